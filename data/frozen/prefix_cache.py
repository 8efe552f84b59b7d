"""Compute the common prefix of all examples once: a system message, or the examples of --shots.

Attention is causal and the base never changes, so a prefix has the same hidden states in every
batch. A `PrefixCache` yields hidden states like the base. If all rows begin with the prefix, the
base continues after the prefix's keys and values. The side network reads all positions.
"""

from os.path import commonprefix

import torch

SHORTEST_PREFIX = 8  # tokens, and a tenth of an example: a shorter prefix saves no time


def share_prefix(base, examples):
    """Compute the examples' common prefix once, if it is long enough; returns the base."""
    lengths = [len(ids) for ids, _ in examples] or [1]
    prefix = commonprefix([ids for ids, _ in examples])[: min(lengths) - 1]  # one of each is left
    if len(prefix) >= max(SHORTEST_PREFIX, sum(lengths) / len(lengths) / 10):
        base.source = PrefixCache(base, prefix)
    return base


class PrefixCache:
    """base: a `Transformer` none of whose layers learn; ids: of the prefix, a list"""

    kept = past = None  # of the first call, for one row: the states, the caches

    def __init__(self, base, ids):
        self.base, self.ids = base, torch.tensor(ids)

    def states(self, idx, keep=None, cache=None, every=1):
        n, (B, T) = len(self.ids), idx.shape
        if keep is not None or cache or T <= n or not bool((idx[:, :n].cpu() == self.ids).all()):
            yield from self.base.states(idx, keep, cache, every)
            return
        if self.kept is None:
            self.past = self.base.new_cache(n)
            self.kept = list(self.base.states(idx[:1, :n], cache=self.past))
        past = [layer.repeated(B, T - n) for layer in self.past]
        before = [*self.kept[:-1:every], self.kept[-1]]
        for h, rest in zip(before, self.base.states(idx[:, n:], None, past, every)):
            yield torch.cat([h.expand(B, -1, -1), rest], dim=1)
