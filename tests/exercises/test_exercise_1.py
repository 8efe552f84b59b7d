"""Exercise 1: a sixth downsampler.

In side.py, add a kind of your own to DOWNSAMPLERS and to `make_downsample`. The obvious first one
takes every `reduction`-th channel of h_f and learns nothing; one that learns can keep h_f for
backward in few bits, as `PackedInputLinear` does. Then compare it with the others:

    python tests/lectures/inside.py downsamplers
"""

import pytest
import torch
from helpers import small_base

from qst import QST
from side import DOWNSAMPLERS, SideConfig, SideNetwork, make_downsample

NEW = DOWNSAMPLERS[5:] or [pytest.param("", marks=pytest.mark.skip("no sixth downsampler yet"))]


@pytest.mark.parametrize("kind", NEW)
def test_its_width(kind):
    """From the base's width to the side's, for each token by itself, and not all to 0."""
    torch.manual_seed(0)
    down = make_downsample(SideConfig(reduction=4, downsample=kind, rank=4), 32, 8)
    h_f = torch.randn(2, 5, 32)
    out = down(h_f)
    assert out.shape == (2, 5, 8) and out.abs().max() > 0
    changed = h_f.clone()
    changed[:, 3] += 1
    same = (down(changed) == out).all(dim=-1)
    assert same[:, :3].all() and same[:, 4:].all() and not same[:, 3].any()


@pytest.mark.parametrize("kind", NEW)
def test_it_keeps_few_bytes_of_h_f(kind):
    """With --h_f_bits 8, nothing that a step keeps for backward is as large as h_f."""
    base = small_base()
    side = SideNetwork(base.config, SideConfig(reduction=4, rank=4, downsample=kind))
    side.save_memory(checkpoint=True, h_f_bits=8)
    h_f, h_g, kept = torch.randn(4, 16, 32), torch.randn(4, 16, 8), []
    note = lambda t: kept.append(t.untyped_storage().nbytes()) or t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        side.start(h_f).sum() + side.step(1, h_f, h_g).sum()
    assert max(kept) < h_f.nbytes


@pytest.mark.parametrize("kind", NEW)
def test_a_model_learns_with_it(kind, idx, tmp_path):
    """The loss falls, and what is saved and loaded computes the same."""
    torch.manual_seed(0)
    base = small_base()
    model = QST(base, SideConfig(reduction=4, rank=4, downsample=kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model.loss(idx, idx))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    model.save_side(tmp_path)
    assert torch.equal(QST.from_side(base, tmp_path)(idx)[0], model(idx)[0])
