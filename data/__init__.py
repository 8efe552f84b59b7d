"""Text to token ids and back: the tokenizers, one file a task, and what several tasks share."""

from os.path import commonprefix

import torch
from tqdm import tqdm

from model import KVCache, check_length


@torch.no_grad()
def choice_logits(model, prompts, choices, batch_size, device, desc=""):
    """Logits of some next tokens after each prompt, fp32 (n, len(choices)), in the prompts' order.

    prompts: lists of ids; choices: ids, or None for every output of the head
    What all prompts begin with goes through the model once; the rest of each, sorted by length
    and padded on the right, goes after it. Only the last real position goes through the head.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    check_length(model.config, len(prompts[order[-1]]), "shorten the prompts")
    prefix = commonprefix(prompts)[: len(prompts[order[0]]) - 1]  # at least one id is left of each
    cache = model.new_cache(len(prefix))
    if prefix:
        model.hidden(torch.tensor([prefix], device=device), cache=cache)
    logits = [None] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc=desc, unit="batch", leave=False):
        rows = order[start : start + batch_size]
        rest = [torch.tensor(prompts[i][len(prefix) :], device=device) for i in rows]
        # Causal attention never looks to the right, so no token sees the padding.
        idx = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)
        h = model.hidden(idx, cache=repeat(cache, *idx.shape) if prefix else None)
        last = h[range(len(rows)), [len(ids) - 1 for ids in rest]]  # (B, C)
        for i, row in zip(rows, model.head(last).float()):
            logits[i] = row if choices is None else row[choices]
    return torch.stack(logits)


def repeat(cache, B, T):
    """A cache of one row, copied for B rows, with room for T more tokens."""
    copies = [KVCache(layer.length + T) for layer in cache]
    for layer, copy in zip(cache, copies):
        copy.append(*(x[:, :, : layer.length].expand(B, -1, -1, -1) for x in (layer.k, layer.v)))
    return copies
