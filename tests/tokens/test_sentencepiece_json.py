"""data/tokens/bpe_files.py with a tokenizer.json of sentencepiece's kind: all that LLaMA-2's and
Mistral's folders have since transformers 5. The ids and the texts are those of `tokenizers`.

tests/fixtures/tokenizers/llama2 (made by make_fixtures.py) has a small one, and what the library
makes of thirty texts in each form of the file.
"""

import json
import random
import time

import pytest
from helpers import FIXTURES, copy, say
from samples import NASTY_TEXT, put
from test_sentencepiece import CHATML
from test_tokenizer import broken

from data.tokens.chat import ChatTemplate
from data.tokens.tokenizer import load_tokenizer

LLAMA2 = FIXTURES / "tokenizers/llama2"
EXPECTED = json.loads((LLAMA2 / "expected.json").read_text())
FORMS = EXPECTED["forms"]


def changed(folder, change):
    """A copy of the fixture with `change(spec)` made, and its tokenizer."""
    path = copy(LLAMA2, folder) / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    return load_tokenizer(path.parent)


def across(spec):
    """Add tokens of two words, which can be merged only if the whole text is one."""
    ids = spec["model"]["vocab"]
    for pair in (["e", "▁"], ["e▁", "f"]):
        ids["".join(pair)] = len(ids)
        spec["model"]["merges"].insert(0, pair)
    for token in spec["added_tokens"][3:]:  # the library counts on from the vocabulary
        token["id"] += 2


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_texts_are_the_librarys(form, tmp_path):
    """Where a space is put before a text, and what a token between two texts changes."""
    ours = changed(tmp_path, lambda spec: spec.update(FORMS[form]["spaces"]))
    plain, special = FORMS[form]["ids"]
    for i, text in enumerate(EXPECTED["texts"]):
        assert ours.encode(text) == plain[i], text
        assert ours.encode(text, special=True) == special[i], text
        assert ours.decode(special[i]) == FORMS[form]["decoded"][i]
        assert "".join(ours.stream(plain[i])) == ours.decode(plain[i])
        assert not set(plain[i]) & set(ours.special.values())


@pytest.mark.parametrize("more", ["as it is", "across", "ignore_merges", "no strip", "a b"])
@pytest.mark.parametrize("form", FORMS)
def test_random_texts_like_the_library(form, more, tmp_path):
    """Where the library is installed: random texts, with tokens of two words, too."""
    library = pytest.importorskip("tokenizers")

    def change(spec):
        spec.update(FORMS[form]["spaces"])
        spec["model"]["ignore_merges"] = more == "ignore_merges"
        if more == "across":
            across(spec)
        if more == "no strip":
            del spec["decoder"]["decoders"][-1]
        if more == "a b":
            spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]

    ours = changed(tmp_path, change)
    theirs = library.Tokenizer.from_file(str(ours.folder / "tokenizer.json"))
    rng = random.Random(form + more)
    alphabet = [*NASTY_TEXT[:1000:3], *"  abe \n\t▁", "the fo", "▁▁", "<s>", "<tool>", "<0x0A>"]
    words = [text.replace("▁", " ") for text in ours.pairs.letters]
    for i in range(150):
        text = "".join(rng.choices(alphabet, k=rng.randrange(25)))
        for special, text in ((i % 2 > 0, text), (False, rng.choice(words))):
            theirs.encode_special_tokens = not special
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special) == ids, text
            assert ours.decode(ids) == theirs.decode(ids)


def test_tokens_of_two_words(tmp_path):
    """They are found: only without any, words are merged apart."""
    apart, whole = load_tokenizer(LLAMA2), changed(tmp_path, across)
    tokens = lambda ours: [ours.token_bytes[id] for id in ours.encode("be fe e")]
    assert apart.pairs.patterns and not whole.pairs.patterns
    assert b"e f" in tokens(whole) and b"e " in tokens(whole)
    assert b"".join(tokens(apart)) == b" be fe e" and not {b"e f", b"e "} & {*tokens(apart)}


@pytest.mark.parametrize("change", [lambda spec: None, across], ids=["apart", "across"])
@pytest.mark.parametrize("text", ["a" * 100_000, "the for " * 12_000, "👩" * 100_000])
def test_time_is_not_quadratic(text, change, tmp_path):
    """100,000 letters are one word, or one with their spaces, and take a second or two."""
    ours = changed(tmp_path, change)
    start = time.perf_counter()
    assert ours.decode(ours.encode(text)) == text
    assert time.perf_counter() - start < 6


