"""Text to token ids and back: the tokenizers, one file a task, and here what all tasks share.

An example is (ids, targets), of equal length: of each token, the id that should follow, or
IGNORE_INDEX where nothing is asked. A classifier's label, or a rating, stands at the last token.
"""

import random
from dataclasses import dataclass, field
from typing import Callable

import torch
from tqdm import tqdm

from model import IGNORE_INDEX
from quant import InputError


@dataclass
class Task:
    """What each task's `load` returns to train.py.

    train: examples to learn from
    held_out: examples whose loss is watched, and chooses the side network that is kept
    score: function of a model that gives the task's metrics, {"accuracy": ..., "examples": ...},
        and perhaps "samples", a list of {"prompt", "expected", "answer"}
    n_labels: outputs of the classifier that the task trains in the LM head's place; 0: none
    """

    train: list
    held_out: list
    score: Callable = lambda model: {}
    n_labels: int = 0
    notes: list = field(default_factory=list)  # what a user should know of the data


def collate(examples, pad_id=0):
    """Pad examples on the right to one length: idx int64 and targets (int64 or fp32), (B, T).

    Causal attention never looks to the right, so no token sees the padding, and no mask is needed.
    """
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, pad_id) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets


def batches(examples, batch_size, seed):
    """Yield batches for ever: each epoch in a new order, sequences of similar length together."""
    rng = random.Random(seed)
    pool = 32 * batch_size
    while True:
        order = rng.sample(examples, len(examples))
        rows = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda example: len(example[0]))
            rows += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        rng.shuffle(rows)
        for row in rows:
            yield collate(row)


def split(examples, fraction, seed, most=0):
    """Shuffle by seed, take `most` (0: all), and hold out a fraction: train, held out."""
    examples = random.Random(seed).sample(examples, len(examples))[: most or None]
    held_out = max(1, round(len(examples) * fraction))
    return examples[held_out:], examples[:held_out]


def label(ids, target):
    """An example that asks for one thing, after the last token."""
    return ids, [IGNORE_INDEX] * (len(ids) - 1) + [target]


@torch.no_grad()
def choice_logits(model, prompts, choices=None, batch_size=8, desc=""):
    """What the head says after each prompt: fp32 (n, choices), of a few ids or of all outputs.

    Prompts of similar length go together, padded on the right, and only the last token of each
    reaches the head.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, unit="q", mininterval=1, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            idx, _ = collate([(prompts[i], []) for i in part])
            last = torch.tensor([len(prompts[i]) - 1 for i in part])
            h = model.hidden(idx.to(model.device))[torch.arange(len(part)), last]
            logits = model.head(h).float().cpu()
            for i, row in zip(part, logits if choices is None else logits[:, choices]):
                found[i] = row
            bar.update(len(part))
    return torch.stack(found)


def word_ids(tokenizer, words, before):
    """The one token that each word begins with, where a space and it follow the text `before`."""
    start = tokenizer.encode(before)
    ids = []
    for word in words:
        whole = tokenizer.encode(f"{before} {word}")
        if whole[: len(start)] != start or len(whole) == len(start):
            raise InputError(f'The tokenizer joins "{before}" and " {word}": this task cannot be asked.')
        ids.append(whole[len(start)])
    if len(set(ids)) < len(ids):
        raise InputError(f"The tokenizer begins several of {', '.join(words)} alike.")
    return ids
