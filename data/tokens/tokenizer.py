"""Encode text as token ids and decode it, with the tokenizer of a model's folder.

The kinds of files, in the order of the search:
    tokenizer.model            sentencepiece (LLaMA-1 and 2), unless a newer tokenizer.json is there
    tokenizer.json             BPE (LLaMA, Mistral, Qwen2, SmolLM2), see bpe.py
    vocab.json + merges.txt    byte-level BPE without settings (GPT-2, OPT)

differs from the libraries: `encode` adds no bos and no eos. It encodes special tokens, such as
<|im_end|>, as plain text unless `special` is set, so that no user can forge them.
"""

import codecs
import math
import re
from functools import lru_cache
from pathlib import Path

from data import InputError, leaf
from data.formats.fields import TABLE, TEXT, either, field, list_of, shown, table_of, whole
from data.formats.files import read_bytes, read_json, write_atomically

ID = whole(0, (1 << 24) - 1)
MOST_ADDED, LONGEST_ADDED = 1 << 12, 256  # tokens that a regex searches in every text
BREAK = "\udfff"  # half a surrogate pair, which no text holds: in a special token, it makes it text


class Tokenizer:
    """Provide what all tokenizers share: `encode`, `decode` and `stream`.

    bos_id, eos_id: the first and the last id of a sequence
    eos_ids: all ids that end an answer, `eos_id` first; some chat models have several
    special: {text: id} of the tokens that only `encode(text, special=True)` finds
    vocab_size: the largest id plus one
    """

    lead = ""  # a prefix that the tokenizer adds to every text; `decode` removes it

    def __init__(self, folder, token_bytes, special, added, bos_id, eos_ids):
        """token_bytes: {id: its bytes}; added: {text: id} of tokens that any text may contain"""
        # Files call some tokens ordinary that end an answer, or frame a message.
        ends, framing = (bos_id, *eos_ids), re.compile(r"<\|.*\|>")
        special = special | {t: id for t, id in added.items() if id in ends or framing.fullmatch(t)}
        added = {text: id for text, id in added.items() if text not in special}
        self.folder, self.special, self.added = folder, special, {**added, **special}
        if len(self.added) > MOST_ADDED or max(map(len, self.added), default=0) > LONGEST_ADDED:
            most = f"{MOST_ADDED:,} special tokens or one of over {LONGEST_ADDED} letters"
            raise InputError(f"{folder}: its tokenizer has more than {most}: download it again.")
        self.special_ids = set(special.values())
        self.bos_id, self.eos_id, self.eos_ids = bos_id, eos_ids[0], eos_ids
        self.token_bytes = {id: text.encode() for text, id in added.items()} | token_bytes
        self.token_bytes |= dict.fromkeys(special.values(), b"")
        self.vocab_size = max(self.token_bytes) + 1
        self._cut = {False: any_of(added), True: any_of(self.added)}
        self._starts = re.compile(f"(?={any_of(special).pattern})(.)", re.DOTALL)
        self._again = lru_cache(1 << 12)(self._encode_plain)  # what conversations have in common

    def encode(self, text, special=False):
        """Encode a text without bos and eos. special: texts such as "</s>" become tokens"""
        encode, ids = self._again if special else self._encode_plain, []
        for i, part in enumerate(self._cut[special].split(text)):
            # JSON may hold half a surrogate pair.
            text = part.replace(BREAK, "").encode("utf-8", "replace").decode()
            ids += [self.added[part]] if i % 2 else encode(text, i == 0)
        return ids

    def hide(self, text):
        """Break special tokens in a text, so that `encode(..., special=True)` finds none there."""
        return self._starts.sub(rf"\2{BREAK}", text)

    def decode(self, ids):
        """Decode ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Decode ids as they arrive, and yield the text in pieces of whole characters."""
        decode, lead = codecs.getincrementaldecoder("utf-8")("replace").decode, self.lead
        for id in ids:
            if text := decode(self.token_bytes.get(int(id), b"")):
                yield text.removeprefix(lead)
                lead = ""
        yield decode(b"", final=True)


def any_of(texts):
    """Compile a regex that finds any of some texts, the longest first."""
    longest_first = map(re.escape, sorted(texts, key=len, reverse=True))
    return re.compile(f"({'|'.join(longest_first)})" if texts else "((?!))")


