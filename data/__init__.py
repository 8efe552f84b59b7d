"""Text to token ids and back: the tokenizers, one file a task, and here what all tasks share.

An example is (ids, targets), of equal length: of each token, the id that should follow, or
IGNORE_INDEX where nothing is asked. A classifier's label, or a rating, stands at the last token.
"""

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from data import distributed
from quant import InputError

IGNORE_INDEX = -100  # the target of a token that is not in the loss


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


def collate(examples, pad_id=0):
    """Pad examples on the right to one length: idx int64 and targets (int64 or fp32), (B, T).

    Causal attention never looks to the right, so no token sees the padding, and no mask is needed.
    """
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, pad_id) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets


def pad_left(prompts, pad_id=0, device=None):
    """Stack prompts of unequal length: list of lists of ids -> idx (B, T) and keep (B, T)."""
    T = max(map(len, prompts))
    idx = torch.tensor([[pad_id] * (T - len(p)) + list(p) for p in prompts], device=device)
    keep = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return idx, keep


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


def to_device(tensor, device):
    """Copy a tensor; from a CPU to a GPU without a wait, which takes pinned memory."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def split(examples, fraction, seed, most=0):
    """Shuffle by seed, take `most` (0: all), and hold out a fraction: train, held out."""
    examples = random.Random(seed).sample(examples, len(examples))[: most or None]
    held_out = max(1, round(len(examples) * fraction))
    return examples[held_out:], examples[:held_out]


def label(ids, target):
    """An example that asks for one thing, after the last token."""
    return ids, [IGNORE_INDEX] * (len(ids) - 1) + [target]


def check_length(config, length, advice):
    if length > config.max_positions:
        raise InputError(
            f"A sequence of {length} tokens is longer than the model's {config.max_positions} "
            f"positions: {advice}."
        )


@torch.no_grad()
def mean_loss(models, examples, batch_size, desc=None):
    """Mean loss per target over all examples, of each model; with a progress bar, if it has a name.

    models: a `Beside`
    """
    examples = sorted(examples, key=lambda example: len(example[0]))
    starts = distributed.split(range(0, len(examples), batch_size))
    sums = []  # of each batch: its targets, and each model's sum of their losses
    for start in tqdm(starts, desc, unit="batch", leave=False, delay=2, disable=not desc):
        idx, targets = collate(examples[start : start + batch_size])
        n, states = count_targets(targets), models.hidden(idx.to(models.device))
        losses = [model.loss_of(h, targets) for model, h in zip(models.models, states)]
        sums.append((n, [n * loss.item() for loss in losses]))
    counts, losses = zip(*distributed.join(sums))
    return [sum(of_one) / sum(counts) for of_one in zip(*losses)]


@torch.no_grad()
def choice_logits(models, prompts, choices=None, batch_size=8, desc=""):
    """Logits of what may follow each prompt, fp32 (n, choices) on the CPU, in the prompts' order;
    of each model.

    models: a `Beside`; prompts: lists of ids; choices: ids, or None for every output of the head
    What all prompts begin with goes through the models once; the rest of each, sorted by length
    and padded on the right, goes after it. Only the last real position goes through the head.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    check_length(models.config, len(prompts[order[-1]]), "shorten the prompts")
    prefix = commonprefix(prompts)[: len(prompts[order[0]]) - 1]  # at least one id is left of each
    cache = models.new_cache(len(prefix))
    if prefix:
        models.hidden(torch.tensor([prefix], device=models.device), cache=cache)
    parts = []
    starts = distributed.split(range(0, len(order), batch_size))
    for start in tqdm(starts, desc, unit="batch", leave=False):
        rows = order[start : start + batch_size]
        idx, _ = collate([(prompts[i][len(prefix) :], []) for i in rows])
        past = [layer.repeated(*idx.shape) for layer in cache] if prefix else None
        states = models.hidden(idx.to(models.device), cache=past)
        at = range(len(rows)), [len(prompts[i]) - len(prefix) - 1 for i in rows]
        logits = [model.head(h[at]).float().cpu() for model, h in zip(models.models, states)]
        parts.append([each if choices is None else each[:, choices] for each in logits])
    back = torch.tensor(order).argsort()
    return [torch.cat(of_one)[back] for of_one in zip(*distributed.join(parts))]


def word_ids(tokenizer, words, before):
    """The one token that each word begins with, where a space and it follow the text `before`."""
    start = tokenizer.encode(before)
    ids = []
    for word in words:
        whole = tokenizer.encode(f"{before} {word}")
        if whole[: len(start)] != start or len(whole) == len(start):
            joined = f'The tokenizer joins "{before}" and " {word}"'
            raise InputError(f"{joined}: this task cannot be asked.")
        ids.append(whole[len(start)])
    if len(set(ids)) < len(ids):
        raise InputError(f"The tokenizer begins several of {', '.join(words)} alike.")
    return ids


@torch.no_grad()
def channel_statistics(model, prompts, skip=1, every=1):
    """Mean and variance of each channel of the hidden states of a base over some texts' tokens.

    prompts: lists of ids; skip: how many positions at the start of each do not count
    returns two of (N / every + 1, C), in fp64: of the embedding and of each every-th layer's output
    """
    n, C = model.config.n_layer // every + 1, model.config.n_embd
    sums = torch.zeros(2, n, C, dtype=torch.float64)
    for start in range(0, len(prompts), 4):  # a few at a time, so that little memory is needed
        rows = prompts[start : start + 4]
        idx, _ = collate([(ids, []) for ids in rows])
        counts = torch.tensor([[skip <= i < len(ids) for i in range(idx.shape[1])] for ids in rows])
        states = model.states(idx.to(model.device), None, None, every)
        for i, h in zip(range(n), states):  # not the last, which is normed
            exact = torch.float32 if h.device.type == "mps" else torch.float64
            h = h[counts.to(h.device)].to(exact)
            sums[:, i] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)]).cpu()
    mean, square = sums / max(1, sum(max(0, len(prompt) - skip) for prompt in prompts))
    return mean, square - mean.square()
