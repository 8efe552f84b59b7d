"""Byte-level BPE, by hand: how GPT-2, OPT, LLaMA-3, Qwen2 and SmolLM2 cut a text into tokens.

How it works
    1. A regex cuts the text into words, so that no token reaches across two words.
    2. A word becomes the ids of its UTF-8 bytes. Then, again and again, the pair of neighbours
       that comes first in the list of merges becomes one id, until no pair is in the list.
    Every text has ids, and the bytes of the ids are the text again.

What we do differently from the libraries `tokenizers` and `regex`
    - The files spell a byte as one visible character ("Ġ" is a space). That is undone once, while
      reading: here tokens are bytes.
    - `re` knows no \\p{L}. We spell out the letters and numbers that Python's `unicodedata` has.
What we give up: characters younger than Python's Unicode (3.11 has Unicode 14, of 2021; the library
16) are neither letters nor numbers, which can cut a word in such a script in another place.
"""

import re
import sys
import unicodedata
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import chain, groupby

# --------------------------------------------------------------------------------------
# Words: the regexes, spelled as the files spell them. Their matches, joined, are the whole text.

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
KNOWN_WORDS = (GPT2_WORDS, QWEN2_WORDS, LLAMA3_WORDS)
DIGITS = r"\p{N}|[^\p{N}]+"  # each digit alone, and what is in between
NUMBERS = r"\p{N}+|[^\p{N}]+"


@cache
def character_classes():
    """{"\\p{L}": ranges of all letters, ...}, to stand between the brackets of a regex."""
    ranges = {"L": "", "N": ""}
    points = range(sys.maxunicode + 1)
    for kind, run in groupby(points, lambda point: unicodedata.category(chr(point))[0]):
        if kind in ranges:
            first, *_, last = [*run] * 2
            ranges[kind] += f"\\U{first:08x}-\\U{last:08x}"
    # Python's own \s has four control characters more, U+001C to U+001F.
    spaces = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return {r"\p{L}": ranges["L"], r"\p{N}": ranges["N"], r"\s": spaces}


@cache
def word_pattern(regex):
    """Compile a regex with \\p{L}, \\p{N}, \\s and \\S, which mean what they mean in the files."""
    regex = regex.replace(r"\S", r"[^\s]")
    for name, ranges in character_classes().items():
        in_brackets = re.compile(r"(\[[^]]*)" + re.escape(name))
        while in_brackets.search(regex):
            regex = in_brackets.sub(lambda match: match[1] + ranges, regex)
        regex = regex.replace(name, f"[{ranges}]")
    return re.compile(regex)


class WordCache(dict):
    """The ids of the words met so far: `cache[word]` asks `compute` for those that are new."""

    most_words, longest_word = 1 << 16, 64  # some 20 MB; when full, it starts afresh

    def __init__(self, compute):
        self.compute = compute

    def __missing__(self, word):
        ids = self.compute(word)
        if len(word) <= self.longest_word:
            if len(self) >= self.most_words:
                self.clear()
            self[word] = ids
        return ids


# --------------------------------------------------------------------------------------
# Bytes


def visible_bytes():
    """The files' spelling of the 256 bytes: visible Latin-1 as it is, the others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


BYTES = visible_bytes()
BYTE_OF = {character: byte for byte, character in enumerate(BYTES)}


def to_bytes(token):
    """The bytes that a token in the files' spelling stands for."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:  # a token that was added as plain text
        return token.encode()


# --------------------------------------------------------------------------------------
# Merges


class BytePairs:
    """Text to ids.

    vocab: {token in the files' spelling: id}
    merges: [(left, right), ...] in that spelling, the first to be merged first
    words: regexes, each applied to the words of the one before
    nfc: bring the text to Unicode's composed form first
    whole_words: {word as bytes: id} of words that are not to be merged together (`ignore_merges`)
    unknown: id of a byte that the vocabulary lacks; None leaves it out, as the library does
    """

    def __init__(self, vocab, merges, words, nfc=False, whole_words=(), unknown=None):
        self.words = WordCache(self.encode_word)
        self.patterns = [word_pattern(regex) for regex in words]
        self.nfc, self.whole_words = nfc, dict(whole_words)
        self.byte_ids = [vocab.get(character, unknown) for character in BYTES]
        self.ranks = {(vocab[a], vocab[b]): rank for rank, (a, b) in enumerate(merges)}
        self.merged = [vocab[a + b] for a, b in merges]

    def encode(self, text):
        words = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for pattern in self.patterns:
            words = [part for word in words for part in pattern.findall(word)]
        return list(chain.from_iterable(map(self.words.__getitem__, words)))

    def encode_word(self, word):
        word = word.encode()
        if word in self.whole_words:
            return [self.whole_words[word]]
        return self.merge([id for byte in word if (id := self.byte_ids[byte]) is not None])

    def merge(self, ids):
        """Merge the pair of lowest rank, the leftmost of equals, until no pair has a rank.

        A pair's new id takes the left one's place; `before` and `after` skip the other. Heap and
        links make it O(n log n): a word may be a megabyte, and the plain loop is O(n^2).
        """
        ids = [*ids, None]  # the end, which merges with nothing
        n, ranks = len(ids), self.ranks
        before, after = list(range(-1, n - 1)), [*range(1, n), n - 1]
        queue = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapify(queue)
        while queue:
            rank, left = heappop(queue)
            right = after[left]
            if ranks.get((ids[left], ids[right])) != rank:
                continue  # one of the two has merged with its other neighbour since
            ids[left], ids[right] = self.merged[rank], None
            after[left] = after[right]
            before[after[left]] = left
            for i in (before[left], left):
                if i >= 0 and (rank := ranks.get((ids[i], ids[after[i]]))) is not None:
                    heappush(queue, (rank, i))
        return [id for id in ids if id is not None]
