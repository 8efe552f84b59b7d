"""quant.py, against what bitsandbytes gives (tests/fixtures, made by make_fixtures.py)."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import FIXTURES, TEST_DATA, needs_test_data
from torch.nn import functional as F

import quant
from data import InputError
from data.frozen.integers import quantize_kind
from quant import (
    CODEBOOKS, DYNAMIC_CODEBOOK, FP4_CODEBOOK, NF4_CODEBOOK, Linear4bit, Quantized4bit,
    dequantize_blockwise, nearest, quantize_4bit, quantize_blockwise,
)

ORACLE = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / "quantized.npz").items()}
NAMES = ["normal", "odd", "zeros", "ties"]
GRID = 2 / 65535  # bitsandbytes finds a level for the nearest point of a grid this fine


def test_code_books_are_exact():
    """The tables are the published ones in full fp32 precision."""
    assert torch.equal(NF4_CODEBOOK, ORACLE["nf4"])
    assert torch.equal(FP4_CODEBOOK, ORACLE["fp4"])
    assert torch.equal(DYNAMIC_CODEBOOK, ORACLE["dynamic"])


def test_nf4_is_derived_from_normal_quantiles():
    """Quantiles at equal steps of probability between 1/2 and 0.9677083, just short of 1, where the
    quantile is infinite; one negative step of eight is given to an exact zero."""
    positive = torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1].tolist()
    negative = torch.linspace(1 - 0.9677083, 0.5, 8, dtype=torch.float64)[:-1].tolist()
    levels = torch.tensor(sorted(map(NormalDist().inv_cdf, [0.5, *positive, *negative])))
    assert (levels / levels.max() - NF4_CODEBOOK).abs().max() < 1e-6


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_bitsandbytes(name, kind):
    """Packed codes and absmax are the same bits, also with ties, zero blocks and odd sizes."""
    q = quantize_4bit(ORACLE[f"{name}.x"], kind, double_quant=False)
    assert torch.equal(q.codes, ORACLE[f"{name}.{kind}.single.codes"])
    assert torch.equal(q.absmax, ORACLE[f"{name}.{kind}.single.absmax"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["single", "double"])
@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_reads_bitsandbytes(name, kind, scale, dtype):
    """What bitsandbytes quantized dequantizes to exactly its result."""
    key, x = f"{name}.{kind}.{scale}", ORACLE[f"{name}.x"]
    nested = [ORACLE.get(f"{key}.nested"), ORACLE.get(f"{key}.offset")]
    q = Quantized4bit(ORACLE[f"{key}.codes"], ORACLE[f"{key}.absmax"], *nested, x.shape, kind)
    expected = ORACLE[f"{key}.{str(dtype)[6:]}"].to(dtype)
    if name == "odd":  # there it multiplies in the output's dtype, and so rounds twice
        rtol = 1e-2 if dtype != torch.float32 else 0
        assert torch.allclose(q.dequantize(dtype), expected, rtol=rtol)
    else:
        assert torch.equal(q.dequantize(dtype), expected)


def test_absmax_codes_are_the_nearest():
    """Ours are true nearest levels; those of bitsandbytes differ in few, by one step."""
    x = ORACLE["many_blocks.x"]
    q = quantize_4bit(x)
    theirs = ORACLE["many_blocks.nf4.double.absmax"]
    assert torch.equal(q.nested_absmax, ORACLE["many_blocks.nf4.double.nested"])
    assert torch.equal(q.offset, ORACLE["many_blocks.nf4.double.offset"])
    step = (q.absmax.int() - theirs.int()).abs()
    assert step.max() == 1 and (step > 0).sum() == 1  # of 300, by one step
    scaled = quantize_4bit(x, double_quant=False).absmax - q.offset
    scaled /= q.nested_absmax.repeat_interleave(256)[: len(scaled)]
    error = lambda codes: (DYNAMIC_CODEBOOK[codes.int()] - scaled).abs()
    best = (DYNAMIC_CODEBOOK - scaled.unsqueeze(1)).abs().amin(dim=1)
    assert (error(q.absmax) - best).max() < 1e-7
    assert (error(theirs) - best).max() <= GRID


LARGER = sorted((TEST_DATA / "oracle/nf4").glob("*.npz"))


@needs_test_data
@pytest.mark.parametrize("path", LARGER, ids=lambda path: path.stem)
def test_larger_oracles(path):
    """The same properties on the larger files, and the dynamic map on ties and normal values."""
    z = {k: torch.from_numpy(v) for k, v in np.load(path).items() if v.dtype.kind != "U"}
    if "code" in z:
        codes, absmax = quantize_blockwise(z["x"], DYNAMIC_CODEBOOK, z["blocksize"].item())
        assert torch.equal(absmax, z["absmax"])
        per_value = absmax.repeat_interleave(z["blocksize"].item())[: len(codes)]
        error = lambda c: (DYNAMIC_CODEBOOK[c.int()] - z["x"] / per_value).abs()
        assert (error(codes) <= error(z["q"]) + 1e-7).all()
        assert (error(z["q"]) - error(codes)).max() <= GRID
        read = torch.empty_like(z["deq"])
        dequantize_blockwise(z["q"], DYNAMIC_CODEBOOK, absmax, z["blocksize"].item(), read)
        assert torch.equal(read, z["deq"])
        return
    q = quantize_4bit(z["input_f32"], double_quant=False)
    assert torch.equal(q.codes, z["packed"]) and torch.equal(q.absmax, z["absmax"])
    assert torch.equal(q.dequantize(), z["dequant"])
    theirs = Quantized4bit(q.codes, z["dq_absmax_q"], z["dq_absmax2"], z["dq_offset"], q.shape)
    scales = torch.empty_like(z["dq_absmax_dequant"])
    dequantize_blockwise(theirs.absmax, DYNAMIC_CODEBOOK, theirs.nested_absmax, 256, scales)
    assert torch.equal(scales + theirs.offset, z["dq_absmax_dequant"])
    assert torch.equal(theirs.dequantize(), z["dq_dequant"])
    ours = quantize_4bit(z["input_f32"])
    step = (ours.absmax.int() - theirs.absmax.int()).abs()
    if z["absmax"].unique().numel() > 1:  # else all scales are equal, and any code times 0 is right
        assert step.max() <= 1 and (step > 0).float().mean() <= 0.003


def test_bits_per_weight():
    """4 + 8 / 64 + 32 / (64 * 256) bits per weight, and one offset a tensor."""
    weight = torch.randn(1024, 1024)
    assert quantize_4bit(weight).nbytes == 2**20 // 2 + 2**14 + 4 * 2**6 + 4
    assert 8 * quantize_4bit(weight).nbytes / 2**20 == pytest.approx(4.127, abs=5e-4)
    assert 8 * quantize_4bit(weight, double_quant=False).nbytes / 2**20 == 4.5


def test_error_on_normal_weights():
    """The mean error of NF4 on N(0, 1) is 0.0728; a uniform code book's, 0.0853, does not pass."""
    x = torch.randn(1 << 14, 64, generator=torch.Generator().manual_seed(0))
    peak = x.abs().amax(dim=1, keepdim=True)
    error = lambda book: (
        book[nearest((x / peak).view(-1), book).int()].view_as(x) * peak - x
    ).abs().mean()
    assert error(NF4_CODEBOOK) == pytest.approx(0.0728, abs=0.0003)
    assert error(torch.linspace(-1, 1, 16)) > 0.08
    assert (quantize_4bit(x, double_quant=False).dequantize() - x).abs().mean() == pytest.approx(
        error(NF4_CODEBOOK).item(), abs=1e-6
    )


