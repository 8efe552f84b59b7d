"""data/tokens/tokenizer.py and data/tokens/bpe.py, against the ids of the library `tokenizers`.

tests/fixtures/tokenizers (made by make_fixtures.py) has a small tokenizer of each kind, a long and
nasty text, and the library's ids of it. Where the library is installed, random texts are added.
"""

import json
import random
import time

import numpy as np
import pytest
from helpers import FIXTURES, copy
from samples import NASTY_TEXT, put

from data import InputError
from data.tokens import bpe
from data.tokens.tokenizer import copy_tokenizer, load_tokenizer

HERE = FIXTURES / "tokenizers"
NAMES = ["smollm2", "opt", "llama3", "qwen2"]


@pytest.fixture(scope="module")
def ours():
    return {name: load_tokenizer(HERE / name) for name in NAMES}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_a_nasty_text_are_the_librarys(ours, name, special):
    """All planes of Unicode, joiners, runs of spaces, CRLF, digits, contractions, special tokens
    inside of text: exactly the library's ids, and the text comes back."""
    ids = ours[name].encode(NASTY_TEXT, special and name != "opt")
    expected = np.load(HERE / name / "expected.npz")
    assert ids == expected[f"special_{special and name != 'opt'}"].tolist()
    if not special:
        assert not set(ids) & set(ours[name].special.values())
        if name != "qwen2":  # which brings the text to NFC first
            assert ours[name].decode(ids) == NASTY_TEXT


@pytest.mark.parametrize("name", NAMES)
def test_random_texts_and_ids_like_the_library(ours, name):
    """Where the library is installed: random strings, and random ids, decoded."""
    library = pytest.importorskip("tokenizers")
    if name == "opt":
        files = (str(HERE / "opt" / file) for file in ("vocab.json", "merges.txt"))
        theirs = library.ByteLevelBPETokenizer(*files)
    else:
        theirs = library.Tokenizer.from_file(str(HERE / name / "tokenizer.json"))
        theirs.encode_special_tokens = True
    rng, mine = random.Random(1), ours[name]
    letters = "abstrevldmSTREVLDM'   \t\n\r\n0123456789!?.,_-<|>"
    alphabet = [*NASTY_TEXT[:3000], *letters, "<|eot_id|>"]
    for _ in range(1500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        ids = mine.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        row = rng.choices(list(mine.token_bytes), k=rng.randrange(20))
        if name != "opt":
            assert mine.decode(row) == theirs.decode(row) == "".join(mine.stream(row))


def test_a_later_merge_can_make_an_earlier_one_possible():
    """The pair that is first in the list is merged first, wherever and whenever it arises."""
    vocab = {token: id for id, token in enumerate(["a", "b", "c", "bc", "abc", "ab"])}
    merge = lambda *merges: bpe.BytePairs(vocab, merges, []).encode("abcab")
    assert merge(("a", "bc"), ("b", "c")) == [4, 0, 1]
    assert merge(("a", "b"), ("b", "c"), ("a", "bc")) == [5, 2, 5]


def test_ends(ours):
    """bos and eos come from tokenizer_config.json or config.json."""
    for name, tokenizer in ours.items():
        assert tokenizer.eos_id == tokenizer.eos_ids[0]
        if name != "opt":
            assert tokenizer.bos_id == tokenizer.added["<|begin_of_text|>"]
            assert tokenizer.eos_id == tokenizer.added["<|eot_id|>"]


def test_the_first_of_several_ends(tmp_path):
    """That of config.json is learned, and those of generation_config.json end an answer, too."""
    folder = copy(HERE / "smollm2", tmp_path)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7, 6]}')
    assert load_tokenizer(folder).eos_ids == [7, 5, 6]


