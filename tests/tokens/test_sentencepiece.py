"""data/tokens/tokenizer.py with a tokenizer.model: ids and text are those of sentencepiece."""

import random

import pytest
from helpers import TEST_DATA, needs_test_data
from samples import NASTY_TEXT

from data import InputError
from data.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_decoding_undoes_encoding(tokenizer):
    """Any text comes back, also what the tokenizer never saw, by way of its bytes."""
    for text in ("Tom went to the lake.", "Où ? À l'école\n\n\ttabs  and   runs", "👩‍👩‍👧 漢字 \r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_user_text_cannot_forge_the_end(tokenizer):
    """The text "</s>" does not become the end token."""
    assert tokenizer.eos_id not in tokenizer.encode("an end </s> and <s> a start")


def test_streaming_shows_whole_characters(tokenizer):
    """The pieces are the text, and none holds half a character."""
    ids = tokenizer.encode("Tom: 👩‍👩‍👧, 漢字 à")
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" not in "".join(pieces)
    assert len(pieces) > 5


def test_a_folder_without_a_tokenizer(tmp_path):
    """It is refused by name, and so is a file that is none."""
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="tokenizer.model is not"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def llama2():
    return load_tokenizer(TEST_DATA / "tokenizers/llama2")


@needs_test_data
def test_sentencepiece_ids_and_text_are_the_librarys(llama2):
    """tokenizer.model gives the library's ids, and its text for all valid UTF-8."""
    for sample in (NASTY_TEXT, " lead", "  two", "\n", "", "日本👩‍👩‍👧‍👦"):
        ids = llama2.encode(sample)
        assert ids == llama2.model.encode(sample)
        assert llama2.decode(ids) == llama2.model.decode(ids)
        assert "".join(llama2.stream(ids)) == llama2.decode(ids)
    rng = random.Random(5)
    whole = [id for id in range(llama2.vocab_size) if not llama2.model.is_byte(id)]
    for _ in range(2000):
        row = rng.choices(whole, k=rng.randrange(12))
        assert llama2.decode(row) == llama2.model.decode(row), row


@needs_test_data
def test_sentencepiece_text_cannot_forge_control_tokens(llama2):
    """"<s>" and "</s>" in a text are text; with special=True they are ids 1 and 2."""
    for text in ("<s>", "</s>", "<unk>", "a</s>b", "<s> hi </s>", "<0x0A>"):
        ids = llama2.encode(text)
        assert not {0, 1, 2} & set(ids), text
        assert llama2.decode(ids) == text
    assert llama2.encode("<s>hi</s>", special=True) == [1, *llama2.encode("hi"), 2]
    assert (llama2.bos_id, llama2.eos_id, llama2.vocab_size) == (1, 2, 32000)


@needs_test_data
def test_sentencepiece_streams_whole_characters(llama2):
    """Characters made of byte tokens come out whole, and half a one as U+FFFD at the end."""
    ids = llama2.encode("x 👩‍👩‍👧‍👦 ༒ y")
    pieces = list(llama2.stream(ids))
    assert "".join(pieces) == "x 👩‍👩‍👧‍👦 ༒ y" and not any("\ufffd" in piece for piece in pieces)
    byte = next(i for i, id in enumerate(ids) if llama2.model.is_byte(id))
    assert llama2.decode(ids[: byte + 2]) == "x \ufffd"
