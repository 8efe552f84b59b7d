"""data/tasks/instruct.py: files of instructions, their mistakes, targets and answers."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import TEST_DATA, needs_test_data, run_script, say
from samples import flat_tree, oasst_tree

from data import IGNORE_INDEX, InputError
from data.tasks import instruct
from data.tokens import chat
from data.tokens.chat import ChatTemplate
from model import from_pretrained

PLAIN = ChatTemplate()
GOOD = '{"instruction": "a", "output": "b"}'


def dialogue(*lines):
    return json.dumps({"messages": say(*lines)})


def read(tmp_path, *records):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return instruct.read_instructions(path)


def test_both_kinds_of_file(tmp_path):
    """A list in JSON, and JSON lines, give the same; a missing file is named."""
    records = [{"instruction": f"q{i}", "output": f"a{i} \u2028"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    one, two = (instruct.read_instructions(tmp_path / name) for name in ("a.json", "b.jsonl"))
    assert one == two and len(one) == 3 and one[1] == say("user: q1", "assistant: a1 \u2028")
    with pytest.raises(InputError, match="c.json is missing"):
        instruct.read_instructions(tmp_path / "c.json")


def test_dolly_and_sharegpt(tmp_path):
    """Dolly's and ShareGPT's names; what a piece of ShareGPT begins and ends with is cut off."""
    turn = lambda role, text: {"from": role, "value": text}
    dolly, sharegpt = read(
        tmp_path,
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"},
        {"id": "x_1", "conversations": [
            turn("gpt", "0"), turn("human", "1"), turn("gpt", "2"), turn("human", "3"),
            turn("gpt", "4"), turn("human", "5")]},
    )
    question, answer = say("user: Add.", "assistant: 3")
    assert dolly == [question | {"input": "1 2"}, answer]
    assert instruct.prompt_text(dolly) == "Add.\n\n1 2"
    assert sharegpt == say("user: 1", "assistant: 2", "user: 3", "assistant: 4")


def test_nothing_that_was_said_is_lost(tmp_path):
    """A "system" beside the messages comes first, Alpaca's "history" before the question; each list
    of messages may have either pair of names."""
    alpaca = dict(instruction="And?", output="So.", system="Be short.", history=[["a", "b"]])
    talk = {"system": "Be short.", "conversations": [
        {"from": "gpt", "value": "0"}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"}]}
    swapped = {"conversations": say("user: a", "assistant: b")}
    first = ("system: Be short.", "user: a", "assistant: b")
    found = read(tmp_path, alpaca, talk, swapped, alpaca | {"system": "", "history": None})
    assert found[1:3] == [say(*first), say(*first[1:])]
    assert [m["content"] for m in found[0]] == ["Be short.", "a", "b", "And?", "So."]
    assert [m["content"] for m in found[3]] == ["And?", "So."]
    for wrong in ({"history": [["a"]]}, {"history": "a"}, {"history": [["a", 1]]}, {"system": [1]}):
        with pytest.raises(InputError, match='in "history"|without a known role and text'):
            read(tmp_path, alpaca | wrong)


def test_oasst1_gives_the_best_path(tmp_path):
    """Of a tree the best answers, the first answered questions, up to an answer; in both forms."""
    tree = oasst_tree()
    best = [say("user: q", "assistant: a1", "user: q2", "assistant: a3")]
    other = tree | {"tree_state": "growing"}
    alone = {"prompt": {"role": "prompter", "text": "q", "replies": []}}
    assert read(tmp_path, tree, other, alone) == best
    messages = list(flat_tree(tree["prompt"]))
    assert read(tmp_path, *messages) == best
    assert read(tmp_path, *reversed(messages[:9]), *messages[9:]) == best
    with pytest.raises(InputError, match="some.jsonl holds no instructions"):
        read(tmp_path, other, alone)


MISTAKES = [  # what a file holds, and how it is refused
    ("", "holds no instructions"), ("[]", "holds no instructions"), ("[1, 2", "is not JSON"),
    (GOOD + "\n{oops", "line 2 is not JSON"),
    (GOOD + '\n\n{"instruction": "a"}', 'line 3 has no text in "output"'),
    (GOOD + "\n7", "line 2 is not an object"),
    ('[{"output": "b"}]', 'entry 1 has no "instruction", "messages",'),
    ('{"prompt": "a", "completion": "b"}', 'line 1 has no "instruction".* or tree in "prompt"'),
    ('{"instruction": 7, "output": "b"}', 'line 1 has no text in "instruction"'),
    ("question,answer", "line 1 is not JSON .*: give --data a list in JSON, or JSON lines"),
    ('{"instruction": "a", "output": "  "}', "line 1 has an empty answer"),
    ('{"instruction": "a", "output": "b", "input": 3}', 'not text in "input"'),
    ('{"instruction": "a", "response": 7}', 'no text in "response"'),
    ('{"instruction": "a", "response": "b", "context": 7}', 'not text in "context"'),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "without a known role"),
    ('{"messages": [7]}', "without a known role"), ('{"messages": 7}', "no list"),
    ('{"messages": []}', "no question with an answer"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no question with an answer"),
    ('{"conversations": 7}', 'no list in "conversations"'),
    ('{"conversations": [{"from": "bing", "value": "x"}]}', "without a known role"),
    (dialogue("user: a", "assistant: b", "user: c", "assistant: ", "user: d", "assistant: e"),
     "empty answer"),
    (dialogue("user: a", "assistant: b", "assistant: c"), "an answer that follows no question"),
    (dialogue("user: a", "system: b", "assistant: c"), "an answer that follows no question"),
    ('{"prompt": {"role": "prompter", "text": "a", "replies": [7]}}',
     'not a list of messages in "replies"'),
    ('{"message_id": "a", "parent_id": null, "role": "prompter", "text": "a"}\n' + GOOD,
     'line 2 has no "message_id"'),
]


@pytest.mark.parametrize("text, message", MISTAKES)
def test_a_bad_line_is_refused_with_its_number(text, message, tmp_path):
    """The sentence names the file, the line or entry, and what is wrong with it."""
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"data.jsonl.*{message}"):
        instruct.read_instructions(path)


def test_what_the_template_refuses_is_named(tmp_path):
    """LLaMA-2's markers in any text, or turns that do not alternate: file, line and reason."""
    check = ChatTemplate("LLaMA-2").check
    path = tmp_path / "some.jsonl"
    for text, message in (
        (dialogue("user: a", "assistant: b [INST] c"), r"has \[INST\] in a message"),
        (dialogue("user: a", "user: b", "assistant: c"), "do not alternate"),
        ('{"instruction": "a", "input": "<<SYS>>", "output": "c"}', "has <<SYS>>"),
    ):
        path.write_text(GOOD + "\n" + text)
        assert len(instruct.read_instructions(path)) == 2
        with pytest.raises(InputError, match=f"some.jsonl, line 2 .*{message}"):
            instruct.read_instructions(path, check)