class SentencePiece(Tokenizer):
    """Tokenize with a tokenizer.model, by the library sentencepiece."""

    def __init__(self, path, vocab_size):
        import sentencepiece

        proto = read_bytes(path, "give a folder with it")
        try:
            self.model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            ids = range(model.vocab_size() if proto else 0)
            scores = sum(model.get_score(id) for id in ids)
            token_bytes = {id: self._bytes(id) for id in ids}
        except (OSError, RuntimeError, ValueError):  # also for a piece that is not UTF-8
            ids = ()
        if not ids or not math.isfinite(scores):
            raise InputError(f"{path} is not a sentencepiece model, or is empty: get it again.")
        special, added = added_tokens(path.parent, range(len(ids), vocab_size))
        special |= {model.id_to_piece(id): id for id in ids if model.is_control(id)}
        bos_id, *_ = end_ids(path.parent, "bos", added | special, model.bos_id())
        eos_ids = end_ids(path.parent, "eos", added | special, model.eos_id())
        super().__init__(path.parent, token_bytes, special, added, bos_id, eos_ids)
        self.lead = " " if "".join(model.encode("a", out_type=str)).startswith("▁") else ""

    def _bytes(self, id):
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # the piece is "<0x0A>"
        return (" ⁇ " if self.model.is_unknown(id) else piece.replace("▁", " ")).encode()

    def _encode_plain(self, text, first):
        return self.model.encode(text)


def added_tokens(folder, ids):
    """Read the tokens beside tokenizer.model: the special ones and the others, two {text: id}.

    ids: those that have a row in the embedding. added_tokens.json does not say which are special:
    all, so that no user can forge one.
    """
    older, path = folder / "added_tokens.json", folder / "tokenizer_config.json"
    found = field(older, {"tokens": read_json(older, optional=True)}, "tokens", table_of(ID))
    tokens = {str(id): {"content": text, "special": True} for text, id in found.items()}
    settings = read_json(path, optional=True)
    tokens |= field(path, settings, "added_tokens_decoder", table_of(TABLE), {})
    own = [id for id in tokens if re.fullmatch("[0-9]{1,9}", id) and int(id) in ids]
    tokens = [tokens[id] | {"id": int(id)} for id in own]
    return leaf("bpe").read_added_tokens(path, tokens, False, {}) if tokens else ({}, {})


def load_tokenizer(folder):
    """Load the tokenizer of a model's folder, and check that the model has all of its ids."""
    folder = Path(folder)
    path = folder / "config.json"
    vocab_size = field(path, read_json(path, optional=True), "vocab_size", ID, 1 << 24)
    # Older files say the same as tokenizer.model; newer ones put no space behind a special token.
    newer = read_json(folder / "tokenizer.json", optional=True).get("pre_tokenizer")
    if (folder / "tokenizer.model").exists() and not newer:
        tokenizer = SentencePiece(folder / "tokenizer.model", vocab_size)
    elif (folder / "tokenizer.json").exists():
        tokenizer = leaf("bpe").read_tokenizer_json(folder)
    elif (folder / "vocab.json").exists():
        tokenizer = leaf("bpe").read_vocab_and_merges(folder)
    else:
        raise InputError(f"{folder} has no tokenizer: copy all small files of the model there.")
    largest = max(tokenizer.vocab_size - 1, tokenizer.bos_id, *tokenizer.eos_ids)
    if largest >= vocab_size:
        sizes = f"ids up to {largest}, but vocab_size in config.json is {vocab_size}"
        raise InputError(f"{folder}: its tokenizer has {sizes}: copy all files of one model there.")
    return tokenizer


def end_ids(folder, name, ids, own=-1):
    """List all ids that a folder's settings give for "bos" or "eos", the most important first.

    ids: {token: id}; own: the id in tokenizer.model, or -1
    """
    path, known = folder / "tokenizer_config.json", either(TEXT, TABLE)
    token = field(path, read_json(path, optional=True), f"{name}_token", known, "")
    if isinstance(token, dict):
        token = field(path, token, f"{name}_token.content", TEXT)
    if token and token not in ids:  # some of the first LLaMA folders have ""
        raise InputError(f'{path}: "{name}_token" is {shown(token)}, which the tokenizer lacks.')
    found = [ids.get(token, -1), own]
    for other in (folder / "config.json", folder / "generation_config.json"):
        settings = read_json(other, optional=True)
        more = field(other, settings, f"{name}_token_id", either(ID, list_of(ID)), [])
        found += more if isinstance(more, list) else [more]
    found = [id for id in dict.fromkeys(found) if id >= 0]
    if not found:
        raise InputError(f'{path} has no "{name}_token", and config.json no "{name}_token_id".')
    return found


def copy_tokenizer(source, target):
    """Copy a folder's tokenizer and its other settings, without weights and config.json."""
    for path in Path(source).iterdir():
        kept = path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "config.json"
        if kept and "index" not in path.name and not path.is_dir():
            content = read_bytes(path, "remove it")
            write_atomically(Path(target) / path.name, lambda file: file.write(content))
