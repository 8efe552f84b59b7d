"""data/tasks/mt_bench.py and `qst.py answer`: answers in FastChat's form, made or finished."""

import json

import pytest
import torch

import qst
from data import InputError
from data.generate import talk
from data.tasks import mt_bench
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained
from qst import QST
from side import SideConfig

QUESTIONS = [
    {"question_id": 81 + i, "category": category, "turns": [f"Tom {i}?", "And Leo?"]}
    for i, category in enumerate(["writing", "math", "other"])
]


def answer(tiny_model, folder, *flags, questions=QUESTIONS):
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    files = ["--questions", folder / "questions.jsonl", "--out", folder / "mine.jsonl"]
    args = ["--base", tiny_model, *files, "--max_new_tokens", 6, "--quant", "none", *flags]
    qst.main(["answer", *map(str, args)])
    return [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]


def test_answers_are_fastchats(tiny_model, tmp_path):
    """One line a question, in FastChat's fields; the second answer has the first one in view."""
    lines = answer(tiny_model, tmp_path, questions=QUESTIONS[:2])
    assert [line["question_id"] for line in lines] == [81, 82]
    model = from_pretrained(tiny_model, "none", torch.float32)
    tokenizer = load_tokenizer(tiny_model)
    for line, question in zip(lines, QUESTIONS):
        assert sorted(line) == ["answer_id", "choices", "model_id", "question_id", "tstamp"]
        (choice,) = line["choices"]
        assert line["model_id"] == "mine" and choice["index"] == 0
        messages = []
        for text, said in zip(question["turns"], choice["turns"], strict=True):
            messages.append({"role": "user", "content": text})
            ids, _ = chat.ChatTemplate().encode(messages, tokenizer)
            out = model.generate(torch.tensor([ids]), 6, eos_id=tokenizer.eos_ids)[0, len(ids) :]
            messages.append({"role": "assistant", "content": tokenizer.decode(out.tolist())})
            assert said == messages[-1]["content"].strip() != ""


@pytest.mark.parametrize("cut", [0, -1, None])
def test_a_file_of_answers_is_finished(tiny_model, tmp_path, cut):
    """What is there stays what it was and is not asked again, with or without the last line's end;
    and in the end each question has one line."""
    answer(tiny_model, tmp_path, questions=QUESTIONS[:2])
    path = tmp_path / "mine.jsonl"
    one, two = path.read_text().splitlines(keepends=True)
    path.write_text(one + two[:cut])
    lines = answer(tiny_model, tmp_path)
    assert [line["question_id"] for line in lines] == [81, 82, 83]
    text = path.read_text()
    assert text.startswith(one) and text.endswith("\n")
    assert text.startswith(one + two) == (cut in (-1, None))
    for line, earlier in zip(lines, (one, two)):
        assert line["choices"] == json.loads(earlier)["choices"]
    before = path.read_bytes()
    answer(tiny_model, tmp_path)
    assert path.read_bytes() == before


def test_a_crash_leaves_whole_answers(tiny_model, tmp_path, monkeypatch):
    """Wherever it comes, each line is whole, and what was answered before is kept."""
    write, path = mt_bench.write_atomically, tmp_path / "mine.jsonl"

    def crash(path, content):
        if path.exists():
            def half(file):
                content(file)
                raise KeyboardInterrupt
            write(path, half)
        write(path, content)

    monkeypatch.setattr(mt_bench, "write_atomically", lambda name, content: crash(path, content))
    with pytest.raises(KeyboardInterrupt):
        answer(tiny_model, tmp_path)
    monkeypatch.undo()
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["question_id"] == 81
    assert len(answer(tiny_model, tmp_path)) == 3 and path.read_text().startswith(line)


@pytest.mark.parametrize("content, message", [
    ("hello", "line 1 is not JSON"), ('{"question_id": 1}\n', "line 1 is not an answer"),
    ('{"question_id": 1, "turns": ["a"]}', "line 1 is not an answer"),
    ("[{oops\n", "as a whole is not JSON"), ('{"question_id": 8', "line 1 is not JSON"),
    ('{"question_id": 81, "model_id": "yours", "choices": []}\n', "line 1 is an answer of .yours"),
])
def test_another_file_is_not_touched(tiny_model, tmp_path, content, message):
    """--out that holds anything else is refused, and left as it is."""
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=f"mine.jsonl, {message}"):
        answer(tiny_model, tmp_path)
    assert path.read_text() == content


def test_a_file_has_the_answers_of_one_side_checkpoint(tiny_model, tmp_path):
    """Another one, trained in the same folder too, or none, does not continue it, under any name;
    the same one does."""
    folder, path = tmp_path / "side", tmp_path / "mine.jsonl"
    base = from_pretrained(tiny_model, "nf4", torch.float32)

    def save(seed):
        torch.manual_seed(seed)
        QST(base, SideConfig(reduction=4)).save_side(folder)

    ask = lambda *flags, n=3: answer(
        tiny_model, tmp_path, "--quant", "nf4", *flags, questions=QUESTIONS[:n])
    for name, flags in (("mine", []), ("me", ["--model_id", "me"])):
        save(seed=1)
        ask("--side", folder, *flags, n=2)
        before = path.read_bytes()
        ids = {line["model_id"] for line in ask("--side", folder, *flags)}
        assert path.read_bytes().startswith(before) and len(ids) == 1
        before = path.read_bytes()
        save(seed=2)
        message = f"line 1 is an answer of .{name}-.*, not of {name}"
        for side in (["--side", folder], []):
            with pytest.raises(InputError, match=message):
                ask(*side, *flags)
        assert path.read_bytes() == before
        path.unlink()
    with pytest.raises(InputError, match="nowhere/side.safetensors is missing"):
        ask("--side", tmp_path / "nowhere")


def test_questions_that_do_not_fit(tiny_model, tmp_path, capsys):
    """A question that the model has no room for has the answer "", and is named."""
    long = {"question_id": 7, "category": "math", "turns": ["word " * 200, "Tom?"]}
    (line,) = answer(tiny_model, tmp_path, questions=[long])
    first, second = line["choices"][0]["turns"]
    assert first == "" and second
    assert "question 7, turn 1 has" in capsys.readouterr().err
    for name, value in (("--max_new_tokens", 0), ("--top_p", 3)):
        (tmp_path / "mine.jsonl").unlink(missing_ok=True)
        with pytest.raises(InputError, match=f"{name.removeprefix('--')} {value}"):
            answer(tiny_model, tmp_path, name, value)
    with pytest.raises(InputError, match='questions.jsonl, line 2 has no "question_id"'):
        answer(tiny_model, tmp_path, questions=[long, {"question_id": 8, "turns": []}])


def test_fastchats_temperatures(tiny_model, tmp_path, monkeypatch):
    """With the flag, each category has FastChat's temperature; without, all have --temperature."""
    seen = []
    say_nothing = lambda *args: seen.append(args[-1].temperature) or iter([])
    monkeypatch.setattr(talk, "stream_ids", say_nothing)
    answer(tiny_model, tmp_path, "--fastchat_temperatures")
    assert seen == [0.7, 0.7, 0.0, 0.0, 0.7, 0.7]
    seen.clear()
    (tmp_path / "mine.jsonl").unlink()
    answer(tiny_model, tmp_path, "--temperature", 0.3)
    assert seen == [0.3] * 6
