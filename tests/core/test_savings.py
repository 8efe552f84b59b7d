"""What backward keeps less of: the same loss, the same gradients, or nearly, and fewer bytes."""

from dataclasses import replace

import pytest
import torch
from account import AS_WRITTEN, SAVINGS, AccountConfig, main, memory_report, parse_args, rows
from helpers import shaken, small_base, small_config
from benchmarks.live import Live
from torch.nn import functional as F

import model as model_py
from data import IGNORE_INDEX
from data.devices.device import loss_and_kept
from data.frozen.hidden import PackedInputFunction, pack_hidden, unpack_hidden
from model import PRESETS, Transformer, _ChunkedLoss, token_loss
from qst import QST
from side import SideConfig

VARIANTS = {
    "paper": {}, "pool": dict(downsample="maxpool"),
    "fast": dict(gate="sum", standardize=True, downsample="linear", every=3),
    "released": dict(gate="channel", mix="released", share_first=True, downsample_norm=True),
}


@pytest.fixture
def idx():
    return torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(1))


def step(model, idx):
    """The loss, and the gradients by name."""
    model.zero_grad()
    loss = model.loss(idx, idx)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.side.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recomputed_steps_have_the_same_gradients(changes, family, idx):
    """Bit for bit, and from fewer activations."""
    model = shaken(QST(small_base(family=family), SideConfig(reduction=4, **changes)))
    loss, expected = step(model, idx)
    before = loss_and_kept(model, idx, idx)[1]
    model.side.save_memory(True, 16)
    again, grads = step(model, idx)
    assert torch.equal(again, loss) and all(torch.equal(grads[n], g) for n, g in expected.items())
    assert loss_and_kept(model, idx, idx)[1] < before


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bits, bound", [(8, 0.02), (4, 0.25)])
def test_few_bits_of_h_f(changes, bits, bound, idx):
    """The loss is the same. Only gradients of the matrices that read h_f change, and a little."""
    model = shaken(QST(small_base(), SideConfig(reduction=4, **changes)))
    if model.side.scale is not None:
        model.side.scale.fill_(1)
    loss, expected = step(model, idx)
    model.side.save_memory(True, bits)
    again, grads = step(model, idx)
    assert torch.equal(again, loss)
    for name, grad in expected.items():
        error = (grads[name] - grad).norm() / grad.norm()
        if ".down." in name:
            assert 0 < error < bound
        else:
            assert error == 0


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packed_once_and_compiled(bits):
    """Two that read h_f keep the same tensors of it; torch.compile takes the function whole."""
    torch.manual_seed(0)
    h_f, weights = torch.randn(2, 5, 64), [torch.randn(3, 64, requires_grad=True) for _ in "ab"]
    grads = []
    for compiled in (False, True):
        kept, run = [], PackedInputFunction.apply
        if compiled:
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            losses = [run(h_f, weight, bits).square().sum() for weight in weights]
        if not compiled:
            pointers = [t.data_ptr() for t in kept if t.shape != (2, 5, 3)]
            assert pointers[len(pointers) // 2 :] == pointers[: len(pointers) // 2]
        grads.append(torch.autograd.grad(sum(losses), weights))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, bound", [(16, 0), (8, 1 / 127), (4, 1 - 0.696)])
def test_packed_activations(bits, bound, dtype):
    """Each value is off by at most half a step of its block of 64, and takes as many bits."""
    x = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[64:128] = 0
    packed = pack_hidden(x, bits)
    y = unpack_hidden(packed, x.shape, bits, dtype)
    assert y.dtype == dtype and y.shape == x.shape
    blocks = lambda t: F.pad(t.float().flatten(), (0, -t.numel() % 64)).view(-1, 64)
    peak = blocks(x).abs().amax(dim=1, keepdim=True)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    most = (bound / 2 + rounding * (bits < 16)) * peak * (1 + 1e-5)
    assert ((blocks(y) - blocks(x)).abs() <= most).all()
    if bits < 16:
        assert 8 * sum(t.nbytes for t in packed) <= (bits + 0.5) * (x.numel() + 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_activations_are_rounded_once(bits, dtype):
    """What comes back is worked out in fp32, and then rounded to the dtype that it is needed in."""
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_hidden(x, bits)
    exact = unpack_hidden(packed, x.shape, bits, torch.float32)
    assert torch.equal(unpack_hidden(packed, x.shape, bits, dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_chunks_add_up_in_fp32(dtype):
    """Of 1,000 positions in 16 bits the loss is what it is in one piece, to fp32 rounding."""
    h = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(1000) % 50
    loss = _ChunkedLoss.apply(h, targets, torch.nn.Identity(), 7)
    torch.testing.assert_close(loss, token_loss(h, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("family, shape", [("llama", {}), ("opt", dict(embed_dim=16))])
def test_the_loss_in_chunks(rows, family, shape, idx, monkeypatch):
    """The same loss and gradients, in chunks of any size, and through OPT-350m's projection."""
    model = shaken(QST(small_base(family=family, **shape), SideConfig(reduction=4)))
    targets = idx.masked_fill(idx % 3 == 0, IGNORE_INDEX)
    model.chunk_loss = False
    expected_loss, expected = step(model, idx)
    plain = model.loss(idx, targets)
    model.chunk_loss = True
    monkeypatch.setattr(model_py, "CHUNK", rows)
    loss, grads = step(model, idx)
    assert torch.allclose(loss, expected_loss, rtol=1e-6)
    assert torch.allclose(model.loss(idx, targets), plain, rtol=1e-6)
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7


def test_the_loss_in_chunks_passes_its_gradient_on():
    """A loss times three has gradients times three."""
    h, targets = torch.randn(7, 5), torch.arange(7) % 5
    grads = []
    for factor in (1, 3):
        part = h.clone().requires_grad_()
        (factor * _ChunkedLoss.apply(part, targets, torch.nn.Identity(), 7)).backward()
        grads.append(part.grad)
    torch.testing.assert_close(grads[1], 3 * grads[0])


@pytest.mark.parametrize("name, most", [("CHUNK", 10), ("CHUNK_LOGITS", 50_000)])
def test_chunks_bound_the_logits(name, most, monkeypatch):
    """With four times the batch the plain loss needs four times the logits, in chunks as many."""
    monkeypatch.setattr(model_py, name, most)
    config = small_config(vocab_size=5000)
    peaks = {}
    for chunked in (False, True):
        for batch in (2, 8):
            model = QST(Transformer(config).freeze("nf4", torch.float32), SideConfig(reduction=4))
            model.chunk_loss = chunked
            idx = torch.zeros(batch, 20, dtype=torch.long)
            with Live() as live:
                model.loss(idx, idx).backward()
            peaks[chunked, batch] = live.peak
    assert peaks[False, 8] > 3 * 8 * 20 * 5000 * 4
    assert peaks[True, 8] < 5 * 10 * 5000 * 4 + 8 * 20 * 5000


def test_evaluation_forms_no_gradients(idx, monkeypatch):
    """Where nothing learns, the loss is the forward pass alone, and the same."""
    model = shaken(QST(small_base(), SideConfig(reduction=4)))
    idx = idx.repeat(4, 1)
    expected = model.loss(idx, idx).detach()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: pytest.fail("a gradient"))
    with torch.no_grad():
        assert torch.equal(model.loss(idx, idx), expected)


def test_a_head_that_learns_is_not_chunked(idx):
    """A classifier, and full finetuning's head, need their own gradients."""
    classifier = QST(small_base(), SideConfig(reduction=4, n_labels=3))
    assert classifier.head_is_trainable
    assert not QST(small_base(), SideConfig(reduction=4)).head_is_trainable
    whole = Transformer(small_config())
    whole.loss(idx, idx).backward()
    assert whole.head_is_trainable and whole.lm_head.weight.grad.abs().sum() > 0


def test_every_saving_saves(tmp_path, monkeypatch, capsys):
    """Each makes the total smaller, and all of them together bring LLaMA-2-7B below 4.8 GB."""
    shape = small_config(n_embd=256, n_ffn=512, vocab_size=500, max_positions=384)
    monkeypatch.setitem(PRESETS, "small", shape)
    flags = f"--savings --preset small --batch_size 4 --sequence_len 384 --out_dir {tmp_path}"
    cfg = parse_args(flags.split())
    reports = main(cfg)
    totals = [row["total_bytes"] for row in reports]
    assert [row["label"] for row in reports] == list(SAVINGS)
    assert all(after < before for before, after in zip(totals, totals[1:]))
    assert "h_f in 4 bits" in capsys.readouterr().out
    first, *_, last = (row for _, row in rows(replace(cfg, preset="llama-2-7b")))
    part = replace(PRESETS["llama-2-7b"], n_layer=24)  # of the layers is too much already
    totals = [memory_report(last)["total_bytes"], memory_report(first, part)["total_bytes"]]
    assert totals[0] < 4.8e9 < totals[1]


def test_the_savings_begin_as_written():
    """The first row is QST without any saving."""
    first = next(rows(AccountConfig(savings=True, preset="opt-125m")))[1]
    plain = AccountConfig(method="qst", preset="opt-125m", **AS_WRITTEN)
    config = replace(PRESETS["opt-125m"], n_layer=2)
    assert memory_report(first, config) == memory_report(plain, config)


def test_targets_out_of_the_loss_change_nothing(idx):
    """`token_loss` of no more than the targets, chunked or not."""
    targets = torch.full_like(idx, IGNORE_INDEX)
    targets[0, 3] = 5
    model = QST(small_base(), SideConfig(reduction=4))
    one = token_loss(model(idx)[0][0, 3:4], targets[0, 3:4])
    assert torch.allclose(model.loss(idx, targets), one, rtol=1e-6)


def test_activation_bytes_counts_each_storage_once():
    """Two uses of one saved tensor count once; weights count not at all."""
    weight = torch.nn.Parameter(torch.randn(8, 8))

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def hidden(self, idx):
            return idx @ self.weight

        def loss_of(self, h, targets):
            return (h * h).sum() + (h * 2).sin().sum()

    x = torch.randn(4, 8, requires_grad=True)  # for whose gradient the weight is kept
    # and x for the weight's gradient, h twice for the square, and 2 h for the sine
    assert loss_and_kept(Square(), x, None)[1] == 3 * 4 * 8 * 4