def test_nearest_is_nearest():
    """Every index is that of the closest level, in both ways of searching."""
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    for book in (NF4_CODEBOOK, FP4_CODEBOOK, DYNAMIC_CODEBOOK):
        chosen = (book[nearest(x, book).int()] - x).abs()
        assert torch.equal(chosen, (book - x.unsqueeze(1)).abs().amin(dim=1))


def test_a_value_between_two_levels_is_multiplied_by_the_reciprocal():
    """As bitsandbytes does: a division would bring a tenth of these to the other level."""
    draw = torch.Generator().manual_seed(0)
    peak = torch.rand(1000, 1, generator=draw) + 0.5
    x = F.pad((NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2 * peak, (0, 49))
    x[:, -1:] = peak
    codes, _ = quantize_blockwise(x, NF4_CODEBOOK, 64)
    codes = torch.stack([codes >> 4, codes & 15], dim=1).view(1000, 64)
    assert torch.equal(codes, nearest(x * (1 / peak), NF4_CODEBOOK))
    assert (codes != nearest(x / peak, NF4_CODEBOOK)).sum() > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (33, 130), (5, 7), (300, 1024)])
def test_linear(shape, bias, dtype):
    """Linear4bit is F.linear with the dequantized weight, in any dtype, also for the gradient."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)
    layer = Linear4bit.from_linear(linear)
    weight = quantize_4bit(linear.weight).dequantize(dtype)
    for rows in (2, 6):  # 6 and 18 rows of x: a matvec, and the unpacked weight
        x = torch.randn(rows, 3, shape[1], dtype=dtype, requires_grad=True)
        expected = F.linear(x, weight, linear.bias.to(dtype) if bias else None)
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected) or rows == 2
        near = dict(rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(y, expected, **near)
        seed = torch.randn_like(y)
        grads = [torch.autograd.grad(out, x, seed)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads, **near)
    assert not list(layer.parameters())
    for empty in ((0, shape[1]), (2, 0, shape[1])):
        assert layer(torch.zeros(empty, dtype=dtype)).shape == (*empty[:-1], shape[0])


def test_layers_share_the_scratch_buffer():
    """A second layer overwrites the first one's weight, and backward still finds the right one."""
    torch.manual_seed(0)
    first, second = (Linear4bit.from_linear(torch.nn.Linear(64, 64)) for _ in range(2))
    buffers = [layer.weight.unpack(torch.float32) for layer in (first, second)]
    assert buffers[0].data_ptr() == buffers[1].data_ptr()
    x = torch.randn(2, 64, requires_grad=True)
    second(first(x)).sum().backward()
    dense = [layer.weight.dequantize() for layer in (first, second)]
    assert torch.allclose(x.grad, (torch.ones(2, 64) @ dense[1]) @ dense[0], atol=1e-5)


