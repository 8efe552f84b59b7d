"""Generate tokens one after the other, with a cache of keys and values.

A model has `hidden`, `head`, `new_cache` and `config`: a base, with or without a side network.
"""

import math

import torch
from torch.nn import functional as F

from data import InputError
from data.settings.flags import refuse_if

FLAGS = {  # the flags of all commands of qst.py that generate
    "max_new_tokens": dict(type=int, help="most tokens per answer: 128, chat 512, answer 1024"),
    "temperature": dict(type=float, default=0.0, help="temperature; 0: only the likeliest token"),
    "top_k": dict(type=int, default=0, help="number of likeliest tokens to choose from; 0: all"),
    "top_p": dict(type=float, default=1.0, help="total probability of the tokens to choose from"),
    "seed": dict(type=int, default=1337, help="seed of the sampling"),
}
ONE_BY_ONE = "--stream reads all weights anew for every token, which is too slow for one answer: " \
    "give --batch FILE with one prompt per line, or omit --stream"


class KVCache:
    """Hold the keys and values of one layer in buffers that are allocated once for `max_len`."""

    def __init__(self, max_len):
        self.max_len, self.length = max_len, 0

    def append(self, k, v):
        """Add keys and values (B, heads, T, D), and return all of them."""
        if self.length == 0:
            self.k = k.new_empty(*k.shape[:2], self.max_len, k.shape[3])
            self.v = torch.empty_like(self.k)
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def repeated(self, B, T):
        """Copy a cache with one row to B rows, with room for T more tokens."""
        copy = KVCache(self.length + T)
        copy.append(*(t[:, :, : self.length].expand(B, -1, -1, -1) for t in (self.k, self.v)))
        return copy


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Choose the next token of every row: logits (B, V) -> ids (B,).

    temperature: 0 chooses the most likely token; top_k: number of tokens to choose from, 0: all
    top_p: choose from the fewest tokens with this total probability (arXiv 1904.09751)
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(dim=-1)
        drop = p.cumsum(dim=-1) - p >= top_p  # the tokens before it suffice
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def check(max_new_tokens, temperature, top_k, top_p, seed):
    """Refuse values that no generation can have. None is a default."""
    refuse_if(
        (max_new_tokens is not None and max_new_tokens < 1,
         f"max_new_tokens {max_new_tokens} must be at least 1"),
        (temperature != 0 and not 0.001 <= temperature <= 1000,
         f"temperature {temperature} must be 0, or from 0.001 to 1000"),
        (top_k < 0, f"top_k {top_k} must be at least 0"),
        (not 0 < top_p <= 1, f"top_p {top_p} must be above 0 and at most 1"),
        (seed is not None and not 0 <= seed < 2**63, f"seed {seed} must be from 0 to 2^63 - 1"),
    )


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos_id=None,
           keep=None, seed=None):
    """Yield the next token of every row, (B,), until all rows have ended or the number is reached.

    idx: (B, T) prompts; keep: (B, T), 0 where a prompt is padded on the left
    temperature, top_k, top_p: see `sample`; eos_id: one id or several. An ended row repeats one.
    """
    streamed = hasattr(getattr(model, "base", model), "stream")
    check_length(model.config, idx.shape[1], "shorten the prompt")
    check_length(model.config, idx.shape[1] + max_new_tokens - 1, "lower max_new_tokens")
    refuse_if((streamed and len(idx) == 1 < max_new_tokens, ONE_BY_ONE))
    check(max_new_tokens, temperature, top_k, top_p, seed)
    cache = model.new_cache(idx.shape[1] + max_new_tokens)
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    ends = idx.new_tensor([] if eos_id is None else eos_id).flatten()
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = model.head(model.hidden(idx, keep, cache)[:, -1])
        token = sample(logits, temperature, top_k, top_p, generator)
        if len(ends):
            token = torch.where(ended, ends[0], token)
            ended |= torch.isin(token, ends)
        yield token
        if len(ends) and ended.all():
            return
        idx = token.unsqueeze(1)
        keep = None if keep is None else F.pad(keep, (0, 1), value=1)


def check_length(config, length, advice):
    if length > config.max_positions:
        sizes = f"{length} tokens is longer than the model's {config.max_positions} positions"
        raise InputError(f"A sequence of {sizes}: {advice}.")


def pad_left(prompts, device=None):
    """Stack prompts of different lengths: lists of ids -> idx (B, T) and keep (B, T)."""
    T = max(map(len, prompts))
    idx = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
    keep = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return idx, keep
