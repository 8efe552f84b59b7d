"""qst.py: where training starts, what has a gradient, and what backward keeps."""

import pytest
import torch
from helpers import FAMILIES, VARIANTS, each_family, shaken, small_base, small_config

from data import IGNORE_INDEX
from model import Transformer
from qst import QST
from side import DOWNSAMPLERS, SideConfig, SideNetwork

STARTS = VARIANTS | {kind: dict(downsample=kind) for kind in DOWNSAMPLERS}


@pytest.mark.parametrize("variant", set(STARTS) - {"released"})
@each_family
def test_training_starts_exactly_at_the_base(family, variant, idx):
    """The logits are the base's, bit for bit, whatever the side network holds, before and after it
    has seen texts to standardize by."""
    base = small_base(**FAMILIES[family])
    expected = base(idx)
    model = QST(base, SideConfig(reduction=4, **STARTS[variant]))
    logits, loss = model(idx)
    assert torch.equal(logits, expected) and loss is None
    model.calibrate([row.tolist() for row in idx])
    assert torch.equal(model(idx)[0], expected)


def test_at_step_0_only_alpha_has_a_gradient(base, idx):
    """The side network's gradients are all zero until alpha moves, and none is once it has."""
    model = QST(base, SideConfig(reduction=4))
    gradients = lambda: {
        n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None
    }
    model(idx, idx)[1].backward()
    nonzero = [name for name, g in gradients().items() if g > 0]
    assert nonzero == ["side.alpha"]
    with torch.no_grad():
        model.side.alpha -= 0.1
    model.zero_grad()
    model(idx, idx)[1].backward()
    assert all(g > 0 for g in gradients().values())
    assert len(gradients()) == len(list(model.parameters()))


def test_the_base_is_frozen_and_keeps_nothing(base, idx):
    """No base weight is a parameter, and backward keeps nothing of the base's width but the hidden
    states that a downsampler or alpha reads, once each."""
    model = shaken(QST(base, SideConfig(reduction=4)))
    assert not list(base.parameters())
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model.hidden(idx).requires_grad
    sizes = [t.untyped_storage().nbytes() // 4 for key, t in kept.items() if key not in own]
    # the embedding, each layer's output, and the difference that alpha weighs
    assert sizes.count(3 * 10 * 32) == 1 + 3 + 1
    assert not any(size % (3 * 10 * 48) == 0 for size in sizes)  # the base's MLP
    assert max(sizes) == 3 * 10 * 32


def test_loss_counts_the_targets_only(base, idx):
    """The loss is the mean over targets that are not IGNORE_INDEX."""
    targets = idx.clone()
    targets[:, :6] = IGNORE_INDEX
    logits, loss = QST(base, SideConfig(reduction=4))(idx, targets)
    log_p = logits[:, 6:].log_softmax(dim=-1).gather(2, idx[:, 6:].unsqueeze(2))
    assert loss.item() == pytest.approx(-log_p.mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_stay_in_fp32(dtype, idx):
    """The side network computes in the base's dtype and keeps fp32 weights and gradients."""
    torch.manual_seed(0)
    base = Transformer(small_config()).freeze("nf4", dtype)
    model = shaken(QST(base, SideConfig(reduction=4)))
    logits, loss = model(idx, idx)
    loss.backward()
    assert logits.dtype == dtype and loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape, config", [
    ({}, {}), (dict(attention_bias="qkv"), dict(gate="channel", share_first=True)),
    (dict(family="opt", attention_bias=True, mlp_bias=True), dict(gate="sum")),
    (dict(qk_norm=True), dict(downsample_norm=True)),
])
def test_few_kernels_compute_the_same(shape, config, idx, monkeypatch):
    """In 16 bits all weights are cast at once, and one product has several weights: the logits and
    the gradients are those of a cast and a product for each use, up to rounding."""
    torch.manual_seed(0)
    base = Transformer(small_config(**shape)).freeze("nf4", torch.bfloat16)
    model = shaken(QST(base, SideConfig(reduction=4, **config)))
    model.side.save_memory(True, 8)

    def run():
        model.zero_grad()
        logits, loss = model(idx, idx)
        loss.backward()
        return {"logits": logits.detach()} | {n: p.grad for n, p in model.side.named_parameters()}

    found = run()
    monkeypatch.setattr(SideNetwork, "cast", lambda side, dtype: side)
    expected = run()
    assert found.keys() == expected.keys() and not torch.equal(found["logits"], base(idx))
    norm = {name: value.float().norm() for name, value in expected.items()}
    largest = max(n for name, n in norm.items() if name != "logits")
    for name, value in expected.items():  # the bias of the keys has hardly any gradient
        error = (found[name] - value).float().norm()
        assert error < 0.03 * norm[name] + 1e-3 * largest, (name, error, norm[name])
