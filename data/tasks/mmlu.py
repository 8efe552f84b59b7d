"""MMLU (arXiv 2009.03300): questions of 57 subjects, each with four choices, answered from 5 shots.

A folder is as in the authors' data.tar: dev/, val/ and test/ with <subject>_<split>.csv, no header,
in each row the question, four choices and the letter of the right one; data/ may stand around it.
The shots are the subject's questions in dev/. The wording is the authors' own, to the letter: two
spaces before the subject, and " A" after "Answer:".

What we do differently from the authors' evaluate_hf.py
    - The four answers are compared by the ids that the tokenizer gives " A" ... " D" behind the
      prompt. Theirs takes the ids of "A" ... "D" alone, which are other tokens in byte-level BPE.
    - Every prompt begins with bos, as in training; theirs does where the tokenizer's settings say.
    - The csv's fields are taken as they stand. Pandas makes nan of "None", and 0.5 of "0.50".

A prompt that is too long loses shots from the end, as theirs does. One that is too long without
any keeps bos and its end, with the choices, if not the beginning of its question. Both are counted.

    python data/tasks/mmlu.py --data FOLDER          counts, and the first prompt
    python data/tasks/mmlu.py --download FOLDER
"""

import csv
import io
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data import InputError
from data.formats.fields import reason, shown
from data.formats.files import read_text
from data.tasks import instruct
from data.tasks.examples import Task
from data.tasks.scoring import choice_logits

CATEGORIES = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science"
        " college_mathematics college_physics computer_security conceptual_physics"
        " electrical_engineering elementary_mathematics high_school_biology high_school_chemistry"
        " high_school_computer_science high_school_mathematics high_school_physics"
        " high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history"
        " high_school_world_history international_law jurisprudence logical_fallacies"
        " moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics"
        " high_school_macroeconomics high_school_microeconomics high_school_psychology"
        " human_sexuality professional_psychology public_relations security_studies sociology"
        " us_foreign_policy"
    ),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging"
        " management marketing medical_genetics miscellaneous nutrition professional_accounting"
        " professional_medicine virology"
    ),
}
CATEGORY = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects.split()}
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple  # four texts
    answer: int  # the index of the right one


# --------------------------------------------------------------------------------------
# Reading


def read(folder, split):
    """Read all subjects that a folder has: {subject: [Question, ...]}, in alphabetical order."""
    folder = Path(folder)
    root = folder / "data" if (folder / "data").is_dir() else folder
    paths = sorted((root / split).glob(f"*_{split}.csv"))
    if not paths:
        raise InputError(
            f"{root / split} has no file named <subject>_{split}.csv: get MMLU with"
            f" python data/tasks/mmlu.py --download {folder}"
        )
    questions = {}
    for path in paths:
        subject = path.name.removesuffix(f"_{split}.csv")
        if subject not in CATEGORY:
            raise InputError(f"{path} is of none of MMLU's {len(CATEGORY)} subjects.")
        questions[subject] = read_csv(path)
    return questions


def read_csv(path):
    """Read one file's questions."""
    questions, line = [], 1
    reader = csv.reader(io.StringIO(read_text(path, newline=""), newline=""), strict=True)
    try:
        for row in reader:
            if row:
                questions.append(question(row, f"{path}, line {line}"))
            line = reader.line_num + 1  # a quoted field may hold several lines
    except csv.Error as error:
        raise InputError(f"{path}, line {line} is not CSV ({reason(error)}).") from None
    if not questions:
        raise InputError(f"{path} holds no questions.")
    return questions


def question(row, where):
    """Check a row and turn it into a `Question`."""
    if len(row) != 6:
        raise InputError(f"{where} has {len(row)} columns instead of 6.")
    text, *choices, answer = row
    if answer not in tuple(LETTERS):
        raise InputError(f"{where} has the answer {shown(answer)}, which is none of A, B, C and D.")
    return Question(text, tuple(choices), LETTERS.index(answer))


# --------------------------------------------------------------------------------------
# Prompts


def ask(question):
    """A question with its choices, up to where the answer goes."""
    choices = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))
    return question.text + "".join(choices) + "\nAnswer:"


def prompt(subject, shots, question):
    """The heading, the shots with their answers, and the question."""
    name = subject.replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
    return heading + "".join(f"{ask(s)} {LETTERS[s.answer]}\n\n" for s in shots) + ask(question)


def encode(subject, shots, question, tokenizer, room):
    """The prompt's ids, at most `room`, and how many shots there was room for; -1: no room even
    for the question, which has lost its beginning."""
    for kept in range(len(shots), -1, -1):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt(subject, shots[:kept], question))]
        if len(ids) <= room:
            return ids, kept
    return ids[:1] + ids[len(ids) - room + 1 :], -1


