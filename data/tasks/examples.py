"""The `Task` that every task returns, and its examples in batches.

An example is (ids, targets) of equal length. A target is the id that should follow, or
IGNORE_INDEX. A classifier's label, or a rating, is the last token's target.
"""

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Callable

import numpy as np
import torch

from data import IGNORE_INDEX
from data.devices import distributed
from data.formats.fields import shown


@dataclass
class Task:
    """The data and the metrics of a run, made by the `load` of each task.

    score: function of a `SharedBase` that returns a dict per model: metrics, "examples", and
        perhaps "samples", a list of {"prompt", "expected", "answer"}
    """

    train: list  # examples
    held_out: list  # examples whose loss chooses the side network that is kept
    score: Callable = lambda models: [{} for _ in models.models]
    n_labels: int = 0  # outputs of the classifier that replaces the LM head; 0: none
    notes: list = field(default_factory=list)  # sentences for the user about the data
    preamble: str = ""  # what all prompts with label words begin with
    example: str = ""  # a question for the trained model, if it answers questions

    def settled(self, cfg):
        """The settings, with what the data decide: the preamble, and the iterations of --epochs."""
        each = len(range(0, len(self.train), cfg.batch_size * distributed.size()))  # batches
        n = len(range(0, each * (cfg.epochs or 0), cfg.gradient_accumulation_steps))
        return replace(cfg, preamble=self.preamble, epochs=None, max_iters=n or cfg.max_iters)

    def marked(self, tokenizer):
        """Yield a line with an example, its trained tokens in [[ ]]. A classifier has none."""
        known = tokenizer.token_bytes | {i: t.encode() for t, i in tokenizer.special.items()}
        for ids, targets in [] if self.n_labels else self.train[:1]:
            trained = [id for id in targets if id != IGNORE_INDEX]
            parts = ids[: targets.index(trained[0]) + 1], trained
            texts = (b"".join(known.get(i, b"") for i in p).decode(errors="replace") for p in parts)
            texts = (t if len(t) < 58 else f"{t[:12]} ... {t[-40:]}" for t in texts)
            before, after = (shown(text)[1:-1] for text in texts)
            yield f"example     {before}[[{after}]]: {len(trained)} of {len(ids)} tokens trained"


def batches(examples, batch_size, seed):
    """Yield lists of examples for ever, in a new order per epoch, similar lengths together."""
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
    """Yield this process's batches of each iteration after the first `start`.

    An iteration has `steps` batches (idx, targets, share) of `batch_size` examples per process.
    share: the fraction of the iteration's targets, so that every token has the same weight
    """
    rows = batches(examples, batch_size * distributed.size(), seed)
    for _ in range(start * steps):
        next(rows)
    while True:
        parts, total = [], 0
        for _ in range(steps):
            idx, targets = collate(next(rows))
            total += count_targets(targets)
            # In a small batch, a process without a sequence takes the first one, with a share of 0.
            has_one = distributed.rank() < len(idx)
            mine = slice(distributed.rank() if has_one else 0, None, distributed.size())
            parts.append((idx[mine], targets[mine], has_one * count_targets(targets[mine])))
        yield [(idx, targets, n / total) for idx, targets, n in parts]


def examples_fingerprint(examples):
    """Identify a set of examples: the number of examples, the number of tokens, a checksum."""
    checksum = 0
    for example in examples:
        checksum = zlib.crc32(np.array(example, np.float64), checksum)
    return [len(examples), sum(len(ids) for ids, _ in examples), checksum]


def count_targets(targets):
    return (targets != IGNORE_INDEX).sum().item()


def prefetch(items):
    """Compute the next item of an endless generator in a thread, while the current one is used."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items)
        while True:
            item = future.result()
            future = thread.submit(next, items)
            yield item


def split(examples, fraction, seed, most=0):
    """Shuffle, take `most` examples (0: all), and hold out a fraction: (train, held out)."""
    examples = random.Random(seed).sample(examples, len(examples))[: most or None]
    held_out = max(1, round(len(examples) * fraction))
    return examples[held_out:], examples[:held_out]


def collate(examples):
    """Pad examples on the right, where causal attention never looks: idx int64 and targets int64
    or fp32, (B, T)."""
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, 0) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets
