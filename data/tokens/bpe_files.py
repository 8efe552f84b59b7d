"""Read the files of BPE: tokenizer.json, or vocab.json and merges.txt.

A setting that we cannot follow exactly as the library does is refused, in a sentence that names the
file and the field.
"""

import re
from dataclasses import replace

from data import InputError
from data.formats.fields import (
    LIST, TABLE, TRUE_OR_FALSE, WORD, field, first_few, list_of, one_of, shown, table_of,
)
from data.formats.files import read_json, read_text
from data.tokens import bpe
from data.tokens.tokenizer import ID, Tokenizer, end_ids

REGEX = replace(one_of(*bpe.KNOWN_WORDS), text="GPT-2's, LLaMA-3's or Qwen2's regex")
# The only values in tokenizer.json that we can follow, and those of missing fields
MODEL = {"type": "BPE", "dropout": 0, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
# What sentencepiece's kind does with spaces, as its files write it
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
BACK = REPLACE | {"pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
STEPS = [BACK, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]
DECODERS = [{"type": "Sequence", "decoders": steps} for steps in (STEPS, STEPS[:-1])]
DECODER = replace(one_of(*DECODERS), text="LLaMA-2's decoder")
PREFIX = one_of("always", "first", "never")


class Bpe(Tokenizer):
    """Tokenize with `pairs`, a `bpe.BytePairs`.

    prefix: for sentencepiece's kind, where a "▁" is added: "each" part of a text between added
        tokens; "always", each that begins with none; "first", the same of the first; or "never"
    """

    def __init__(self, folder, vocab, pairs, special, added, prefix="", lead=""):
        self.pairs, self.prefix, self.lead = pairs, prefix, lead
        every = {**vocab, **added, **special}
        known = every if prefix else vocab  # sentencepiece's kind also has "▁" in added tokens
        token_bytes = {id: bpe.to_bytes(token, prefix != "") for token, id in known.items()}
        bos_id, *_ = end_ids(folder, "bos", every)
        super().__init__(folder, token_bytes, special, added, bos_id, end_ids(folder, "eos", every))

    def _encode_plain(self, text, first):
        if self.prefix:
            text = text.replace(" ", "▁")
            bare = not text.startswith("▁")
            adds = {"each": True, "always": bare, "first": bare and first, "never": False}
            text = text and "▁" * adds[self.prefix] + text
        return self.pairs.encode(text)


def read_vocab_and_merges(folder):
    """Read GPT-2's and OPT's files. A token that no merge makes, such as "</s>", is special."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path, optional=True)
    field(path, settings, "tokenizer_class", one_of("GPT2Tokenizer", "GPT2TokenizerFast"), None)
    field(path, settings, "add_prefix_space", one_of(False), None)
    path = folder / "vocab.json"
    vocab = checked_vocab(path, {"vocab": read_json(path)}, "vocab")
    path = folder / "merges.txt"
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version:"):
        del lines[0]
    merges = checked_merges(path, filter(None, lines), vocab)
    made = {left + right for left, right in merges}
    special = {token: id for token, id in vocab.items() if len(token) > 1 and token not in made}
    if strange := [token for token in special if not token.isascii()]:
        names = first_few(strange)
        raise InputError(f"{path} has no merge for {names} of vocab.json: get the whole file.")
    return Bpe(folder, vocab, bpe.BytePairs(vocab, merges, [bpe.GPT2_WORDS]), special, added={})


def read_tokenizer_json(folder):
    """Read the file of the library `tokenizers`, if it holds BPE."""
    path = folder / "tokenizer.json"
    spec = read_json(path)
    model = field(path, spec, "model", TABLE)
    spaced = field(path, model, "model.byte_fallback", TRUE_OR_FALSE, False)
    for name, known in MODEL.items():
        field(path, model, f"model.{name}", one_of(known), known)
    field(path, model, "model.fuse_unk", TRUE_OR_FALSE if spaced else one_of(False), False)
    vocab = checked_vocab(path, model, "model.vocab")
    merges = checked_merges(path, field(path, model, "model.merges", LIST), vocab)
    tokens = field(path, spec, "added_tokens", list_of(TABLE), [])
    changed = spec.get("normalizer") is not None
    special, added = read_added_tokens(path, tokens, changed, vocab)
    whole_words = field(path, model, "model.ignore_merges", TRUE_OR_FALSE, False)
    unknown = field(path, model, "model.unk_token", WORD, None)
    if unknown is not None and unknown not in vocab:
        raise InputError(f"{path}: model.unk_token is {shown(unknown)}, which model.vocab lacks.")
    if spaced and (lacking := [name for name in bpe.FALLBACK if name not in vocab]):
        raise InputError(f"{path}: model.vocab lacks {lacking[0]}, which byte_fallback needs.")
    taken = set(special.values())  # what no word and no merge may make
    merges = [(a, b) for a, b in merges if vocab[a + b] not in taken]
    as_word = str.encode if spaced else bpe.to_bytes
    whole = {as_word(token): id for token, id in vocab.items() if whole_words and id not in taken}
    words, *spaces = read_spaces(path, spec) if spaced else [read_words(path, spec)]
    if words == [bpe.RUNS] and (whole or any(re.search("[^▁]▁", a + b) for a, b in merges)):
        words = []  # the whole text is a word
    options = dict(spaced=spaced, nfc=changed and not spaced, unknown=vocab.get(unknown))
    pairs = bpe.BytePairs(vocab, merges, words, whole_words=whole, **options)
    return Bpe(folder, vocab, pairs, special, added, *spaces)


def checked_vocab(path, record, name):
    """Check a vocabulary {token: id}: it has tokens, and no two with the same id."""
    vocab = field(path, record, name, table_of(ID))
    tokens = {}
    for token, id in vocab.items():
        if (other := tokens.setdefault(id, token)) != token:
            raise InputError(f"{path}: {shown(other)} and {shown(token)} have the same id {id}.")
    if not vocab:
        raise InputError(f"{path} has no tokens.")
    return vocab


def checked_merges(path, merges, vocab):
    """Return merges as pairs; a file writes one as "a b" or as ["a", "b"]."""
    pairs = []
    for i, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        texts = isinstance(pair, list) and len(pair) == 2 and all(map(WORD.fits, pair))
        if not texts or not all(part in vocab for part in (*pair, "".join(pair))):
            raise InputError(f"{path}: merge {i}, {shown(pair)}, does not make a token of two.")
        pairs.append(tuple(pair))
    return pairs


def read_added_tokens(path, tokens, changed, vocab):
    """Return the special tokens and the other added ones: two dicts {text: id}."""
    kinds, owners = ({}, {}), {id: token for token, id in vocab.items()}
    for token in tokens:
        for flag in ("single_word", "lstrip", "rstrip") + ("normalized",) * changed:
            field(path, token, f"added_tokens.{flag}", one_of(False), False)
        text = field(path, token, "added_tokens.content", WORD)
        id = field(path, token, "added_tokens.id", ID)
        special = field(path, token, "added_tokens.special", TRUE_OR_FALSE, False)
        twice = text in kinds[0] or text in kinds[1]
        if twice or owners.setdefault(id, text) != text or vocab.get(text, id) != id:
            raise InputError(f"{path}: the added token {shown(text)}, {id}, contradicts another.")
        kinds[not special][text] = id
    return kinds


def read_words(path, spec):
    """Return the regexes of a pre-tokenizer, to be applied one after the other."""
    field(path, field(path, spec, "decoder", TABLE), "decoder.type", one_of("ByteLevel"))
    field(path, spec, "normalizer", one_of({"type": "NFC"}), None)
    spec = field(path, spec, "pre_tokenizer", TABLE)
    splits, last = [], spec
    if spec.get("type") == "Sequence":
        *splits, last = field(path, spec, "pre_tokenizer.pretokenizers", list_of(TABLE, 1, 8))
    words = []
    for split in splits:
        if field(path, split, "pre_tokenizer.type", one_of("Split", "Digits")) == "Digits":
            single = field(path, split, "pre_tokenizer.individual_digits", TRUE_OR_FALSE, False)
            words.append(bpe.DIGITS if single else bpe.NUMBERS)
            continue
        field(path, split, "pre_tokenizer.behavior", one_of("Isolated"))
        field(path, split, "pre_tokenizer.invert", one_of(False), False)
        pattern = field(path, split, "pre_tokenizer.pattern", TABLE)
        words.append(field(path, pattern, "pre_tokenizer.pattern.Regex", REGEX))
    field(path, last, "pre_tokenizer.type", one_of("ByteLevel"))
    field(path, last, "pre_tokenizer.add_prefix_space", one_of(False))
    own = field(path, last, "pre_tokenizer.use_regex", TRUE_OR_FALSE, True)
    return words + [bpe.GPT2_WORDS] * own


def read_spaces(path, spec):
    """Return the words, prefix and lead of a file of sentencepiece's kind."""
    lead = " " if STRIP in field(path, spec, "decoder", DECODER)["decoders"] else ""
    if field(path, spec, "normalizer", one_of(PREPEND), None):
        field(path, spec, "pre_tokenizer", one_of(None), None)
        return [bpe.RUNS], "each", lead
    spaces = field(path, spec, "pre_tokenizer", TABLE)
    field(path, spaces, "pre_tokenizer.type", one_of("Metaspace"))
    field(path, spaces, "pre_tokenizer.replacement", one_of("▁"))
    prefix = field(path, spaces, "pre_tokenizer.prepend_scheme", PREFIX, "always")
    field(path, spaces, "pre_tokenizer.add_prefix_space", one_of(prefix != "never"), None)
    split = field(path, spaces, "pre_tokenizer.split", TRUE_OR_FALSE, True)
    return [bpe.SPLIT if split else bpe.RUNS], prefix, lead
