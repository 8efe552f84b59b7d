"""What all examples begin with goes through the frozen base once: a chat template's system message,
or the answered examples of `--shots`.

No token looks to its right, and the base never changes; so what its layers make of such a prefix is
the same in every batch. A `PrefixCache` is a source of hidden states like the base: where all rows
begin so, it lets the base go on after the prefix's keys and values, and puts the prefix's states
before what comes. The side network reads all positions.
"""

from os.path import commonprefix

import torch

WORTH = 8  # tokens, and a tenth of the whole: for fewer, copies and mask cost what they save


class PrefixCache:
    """The states of a frozen base, of which those of `ids` are computed once.

    base: a `Transformer` none of whose layers learn; ids: a list
    """

    kept = past = None  # of the first call, when a base is repaired: of one row, the states, caches

    def __init__(self, base, ids):
        self.base, self.ids = base, torch.tensor(ids, device=base.device)

    def states(self, idx, keep=None, cache=None, every=1):
        n, (B, T) = len(self.ids), idx.shape
        if keep is not None or cache or T <= n or not bool((idx[:, :n] == self.ids).all()):
            yield from self.base.states(idx, keep, cache, every)
            return
        if self.kept is None:
            self.past = self.base.new_cache(n)
            self.kept = list(self.base.states(idx[:1, :n], cache=self.past))
        past = [layer.repeated(B, T - n) for layer in self.past]
        before = [*self.kept[:-1:every], self.kept[-1]]
        for h, rest in zip(before, self.base.states(idx[:, n:], None, past, every)):
            yield torch.cat([h.expand(B, -1, -1), rest], dim=1)


def attach(base, examples):
    """Give a base a `PrefixCache` of what the examples begin with, if that is worth it."""
    lengths = [len(ids) for ids, _ in examples] or [1]
    prefix = commonprefix([ids for ids, _ in examples])[: min(lengths) - 1]  # one of each is left
    if len(prefix) >= max(WORTH, sum(lengths) / len(lengths) / 10):
        base.source = PrefixCache(base, prefix)
    return base
