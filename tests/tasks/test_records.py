"""data/tasks/instruct.py reads files of instructions: formats, and what cannot be used."""

import csv
import json
import re
from types import SimpleNamespace

import pytest
from chat_templates import LLAMA2
from helpers import TEST_DATA, needs_test_data, run_script, say
from samples import oasst_tree

import train
from data import InputError
from data.tasks import instruct
from data.tokens.chat import ChatTemplate

GOOD = '{"instruction": "a", "output": "b"}'


def dialogue(*lines):
    return json.dumps({"messages": say(*lines)})


def read(tmp_path, *records):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return instruct.read_instructions(path)[0]


def test_both_kinds_of_file(tmp_path):
    """A list in JSON, and JSON lines, give the same; a missing file is named."""
    records = [{"instruction": f"q{i}", "output": f"a{i} \u2028"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    one, two = (instruct.read_instructions(tmp_path / name)[0] for name in ("a.json", "b.jsonl"))
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
    assert instruct.with_input(dolly[-2]) == "Add.\n\n1 2"
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
        with pytest.raises(InputError, match='in "history"|a message without text in "content"'):
            read(tmp_path, alpaca | wrong)


def test_other_names_of_a_question_and_its_answer(tmp_path):
    """Each pair of names is read, with either name of an input; no input is lost between the names
    of two formats, and no answer is taken for a question that is not its own."""
    ask, tell = say("user: q", "assistant: a")
    pairs = [("prompt", "completion"), ("question", "answer"), ("instruction", "response")]
    records = [{one: "q", other: "a", "context": "", "input": "i"} for one, other in pairs]
    records += [dict(question="q", answer="a", context="i"), dict(instruction="q", output="a",
                input="", context="i"), dict(instruction="q", output="a", text="t", prompt="p")]
    assert read(tmp_path, *records) == [[ask | {"input": "i"}, tell]] * 5 + [[ask, tell]]
    assert read(tmp_path, *[say_in(role) for role in ("bing", "chatgpt", "bard")]) == [
        say("user: q", "assistant: a")] * 3
    for mixed, message in (
        ({"instruction": "i", "question": "q", "answer": "a"}, 'has no text in "output"'),
        ({"prompt": "q", "answer": "a"}, 'has no text in "completion"'),
        ({"prompt": "q", "chosen": "a"}, 'has a "chosen" answer: call it "completion"'),
        ({"prompt": "q", "chosen": [{}], "rejected": [{}]}, 'has a "chosen" answer: call it "mess'),
        ({"text": "t"}, 'has a "text" and no question: .* --task text'),
        ({"version": 1, "rows": [{}]}, r"in place of a list: keep only its list \(line 1: rows\)"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, mixed)


def say_in(role):
    return {"conversations": [{"from": "human", "value": "q"}, {"from": role, "value": "a"}]}


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, capsys):
    """The reasons with their first three places, for the command and for the run."""
    empty, tool = dict(instruction="a", output=" "), dialogue("user: a", "tool: b", "assistant: c")
    null = {"messages": [dict(role="user", content="a"), dict(role="assistant", content=None)]}
    path = tmp_path / "some.json"
    path.write_text(json.dumps([empty, json.loads(GOOD), *[empty] * 4, json.loads(tool), null, 7]))
    found, notes = instruct.read_instructions(path)
    assert found == [say("user: a", "assistant: b")] and notes == [
        f"{path}: 5 of 9 records left out: each has an empty answer (entry 1, entry 3, entry 4 and "
        "2 more)",
        f"{path}: 1 of 9 records left out: each has a message without a known role (entry 7: "
        "'tool')",
        f'{path}: 1 of 9 records left out: each has a message without text in "content" (entry 8: '
        "None)",
        f"{path}: 1 of 9 records left out: each is not an object (entry 9)",
    ]
    instruct.show(path)
    assert capsys.readouterr().out.startswith("\n".join([*notes, "1 conversations with 1 answers"]))
    path.write_text(json.dumps([empty] * 1000))
    with pytest.raises(InputError) as caught:
        instruct.read_instructions(path)
    assert str(caught.value) == (
        f"{path} has no usable record: data/README.md shows the formats. 1,000 of 1,000 records "
        "left out: each has an empty answer (entry 1, entry 2, entry 3 and 997 more).")


def test_a_run_says_what_it_leaves_out(tiny_model, tmp_path, capsys):
    """Before it trains, in the first lines."""
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([GOOD] * 8 + ['{"instruction": "a"}']))
    run = dict(data=str(path), out_dir=str(tmp_path / "out"), base=str(tiny_model), device="cpu")
    run |= dict(max_iters=1, batch_size=2, sequence_len=96, reduction=4, rank=4)
    train.main(train.TrainConfig(**run))
    note = f'{path}: 1 of 9 records left out: each has no text in "output" (line 9: instruction)\n'
    out = capsys.readouterr().out
    assert note in out[: out.index("trainable")]


def test_oasst1_gives_the_best_path(tmp_path):
    """Of a tree the best answers, the first answered questions, up to an answer."""
    tree = oasst_tree()
    best = [say("user: q", "assistant: a1", "user: q2", "assistant: a3")]
    other = tree | {"tree_state": "growing"}
    alone = {"prompt": {"role": "prompter", "text": "q", "replies": []}}
    assert read(tmp_path, tree, other, alone) == best
    with pytest.raises(InputError, match="not ready for export .*: 'growing'.*question with an a"):
        read(tmp_path, other, alone)
    message = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"}
    with pytest.raises(InputError, match="is one message of OASST1: give its file of trees"):
        read(tmp_path, message)


MISTAKES = [  # what a file holds, and how it is refused
    ("", "holds no instructions"), ("[]", "holds no instructions"), ("[1, 2", "is not JSON"),
    (GOOD + "\n{oops", "line 2 is not JSON"),
    ('\n\n{"instruction": "a"}', r'has no text in "output" \(line 3: instruction\)'),
    ("7", r"is not an object \(line 1\)"), ("null", "is not an object"),
    ('[{"output": "b"}]', r'each has no text in "instruction" \(entry 1: output\)'),
    ('[{}]', r'has no text in "instruction" \(entry 1: empty\)'),
    ('{"instruction": 7, "output": "b"}', r'has no text in "instruction" \(line 1: instruction,'),
    ('{\n"version": 1, "data": [' + GOOD + "]}", r"keep only its list \(entry 1: data\)"),
    ('{"a": 1,\n"b": 2,}', "as a whole is not JSON .*line 2 column 8"),
    ("question,answer", "line 1 is not JSON .*: give a list in JSON, JSON lines, or a .csv"),
    ('{"instruction": "a", "output": "  "}', r"has an empty answer \(line 1\)"),
    ('{"instruction": "a", "output": "b", "input": 3}', r"context that is not text \(line 1: 3\)"),
    ('{"instruction": "a", "response": 7}', 'no text in "response"'),
    ('{"instruction": "a", "response": "b", "context": 7}', "context that is not text"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', r"known role \(line 1: 'robot'\)"),
    ('{"messages": [7]}', "without a known role"), ('{"messages": 7}', "no list"),
    ('{"messages": []}', "no question with an answer"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no question with an answer"),
    ('{"conversations": 7}', 'no list in "conversations"'),
    ('{"conversations": [{"from": "bing", "value": "x"}]}', "no question with an answer"),
    (dialogue("user: a", "assistant: b", "user: c", "assistant: ", "user: d", "assistant: e"),
     "empty answer"),
    (dialogue("user: a", "assistant: b", "assistant: c"), "an answer that follows no question"),
    (dialogue("user: a", "system: b", "assistant: c"), "an answer that follows no question"),
    ('{"prompt": {"role": "prompter", "text": "a", "replies": [7]}}',
     'not a list of messages in "replies"'),
    ('{"instruction": "a", "output": "b", "input": "c", "context": "d"}', 'both an "input" and a'),
]


@pytest.mark.parametrize("text, message", MISTAKES)
def test_a_file_without_a_good_record_is_refused(text, message, tmp_path):
    """The sentence names the file, the line or entry, and what is wrong with it."""
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"data.jsonl.*{message}"):
        instruct.read_instructions(path)

@pytest.mark.parametrize("name, separator", [
    ("some.csv", ","), ("some.TSV", "\t"), ("some.csv", ";"), ("some.csv", "\t"),
])
def test_a_table_is_read_as_its_records_in_json(name, separator, tmp_path):
    """Whatever their cells hold; with a BOM, lines of Windows, empty rows, other columns."""
    cells = ['a, b\tc', 'two\n\nlines', 'say "hi"', "é \u2028 ' \\n", "#=1", " x "]
    names, path = ["id", "context", "answer", "question", "system"], tmp_path / name
    records = [dict(question=q, answer=q[::-1], context=q * (q < "b"), system="", id="7")
               for q in cells]
    for end in ("\n", "\r\n"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, names, delimiter=separator, lineterminator=end)
            table.writeheader()
            file.write(end)
            table.writerows(records)
        assert instruct.read_instructions(path) == (read(tmp_path, *records), [])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").replace(b"\r\r", b"\r"))
    assert instruct.read_instructions(path) == (read(tmp_path, *records), [])


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    """With the lines in which they begin; a good row among them is kept."""
    path = tmp_path / "some.csv"
    path.write_text('question,answer,,\n"a\nb"\n"c\nd",,,\ne,f,,,,\n1,2,,,3\ng\0,h,,\n ,i,,\n')
    found, notes = instruct.read_instructions(path)
    why = "has not one field for each name in the first row, or has a NUL"
    assert found == [say("user: e", "assistant: f")] and notes == [
        f"{path}: 3 of 6 records left out: each {why} (line 2, line 7, line 8)",
        f"{path}: 1 of 6 records left out: each has an empty answer (line 4)",
        f"{path}: 1 of 6 records left out: each has an empty question (line 9)",
    ]


@pytest.mark.parametrize("text, message", [
    ("", "holds no instructions"), ("question,answer\n\n", "holds no instructions"),
    ("who,says\n1,2\n", r'no text in "instruction" \(line 2: who, says\)'),
    ("question|answer\n1|2\n", r"\(line 2: 'question\|answer'\)"),
    ("prompt,chosen,rejected\n1,2,3\n", 'has a "chosen" answer: call it "completion"'),
    ("question,answer,answer\n1,2,3\n", "has two columns of one name: rename one"),
    ("question,answer\n1,2\n\"3\n4,5", "line 3 is not CSV .unexpected end of data"),
    ('question,answer\n"1"2,3\n', "line 2 is not CSV"), ("PAR1", "is Parquet: save it as JSON"),
    (f"question,answer\n1,{'2' * 200_000}\n", "line 2 is not CSV .field larger than field limit"),
    ("question,answer\n1,2\n".encode("utf-16-le").decode(), "has a NUL"),
])
def test_a_table_without_a_good_row_is_refused(text, message, tmp_path):
    """In one sentence with the file, the line, and the names that its first row has."""
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^.*data.csv.*{message}.*$"):  # on one line
        instruct.read_instructions(path)


def test_what_the_template_refuses_is_named(tokenizer):
    """What a template says of turns that it does not take is a note with a count, in both halves of
    the data; so is a template that refuses to begin an answer."""
    cfg = SimpleNamespace(
        held_out=0.5, data_seed=0, max_examples=0, eval_only=False, sequence_len=99, data="x"
    )
    good = [say("user: a", f"assistant: {i}") for i in range(4)]
    bad = [say("user: a", "user: b", "assistant: c")] * 4
    make = lambda text: instruct.make_task(good + bad, tokenizer, ChatTemplate(text), cfg, None)
    task = make(LLAMA2)
    assert len(task.train) + len(task.held_out) == 4
    form = re.compile(r"(\d) (\S+) examples left out: each (.*)")
    notes = [form.fullmatch(note).groups() for note in task.notes]
    assert sum(int(n) for n, *_ in notes) == 4
    assert {why for *_, why in notes} == {"is refused by the chat template: must alternate"}
    own = "{{ raise_exception(messages[0].content) }}"  # another reason for each
    each = [say(f"user: {i}", "assistant: a") for i in range(20)]
    task = instruct.make_task(each, tokenizer, ChatTemplate(own), cfg, None)
    assert len(task.notes) == 12 and not task.train
    assert sum(int(note.split()[0]) for note in task.notes) == 20
    begun = "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    assert not make(begun).train and not make(begun).held_out



def test_looking_into_a_file(tmp_path, capsys):
    """`python data/tasks/instruct.py --data FILE` counts, and shows the first conversation."""
    path = tmp_path / "some.json"
    add = {"instruction": "Add.", "input": "1 2", "output": "3"}
    path.write_text(f'[{json.dumps(add)}, {dialogue(*["user: a", "assistant: b"] * 2)}]')
    instruct.show(path)
    out = capsys.readouterr().out
    assert out.startswith("2 conversations with 3 answers.") and "Add.\n\n1 2\n" in out
    listed = run_script("data/tasks/instruct.py", "--help")
    assert all(name in listed for name in ("Alpaca", "Dolly", "OASST1", "ShareGPT"))
    with pytest.raises(SystemExit, match="^error: no.json is missing"):
        run_script("data/tasks/instruct.py", "--data", "no.json", cwd=tmp_path)


@needs_test_data
def test_real_instructions():
    """Dolly's own file is read."""
    found, notes = instruct.read_instructions(TEST_DATA / "data/instructions/dolly_3k.json")
    assert len(found) > 2900 and not notes
