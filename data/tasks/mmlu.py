"""MMLU (arXiv 2009.03300): questions of 57 subjects with four choices each, asked with 5 shots.

A folder has the authors' layout: dev/<subject>_dev.csv and test/<subject>_test.csv, or both in
data/. A row has the question, four choices and the right letter. The shots are the subject's first
questions in dev/. The wording is the authors' own, with two spaces before the subject.

Differences from the authors' evaluate_hf.py
    - Answers are compared by the ids of " A" ... " D" after the prompt. The authors take the ids
      of "A" ... "D", which are other tokens in byte-level BPE.
    - Every prompt begins with bos, as in training. The authors leave bos to the tokenizer.
    - The csv fields are not converted. Pandas turns "None" into nan, and "0.50" into 0.5.

A prompt that is too long loses shots from the end, as in the authors' code. If it is too long
without shots, its question loses the beginning. Both cases are counted.
"""

import json
import random
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data import InputError
from data.formats.fields import shown
from data.tasks import instruct
from data.tasks.examples import Task
from data.tasks.scoring import choice_logits, word_ids

CATEGORIES = json.loads(Path(__file__).with_name("mmlu.json").read_text())  # {name: its subjects}
CATEGORY = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}
LETTERS = "ABCD"
SHOTS = 5
Question = namedtuple("Question", "text choices answer")  # four choices; answer: an index


def read(folder, split):
    """Read all subjects of a folder: {subject: [Question, ...]}, in alphabetical order."""
    folder = Path(folder)
    root = folder / "data" if (folder / "data").is_dir() else folder
    paths = sorted((root / split).glob(f"*_{split}.csv"))
    if not paths:
        raise InputError(f"{root / split} has no *_{split}.csv: try data/tasks/mmlu.py --download.")
    found = {path.name.removesuffix(f"_{split}.csv"): path for path in paths}
    if unknown := [path for subject, path in found.items() if subject not in CATEGORY]:
        raise InputError(f"{unknown[0]} belongs to none of MMLU's {len(CATEGORY)} subjects.")
    return {subject: read_csv(path) for subject, path in found.items()}


def read_csv(path):
    questions = []
    for line, row in instruct.csv_rows(path, newline=""):
        if len(row) != 6:
            raise InputError(f"{path}, line {line} has {len(row)} columns instead of 6.")
        text, *choices, answer = row
        if answer not in tuple(LETTERS):
            raise InputError(f"{path}, line {line} has the answer {shown(answer)}, not A to D.")
        questions.append(Question(text, tuple(choices), LETTERS.index(answer)))
    if not questions:
        raise InputError(f"{path} holds no questions.")
    return questions


def read_shots(folder, subjects):
    """Read the first questions of dev/ for each subject: {subject: [Question, ...]}."""
    dev = read(folder, "dev")
    for subject in subjects:
        if (found := len(dev.get(subject, []))) < SHOTS:
            raise InputError(f"{folder}: {subject}_dev.csv has {found} of the {SHOTS} shots.")
    return {subject: dev[subject][:SHOTS] for subject in subjects}


def draw(tests, most):
    """Draw `most` questions (0: all) from all subjects together by a fixed seed, in their order."""
    every = [(subject, q) for subject, questions in tests.items() for q in questions]
    if 0 < most < len(every):
        every = [every[i] for i in sorted(random.Random(0).sample(range(len(every)), most))]
    found = {name: [q for subject, q in every if subject == name] for name in tests}
    return {name: questions for name, questions in found.items() if questions}


def ask(question):
    """Write a question with its choices, up to the place of the answer."""
    choices = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))
    return question.text + "".join(choices) + "\nAnswer:"


def prompt(subject, shots, question):
    name = subject.replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
    return heading + "".join(f"{ask(s)} {LETTERS[s.answer]}\n\n" for s in shots) + ask(question)


def encode(subject, shots, question, tokenizer, room):
    """Encode a prompt in at most `room` ids: (ids, shots that fit; -1 if the question was cut)."""
    for kept in range(len(shots), -1, -1):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt(subject, shots[:kept], question))]
        if len(ids) <= room:
            return ids, kept
    return ids[:1] + ids[len(ids) - room + 1 :], -1


def evaluate(models, tokenizer, folder, sequence_len=2048, batch_size=8, max_examples=0):
    """Answer the test questions, or `max_examples` of them: a dict of accuracies and counts per
    model. models: a `SharedBase`; "shortened" counts prompts that lost shots, "cut" those that
    lost a part of their question."""
    tests = draw(read(folder, "test"), max_examples)
    dev = read_shots(folder, tests)
    room = min(sequence_len, models.config.max_positions)
    right, fitting = [{} for _ in models.models], []
    for subject, questions in tests.items():
        shots = dev[subject]
        prompts, kept = zip(*[encode(subject, shots, q, tokenizer, room) for q in questions])
        fitting += kept
        choices = word_ids(tokenizer, LETTERS, prompt(subject, shots, questions[0]))
        logits = choice_logits(models, list(prompts), choices, batch_size, desc=subject)
        answers = torch.tensor([q.answer for q in questions])
        for marks, each in zip(right, logits):
            marks[subject] = (each.argmax(dim=1) == answers).tolist()
    shortened, cut = sum(0 <= kept < SHOTS for kept in fitting), fitting.count(-1)
    return [dict(summary(marks), shortened=shortened, cut=cut) for marks in right]


def summary(right):
    """Compute accuracies from {subject: [is it right?, ...]}. Every question counts the same."""
    by_category = {}
    for subject, marks in right.items():
        by_category.setdefault(CATEGORY[subject], []).extend(marks)
    every = sum(right.values(), [])
    mean = lambda marks: sum(marks) / len(marks)
    return dict(
        accuracy=mean(every),
        accuracy_by_category={name: mean(by_category[name]) for name in sorted(by_category)},
        accuracy_by_subject={subject: mean(marks) for subject, marks in right.items()},
        examples=len(every),
    )


def load(cfg, tokenizer):
    """Make the paper's experiment, a `Task`: train on --instructions, and answer MMLU."""
    read(cfg.data, "test")  # find a mistake now, and not after hours of training
    limits = cfg.sequence_len, cfg.batch_size, cfg.score_examples
    score = lambda models: evaluate(models, tokenizer, cfg.data, *limits)
    if cfg.eval_only:
        return Task([], [], score)
    if not cfg.instructions:
        advice = "give --instructions alpaca_data.json, or --eval_only to test without training"
        raise InputError(f"--task mmlu trains on --instructions, and tests on --data: {advice}.")
    return replace(instruct.load(replace(cfg, data=cfg.instructions), tokenizer), score=score)


def show(folder):
    """Count the test questions of an MMLU folder, and print the first prompt."""
    tests = read(folder, "test")
    total, first = sum(map(len, tests.values())), next(iter(tests))
    print(f"{total} questions in {len(tests)} of the {len(CATEGORY)} subjects\n")
    print(prompt(first, read_shots(folder, [first])[first], tests[first][0]))


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "MMLU")