def test_a_conversation_has_a_space_only_at_its_start():
    """With "first", a text after a special token has none, as in transformers."""
    ours = load_tokenizer(LLAMA2)
    ids, inside = ChatTemplate("<s>" + CHATML).encode(say("user: the", "assistant: self"), ours)
    text = "<s><|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nself<|im_end|>\n"
    assert ids == ours.encode(text, special=True) and ids[0] == 1
    assert ours.decode([id for id, on in zip(ids, inside) if on]) == "self"


METASPACE = {"type": "Metaspace", "replacement": "▁"}


@pytest.mark.parametrize("named, change", [
    ("model.fuse_unk", put("model", "fuse_unk", value="x")),
    ("model.vocab lacks <0x0A>", lambda spec: spec["model"]["vocab"].pop("<0x0A>")),
    ("normalizer", put("normalizer", value={"type": "NFKC"})),
    ("pre_tokenizer", lambda spec: spec.update(FORMS["prepend"]["spaces"],
                                               pre_tokenizer=METASPACE)),
    ("pre_tokenizer", put("pre_tokenizer", value=None)),
    ("pre_tokenizer.type", put("pre_tokenizer", "type", value="ByteLevel")),
    ("pre_tokenizer.replacement", put("pre_tokenizer", "replacement", value="_")),
    ("pre_tokenizer.prepend_scheme", put("pre_tokenizer", "prepend_scheme", value="last")),
    ("pre_tokenizer.split", put("pre_tokenizer", "split", value=1)),
    ("add_prefix_space", put("pre_tokenizer", "add_prefix_space", value=False)),
    ("decoder", put("decoder", value={"type": "ByteLevel"})),
    ("decoder", put("decoder", "decoders", 3, "start", value=2)),
    ("added_tokens.rstrip", put("added_tokens", 0, "rstrip", value=True)),
    ("added_tokens.normalized", lambda spec: (spec.update(FORMS["prepend"]["spaces"]),
                                              spec["added_tokens"][0].update(normalized=True))),
])
def test_what_we_do_not_compute_is_refused_by_name(tmp_path, named, change):
    """A setting that the library knows and that would change ids or text is never passed over."""
    sentence = broken(tmp_path, change, source="llama2")
    assert named in sentence and "\n" not in sentence, sentence


def test_what_a_file_leaves_out(tmp_path):
    """A Metaspace without settings puts a space before each text, and every space begins a word,
    whatever the merges. Without a step that takes it off again, the space stays."""

    def change(spec):
        spec["pre_tokenizer"] = METASPACE
        spec["model"]["vocab"]["▁▁"] = 700
        spec["model"]["merges"].insert(0, ["▁", "▁"])
        del spec["decoder"]["decoders"][-1]

    ours = changed(tmp_path, change)
    a, space = ours.encode("a"), [ours.pairs.letters["▁"][0]]
    assert ours.encode("a<tool>a   a") == [*a, ours.added["<tool>"], *a, *space, *space, *a]
    assert ours.decode(a) == " a"


def test_an_added_token_with_a_space(tmp_path):
    """In the text of an ordinary one a "▁" is a space, as the library decodes it."""
    ours = changed(tmp_path, put("added_tokens", 4, "content", value="<a▁tool>"))
    assert ours.encode("<a▁tool>") == [501] and ours.decode([501]) == "<a tool>"
    assert 501 not in ours.encode("<a tool>")


def test_a_text_that_is_a_token(tmp_path):
    """With `ignore_merges` a whole text can be a token of several words that no merge makes."""

    def change(spec):
        spec.update(FORMS["never"]["spaces"])
        spec["model"]["vocab"] |= {"b▁<0x0A>": 700, "éé": 701}
        spec["model"]["ignore_merges"] = True

    ours = changed(tmp_path, change)
    assert ours.encode("b <0x0A>") == [700] and len(ours.encode("b <0x0A>a")) > 2
    assert ours.encode("éé") == [701] and ours.decode([700, 701]) == "b <0x0A>éé"


def test_a_newer_file_precedes_tokenizer_model(tmp_path, tiny_model):
    """As in transformers: an older one, without a pre-tokenizer, says the same as it."""
    for form, kind in (("prepend", "SentencePiece"), ("first", "Bpe")):
        folder = copy(LLAMA2, tmp_path / form)
        (folder / "tokenizer.model").write_bytes((tiny_model / "tokenizer.model").read_bytes())
        ours = changed(tmp_path / form, lambda spec: spec.update(FORMS[form]["spaces"]))
        assert type(ours).__name__ == kind
