"""BPE: how GPT-2, OPT, LLaMA, Mistral, Qwen2 and SmolLM2 split a text into tokens.

    1. A regex splits the text into words, so that no token is part of two words.
    2. A word becomes the ids of its UTF-8 bytes. The pair of neighbours that comes first in the
       list of merges then becomes one id, repeatedly, until no pair is in the list.

Sentencepiece's kind (LLaMA-2, Mistral) begins with the ids of characters, "▁" for a space. Only a
character that the vocabulary lacks becomes bytes.

differs from the libraries `tokenizers` and `regex`:
    - The files write a byte as one visible character ("Ġ" is a space). Tokens are bytes here.
    - Where a sentencepiece's byte is not UTF-8, `tokenizers` also replaces those beside it.
    - `re` lacks \\p{L}, so the letters and numbers of Python's `unicodedata` are written out. Words
      with characters that this Python's Unicode lacks can be split differently.
"""

import re
import sys
import unicodedata
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from itertools import groupby

# Regexes of words, as the files write them. What is between two matches is a word, too.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
KNOWN_WORDS = (GPT2_WORDS, QWEN2_WORDS, LLAMA3_WORDS)
DIGITS, NUMBERS = r"\p{N}", r"\p{N}+"
SPLIT, RUNS = r"▁[^▁]*", r"▁+[^▁]*"  # of sentencepiece's kind; RUNS, if no token is of two words


@cache
def character_classes():
    """Return {"\\p{L}": the ranges of all letters, ...} for use in the brackets of a regex."""
    # Python's own \s also matches four control characters, U+001C to U+001F.
    spaces = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    classes = {r"\p{L}": "", r"\p{N}": "", r"\s": spaces}
    name = lambda point: r"\p{%s}" % unicodedata.category(chr(point))[0]
    for kind, run in groupby(range(sys.maxunicode + 1), name):
        if kind in classes:
            first, *_, last = [*run] * 2
            classes[kind] += f"\\U{first:08x}-\\U{last:08x}"
    return classes


@cache
def word_pattern(regex):
    """Compile a regex with \\p{L}, \\p{N}, \\s and \\S in the meaning of the files."""
    regex = regex.replace(r"\S", r"[^\s]")
    for name, ranges in character_classes().items():
        regex = re.sub(r"(\[[^]]*)" + re.escape(name), lambda found: found[1] + ranges, regex)
        regex = regex.replace(name, f"[{ranges}]")
    return re.compile(f"({regex})")


# The files' characters for the 256 bytes: visible Latin-1, and U+0100 and up for the other bytes
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF |= {chr(0x100 + i): byte for i, byte in enumerate(OTHERS)}
FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)}  # bytes, as sentencepiece writes them


def to_bytes(token, spaced=False):
    """Translate a token from the files' characters to bytes."""
    if spaced:
        return bytes([FALLBACK[token]]) if token in FALLBACK else token.replace("▁", " ").encode()
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:  # a token that was added as plain text
        return token.encode()


LONGEST_WORD, MOST_WORDS = 64, 1 << 16  # the cache of words takes some 20 MB


class BytePairs:
    """Encode text as ids.

    vocab: {token in the files' characters: id}; merges: [(left, right), ...], the first comes first
    words: regexes, each applied to the words of the previous one
    nfc: convert the text to Unicode's composed form first
    whole_words: {word as bytes: id}, words that are tokens without merges (`ignore_merges`)
    unknown: the id for a byte that the vocabulary lacks; None omits it, as the library does
    spaced: begin with characters, as sentencepiece's kind does
    """

    def __init__(self, vocab, merges, words, nfc=False, whole_words=(), unknown=None, spaced=False):
        self.cached = lru_cache(MOST_WORDS)(self.encode_word)
        self.patterns = [word_pattern(regex) for regex in words]
        self.nfc, self.whole_words = nfc, dict(whole_words)
        names = FALLBACK if spaced else BYTE_OF
        self.byte_ids = {byte: vocab.get(name, unknown) for name, byte in names.items()}
        self.letters = {text: [vocab[text]] for text in vocab if spaced and len(text) == 1}
        self.ranks = {(vocab[a], vocab[b]): rank for rank, (a, b) in enumerate(merges)}
        self.merged = [vocab[a + b] for a, b in merges]

    def encode(self, text):
        words = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for pattern in self.patterns:
            words = [part for word in words for part in pattern.split(word) if part]
        ids = []
        for word in words:
            ids += self.cached(word) if len(word) <= LONGEST_WORD else self.encode_word(word)
        return ids

    def encode_word(self, word):
        if (whole := self.whole_words.get(word.encode())) is not None:
            return [whole]
        ids = [id for c in word for id in self.letters.get(c) or map(self.byte_ids.get, c.encode())]
        return self.merge([id for id in ids if id is not None])

    def merge(self, ids):
        """Merge the pair of lowest rank, and the leftmost of equal ones, until no pair has a rank.

        The new id replaces the left id; `before` and `after` skip the right one. A heap makes this
        O(n log n), because a word may have a megabyte.
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
                continue  # one of the two has since merged with its other neighbour
            ids[left], ids[right] = self.merged[rank], None
            after[left] = after[right]
            before[after[left]] = left
            for i in (before[left], left):
                if i >= 0 and (rank := ranks.get((ids[i], ids[after[i]]))) is not None:
                    heappush(queue, (rank, i))
        return [id for id in ids if id is not None]
