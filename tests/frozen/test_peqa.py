"""PEQA: whole numbers of 3 and 4 bits, the gradients of their scales, and training those alone."""

import numpy as np
import pytest
import torch
from helpers import small_base, small_config, tuned
from torch.nn import functional as F

from data import InputError
from data.formats.safetensors import read_safetensors
from data.frozen import integers
from data.frozen.integers import QuantizedInt, pack, quantize_kind, unpack_codes
from model import Transformer
from quant import Linear4bit, _FrozenLinear

CASES = pytest.mark.parametrize("bits, group", [(4, 0), (3, 0), (4, 12), (3, 12)])


def by_numpy(weight, bits, group):
    """PEQA's formula, group by group: codes, scales, zero points and what they stand for."""
    top, result = 2**bits - 1, []
    for values in weight.numpy().reshape(-1, group or weight.shape[1]):
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        scale = (high - low) / np.float32(top) if high > low else np.float32(1)
        zero = np.round(-low / scale)
        codes = np.clip(np.round(values / scale) + zero, 0, top)
        result.append((codes, scale, zero, scale * (codes - zero)))
    return [np.array(part) for part in zip(*result)]


def kind_of(bits, group):
    return f"int{bits}-{group}" if group else f"int{bits}"


@CASES
def test_rounding_is_the_formula(bits, group):
    """Codes, scales, zero points and weights are those of an independent numpy version; no weight
    is off by more than half a scale; also of rows of one sign, of zeros, and of odd sizes."""
    torch.manual_seed(0)
    weight = torch.randn(13, 36) * torch.rand(13, 1)
    weight[1], weight[2], weight[3] = 0, weight[2].abs() + 0.5, -weight[3].abs()
    q = quantize_kind(weight, kind_of(bits, group))
    codes, scales, zeros, restored = by_numpy(weight, bits, group)
    assert np.array_equal(unpack_codes(q.codes, bits)[: 13 * 36].numpy(), codes.reshape(-1))
    assert np.array_equal(q.scales.flatten().numpy(), scales)
    assert np.array_equal(q.zeros.flatten().numpy(), zeros)
    assert np.array_equal(q.dequantize().numpy(), restored.reshape(13, 36))
    error = (q.dequantize() - weight).abs().view(13, -1, group or 36)
    assert (error <= q.scales.unsqueeze(-1) / 2 * 1.0001).all()
    assert q.shape == weight.shape and q.codes.numel() == -(-13 * 36 // 8) * bits


def test_chunks_do_not_show(monkeypatch):
    """A matrix that is handled a few rows at a time is quantized, unpacked and trained the same."""
    torch.manual_seed(0)
    weight, x = torch.randn(37, 24), torch.randn(5, 24)

    def all_of_it():
        layer = Linear4bit(quantize_kind(weight, "int3-8"))
        layer.weight.scales.requires_grad_()
        layer(x).square().sum().backward()
        return layer.weight.codes, layer.weight.dequantize(), layer.weight.scales.grad

    whole = all_of_it()
    odd = quantize_kind(weight[:, :12], "int3").codes  # nine rows of 12 would end inside of a byte
    for rows in (8, 9):
        monkeypatch.setattr(integers, "chunk_size", lambda device: 24 * rows)
        assert all(torch.allclose(a, b) for a, b in zip(whole, all_of_it()))
        monkeypatch.setattr(integers, "chunk_size", lambda device: 12 * rows)
        assert torch.equal(quantize_kind(weight[:, :12], "int3").codes, odd)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_packed_to_the_bit(bits):
    """Eight codes take `bits` bytes, the first in the lowest bits, and come back."""
    codes = torch.randint(0, 2**bits, (8 * 11,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == 11 * bits and torch.equal(unpack_codes(packed, bits), codes.int())
    number = sum(code << bits * i for i, code in enumerate(codes[:8].tolist()))
    assert packed[:bits].tolist() == list(number.to_bytes(bits, "little"))


def int_layer(bits, group, dtype=torch.float64):
    torch.manual_seed(0)
    weight = quantize_kind(torch.randn(10, 24), kind_of(bits, group))
    layer = Linear4bit(weight, torch.randn(10)).to(dtype)
    layer.weight.scales.requires_grad_()
    return layer, torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)


@CASES
def test_gradients_against_numerical_differences(bits, group):
    """Of x and of the scales, in float64."""
    layer, x = int_layer(bits, group)
    weight = layer.weight

    def product(x, scales):
        weight.scales.data.copy_(scales.detach())
        return _FrozenLinear.apply(x, scales, weight, layer.bias)

    scales = weight.scales.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(product, (x, scales))


@CASES
def test_gradients_against_autograd(bits, group):
    """They are those of a dense W = scale * (code - zero) that autograd knows, and nothing but x is
    kept for them: neither W nor the codes in float."""
    layer, x = int_layer(bits, group, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()
    weighting = torch.randn_like(y)
    q = layer.weight
    ours = torch.autograd.grad((y * weighting).sum(), (x, q.scales))
    codes = unpack_codes(q.codes, bits).view(10, -1, group or 24) - q.zeros.unsqueeze(-1)
    dense = F.linear(x, (q.scales.unsqueeze(-1) * codes).flatten(1), layer.bias)
    assert torch.allclose(y, dense, atol=1e-5)
    for one, two in zip(ours, torch.autograd.grad((dense * weighting).sum(), (x, q.scales))):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "int3", "int4-8", "int3-16"])
def test_peqa_trains_the_scales_alone(kind, tmp_path, idx):
    """As many numbers as there are scales; whole numbers and zero points are the same bits after
    training; the file holds the scales and nothing else; another file is another task."""
    model = tuned("peqa", kind=kind)
    start = model.side.state_dict()
    weights = [m for m in model.base.modules() if isinstance(m, QuantizedInt)]
    assert len(weights) == 3 * 7 and {weight.kind for weight in weights} == {kind}
    group = int(kind.partition("-")[2] or 0)
    shapes = [weight.shape for weight in weights]
    count = sum(rows * (columns // (group or columns)) for rows, columns in shapes)
    assert sum(p.numel() for p in model.parameters()) == count
    before = [(m.codes.clone(), m.zeros.clone(), m.scales.detach().clone()) for m in weights]
    model.save_side(tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(idx, idx).backward()
        optimizer.step()
    for (codes, zeros, scales), m in zip(before, weights):
        assert torch.equal(codes, m.codes) and torch.equal(zeros, m.zeros)
        assert not torch.equal(scales, m.scales)
    model.save_side(tmp_path / "task")
    saved = read_safetensors(tmp_path / "task/side.safetensors")
    assert set(saved) == set(start) and sum(read().numel() for read in saved.values()) == count
    task = model(idx)[0].detach()
    original = model.load_side(tmp_path / "base")(idx)[0].detach()
    assert torch.equal(original, small_base(kind)(idx)) and not torch.equal(original, task)
    assert torch.equal(model.load_side(tmp_path / "task")(idx)[0], task)


def test_bits_of_a_weight():
    """Per channel of 4,096 weights, 3 bits take 3.01 and 4 bits 4.01; what is no matrix of whole
    groups, or not finite, is refused by its name."""
    weight = torch.randn(16, 4096)
    for bits in (3, 4):
        assert 8 * quantize_kind(weight, f"int{bits}").nbytes / weight.numel() == bits + 40 / 4096
    message = "int4-100 does not divide the 4096 columns of layers.0; .* up to 4096"
    with pytest.raises(InputError, match=message):
        quantize_kind(weight, "int4-100", "layers.0")
    with pytest.raises(InputError, match="powers of two do, up to 32"):
        quantize_kind(weight[:, :96], "int4-64")
    assert quantize_kind(weight[:, :96], "int4-32").scales.shape == (16, 3)
    weight[3, 5] = float("nan")
    with pytest.raises(InputError, match="layers.0 has NaN"):
        quantize_kind(weight, name="layers.0")
    with pytest.raises(InputError, match="--quant int7 is unknown"):
        Transformer(small_config()).freeze("int7")