def test_chunks_do_not_show(monkeypatch):
    """A weight that is handled a chunk at a time has the codes, scales and values it has whole."""
    x = torch.randn(39_999, generator=torch.Generator().manual_seed(0))
    whole = quantize_4bit(x)
    expected = [*whole.buffers(), whole.dequantize()]
    monkeypatch.setattr(quant, "chunk_size", lambda device: 2048)
    parts = quantize_4bit(x)
    assert all(map(torch.equal, [*parts.buffers(), parts.dequantize()], expected))


def test_dequantize_into_a_buffer():
    """`out` is filled and returned, whether it is just the weight's size or larger."""
    q = quantize_4bit(torch.randn(5, 7))
    exact, large = torch.empty(5, 7), torch.empty(200)
    assert torch.equal(q.dequantize(out=exact), q.dequantize())
    assert torch.equal(exact, q.dequantize())
    assert q.dequantize(out=large).data_ptr() == large.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_numbers_are_refused(value):
    """NaN and infinite weights are refused by the tensor's name."""
    weight = torch.randn(100, 100)
    weight[70, 3] = value
    with pytest.raises(InputError, match="layers.3.mlp.up_proj.weight"):
        quantize_4bit(weight, name="layers.3.mlp.up_proj.weight")
    with pytest.raises(InputError, match="weight is empty, or"):
        quantize_4bit(torch.zeros(0, 100))
    with pytest.raises(InputError, match="int3.*nf4"):
        quantize_4bit(torch.zeros(4), "int3")


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("power", [-80, 60])
def test_the_size_of_weights_does_not_matter(power, double_quant, kind):
    """Weights a power of two larger or smaller have the same codes, and scales as much larger."""
    weight = torch.randn(70, 70)
    one, other = (quantize_4bit(w, kind, double_quant) for w in (weight, weight * 2.0**power))
    assert torch.equal(other.codes, one.codes)
    assert torch.equal(other.dequantize(), one.dequantize() * 2.0**power)


def test_backward_keeps_no_input():
    """A frozen weight's gradient is not needed, and so x is not kept; where scales are trained, x
    alone is."""
    linear, x = torch.nn.Linear(32, 16), torch.randn(20, 32, requires_grad=True)
    for weight in (quantize_4bit(linear.weight.detach()), quantize_kind(linear.weight.detach())):
        layer, kept = Linear4bit(weight, linear.bias), []
        trained = weight.scales is not None
        if trained:
            weight.scales.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: x):
            layer(x)
        assert len(kept) == trained and all(map(torch.equal, kept, [x]))
