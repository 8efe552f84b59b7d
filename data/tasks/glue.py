"""GLUE (arXiv 1804.07461): eight tasks of one sentence or two, from the benchmark's own .tsv files.

Two ways to ask, `--head`
    classifier   as the released code does: the bare sentences, each after a bos token, and a
                 classifier on the last token's state, trained with the side network; STS-B's rating
                 is a regression
    lm           a question in words, and the frozen LM head's next token among the label words.
                 With --shots K so many training examples and their answers stand before it: a
                 frozen model learns from them what is asked, and its states say more of it

The loss on a tenth of train.tsv chooses the side network that is kept; the score is that of all of
dev.tsv, which nothing was chosen by.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data import InputError
from data.formats.fields import shown
from data.formats.files import read_text, write_atomically
from data.tasks.examples import Task, label, split
from data.tasks.metrics import METRICS
from data.tasks.scoring import choice_logits, word_ids

RATING = 5.0  # STS-B's largest


@dataclass(frozen=True)
class Form:
    """Where a task's parts stand in its files, and how it is asked in words."""

    folder: str
    columns: tuple  # the sentences, and last the label
    labels: tuple  # as the files spell them, in the order of the classes
    words: tuple  # that answer the question, in the same order
    heading: str  # what to do, before all: a causal model reads the sentences with it in mind
    question: str  # {0} and {1} are the sentences
    metrics: tuple
    dev: str = "dev.tsv"


YES_NO = ("no", "yes")
SENTENCES = ("sentence1", "sentence2")
FORMS = {
    "rte": Form("RTE", (*SENTENCES, "label"), ("not_entailment", "entailment"), YES_NO,
                "Say whether the claim follows from the text.", "Text: {0}\nClaim: {1}",
                ("accuracy",)),
    "mrpc": Form("MRPC", ("#1 String", "#2 String", "Quality"), ("0", "1"), YES_NO,
                 "Say whether both sentences say the same.", "First: {0}\nSecond: {1}",
                 ("accuracy", "f1")),
    "stsb": Form("STS-B", (*SENTENCES, "score"), (),
                 ("zero", "one", "two", "three", "four", "five"),
                 "Say how similar both sentences are, from zero to five.",
                 "First: {0}\nSecond: {1}", ("pearson", "spearman")),
    "cola": Form("CoLA", (3, 1), ("0", "1"), YES_NO,
                 "Say whether the sentence is good English.", "Sentence: {0}", ("matthews",)),
    "sst2": Form("SST-2", ("sentence", "label"), ("0", "1"), ("bad", "good"),
                 "Say whether the film review is good or bad.", "Review: {0}", ("accuracy",)),
    "qnli": Form("QNLI", ("question", "sentence", "label"), ("not_entailment", "entailment"),
                 YES_NO, "Say whether the text answers the question.",
                 "Question: {0}\nText: {1}", ("accuracy",)),
    "qqp": Form("QQP", ("question1", "question2", "is_duplicate"), ("0", "1"), YES_NO,
                "Say whether both ask the same.", "First: {0}\nSecond: {1}", ("accuracy", "f1")),
    "mnli": Form("MNLI", (*SENTENCES, "gold_label"), ("entailment", "neutral", "contradiction"),
                 ("yes", "maybe", "no"),
                 "Say whether the claim follows from the text, or may be true.",
                 "Text: {0}\nClaim: {1}", ("accuracy",), "dev_matched.tsv"),
}
FORMS["mnli-mm"] = Form(**{**vars(FORMS["mnli"]), "dev": "dev_mismatched.tsv"})
ANSWER = "\nAnswer:"

# --------------------------------------------------------------------------------------
# Reading and asking


