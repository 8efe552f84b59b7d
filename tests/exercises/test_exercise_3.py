"""Exercise 3: a task from a CSV of questions and answers.

Spreadsheets leave files of this kind, in which a cell in quotes may hold commas and line breaks:

    question,answer
    "What is 2 + 2?",4

Write a file in data/tasks/ with a function `load(cfg, tokenizer)` that returns a `Task`, and
name it "csv" in TASKS of data/__init__.py. It learns to answer as --task instruct does, for which
`instruct.make_task` does most, and its score is `exact_match`, the fraction of held-out answers
that are right in every letter, as of the embedded default. A file without one of the two columns is
refused with an `InputError` that names the file and the column. Try it with a table of your own:

    python train.py --base FOLDER --task csv --data FILE.csv
"""

import csv
import json

import pytest
import torch

import train
from data import TASKS, InputError, leaf
from data.tasks import tiny
from model import from_pretrained
from qst import SharedBase
from train import TrainConfig

pytestmark = pytest.mark.skipif("csv" not in TASKS, reason='TASKS has no "csv" yet')
RECORDS = [dict(question=r["instruction"], answer=r["output"]) for r in tiny.task(30, seed=3)]
RECORDS[0] = dict(question='Say "yes",\nor no, twice.', answer="yes, yes")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ["id", "answer", "question"])  # in any order, and more of them
        rows.writeheader()
        rows.writerows(dict(record, id=i) for i, record in enumerate(RECORDS))
    return path


def load(task, path, tiny_model, **changes):
    settings = dict(base=str(tiny_model), data=str(path), task=task, sequence_len=100, reduction=4)
    cfg = train.resolve(TrainConfig(**settings | changes))
    return leaf(task).load(cfg, train.load_tokenizer(tiny_model))


def test_it_learns_from_the_same_examples(path, tiny_model, tmp_path):
    """Those that --task instruct has of the same questions in JSON, split in the same way."""
    lines = [dict(instruction=r["question"], output=r["answer"]) for r in RECORDS]
    (tmp_path / "same.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own, same = load("csv", path, tiny_model), load("instruct", tmp_path / "same.jsonl", tiny_model)
    assert (own.train, own.held_out) == (same.train, same.held_out) and len(own.held_out) == 3


def test_its_score(path, tiny_model, monkeypatch):
    """Of three held-out answers, those that are right in every letter."""
    task = load("csv", path, tiny_model)
    right = {record["question"]: record["answer"] for record in RECORDS}

    tokenizer = train.load_tokenizer(tiny_model)

    def generate(model, idx, *args, **more):
        prompts = [tokenizer.decode(row.tolist()) for row in idx]
        said = [next(a for q, a in right.items() if q in prompt) for prompt in prompts]
        said[1] += "."
        rows = [tokenizer.encode(text) for text in said]
        rows = [row + [tokenizer.eos_id] * (max(map(len, rows)) - len(row)) for row in rows]
        return torch.cat([idx, torch.tensor(rows)], dim=1)

    monkeypatch.setattr("model.LanguageModel.generate", generate)
    (found,) = task.score(SharedBase([from_pretrained(tiny_model, "nf4", torch.float32)]))
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_a_file_that_is_no_such_table(path, tiny_model):
    """It is refused by its name and what it lacks."""
    path.write_text("question,reply\nWho?,Me\n")
    with pytest.raises(InputError, match="table.csv.*answer"):
        load("csv", path, tiny_model)
