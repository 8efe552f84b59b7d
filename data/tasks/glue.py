"""GLUE (arXiv 1804.07461): eight tasks with one or two sentences, from the benchmark's .tsv files.

`--head` chooses between two methods
    classifier   a classifier on the last token's hidden state, trained with the side network, as
                 in the released code. STS-B's rating is a regression.
    lm           a prompt, and the frozen LM head's next token among the label words. `--shots K`
                 puts K few-shot examples into the prompt.

The loss on a tenth of train.tsv chooses the side network that is kept. dev.tsv gives the score.
"""

import json
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data import IGNORE_INDEX, InputError
from data.formats.fields import shown
from data.formats.files import read_text
from data.tasks.examples import Task, split
from data.tasks.metrics import METRICS
from data.tasks.scoring import choice_logits, word_ids

HIGHEST = 5.0  # the highest rating of STS-B
RATING = re.compile(r"[0-4](\.[0-9]*)?|5(\.0*)?")
ANSWER = "\nAnswer:"


class Form(NamedTuple):
    """The layout of a task's files, and its prompt: a row of glue.json."""

    folder: str
    columns: tuple  # the names of the sentences' columns, and last the label's
    heading: str  # the instruction: it comes first, since a causal model only looks back
    question: str  # {0} and {1} are the sentences
    labels: tuple = ("0", "1")  # as the files spell them, in the order of the classes; (): a rating
    words: tuple = ("no", "yes")  # the label words, in the same order
    metrics: tuple = ("accuracy",)
    dev: str = "dev.tsv"
    header: tuple = ()  # for files without one


TABLE = json.loads(Path(__file__).with_name("glue.json").read_text())
FORMS = {task: Form(**fields) for task, fields in TABLE.items()}
FORMS["mnli-mm"] = FORMS["mnli"]._replace(dev="dev_mismatched.tsv")


def lines_of(path, form):
    """Read a file's lines, with their numbers. What is downloaded for MRPC is another file: the
    corpus, beside a list of the pairs of ids that are in GLUE's dev.tsv."""
    corpus, has = path.with_name("msr_paraphrase_train.txt"), lambda line: True
    if corpus.exists() and not path.exists():
        dev = {*read_text(path.with_name("mrpc_dev_ids.tsv")).split("\n")}
        path, is_dev = corpus, path.name == "dev.tsv"
        has = lambda line: ("\t".join(line.split("\t")[1:3]) in dev) == is_dev
    text = read_text(path, f"give --data the folder of GLUE's {form.folder}")
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if i == 1 or has(line)]


def read(path, form):
    """Read the rows of a .tsv file: ([(sentences, label), ...], number of lines left out).

    A label is the class's number, or STS-B's rating. Quotes are text, as in GLUE's own files.
    Lines with fewer columns than the header are left out: QQP has a few.
    """
    lines = [(i, line.split("\t")) for i, line in lines_of(path, form) if line.strip()]
    header = form.header or (lines.pop(0)[1] if lines else [])
    if missing := [name for name in form.columns if name not in header]:
        raise InputError(f'{path} has no column "{missing[0]}": is it GLUE\'s {form.folder}?')
    rows = []
    for i, fields in lines:
        if len(fields) >= len(header):
            *sentences, text = (fields[header.index(name)] for name in form.columns)
            if text in form.labels:
                target = form.labels.index(text)
            elif not form.labels and RATING.fullmatch(text):
                target = float(text)
            else:
                known = ", ".join(form.labels) or f"a number from 0 to {HIGHEST:g}"
                raise InputError(f"{path}, line {i}: the label {shown(text)} is not {known}.")
            rows.append(([sentence.strip() for sentence in sentences], target))
    if not rows:
        raise InputError(f"{path} holds no examples.")
    return rows, len(lines) - len(rows)


def files(data, form):
    """Find the folder with a task's files: --data itself, or the folder in it."""
    folder = Path(data) / form.folder
    return folder if folder.is_dir() else Path(data)


def take_shots(rows, number):
    """Take the first rows of each class in turn."""
    if number > len(rows):
        raise InputError(f"--shots {number} is more than the {len(rows)} examples: give less.")
    classes = {}
    for row in rows:
        classes.setdefault(row[1], []).append(row)
    return [row for turn in zip_longest(*classes.values()) for row in turn if row][:number]


def answered(sentences, target, form):
    """Write a few-shot example: the question and its answer."""
    return f"{form.question.format(*sentences)}{ANSWER} {form.words[round(target)]}\n\n"


