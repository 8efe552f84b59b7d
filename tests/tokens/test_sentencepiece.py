"""data/tokens/tokenizer.py with a tokenizer.model: ids and text are those of sentencepiece."""

import json
import random
import shutil

import pytest
from chat_templates import CHATML
from helpers import TEST_DATA, needs_test_data, refused, say
from samples import NASTY_TEXT

from data import InputError
from data.tokens.chat import ChatTemplate
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
    with pytest.raises(InputError, match="nowhere has no tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="tokenizer.model is not"):
        load_tokenizer(tmp_path)


def with_added(tiny_model, tmp_path, room=3, **more):
    """The tokenizer's folder with three tokens beside tokenizer.model, and their first id."""
    first = load_tokenizer(tiny_model).model.vocab_size()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": first + room}))
    shutil.copyfile(tiny_model / "tokenizer.model", tmp_path / "tokenizer.model")
    older = {"<|im_end|>": first, "<|im_start|>": first + 1, "<tool>": first + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(older))
    token = {"content": "<tool>", "special": False, "lstrip": False} | more
    decoder = {"1": {"content": "<s>", "special": True}, str(first + 2): token}
    settings = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path, first


def test_tokens_beside_tokenizer_model(tiny_model, tmp_path):
    """They are read as those of a tokenizer.json: an ordinary one is found in any text, a special
    one only where it is asked for, and one of them may be the end."""
    folder, first = with_added(tiny_model, tmp_path)
    ours = load_tokenizer(folder)
    plain = ours.model.encode
    assert ours.eos_ids[0] == first and ours.vocab_size == first + 3
    text = "Tom <tool>went<|im_end|>"
    assert ours.encode(text) == [*plain("Tom "), first + 2, *plain("went<|im_end|>")]
    assert ours.encode(text, special=True) == [*plain("Tom "), first + 2, *plain("went"), first]
    assert ours.decode([first + 2, first, *plain("x")]) == "<tool> x"


def test_tokens_that_cannot_be_used(tiny_model, tmp_path):
    """One without a row in the embedding is none; one that takes the spaces around it is refused,
    and so is an id that is no number."""
    folder, first = with_added(tiny_model, tmp_path, room=2)
    assert load_tokenizer(folder).encode("<tool>", special=True) == \
        load_tokenizer(tiny_model).encode("<tool>")
    with_added(tiny_model, tmp_path, lstrip=True)
    assert "lstrip" in refused(load_tokenizer, folder, named="tokenizer_config.json")
    (folder / "added_tokens.json").write_text('{"<tool>": "x"}')
    refused(load_tokenizer, folder, named="added_tokens.json")


def test_chatml_with_sentencepiece(tiny_model, tmp_path):
    """The ids are those of whole texts between markers: no space begins an answer."""
    ours = load_tokenizer(with_added(tiny_model, tmp_path)[0])
    end, start = ours.special["<|im_end|>"], ours.special["<|im_start|>"]
    talk = say("user: Tom went.", "assistant: The lake.")
    ids, inside = ChatTemplate(CHATML).encode(talk, ours)
    plain, head = ours.model.encode, ours.model.encode("assistant\n")
    question = [start, *plain("user\nTom went."), end, *plain("\n"), start, *head]
    answer = [*plain("assistant\nThe lake.")[len(head) :], end]
    assert ids == [*question, *answer, *plain("\n")]
    assert inside == [False] * len(question) + [True] * len(answer) + [False] * len(plain("\n"))


def test_an_end_that_is_empty(tiny_model, tmp_path):
    """Some of the first LLaMA folders have the bos_token "": tokenizer.model knows the id."""
    shutil.copyfile(tiny_model / "tokenizer.model", tmp_path / "tokenizer.model")
    ends = {"bos_token": "", "eos_token": {"content": ""}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ends))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (1, [2])


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