def read(path, form):
    """Rows of a .tsv file: ([(sentences, label), ...], how many lines were left out).

    label: the class's number, or STS-B's rating. Quotes are text, as in GLUE's own files. A line
    with fewer columns than the header, as a few of QQP's have, is left out.
    """
    advice = f"give --data the folder of GLUE's {form.folder}"
    lines = read_text(path, advice).split("\n")
    lines = [(i, line.rstrip("\r").split("\t")) for i, line in enumerate(lines, 1) if line.strip()]
    columns, width = form.columns, 4
    if isinstance(columns[0], str):
        header = lines.pop(0)[1] if lines else []
        if missing := [name for name in columns if name not in header]:
            raise InputError(f'{path} has no column "{missing[0]}": is it GLUE\'s {form.folder}?')
        columns, width = [header.index(name) for name in columns], len(header)
    whole = [(i, fields) for i, fields in lines if len(fields) >= width]
    rows = [
        ([fields[c].strip() for c in columns[:-1]], parse_label(path, i, fields[columns[-1]], form))
        for i, fields in whole
    ]
    if not rows:
        raise InputError(f"{path} holds no examples.")
    return rows, len(lines) - len(whole)


def files(data, form):
    """The folder with a task's files: --data itself, or the one in it."""
    folder = Path(data) / form.folder
    folder = folder if folder.is_dir() else Path(data)
    if (folder / "msr_paraphrase_train.txt").exists() and not (folder / "dev.tsv").exists():
        split_mrpc(folder)
    return folder


def split_mrpc(folder):
    """Make MRPC's train.tsv and dev.tsv, as GLUE does, of the corpus and a list of pairs of ids."""
    ids, corpus = folder / "mrpc_dev_ids.tsv", folder / "msr_paraphrase_train.txt"
    pairs = {tuple(line.split("\t")) for line in read_text(ids).split("\n")}
    header, *lines = read_text(corpus).split("\n")
    parts = {"train.tsv": [header], "dev.tsv": [header]}
    for line in filter(None, lines):
        parts["dev.tsv" if tuple(line.split("\t")[1:3]) in pairs else "train.tsv"].append(line)
    columns = set(FORMS["mrpc"].columns) <= set(header.split("\t"))
    if not columns or len(parts["dev.tsv"]) == 1:
        raise InputError(f"{corpus} has no line of those that {ids} names: get both files anew.")
    for name, rows in parts.items():
        text = "\n".join(rows) + "\n"
        write_atomically(folder / name, lambda file: file.write(text.encode()))


def parse_label(path, line, text, form):
    """A label's class, or a rating."""
    known = ", ".join(form.labels) or f"a number from 0 to {RATING:g}"
    if text in form.labels:
        return form.labels.index(text)
    if not form.labels and re.fullmatch(r"\d(\.\d*)?", text, re.ASCII) and float(text) <= RATING:
        return float(text)
    raise InputError(f"{path}, line {line}: the label {shown(text)} is not {known}.")


def take_shots(rows, number):
    """Of the rows as `read` finds them, the first of each class in turn."""
    classes = {}
    for row in rows:
        classes.setdefault(row[1], []).append(row)
    in_turn = [row for turn in zip_longest(*classes.values()) for row in turn if row]
    if number > len(in_turn):
        raise InputError(f"--shots {number} is more than the {len(rows)} examples: give less.")
    return in_turn[:number]


def answered(sentences, target, form):
    """A shot: the question and its answer."""
    return f"{form.question.format(*sentences)}{ANSWER} {form.words[round(target)]}\n\n"


def preamble_of(shots, form):
    """What stands before every question: what is asked, and the shots with their answers."""
    return "".join([form.heading, "\n\n", *(answered(*shot, form) for shot in shots)])


