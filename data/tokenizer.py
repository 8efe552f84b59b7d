"""Text to token ids and back, with the tokenizer that lies in a model's folder.

The three kinds of files, in the order in which they are looked for
    tokenizer.model            sentencepiece (LLaMA-1 and 2, Mistral, TinyLlama)
    tokenizer.json             byte-level BPE (LLaMA-3, Qwen2, SmolLM2), see bpe.py
    vocab.json + merges.txt    byte-level BPE without settings (GPT-2, OPT)

What we do differently from the libraries
    - `encode` adds no bos and no eos, and takes special tokens, such as <|im_end|>, for plain text
      unless told otherwise: no user can forge them.
    - What we cannot do exactly as the library does is refused when a folder is read, in a sentence
      that names the file and the field.
"""

import codecs
import json
import re
from pathlib import Path

from data import bpe
from data.files import read_json, read_text, write_atomically
from quant import InputError


class Tokenizer:
    """What every tokenizer can do: `encode`, `decode` and `stream`.

    bos_id, eos_id: what a sequence begins and ends with
    eos_ids: all ids that end an answer, `eos_id` first; some chat models have several
    special: {text: id} of the tokens that only `encode(text, special=True)` finds
    vocab_size: one more than the largest id
    """

    lead = ""  # what the tokenizer puts before a text, for `decode` to take away

    def __init__(self, token_bytes, special, added, bos_id, eos_ids):
        """token_bytes: {id: the bytes it stands for}; added: {text: id} to be found in any text"""
        self.special, self.added = special, {**added, **special}
        self.bos_id, self.eos_id, self.eos_ids = bos_id, eos_ids[0], eos_ids
        self.token_bytes = {**token_bytes, **dict.fromkeys(special.values(), b"")}
        self.vocab_size = max(self.token_bytes) + 1
        self._cut = {False: self._any_of(added), True: self._any_of(self.added)}

    @staticmethod
    def _any_of(texts):
        longest_first = map(re.escape, sorted(texts, key=len, reverse=True))
        return re.compile(f"({'|'.join(longest_first)})" if texts else "((?!))")

    def encode(self, text, special=False):
        """Ids of a text, without bos and eos. special: take "</s>" and the like for tokens."""
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        ids = []
        for i, part in enumerate(self._cut[special].split(text)):
            ids += [self.added[part]] if i % 2 else self._encode_plain(part)
        return ids

    def decode(self, ids):
        """Text of ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Decode ids as they come: yield pieces of text, whole characters, at O(1) each."""
        decode, lead = codecs.getincrementaldecoder("utf-8")("replace").decode, self.lead
        for id in ids:
            if text := decode(self.token_bytes.get(int(id), b"")):
                yield text.removeprefix(lead)
                lead = ""
        yield decode(b"", final=True)


class SentencePiece(Tokenizer):
    """A tokenizer.model. The library begins every text with a space of its own."""

    def __init__(self, path):
        import sentencepiece

        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise InputError(f"{path} is not a sentencepiece model.") from None
        ids = range(model.vocab_size())
        special = {model.id_to_piece(id): id for id in ids if model.is_control(id)}
        bos_id, *_ = end_ids(path.parent, "bos", special, model.bos_id())
        eos_ids = end_ids(path.parent, "eos", special, model.eos_id())
        super().__init__({id: self._bytes(id) for id in ids}, special, {}, bos_id, eos_ids)
        self.lead = " " if model.encode("a", out_type=str)[0].startswith("▁") else ""

    def _bytes(self, id):
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # the piece is "<0x0A>"
        return (" ⁇ " if self.model.is_unknown(id) else piece.replace("▁", " ")).encode()

    def _encode_plain(self, text):
        return self.model.encode(text)


class ByteLevel(Tokenizer):
    """BPE on bytes; vocab and options as `bpe.BytePairs` takes them."""

    def __init__(self, folder, vocab, merges, words, special, added, whole_words=False, **options):
        every = {**vocab, **added, **special}
        token_bytes = {id: bpe.to_bytes(token) for token, id in vocab.items()}
        if whole_words:  # but a special token stays out of reach, even if a word is spelled like it
            taken = set(special.values())
            whole_words = ((token, id) for id, token in token_bytes.items() if id not in taken)
        self.pairs = bpe.BytePairs(vocab, merges, words, whole_words=whole_words or (), **options)
        token_bytes |= {id: text.encode() for text, id in added.items()}
        bos_id, *_ = end_ids(folder, "bos", every)
        super().__init__(token_bytes, special, added, bos_id, end_ids(folder, "eos", every))

    def _encode_plain(self, text):
        return self.pairs.encode(text)


# --------------------------------------------------------------------------------------
# Reading the files