@pytest.mark.parametrize("whole", [True, False], ids=["whole words", "merges"])
def test_a_word_is_no_special_token(whole, tmp_path):
    """Whether the vocabulary has a word without merges (`ignore_merges`) or merges make it, a
    special one needs to be asked for."""
    folder = copy(HERE / "llama3", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    last, ids = spec["added_tokens"][-1], spec["model"]["vocab"]
    for token in ("Quux", "Xyzzy", *([] if whole else ["Qu", "ux", "Xy", "zz", "Xyzz"])):
        ids.setdefault(token, max(*ids.values(), last["id"]) + 1)
    if not whole:
        spec["model"]["merges"][:0] = ["Q u", "u x", "Qu ux", "X y", "z z", "Xy zz", "Xyzz y"]
    spec["model"]["ignore_merges"] = whole
    spec["added_tokens"].append(last | dict(content="Xyzzy", special=True, id=ids["Xyzzy"]))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(folder)
    assert ours.encode("Quux") == [ids["Quux"]]
    assert ours.encode("Xyzzy", special=True) == [ids["Xyzzy"]]
    forged = ours.encode("Xyzzy")
    assert ids["Xyzzy"] not in forged and ours.decode(forged) == "Xyzzy"


@pytest.mark.parametrize("name", NAMES)
def test_streaming_is_whole_characters(ours, name):
    """The pieces of a stream are the text, and none ends inside a character."""
    text = "naïve 👩‍👩‍👧‍👦 日本語 \u00a0é" * 20 + "\ufffd"
    pieces = list(ours[name].stream(ours[name].encode(text)))
    assert "".join(pieces) == text and len(pieces) > 100
    assert sum("\ufffd" in piece for piece in pieces) == 1


def test_time_is_not_quadratic():
    """A word of 300,000 letters takes seconds, and so does streaming it."""
    rng = random.Random(4)
    ours = load_tokenizer(HERE / "llama3")
    text = "".join(rng.choices("ACGT", k=300_000))
    start = time.perf_counter()
    ids = ours.encode(text)
    assert "".join(ours.stream(ids)) == text
    assert time.perf_counter() - start < 6
    assert ours.pairs.cached.cache_info().currsize == 0  # too long to remember


def test_the_cache_is_bounded(monkeypatch):
    """The cache drops words before it exceeds its bound, and the ids stay right."""
    monkeypatch.setattr(bpe, "MOST_WORDS", 50)
    ours = load_tokenizer(HERE / "llama3")
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600))
    assert ours.decode(ours.encode(text)) == text
    assert ours.pairs.cached.cache_info().currsize == 50


@pytest.mark.parametrize("number, length", [(4096, 256), (4097, 9), (9, 257)])
def test_not_too_many_or_too_long_special_tokens(number, length, tmp_path):
    """Every text is searched for all of them: 4,096 of 256 letters are the most."""
    folder = copy(HERE / "llama3", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    tokens, last = spec["added_tokens"], spec["added_tokens"][-1]
    for i in range(1, 1 + number - len(tokens)):
        tokens.append(last | dict(content=f"<{i:0{length - 2}}>", id=last["id"] + i))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if (number, length) == (4096, 256):
        assert len(load_tokenizer(folder).added) == number
        return
    with pytest.raises(InputError, match="more than 4,096 special tokens or one of over 256 let"):
        load_tokenizer(folder)


def broken(tmp_path, change, source="qwen2", file="tokenizer.json"):
    """A copy of a folder with something changed, and the sentence that refuses it."""
    for path in (HERE / source).glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    spec = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(spec)
    path.write_text(json.dumps(spec))
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("named, change", [
    ("model.type", put("model", "type", value="Unigram")),
    ("model.vocab lacks <0x00>", put("model", "byte_fallback", value=True)),
    ("model.fuse_unk", put("model", "fuse_unk", value=True)),
    ("model.type", put("model", "type", value="WordPiece")),
    ("model.dropout", put("model", "dropout", value=0.1)),
    ("model.merges", put("model", "merges", value=None)),
    ("merge 1", put("model", "merges", 0, value="a b c")),
    ("merge 2", put("model", "merges", 1, value=["qq", "zz"])),
    ("model.vocab", put("model", "vocab", value=[])),
    ("normalizer", put("normalizer", value={"type": "NFKC"})),
    ("decoder", put("decoder", value=None)),
    ("decoder.type", put("decoder", "type", value="Metaspace")),
    ("pre_tokenizer", put("pre_tokenizer", value=None)),
    ("pre_tokenizer.type", put("pre_tokenizer", "type", value="Metaspace")),
    ("pre_tokenizer.pretokenizers", put("pre_tokenizer", "pretokenizers", value=None)),
    ("pre_tokenizer.pretokenizers", put("pre_tokenizer", "pretokenizers", value=[])),
    (r"\\\\w+", put("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": r"\w+"})),
    ("pre_tokenizer.pattern",
     put("pre_tokenizer", "pretokenizers", 0, "pattern", value={"String": " "})),
    ("behavior", put("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed")),
    ("add_prefix_space", put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True)),
    ("added_tokens.lstrip", put("added_tokens", 0, "lstrip", value=True)),
    ("added_tokens.normalized", put("added_tokens", 0, "normalized", value=True)),
    ("added_tokens.id", put("added_tokens", 0, "id", value="x")),
])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, named, change):
    """Every unknown setting is refused in one sentence that names the file and the field."""
    sentence = broken(tmp_path, change)
    assert named.replace(r"\\\\", r"\\") in sentence and "\n" not in sentence, sentence


def test_what_is_copied(tiny_model, tmp_path):
    """Files, and not folders; a link that leads nowhere is not passed over without a word."""
    folder = copy(tiny_model, tmp_path / "from")
    (folder / "more.json").mkdir()
    copy_tokenizer(folder, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["tokenizer.model"]
    (folder / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        copy_tokenizer(folder, tmp_path / "to")
