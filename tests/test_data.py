"""data/: tokenizers, instructions and the embedded default's language."""

import json

import pytest
import torch
from conftest import SHARED

from data import batches, instruct, split, tiny
from data.tokenizer import load_tokenizer
from model import IGNORE_INDEX
from quant import InputError


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
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="tokenizer.model is not"):
        load_tokenizer(tmp_path)


def test_targets_are_the_answers_tokens(tokenizer):
    """A target is the next id inside an answer, its end included, and else IGNORE_INDEX."""
    record = {"instruction": "Where was Tom?", "input": "Tom went to the lake.", "output": "lake"}
    ids, targets = instruct.encode(instruct.turns(record), tokenizer, 200)
    answer = [t for t in targets if t != IGNORE_INDEX]
    assert answer == tokenizer.encode("lake") + [tokenizer.eos_id]
    assert ids[0] == tokenizer.bos_id and len(ids) == len(targets)
    assert targets[-1] == tokenizer.eos_id and ids[-1] != tokenizer.eos_id
    start = targets.index(answer[0])
    assert ids[start + 1 :] == answer[:-1]
    text = tokenizer.decode(ids[: start + 1])
    assert text.strip() == instruct.frame(record["instruction"], record["input"]).strip()


def test_every_assistant_turn_is_trained_on(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Tom"}, {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "the lake"},
    ]  # fmt: skip
    parts = instruct.turns({"messages": messages})
    ids, targets = instruct.encode(parts, tokenizer, 300)
    answers = [*tokenizer.encode("Tom"), tokenizer.eos_id, *tokenizer.encode("the lake"), tokenizer.eos_id]
    assert [t for t in targets if t != IGNORE_INDEX] == answers
    assert "Be short." in tokenizer.decode(ids)
    assert instruct.encode_prompt(parts, tokenizer) == ids[: len(ids) - len(tokenizer.encode("the lake"))]


def test_long_sequences_are_cut(tokenizer):
    """An answer is cut at the limit; an example whose prompt fills it is given up."""
    parts = instruct.turns({"instruction": "Say much.", "output": "lake " * 50})
    whole = instruct.encode(parts, tokenizer, 1000)
    ids, targets = instruct.encode(parts, tokenizer, 40)
    assert len(ids) == 40 and ids == whole[0][:40] and targets == whole[1][:40]
    assert instruct.encode(parts, tokenizer, 5) is None


def test_batches_have_every_example_once_an_epoch():
    """Batches are padded on the right, similar lengths together, each example once an epoch."""
    examples = [([i] * (1 + i % 37), [i] * (1 + i % 37)) for i in range(1, 301)]
    stream = batches(examples, 8, seed=0)
    seen, filled, room = [], 0, 0
    while len(seen) < 300:
        idx, targets = next(stream)
        assert idx.shape == targets.shape and len(idx) <= 8
        seen += idx[:, 0].tolist()
        filled, room = filled + (targets != IGNORE_INDEX).sum().item(), room + targets.numel()
        assert torch.equal(idx != 0, targets != IGNORE_INDEX)
    assert sorted(seen) == list(range(1, 301))
    assert filled / room > 0.9  # at random, 0.6
    assert torch.equal(next(batches(examples, 8, 5))[0], next(batches(examples, 8, 5))[0])


def test_split_is_by_seed_and_disjoint():
    train, held_out = split(list(range(100)), 0.1, seed=3)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(100))
    assert split(list(range(100)), 0.1, 3) == (train, held_out)
    assert split(list(range(100)), 0.1, 4)[1] != held_out
    assert sum(map(len, split(list(range(100)), 0.1, 3, most=20))) == 20


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize("text, told", [
    ("", "holds no instructions"), ("[]", "holds no instructions"), (GOOD + "\n{oops", "line 2 is not JSON"),
    (GOOD + '\n\n{"instruction": "a"}', 'line 3 has no text in "output"'),
    (GOOD + "\n7", "line 2 is not an object"), ('[{"output": "b"}]', 'entry 1 has no text in "instruction"'),
    ('{"instruction": "a", "output": "  "}', "line 1 has an empty answer"),
    ('{"instruction": "a", "output": "b", "input": 3}', 'not text in "input"'),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "without a known role"),
    ('{"messages": [7]}', "without a known role"), ('{"messages": 7}', "no list"),
    ("[1, 2", "is not JSON"),
])  # fmt: skip
def test_a_bad_line_is_refused_with_its_number(text, told, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"data.jsonl.*{told}"):
        instruct.read_instructions(path)


def test_both_kinds_of_file(tmp_path):
    records = [{"instruction": f"q{i}", "output": f"a{i} \u2028"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    one, two = (instruct.read_instructions(tmp_path / name) for name in ("a.json", "b.jsonl"))
    assert one == two and len(one) == 3 and one[1][1] == ("a1 \u2028", True)
    with pytest.raises(InputError, match="c.json does not exist"):
        instruct.read_instructions(tmp_path / "c.json")


def test_the_task_follows_from_the_story():
    """The tiny task has one right answer a question, in French, and no question twice."""
    task = tiny.task(500, seed=0)
    assert len({r["instruction"] for r in task}) == 500
    moods = {en[0]: mood for mood, events in tiny.MOODS.items() for en in events}
    for record in task:
        mood = next(m for event, m in moods.items() if event + "." in record["instruction"])
        place = next(p for p in tiny.PLACES if f"to the {p[0]}." in record["instruction"])
        assert record["output"] == f"{mood[1]}, {place[1]}"
    base = list(tiny.pretraining(200, seed=0))
    assert {r["output"].split(", ")[1] for r in base} == {word for place in tiny.PLACES for word in place}
    for record in base:  # the base answers in the language of the story
        french = "Comment" in record["instruction"]
        assert record["output"].split(", ")[0] in {mood[french] for mood in tiny.MOODS}


@pytest.mark.skipif(not SHARED.is_dir(), reason="more data, not part of the project")
def test_real_instructions():
    assert len(instruct.read_instructions(SHARED / "data/instructions/dolly_3k.json")) > 2900