def test_the_plain_frame(tokenizer):
    """Ids are bos, the frame, the answer and eos; input and system message have their places."""
    answer = [*tokenizer.encode("3"), tokenizer.eos_id]
    for given, text in (
        ("1 2", "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
        ("", "### Instruction:\nAdd.\n\n### Response:\n"),
    ):
        record = {"instruction": "Add.", "input": given, "output": "3"}
        ids, targets = instruct.encode(instruct.conversation(record), tokenizer, PLAIN, 200)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text), *answer[:-1]]
        assert [t for t in targets if t != IGNORE_INDEX] == answer
    (bos, _), (text, trained) = PLAIN.parts(say("system: S", "system: T", "user: q"), tokenizer)
    assert bos == tokenizer.bos_id and not trained
    assert text == "S\n\nT\n\n### Instruction:\nq\n\n### Response:\n"


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
    assert text.strip() == chat.frame(record["instruction"], record["input"]).strip()


def test_every_assistant_turn_is_trained_on(tokenizer):
    """The targets are all answers; the prompt is what stands before the last one."""
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Tom"}, {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "the lake"},
    ]
    made = instruct.conversation({"messages": messages})
    assert made == messages
    ids, targets = instruct.encode(made, tokenizer, PLAIN, 300)
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("Tom", "the lake")]
    assert [t for t in targets if t != IGNORE_INDEX] == answers[0] + answers[1]
    assert "Be short." in tokenizer.decode(ids)
    prompt, _ = PLAIN.encode(made[:-1], tokenizer)
    assert prompt == ids[: len(ids) - len(tokenizer.encode("the lake"))]
    assert instruct.prompt_text(made) == "Where?"


def test_long_sequences_are_cut(tokenizer):
    """An answer is cut at the limit; an example whose prompt fills it is given up."""
    long = instruct.conversation({"instruction": "Say much.", "output": "lake " * 50})
    whole = instruct.encode(long, tokenizer, PLAIN, 1000)
    ids, targets = instruct.encode(long, tokenizer, PLAIN, 40)
    assert len(ids) == 40 and ids == whole[0][:40] and targets == whole[1][:40]
    assert instruct.encode(long, tokenizer, PLAIN, 5) is None


