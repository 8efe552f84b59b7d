"""What a model makes of examples and prompts: the mean loss, and logits of what may follow."""

from os.path import commonprefix

import torch
from tqdm import tqdm

from data import InputError
from data.devices import distributed
from data.generate.sampling import check_length
from data.tasks.examples import collate, count_targets


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
