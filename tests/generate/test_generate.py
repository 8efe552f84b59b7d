"""data/generate/sampling.py: choosing tokens, and the caches of base and side network."""

import pytest
import torch
from helpers import FAMILIES, VARIANTS, each_family, shaken, small_base

from data import InputError
from data.generate.sampling import KVCache, pad_left, sample
from model import positions_and_mask
from qst import QST
from side import SideConfig


def test_sampling():
    """top-k and top-p leave out what they should, and the seed decides the rest."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    draw = lambda **k: sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **k)
    counts = lambda tokens: (tokens.bincount(minlength=4) / 4000).tolist()
    assert counts(draw()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert counts(draw(top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert counts(draw(top_p=0.75)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert counts(draw(top_p=0.1)) == [1, 0, 0, 0]
    assert sample(logits.flip(1), 1.0, top_p=0.1).eq(3).all()
    assert len(sample(torch.zeros(99, 2), 1.0, top_p=0.5).unique()) == 1  # one half is enough
    assert torch.equal(draw(), draw()) and sample(logits).eq(0).all()
    cold = sample(logits, 0.1, generator=torch.Generator().manual_seed(0))
    assert cold.eq(0).float().mean() > 0.98


def test_sampling_depends_only_on_the_seed(idx):
    """One seed draws the same text twice, another one another."""
    model = QST(small_base(), SideConfig(reduction=4))
    draw = lambda seed: model.generate(idx, 10, 1.5, top_k=20, top_p=0.95, seed=seed)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("wrong", [
    dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-3), dict(top_p=0.0)
])
def test_sampling_settings_that_make_no_sense(wrong):
    """They are refused by name."""
    with pytest.raises(InputError, match=next(iter(wrong))):
        small_base().generate(torch.zeros(1, 3, dtype=torch.long), **dict(max_new_tokens=2) | wrong)


def test_cache_is_allocated_once():
    """The cache's buffers are made at its first use, and never again."""
    cache = KVCache(8)
    cache.append(*torch.zeros(2, 1, 2, 3, 4))
    place = cache.k.data_ptr()
    k, _ = cache.append(*torch.ones(2, 1, 2, 2, 4))
    assert cache.k.data_ptr() == place and k.shape == (1, 2, 5, 4) and k[..., 3:, :].eq(1).all()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cache_equals_no_cache(family, idx):
    """Tokens fed in pieces through the cache give the logits of all at once."""
    model, cache = small_base(family=family), None
    whole, cache = model(idx), model.new_cache(10)
    pieces = [model(idx[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9), (9, 10))]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_two_caches(family, changes, idx):
    """Generating through the caches of base and side gives what recomputing everything gives."""
    model = shaken(QST(small_base(**FAMILIES[family]), SideConfig(reduction=4, **changes)))
    expected = idx
    for _ in range(8):
        token = model(expected)[0][:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(model.generate(idx, 8), expected)


def test_what_a_padded_position_looks_at():
    """A token looks at the tokens up to it, and nothing but itself where it is padding; no row of
    the mask is empty, of which torch's attention once made NaN. Positions count only tokens."""
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    for past in (0, 3):
        positions, mask = positions_and_mask(torch.zeros(2, 5 - past), keep, past)
        assert positions.tolist() == [[0, 0, 0, 1, 2][past:], [0, 1, 2, 2, 2][past:]]
        for row, seen in zip(keep.tolist(), mask[:, 0].tolist()):
            for query, keys in enumerate(seen, past):
                assert keys == [bool(row[k]) and k <= query or k == query for k in range(5)]


@pytest.mark.parametrize("side", [False, True])
@each_family
def test_padded_batch_equals_single_prompts(family, side):
    """Prompts of unequal length, padded on the left, get the tokens that each gets by itself."""
    model = small_base(**FAMILIES[family])
    if side:
        model = shaken(QST(model, SideConfig(reduction=4)))
    prompts = [[5, 9, 3], [7, 8, 4, 11, 30, 2], [12]]
    idx, keep = pad_left(prompts)
    together = model.generate(idx, 8, keep=keep)[:, idx.shape[1] :]
    for prompt, row in zip(prompts, together):
        assert torch.equal(model.generate(torch.tensor([prompt]), 8)[0, len(prompt) :], row)


def test_generation_stops_at_the_end_token(idx):
    """All rows end: the stream stops early, and a row that has ended repeats its end token."""
    model = small_base()
    free = model.generate(idx, 12)[:, 10:]
    ends = [free[0, 2].item(), free[1, 4].item(), free[2, 1].item()]
    stopped = model.generate(idx, 12, eos_id=ends)[:, 10:]
    assert stopped.shape[1] < 12
    for row, plain in zip(stopped.tolist(), free.tolist()):
        first = min(i for i, token in enumerate(plain) if token in ends)
        assert row[: first + 1] == plain[: first + 1] and set(row[first + 1 :]) <= {ends[0]}