def preamble_of(shots, form):
    """Write what all prompts begin with: the heading and the few-shot examples."""
    return "".join([form.heading, "\n\n", *(answered(*shot, form) for shot in shots)])


def prompt(sentences, form, tokenizer, sequence_len, preamble):
    """Encode a question in at most `sequence_len` ids. The longer sentence loses its end.

    preamble: comes before the question; None for a classifier, which takes bos and the bare
        sentence for each sentence, as LLaMA's and OPT's tokenizers join a pair
    """
    sentences, bos = list(sentences), [tokenizer.bos_id]

    def encode():
        if preamble is None:
            return [id for sentence in sentences for id in bos + tokenizer.encode(sentence)]
        return bos + tokenizer.encode(preamble + form.question.format(*sentences) + ANSWER)

    while (over := len(ids := encode()) - sequence_len) > 0:
        longest = max(range(len(sentences)), key=lambda i: len(sentences[i]))
        if not sentences[longest]:
            why = f"--sequence_len {sequence_len} is too short even without the sentences"
            raise InputError(f"{why}: give more, or fewer --shots.")
        # A character has at most four tokens, its bytes: this never cuts more than needed.
        sentences[longest] = sentences[longest][: -max(1, over // 4)]
    return ids


def metrics(logits, rows, form):
    """Compute a task's metrics. logits: fp64, (n, classes or label words), or (n, 1) for ratings"""
    labels = torch.tensor([label for _, label in rows]).double()
    if form.labels:
        predicted = logits.argmax(dim=1).double()
    elif logits.shape[1] == 1:
        predicted = logits[:, 0] * HIGHEST
    else:  # the expected rating under the probabilities of the label words
        predicted = logits.softmax(dim=1) @ torch.arange(6.0, dtype=torch.float64)
    found = {name: METRICS[name](predicted, labels) for name in form.metrics}
    if "accuracy" in form.metrics:
        found["majority_class"] = labels.unique(return_counts=True)[1].max().item() / len(labels)
    return {**found, "examples": len(rows)}


def load(cfg, tokenizer):
    """Read train.tsv and dev.tsv, and return the `Task`."""
    form = FORMS[cfg.task]
    data = files(cfg.data, form)
    dev, dropped = read(data / form.dev, form)
    dev = dev[: cfg.score_examples or None]
    known = cfg.side and cfg.preamble.startswith(form.heading)  # and not another task's preamble
    needed = not cfg.eval_only or cfg.shots and not known
    rows, more = read(data / "train.tsv", form) if needed else ([], 0)
    notes = [f"{dropped + more} lines with too few columns left out"] if dropped + more else []
    choices = preamble = None
    if cfg.head == "lm":
        choices = word_ids(tokenizer, form.words, ANSWER)
        preamble = cfg.preamble if known else preamble_of(take_shots(rows, cfg.shots), form)
    encode = lambda sentences: prompt(sentences, form, tokenizer, cfg.sequence_len, preamble)

    def example(sentences, target):
        if choices:
            target = choices[round(target)]
        elif not form.labels:
            target = target / HIGHEST
        ids = encode(sentences)
        return ids, [IGNORE_INDEX] * (len(ids) - 1) + [target]

    prompts = [encode(sentences) for sentences, _ in dev]

    def score(models):
        logits = choice_logits(models, prompts, choices, 2 * cfg.batch_size, desc=form.folder)
        return [metrics(each.double(), dev, form) for each in logits]

    about = score, 0 if choices else len(form.labels) or 1, notes, preamble or ""
    if cfg.eval_only:
        return Task([], [example(*row) for row in dev], *about)
    parts = split(rows, cfg.held_out, cfg.data_seed, cfg.max_examples)
    is_shot = lambda row: choices and answered(*row, form) in preamble  # it is not trained on
    return Task(*([example(*row) for row in part if not is_shot(row)] for part in parts), *about)


def show(folder):
    """Count the examples of each task of GLUE in a folder, and print one example per task."""
    found = False
    for task, form in FORMS.items():
        where = files(folder, form)
        if Path(os.path.abspath(where)).name == form.folder:  # --data may be one task's folder
            train, dev = (read(where / name, form)[0] for name in ("train.tsv", form.dev))
            print(f"{task}: {len(train)} to train on, {len(dev)} to score. {dev[0]}")
            found = True
    if not found:
        names = ", ".join(f"{form.folder}/{form.dev}" for form in FORMS.values())
        raise InputError(f"{folder} has none of {names}: give GLUE's folder, or one task's folder.")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "RTE", "MRPC", "STS-B", "CoLA", "SST-2", "QNLI", "QQP", "MNLI")