def test_long_conversations_lose_their_beginning(tokenizer, tiny_model):
    """A conversation that is too long loses whole turns, oldest first, as in a chat; a single
    question that is too long loses its own beginning. The answer keeps its room."""
    model = from_pretrained(tiny_model, "nf4", torch.float32)
    turn = lambda i: "assistant: Yes." if i % 2 else f"user: Question {i}, is it so?"
    turns = [turn(i) for i in range(41)]
    conversations = [
        say(*turns, "assistant: Yes."), say("user: short", "assistant: a"),
        say("user: " + "very long " * 200 + "end", "assistant: a"),
    ]
    found = instruct.answers(model, tokenizer, PLAIN, conversations)
    assert len(found) == 3
    alone = [instruct.answers(model, tokenizer, PLAIN, [one])[0] for one in conversations]
    assert len(found[1]) > 20 and alone[1].startswith(found[1][:20])
    ids, kept = chat.prompt_that_fits(conversations[0][:-1], tokenizer, PLAIN, 96)
    assert len(ids) <= 96 and kept[0]["role"] == "user"
    assert kept == conversations[0][:-1][-len(kept) :]
    assert len(chat.prompt_that_fits(conversations[0][:-1], tokenizer, PLAIN, 999)[1]) == 41


class Echo:
    """A model of 40 positions that says the last id of its prompt, and remembers the prompt."""

    device, config = "cpu", SimpleNamespace(max_positions=40)

    def generate(self, idx, new, **more):
        self.seen = idx[0].tolist(), new
        return torch.cat([idx, idx[:, -1:]], dim=1)


def test_a_question_that_is_too_long_loses_its_front(tokenizer):
    """The prompt keeps its end, leaves room for an answer, and does not contain the answer."""
    model, one = Echo(), say("user: " + "Tom went to the lake. " * 9, "assistant: lake")
    instruct.answers(model, tokenizer, PLAIN, [one])
    whole, _ = PLAIN.encode(one[:-1], tokenizer)
    assert len(whole) > 40 and model.seen == (whole[-30:], 10)


@pytest.mark.parametrize("eval_only", [False, True])
def test_all_is_held_out_where_nothing_is_trained(tokenizer, eval_only):
    """Of twenty conversations a tenth, and with --eval_only every one."""
    found = [say(f"user: Is it {i}?", "assistant: yes") for i in range(20)]
    cfg = dict(held_out=0.1, data_seed=1, max_examples=0, sequence_len=60, eval_only=eval_only)
    score = lambda model, held_out: len(held_out)
    task = instruct.make_task(found, tokenizer, PLAIN, SimpleNamespace(**cfg), score)
    sizes = len(task.train), len(task.held_out), task.score(SimpleNamespace(models=[None]))[0]
    assert sizes == ((0, 20, 20) if eval_only else (18, 2, 2))
    if eval_only:  # and none that fits is refused
        cfg |= dict(sequence_len=2, data="F")
        with pytest.raises(InputError, match="F: 20 held-out .* fills 2 tokens. Raise --sequence"):
            instruct.make_task(found, tokenizer, PLAIN, SimpleNamespace(**cfg), score)


def test_looking_into_a_file(tmp_path, capsys):
    """`python data/tasks/instruct.py --data FILE` counts, and shows the first conversation."""
    path = tmp_path / "some.json"
    add = {"instruction": "Add.", "input": "1 2", "output": "3"}
    path.write_text(f'[{json.dumps(add)}, {dialogue(*["user: a", "assistant: b"] * 2)}]')
    instruct.show(path)
    out = capsys.readouterr().out
    assert out.startswith("2 conversations with 3 answers.") and "Add.\n[input]\n1 2\n" in out
    listed = run_script("data/tasks/instruct.py", "--help")
    assert all(name in listed for name in ("Alpaca", "Dolly", "OASST1", "ShareGPT"))
    with pytest.raises(SystemExit, match="^error: no.json is missing"):
        run_script("data/tasks/instruct.py", "--data", "no.json", cwd=tmp_path)


@needs_test_data
def test_real_instructions():
    """Dolly's own file is read."""
    assert len(instruct.read_instructions(TEST_DATA / "data/instructions/dolly_3k.json")) > 2900
