"""What all tasks share: the `Task` that each returns, and its examples in batches.

An example is (ids, targets), of equal length: of each token, the id that should follow, or
IGNORE_INDEX where nothing is asked. A classifier's label, or a rating, stands at the last token.
"""

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch

from data import IGNORE_INDEX
from data.devices import distributed


@dataclass
class Task:
    """What each task's `load` returns to train.py.

    train: examples to learn from
    held_out: examples whose loss is watched, and chooses the side network that is kept
    score: function of models beside one base (`Beside` in qst.py) that gives each one's metrics,
        [{"accuracy": ..., "examples": ...}, ...], and perhaps "samples", a list of {"prompt",
        "expected", "answer"}
    n_labels: outputs of the classifier that the task trains in the LM head's place; 0: none
    """

    train: list
    held_out: list
    score: Callable = lambda models: [{} for _ in models.models]
    n_labels: int = 0
    notes: list = field(default_factory=list)  # what a user should know of the data
    preamble: str = ""  # what stands before every question, if they are asked in words
    samples: Callable = None  # function of a model: a held-out question or two, with its answers
    example: str = ""  # a question to ask the trained model, if it answers questions


def batches(examples, batch_size, seed):
    """Yield lists of examples for ever: each epoch in a new order, similar lengths together."""
    rng = random.Random(seed)
    pool = 32 * batch_size
    while True:
        order = rng.sample(examples, len(examples))
        rows = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda example: len(example[0]))
            rows += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        rng.shuffle(rows)
        yield from rows


def iteration_batches(examples, batch_size, steps, seed, start=0):
    """Yield, for each iteration after the first `start`, the batches that this process computes:
    [(idx, targets, share), ...], `steps` of them.

    share: how many of the iteration's targets a batch has, so that every token weighs the same,
        however many batches and processes there are. batch_size: of one process
    """
    rows = batches(examples, batch_size * distributed.size(), seed)
    for _ in range(start * steps):
        next(rows)
    while True:
        parts, total = [], 0
        for _ in range(steps):
            idx, targets = collate(next(rows))
            total += count_targets(targets)
            # Of an epoch's last batch, which may be small, a process without a sequence takes the
            # first one, with no weight.
            has_one = distributed.rank() < len(idx)
            mine = slice(distributed.rank() if has_one else 0, None, distributed.size())
            parts.append((idx[mine], targets[mine], has_one * count_targets(targets[mine])))
        yield [(idx, targets, n / total) for idx, targets, n in parts]


def examples_fingerprint(examples):
    """How many examples, how many tokens, and a checksum: what tells one set from another."""
    checksum = 0
    for example in examples:
        checksum = zlib.crc32(np.array(example, np.float64), checksum)
    return [len(examples), sum(len(ids) for ids, _ in examples), checksum]


def count_targets(targets):
    return (targets != IGNORE_INDEX).sum().item()


def prefetch(items):
    """Make the next item of an endless generator, in a thread, while the current one is in use."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items)
        while True:
            item = future.result()
            future = thread.submit(next, items)
            yield item


def split(examples, fraction, seed, most=0):
    """Shuffle by seed, take `most` (0: all), and hold out a fraction: train, held out."""
    examples = random.Random(seed).sample(examples, len(examples))[: most or None]
    held_out = max(1, round(len(examples) * fraction))
    return examples[held_out:], examples[:held_out]


def label(ids, target):
    """An example that asks for one thing, after the last token."""
    return ids, [IGNORE_INDEX] * (len(ids) - 1) + [target]


def collate(examples, pad_id=0):
    """Pad examples on the right to one length: idx int64 and targets (int64 or fp32), (B, T).

    Causal attention never looks to the right, so no token sees the padding, and no mask is needed.
    """
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, pad_id) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets
