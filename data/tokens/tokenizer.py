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
import math
import re
from pathlib import Path

from data import InputError, leaf
from data.formats.fields import TABLE, WORD, either, field, list_of, shown, whole
from data.formats.files import read_bytes, read_json, write_atomically

ID = whole(0, (1 << 24) - 1)
MOST_ADDED, LONGEST_ADDED = 1 << 12, 256  # tokens that are looked for in every text, by a regex


class Tokenizer:
    """What every tokenizer can do: `encode`, `decode` and `stream`.

    bos_id, eos_id: what a sequence begins and ends with
    eos_ids: all ids that end an answer, `eos_id` first; some chat models have several
    special: {text: id} of the tokens that only `encode(text, special=True)` finds
    vocab_size: one more than the largest id
    """

    lead = ""  # what the tokenizer puts before a text, for `decode` to take away

    def __init__(self, folder, token_bytes, special, added, bos_id, eos_ids):
        """token_bytes: {id: the bytes it stands for}; added: {text: id} to be found in any text"""
        self.folder, self.special, self.added = folder, special, {**added, **special}
        if len(self.added) > MOST_ADDED or max(map(len, self.added), default=0) > LONGEST_ADDED:
            most = f"{MOST_ADDED:,} special tokens, of {LONGEST_ADDED} letters"
            raise InputError(f"{folder}: its tokenizer has more than {most}: get it anew.")
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

        proto = read_bytes(path, "give a folder with it")
        bad = f"{path} is not a sentencepiece model"
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            ids = range(model.vocab_size() if proto else 0)
            scores = sum(model.get_score(id) for id in ids)
            token_bytes = {id: self._bytes(id) for id in ids}
        except (OSError, RuntimeError, ValueError):  # also of a piece that is not UTF-8
            raise InputError(f"{bad}.") from None
        if not ids or not math.isfinite(scores):
            raise InputError(f"{bad}, or is empty.")
        special = {model.id_to_piece(id): id for id in ids if model.is_control(id)}
        bos_id, *_ = end_ids(path.parent, "bos", special, model.bos_id())
        eos_ids = end_ids(path.parent, "eos", special, model.eos_id())
        super().__init__(path.parent, token_bytes, special, {}, bos_id, eos_ids)
        self.lead = " " if "".join(model.encode("a", out_type=str)).startswith("▁") else ""

    def _bytes(self, id):
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # the piece is "<0x0A>"
        return (" ⁇ " if self.model.is_unknown(id) else piece.replace("▁", " ")).encode()

    def _encode_plain(self, text):
        return self.model.encode(text)


# --------------------------------------------------------------------------------------
# Reading the files


def load_tokenizer(folder):
    """Choose the tokenizer by the files in a model's folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one in Hugging Face's layout.")
    if (folder / "tokenizer.model").exists():
        tokenizer = SentencePiece(folder / "tokenizer.model")
    elif any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = leaf("bpe").load(folder)
    else:
        raise InputError(
            f"{folder} has no tokenizer: copy the model's tokenizer.model, its tokenizer.json, or"
            " its vocab.json and merges.txt there."
        )
    path = folder / "config.json"
    if vocab_size := field(path, read_json(path, optional=True), "vocab_size", ID, 0):
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer, vocab_size):
    """Refuse a tokenizer with ids of which the model has no embedding."""
    largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id, *tokenizer.eos_ids)
    if largest >= vocab_size:
        raise InputError(
            f"{tokenizer.folder}: its tokenizer has ids up to {largest}, and its config.json says"
            f" vocab_size {vocab_size}: copy all files there, of the same model."
        )


def end_ids(folder, name, ids, own=-1):
    """All ids that a folder's settings give for "bos" or "eos", those that count most first.

    ids: {token: id}; own: the id that tokenizer.model itself names, or -1
    """
    path, known = folder / "tokenizer_config.json", either(WORD, TABLE)
    token = field(path, read_json(path, optional=True), f"{name}_token", known, None)
    if isinstance(token, dict):
        token = field(path, token, f"{name}_token.content", WORD)
    if token is not None and token not in ids:
        message = f'{path}: "{name}_token" is {shown(token)}, which the tokenizer does not have.'
        raise InputError(message)
    found = ([] if token is None else [ids[token]]) + ([own] if own >= 0 else [])
    for other in (folder / "config.json", folder / "generation_config.json"):
        settings = read_json(other, optional=True)
        more = field(other, settings, f"{name}_token_id", either(ID, list_of(ID)), [])
        found += more if isinstance(more, list) else [more]
    if not found:
        raise InputError(f'{path} has no "{name}_token", and config.json no "{name}_token_id".')
    return list(dict.fromkeys(found))


def copy_tokenizer(source, target):
    """Copy a folder's tokenizer, and what else is neither weights nor config.json."""
    for path in Path(source).iterdir():
        kept = path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "config.json"
        if kept and "index" not in path.name:
            content = read_bytes(path, "remove it")
            write_atomically(Path(target) / path.name, lambda file: file.write(content))