def prompt(sentences, form, tokenizer, sequence_len, head, preamble=""):
    """Ids, at most `sequence_len`: of what is too long, the longer sentence loses its end.

    In words: the preamble and the question. A classifier reads a bos token before each sentence,
    which is how the tokenizers of LLaMA and OPT join a pair.
    """
    sentences, bos = list(sentences), [tokenizer.bos_id]

    def ids():
        if head == "lm":
            return bos + tokenizer.encode(preamble + form.question.format(*sentences) + ANSWER)
        return [id for sentence in sentences for id in bos + tokenizer.encode(sentence)]

    while (over := len(found := ids()) - sequence_len) > 0:
        longest = max(range(len(sentences)), key=lambda i: len(sentences[i]))
        if not sentences[longest]:
            shots = ANSWER in preamble
            what = "the shots and the question" if shots else "the question itself"
            advice = "give more, or fewer --shots" if shots else "give more"
            raise InputError(f"--sequence_len {sequence_len} is too short for {what}: {advice}.")
        # A character may be four tokens, its bytes: cut so few that nothing is lost that fits.
        sentences[longest] = sentences[longest][: -max(1, over // 4)]
    return found


def score(models, rows, prompts, form, choices, batch_size):
    """Each model's metrics of the task, and how many examples they are of."""
    logits = choice_logits(models, prompts, choices, batch_size, desc=form.folder)
    return [metrics(each.double(), rows, form, choices) for each in logits]


def metrics(logits, rows, form, choices):
    labels = torch.tensor([label for _, label in rows]).double()
    if form.labels:
        predicted = logits.argmax(dim=1).double()
    elif choices:  # a rating in words: what is expected of them
        predicted = logits.softmax(dim=1) @ torch.arange(6.0, dtype=torch.float64)
    else:
        predicted = logits[:, 0] * RATING
    found = {name: METRICS[name](predicted, labels) for name in form.metrics}
    if "accuracy" in form.metrics:
        found["majority_class"] = labels.unique(return_counts=True)[1].max().item() / len(labels)
    return {**found, "examples": len(rows)}


def load(cfg, tokenizer):
    """Read a task's train.tsv and dev.tsv: `Task`."""
    form = FORMS[cfg.task]
    data = files(cfg.data, form)
    dev, dropped = read(data / form.dev, form)
    dev = dev[: cfg.score_examples or None]
    known = cfg.side and cfg.preamble.startswith(form.heading)  # older ones and other tasks' do not
    rows, more = [], 0
    if not cfg.eval_only or cfg.shots and not known:
        rows, more = read(data / "train.tsv", form)
    choices = word_ids(tokenizer, form.words, ANSWER) if cfg.head == "lm" else None
    notes = [f"{dropped + more} lines of too few columns left out"] if dropped + more else []

    preamble = cfg.preamble if known else preamble_of(take_shots(rows, cfg.shots), form)
    to_ids = partial(
        prompt, form=form, tokenizer=tokenizer, sequence_len=cfg.sequence_len, head=cfg.head,
        preamble=preamble,
    )

    def example(row):
        sentences, target = row
        if choices:
            target = choices[round(target)]
        elif not form.labels:
            target = target / RATING
        return label(to_ids(sentences), target)

    prompts = [to_ids(sentences) for sentences, _ in dev]
    scored = lambda models: score(models, dev, prompts, form, choices, 2 * cfg.batch_size)
    n_labels = 0 if choices else len(form.labels) or 1
    about = scored, n_labels, notes, preamble if choices else ""
    if cfg.eval_only:
        return Task([], [example(row) for row in dev], *about)
    parts = split(rows, cfg.held_out, cfg.data_seed, cfg.max_examples)
    is_shot = lambda row: choices and answered(*row, form) in preamble  # which is not learned
    return Task(*([example(row) for row in part if not is_shot(row)] for part in parts), *about)


def show(folder):
    """Count the examples of every task of GLUE that a folder has, and print one of each."""
    found = False
    for task, form in FORMS.items():
        own = Path(folder).resolve().name == form.folder  # or it is the folder of all
        inside = (Path(folder) / form.folder).is_dir()
        if (own or inside) and (files(folder, form) / form.dev).exists():
            where, names = files(folder, form), ("train.tsv", form.dev)
            train, dev = (read(where / name, form)[0] for name in names)
            print(f"{task}: {len(train)} to train on, {len(dev)} to score. {dev[0]}")
            found = True
    if not found:
        names = ", ".join(f"{form.folder}/{form.dev}" for form in FORMS.values())
        there = "has none of" if Path(folder).is_dir() else "is no folder with any of"
        raise InputError(f"{folder} {there} {names}: give GLUE's folder, or that of one task.")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "RTE", "MRPC", "STS-B", "CoLA", "SST-2", "QNLI", "QQP", "MNLI")
