"""data/: tokenizers, instructions and the embedded default's language."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEST_DATA, needs_test_data

from data import batches, instruct, split, tiny
from data.chat import ChatTemplate
from data.tokenizer import load_tokenizer
from data import IGNORE_INDEX
from quant import InputError

PLAIN = ChatTemplate()


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
    ids, targets = instruct.encode(instruct.conversation(record), tokenizer, PLAIN, 200)
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
    made = instruct.conversation({"messages": messages})
    assert made == messages
    ids, targets = instruct.encode(made, tokenizer, PLAIN, 300)
    answers = [*tokenizer.encode("Tom"), tokenizer.eos_id, *tokenizer.encode("the lake"), tokenizer.eos_id]
    assert [t for t in targets if t != IGNORE_INDEX] == answers
    assert "Be short." in tokenizer.decode(ids)
    prompt = instruct.encode_prompt(made, tokenizer, PLAIN)
    assert prompt == ids[: len(ids) - len(tokenizer.encode("the lake"))]
    assert instruct.prompt_text(made) == "Where?"


def test_long_sequences_are_cut(tokenizer):
    """An answer is cut at the limit; an example whose prompt fills it is given up."""
    long = instruct.conversation({"instruction": "Say much.", "output": "lake " * 50})
    whole = instruct.encode(long, tokenizer, PLAIN, 1000)
    ids, targets = instruct.encode(long, tokenizer, PLAIN, 40)
    assert len(ids) == 40 and ids == whole[0][:40] and targets == whole[1][:40]
    assert instruct.encode(long, tokenizer, PLAIN, 5) is None


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


def say(*lines):
    """"role: text" lines as messages."""
    return [dict(zip(("role", "content"), line.split(": ", 1))) for line in lines]


def dialogue(*lines):
    return json.dumps({"messages": say(*lines)})


@pytest.mark.parametrize("text, told", [
    ("", "holds no instructions"), ("[]", "holds no instructions"), (GOOD + "\n{oops", "line 2 is not JSON"),
    (GOOD + '\n\n{"instruction": "a"}', 'line 3 has no text in "output"'),
    (GOOD + "\n7", "line 2 is not an object"), ('[{"output": "b"}]', 'entry 1 has no "instruction" .as Alpaca and Dolly., "messages",'),
    ('{"prompt": "a", "completion": "b"}', 'line 1 has no "instruction" .* or tree in "prompt"'),
    ('{"instruction": 7, "output": "b"}', 'line 1 has no text in "instruction"'),
    ("question,answer", "line 1 is not JSON .*: give --data a list in JSON, or JSON lines"),
    ('{"instruction": "a", "output": "  "}', "line 1 has an empty answer"),
    ('{"instruction": "a", "output": "b", "input": 3}', 'not text in "input"'),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "without a known role"),
    ('{"messages": [7]}', "without a known role"), ('{"messages": 7}', "no list"),
    ('{"messages": []}', "no question with an answer"), ('{"conversations": 7}', 'no list in "conversations"'),
    ('{"conversations": [{"from": "bing", "value": "x"}]}', "without a known role"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no question with an answer"),
    (dialogue("user: a", "assistant: b", "user: c", "assistant: ", "user: d", "assistant: e"), "empty answer"),
    (dialogue("user: a", "assistant: b", "assistant: c"), "an answer that follows no question"),
    (dialogue("user: a", "system: b", "assistant: c"), "an answer that follows no question"),
    ('{"instruction": "a", "response": 7}', 'no text in "response"'),
    ('{"instruction": "a", "response": "b", "context": 7}', 'not text in "context"'),
    ('{"prompt": {"role": "prompter", "text": "a", "replies": [7]}}', 'not a list of messages in "replies"'),
    ('{"message_id": "a", "parent_id": null, "role": "prompter", "text": "a"}\n' + GOOD, 'line 2 has no "message_id"'),
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
    assert one == two and len(one) == 3 and one[1] == say("user: q1", "assistant: a1 \u2028")
    with pytest.raises(InputError, match="c.json is missing"):
        instruct.read_instructions(tmp_path / "c.json")


def read(tmp_path, *records):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return instruct.read_instructions(path)


def test_the_plain_frame(tokenizer):
    """Ids are bos, the frame, the answer and eos, as they always were; input and system have places."""
    for record, text in (
        ({"instruction": "Add.", "input": "1 2"}, "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
        ({"instruction": "Add.", "input": ""}, "### Instruction:\nAdd.\n\n### Response:\n"),
    ):
        ids, targets = instruct.encode(instruct.conversation(record | {"output": "3"}), tokenizer, PLAIN, 200)
        whole = [tokenizer.bos_id, *tokenizer.encode(text), *tokenizer.encode("3"), tokenizer.eos_id]
        assert ids == whole[:-1]
        assert [t for t in targets if t != IGNORE_INDEX] == [*tokenizer.encode("3"), tokenizer.eos_id]
    parts = PLAIN.parts(say("system: S", "system: T", "user: q"), tokenizer)
    assert parts == [(tokenizer.bos_id, False), ("S\n\nT\n\n### Instruction:\nq\n\n### Response:\n", False)]


def test_dolly_and_sharegpt(tmp_path):
    """Dolly's and ShareGPT's names; what a piece of ShareGPT begins and ends with is cut off."""
    turn = lambda role, text: {"from": role, "value": text}
    dolly, sharegpt = read(
        tmp_path,
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"},
        {"id": "x_1", "conversations": [
            turn("gpt", "0"), turn("human", "1"), turn("gpt", "2"), turn("human", "3"), turn("gpt", "4"),
            turn("human", "5")]},
    )  # fmt: skip
    assert dolly == [{"role": "user", "content": "Add.", "input": "1 2"}, {"role": "assistant", "content": "3"}]
    assert instruct.prompt_text(dolly) == "Add.\n\n1 2"
    assert sharegpt == say("user: 1", "assistant: 2", "user: 3", "assistant: 4")


def oasst_tree():
    """A tree in OASST1's form: the best path is q, a1, q2, a3; all else in it must not be taken."""
    ids = iter("abcdefghijklmn")
    node = lambda role, text, *replies, **more: dict(
        message_id=next(ids), role=role, text=text, replies=list(replies), **more
    )
    tree = node(
        "prompter", "q",
        node("assistant", "unranked", rank=None),
        node("assistant", "worse", node("prompter", "but why?", node("assistant", "so")), rank=1),
        node("assistant", "spam", review_result=False, rank=0),
        node("assistant", "deleted", deleted=True, rank=0),
        node(
            "assistant", "a1",
            node("prompter", "never answered"),
            node("prompter", "q2", node("assistant", "a3", node("prompter", "thanks"))),
            node("prompter", "q3", node("assistant", "a4")),
            rank=0, review_result=True,
        ),
    )  # fmt: skip
    return {"message_tree_id": tree["message_id"], "tree_state": "ready_for_export", "prompt": tree}


