"""What all examples begin with goes through the frozen base once: a chat template's system message,
or the answered examples of `--shots`.

No token looks to its right, and the base never changes; so what its layers make of such a prefix is
the same in every batch. They are called as ever, with whole sequences, and return whole ones:
`PrefixCache` stands before their `forward`, keeps the prefix's keys, values and output of the first
call (by then a base is repaired), and from then on a layer computes only what comes after. The side
network reads all positions.
"""

from functools import partial
from os.path import commonprefix

import torch
from torch.nn.attention.bias import causal_lower_right

from data.sampling import KVCache

WORTH = 8  # tokens, and a tenth of the whole: for fewer, copies and mask cost what they save


class PrefixCache:
    """Lets a frozen base compute only what comes after `ids`, where every row of a batch begins so.

    base: a `Transformer` none of whose layers learn; ids: a list
    """

    def __init__(self, base, ids):
        self.ids = torch.tensor(ids, device=base.device)
        self.kept = [None] * len(base.layers)  # of each: its KVCache of one row, and its output
        base.embed = partial(self.embed, base.embed)
        for i, layer in enumerate(base.layers):
            layer.forward = partial(self.layer, i, layer.forward)

    def embed(self, forward, idx, positions):
        x, n = forward(idx, positions), len(self.ids)
        T, x.after_prefix = idx.shape[1], None
        if T > n and bool((idx[:, :n] == self.ids).all()):
            # A mask that a GPU's flash attention knows without its T - n times T values.
            x.after_prefix = causal_lower_right(T - n, T)
        return x

    def layer(self, i, forward, x, mask=None, rope=None, cache=None):
        after = getattr(x, "after_prefix", None)
        if after is None or mask is not None or cache is not None:
            return forward(x, mask, rope, cache)
        (B, T, _), n = x.shape, len(self.ids)
        rope_of = lambda part: rope and tuple(table[:, :, part] for table in rope)
        if self.kept[i] is None:
            past = KVCache(n)
            self.kept[i] = past, forward(x[:1, :n], None, rope_of(slice(n)), past)
        past, h = self.kept[i]
        y = forward(x[:, n:], after, rope_of(slice(n, None)), past.repeated(B, T - n))
        y = torch.cat([h.expand(B, -1, -1), y], dim=1)
        y.after_prefix = after
        return y


def attach(base, examples):
    """Give a base a `PrefixCache` of what the examples begin with, if that is worth it."""
    lengths = [len(ids) for ids, _ in examples] or [1]
    prefix = commonprefix([ids for ids, _ in examples])[: min(lengths) - 1]  # one of each is left
    if len(prefix) >= max(WORTH, sum(lengths) / len(lengths) / 10):
        PrefixCache(base, prefix)
    return base