def load_tokenizer(folder):
    """Choose the tokenizer by the files in a model's folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one in Hugging Face's layout.")
    if (folder / "tokenizer.model").exists():
        return SentencePiece(folder / "tokenizer.model")
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_json(folder)
    if (folder / "vocab.json").exists():
        return read_vocab_and_merges(folder)
    raise InputError(
        f"{folder} has no tokenizer: copy the model's tokenizer.model, its tokenizer.json, or its"
        " vocab.json and merges.txt there."
    )


def expect(path, record, field, *known):
    """Return a field, named as "where.name"; refuse it unless it is one of the known values, or of
    one of the known types."""
    value = record.get(field.rsplit(".", 1)[-1])
    for one in known:
        if isinstance(value, one) if isinstance(one, type) else value == one:
            return value
    known = " or ".join(one.__name__ if isinstance(one, type) else json.dumps(one) for one in known)
    raise InputError(f'{path}: "{field}" is {json.dumps(value)[:300]}, but we read only {known}.')


def end_ids(folder, name, ids, own=-1):
    """All ids that a folder's settings give for "bos" or "eos", those that count most first.

    ids: {token: id}; own: the id that tokenizer.model itself names, or -1
    """
    path = folder / "tokenizer_config.json"
    token = read_json(path, optional=True).get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and token not in ids:
        raise InputError(f'{path}: "{name}_token" is {token!r}, which the tokenizer does not have.')
    found = ([] if token is None else [ids[token]]) + ([own] if own >= 0 else [])
    for file in ("config.json", "generation_config.json"):
        more = read_json(folder / file, optional=True).get(f"{name}_token_id")
        found += more if isinstance(more, list) else [] if more is None else [more]
    if not found:
        raise InputError(f'{path} has no "{name}_token", and config.json no "{name}_token_id".')
    return list(dict.fromkeys(found))


def checked_merges(path, merges, vocab):
    """Merges as pairs; the files spell one "a b" or ["a", "b"]."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for i, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise InputError(f"{path}: merge {i}, {pair}, is not two tokens that make a third.")
    return pairs


def read_vocab_and_merges(folder):
    """GPT-2's and OPT's files. A token that no merge makes, such as "</s>", is special."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path, optional=True)
    expect(path, settings, "tokenizer_class", None, "GPT2Tokenizer", "GPT2TokenizerFast")
    expect(path, settings, "add_prefix_space", None, False)
    vocab, path = read_json(folder / "vocab.json"), folder / "merges.txt"
    lines = read_text(path).removeprefix("#version: 0.2\n").split("\n")
    merges = checked_merges(path, filter(None, lines), vocab)
    made = {left + right for left, right in merges}
    special = {token: id for token, id in vocab.items() if len(token) > 1 and token not in made}
    return ByteLevel(folder, vocab, merges, [bpe.GPT2_WORDS], special, added={})


def read_tokenizer_json(folder):
    """The one file of the library `tokenizers`, if it holds byte-level BPE."""
    path = folder / "tokenizer.json"
    spec = read_json(path)
    model = expect(path, spec, "model", dict)
    expect(path, model, "model.type", "BPE", None)
    expect(path, model, "model.byte_fallback", False, None)  # True is sentencepiece in disguise
    expect(path, model, "model.dropout", None, 0)
    expect(path, model, "model.fuse_unk", False, None)
    expect(path, model, "model.continuing_subword_prefix", None, "")
    expect(path, model, "model.end_of_word_suffix", None, "")
    expect(path, expect(path, spec, "decoder", dict), "decoder.type", "ByteLevel")
    nfc = expect(path, spec, "normalizer", None, {"type": "NFC"}) is not None
    vocab = expect(path, model, "model.vocab", dict)
    merges = checked_merges(path, expect(path, model, "model.merges", list), vocab)
    return ByteLevel(
        folder, vocab, merges, read_words(path, spec), *read_added_tokens(path, spec, nfc), nfc=nfc,
        whole_words=model.get("ignore_merges"), unknown=vocab.get(model.get("unk_token")),
    )  # fmt: skip


def read_added_tokens(path, spec, nfc):
    """The special tokens and the other added ones: two dicts {text: id}."""
    special, added = {}, {}
    for token in expect(path, spec, "added_tokens", list, None) or []:
        for flag in ("single_word", "lstrip", "rstrip") + ("normalized",) * nfc:
            expect(path, token, f"added_tokens.{flag}", False, None)
        text, kind = expect(path, token, "added_tokens.content", str), token.get("special")
        (special if kind else added)[text] = expect(path, token, "added_tokens.id", int)
    return special, added


def read_words(path, spec):
    """The regexes that a pre-tokenizer stands for, to be applied one after the other."""
    spec = expect(path, spec, "pre_tokenizer", dict)
    if spec.get("type") == "Sequence":
        *splits, last = expect(path, spec, "pre_tokenizer.pretokenizers", list) or [{}]
    else:
        splits, last = [], spec
    words = []
    for split in splits:
        if expect(path, split, "pre_tokenizer.type", "Split", "Digits") == "Digits":
            words.append(bpe.DIGITS if split.get("individual_digits") else bpe.NUMBERS)
            continue
        expect(path, split, "pre_tokenizer.behavior", "Isolated")
        expect(path, split, "pre_tokenizer.invert", False, None)
        regex = expect(path, split, "pre_tokenizer.pattern", dict).get("Regex")
        if regex not in bpe.KNOWN_WORDS:
            raise InputError(
                f'{path}: "pre_tokenizer.pattern" has the regex {json.dumps(regex)}, which is not'
                " GPT-2's, LLaMA-3's or Qwen2's, and we read no other."
            )
        words.append(regex)
    expect(path, last, "pre_tokenizer.type", "ByteLevel")
    expect(path, last, "pre_tokenizer.add_prefix_space", False)
    return words + [bpe.GPT2_WORDS] * last.get("use_regex", True)


def copy_tokenizer(source, target):
    """Copy a folder's tokenizer, and what else is neither weights nor config.json."""
    for path in Path(source).iterdir():
        kept = path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "config.json"
        if kept and "index" not in path.name:
            write_atomically(Path(target) / path.name, lambda file: file.write(path.read_bytes()))