def answer_ids(tokenizer, text):
    """The ids of " A" ... " D" behind a prompt, one each.

    Found in their place: sentencepiece begins every text with a space of its own, so that " A" by
    itself would be two tokens.
    """
    before, ids = tokenizer.encode(text), []
    for letter in LETTERS:
        *head, last = tokenizer.encode(f"{text} {letter}")
        if head != before:
            raise InputError(
                f'MMLU cannot be asked: this tokenizer does not make " {letter}" one token behind '
                f'"Answer:", as those of larger vocabularies do.'
            )
        ids.append(last)
    return ids


# --------------------------------------------------------------------------------------
# Evaluation


def answer_logits(models, tokenizer, subject, shots, questions, room, batch_size):
    """Each model's logits of A to D for one subject's questions, (n, 4), and how many shots each
    question kept."""
    encoded = [encode(subject, shots, q, tokenizer, room) for q in questions]
    ids = answer_ids(tokenizer, prompt(subject, shots, questions[0]))
    prompts, kept = zip(*encoded)
    logits = choice_logits(models, list(prompts), ids, batch_size, desc=subject)
    return logits, kept


def evaluate(
    models, tokenizer, folder, split="test", shots=5, sequence_len=2048, batch_size=8,
    max_examples=0,
):
    """Answer a split's questions, or `max_examples` of them, drawn by a fixed seed.

    models: a `Beside`
    returns of each model "accuracy" (mean over all questions), "accuracy_by_category" and
    "accuracy_by_subject" (each of those that the folder has), "examples", "subjects" (how many),
    "shortened" and "cut": prompts that lost shots, and prompts that lost some of their question too
    """
    tests = draw(read(folder, split), max_examples)
    dev = read_shots(folder, tests, shots)
    room = min(sequence_len, models.config.max_positions)
    right, shortened, cut = [{} for _ in models.models], 0, 0
    for subject, questions in tests.items():
        logits, kept = answer_logits(
            models, tokenizer, subject, dev[subject], questions, room, batch_size
        )
        answers = torch.tensor([q.answer for q in questions])
        for marks, each in zip(right, logits):
            marks[subject] = (each.argmax(dim=1) == answers).tolist()
        shortened += sum(0 <= k < shots for k in kept)
        cut += kept.count(-1)
    return [dict(summary(marks), shortened=shortened, cut=cut) for marks in right]


def draw(tests, most):
    """Take `most` questions (0: all) of all subjects together, and keep their order."""
    every = [(subject, q) for subject, questions in tests.items() for q in questions]
    if 0 < most < len(every):
        every = [every[i] for i in sorted(random.Random(0).sample(range(len(every)), most))]
    drawn = {}
    for subject, q in every:
        drawn.setdefault(subject, []).append(q)
    return drawn


def read_shots(folder, subjects, shots):
    """The first questions of dev/ for each subject: {subject: [Question, ...]}."""
    if not shots:
        return {subject: [] for subject in subjects}
    dev = read(folder, "dev")
    for subject in subjects:
        if (found := len(dev.get(subject, []))) < shots:
            raise InputError(
                f"{folder}: {subject}_dev.csv has {found} questions, but {shots} shots are asked"
                " for."
            )
    return {subject: dev[subject][:shots] for subject in subjects}


def summary(right):
    """Accuracies from {subject: [is it right?, ...]}: every question counts the same."""
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
        subjects=len(right),
    )


def load(cfg, tokenizer):
    """The paper's experiment: learn from --instructions, and answer MMLU: `Task`."""
    read(cfg.data, "test")  # a mistake is better found before hours of training

    def score(models):
        return evaluate(
            models, tokenizer, cfg.data, sequence_len=cfg.sequence_len, batch_size=cfg.batch_size,
            max_examples=cfg.score_examples,
        )

    if cfg.eval_only:
        return Task([], [], score)
    if not cfg.instructions:
        raise InputError(
            "--task mmlu trains on --instructions, such as Alpaca's alpaca_data.json, and tests on "
            "--data; or give --eval_only."
        )
    task = instruct.load(replace(cfg, data=cfg.instructions), tokenizer)
    return replace(task, score=score)


# --------------------------------------------------------------------------------------
# The command line


def show(folder):
    """Count the test questions of an MMLU folder, and print the first prompt."""
    tests = read(folder, "test")
    for subject, questions in tests.items():
        print(f"{len(questions):5} {subject} ({CATEGORY[subject]})")
    total, first = sum(map(len, tests.values())), next(iter(tests))
    print(f"{total:5} questions in {len(tests)} of the {len(CATEGORY)} subjects\n")
    print(prompt(first, read_shots(folder, [first], 5)[first], tests[first][0]))


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "MMLU")