def flat(node, parent=None):
    """The messages of a tree in OASST1's other form."""
    mine = {k: v for k, v in node.items() if k != "replies"}
    yield mine | {"parent_id": parent, "tree_state": "ready_for_export"}
    for reply in node["replies"]:
        yield from flat(reply, node["message_id"])


def test_oasst1_gives_the_best_path(tmp_path):
    """Of a tree the best answers, the first answered questions, up to an answer; in both forms."""
    tree = oasst_tree()
    best = [say("user: q", "assistant: a1", "user: q2", "assistant: a3")]
    other, alone = tree | {"tree_state": "growing"}, {"prompt": {"role": "prompter", "text": "q", "replies": []}}
    assert read(tmp_path, tree, other, alone) == best
    messages = list(flat(tree["prompt"]))
    assert read(tmp_path, *messages) == best == read(tmp_path, *reversed(messages[:9]), *messages[9:])
    with pytest.raises(InputError, match="some.jsonl holds no instructions"):
        read(tmp_path, other, alone)


def test_what_the_template_refuses_is_named(tmp_path):
    """LLaMA-2's markers in any text, or turns that do not alternate: file, line and reason."""
    check = ChatTemplate("LLaMA-2").check
    path = tmp_path / "some.jsonl"
    for text, told in (
        (dialogue("user: a", "assistant: b [INST] c"), r"has \[INST\] in a message"),
        (dialogue("user: a", "user: b", "assistant: c"), "do not alternate"),
        ('{"instruction": "a", "input": "<<SYS>>", "output": "c"}', "has <<SYS>>"),
    ):
        path.write_text(GOOD + "\n" + text)
        assert len(instruct.read_instructions(path)) == 2
        with pytest.raises(InputError, match=f"some.jsonl, line 2 .*{told}"):
            instruct.read_instructions(path, check)


def test_looking_into_a_file(tmp_path, capsys):
    """`python data/instruct.py --data FILE` counts, and shows the first conversation."""
    path = tmp_path / "some.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}, {"messages": say(
        "user: a", "assistant: b", "user: c", "assistant: d")}]))  # fmt: skip
    instruct.show(path)
    out = capsys.readouterr().out
    assert out.startswith("2 conversations with 3 answers.") and "Add.\n[input]\n1 2\n" in out
    script = [sys.executable, ROOT / "data/instruct.py"]
    told = subprocess.run([*script, "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert all(name in told for name in ("Alpaca", "Dolly", "OASST1", "ShareGPT"))
    told = subprocess.run([*script, "--data", "no.json"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 1 and told.stderr.startswith("error: no.json is missing")


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


@needs_test_data
def test_real_instructions():
    assert len(instruct.read_instructions(TEST_DATA / "data/instructions/dolly_3k.json")) > 2900
