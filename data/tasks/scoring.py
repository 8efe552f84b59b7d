"""The mean loss of examples, and the logits of the next token after prompts."""

from os.path import commonprefix

import torch
from tqdm import tqdm

from data import InputError
from data.devices import distributed
from data.formats.fields import shown
from data.generate.sampling import check_length
from data.tasks.examples import collate, count_targets


@torch.no_grad()
def mean_loss(models, examples, batch_size, desc=None):
    """Compute each model's mean loss per target. models: a `SharedBase`; desc: of a progress bar"""
    examples = sorted(examples, key=lambda example: len(example[0]))
    starts = distributed.split(range(0, len(examples), batch_size))
    sums = []  # per batch: the number of targets, and each model's summed loss
    for start in tqdm(starts, desc, unit="batch", leave=False, delay=2, disable=not desc):
        idx, targets = collate(examples[start : start + batch_size])
        n, states = count_targets(targets), models.hidden(idx)
        losses = [model.loss_of(h, targets) for model, h in zip(models.models, states)]
        sums.append((n, [n * loss.item() for loss in losses]))
    counts, losses = zip(*distributed.join(sums))
    return [sum(of_one) / sum(counts) for of_one in zip(*losses)]


@torch.no_grad()
def choice_logits(models, prompts, choices=None, batch_size=8, desc=""):
    """Compute each model's logits of the next token: fp32 (n, choices) on the CPU.

    models: a `SharedBase`; prompts: lists of ids; choices: ids, or None for all outputs of the head
    The prompts' common prefix is computed once. The rest is sorted by length and padded on the
    right. Only the last position of each prompt goes through the head.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    check_length(models.config, len(prompts[order[-1]]), "shorten the prompts")
    prefix = commonprefix(prompts)[: len(prompts[order[0]]) - 1]  # each keeps at least one id
    cache = models.new_cache(len(prefix))
    if prefix:
        models.hidden(torch.tensor([prefix]), cache=cache)
    parts = []
    starts = distributed.split(range(0, len(order), batch_size))
    for start in tqdm(starts, desc, unit="batch", leave=False):
        rows = order[start : start + batch_size]
        idx, _ = collate([(prompts[i][len(prefix) :], []) for i in rows])
        past = [layer.repeated(*idx.shape) for layer in cache] if prefix else None
        states = models.hidden(idx, cache=past)
        at = range(len(rows)), [len(prompts[i]) - len(prefix) - 1 for i in rows]
        logits = [model.head(h[at]).float().cpu() for model, h in zip(models.models, states)]
        parts.append([each if choices is None else each[:, choices] for each in logits])
    back = torch.tensor(order).argsort()
    return [torch.cat(of_one)[back] for of_one in zip(*distributed.join(parts))]


def word_ids(tokenizer, words, before):
    """Find the token with which each word begins after the text `before` and a space.

    They are encoded together: sentencepiece puts a space of its own before every text.
    """
    advice = "choose a model with a larger vocabulary, or for GLUE --head classifier"
    start = tokenizer.encode(before)
    ids = []
    for word in words:
        whole = tokenizer.encode(f"{before} {word}")
        if whole[: len(start)] != start or len(whole) == len(start):
            where = f"{shown(' ' + word)} after {shown(before[-20:])}"
            raise InputError(f"The tokenizer has no token for {where}: {advice}.")
        ids.append(whole[len(start)])
    if len(set(ids)) < len(ids):
        raise InputError(f"The tokenizer begins several of {', '.join(words)} alike: {advice}.")
    return ids
