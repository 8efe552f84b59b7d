"""Checks of the first six pieces: four bits per weight."""

import weakref

import reference
import torch
from checks import check_of, expect, expect_like, expect_near, expect_tuple
from torch.nn import functional as F

from quant import DYNAMIC_CODEBOOK, FP4_CODEBOOK, NF4_CODEBOOK, Quantized4bit, quantize_4bit


def weights(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@check_of("nf4_codebook", "list the sixteen probabilities on paper first. How many are above 1/2?")
def check_codebook(nf4_codebook):
    levels = nf4_codebook()
    expect_like("the result", levels, NF4_CODEBOOK)
    expect((levels.diff() > 0).all(), "the levels are not in ascending order.")
    largest = levels.abs().max().item()
    expect(largest < 1.0001, f"the largest level is {largest:.3f}, and must be 1: divide by it.")
    even = levels.diff().std() < 1e-3
    expect(not even, "the levels are evenly spaced: they must be quantiles of the normal "
           "distribution, close together near 0.")
    expect((levels == 0).any(), "no level is exactly 0: a zero weight must stay zero.")
    above = (levels > 0).sum().item()
    expect(above == 8, f"{above} levels are above 0 and {15 - above} below it: it must be 8 and 7.")
    expect(levels[0] == -1, f"the lowest level is {levels[0]:.3f}, and must be -1.")
    expect_near("the table", levels, NF4_CODEBOOK, tolerance=1e-6)


@check_of("quantize_blocks", "print one block of eight values beside its levels times its absmax.")
def check_blocks(quantize_blocks):
    x = weights(330)
    x[70] = -9  # the largest magnitude of its block is that of a negative weight
    run(quantize_blocks, x, NF4_CODEBOOK, 64)
    zeros = weights(192)
    zeros[64:128] = 0
    run(quantize_blocks, zeros, NF4_CODEBOOK, 64)
    run(quantize_blocks, x * 1e-20, NF4_CODEBOOK, 64)
    run(quantize_blocks, weights(100), FP4_CODEBOOK, 64)
    run(quantize_blocks, weights(600), DYNAMIC_CODEBOOK, 256)


def run(quantize_blocks, x, codebook, size):
    """Compare the scales with the project's, and then ask for levels as near as the nearest."""
    found = quantize_blocks(x.clone(), codebook, size)
    expect_tuple("quantize_blocks", found, ("codes", "absmax"))
    (codes, absmax), (right, peaks) = found, reference.quantize_blocks(x, codebook, size)
    signed = torch.stack([block.max() for block in x.split(size)])
    expect_near("absmax", absmax, peaks, [
        ("absmax is the largest value of a block, and not the largest magnitude.", signed),
        ("absmax is the mean magnitude of a block, and not the largest.",
         torch.stack([block.abs().mean() for block in x.split(size)])),
    ], tolerance=0)
    expect_like("codes", codes, right)
    scale = peaks.repeat_interleave(size)[: len(x)]
    most = codes.max().item()
    expect(most < len(codebook), f"a code is {most}, and the code book has {len(codebook)} levels.")
    of_zeros = scale == 0
    wrong = of_zeros & (codebook[codes.long()] != 0)
    expect(not wrong.any(), "in a block of zeros the codes are not that of level 0: what is 0 / 0?")
    miss, best = ((codebook[c.long()] * scale - x) / scale.clamp(min=1e-30) for c in (codes, right))
    low = (miss[~of_zeros] <= 1e-6).all()
    expect(not low or (best <= 1e-6).all(), "every code is that of the level below its value, and "
           "not of the nearest.")
    worse = miss.abs() > best.abs() + 1e-5
    if worse.any():
        j = worse.nonzero()[0].item()
        small = "; weights near 1e-20 differ: is something added to absmax?" * (scale.max() < 1e-9)
        order = "; this code book is not sorted" * (codebook is FP4_CODEBOOK)
        raise AssertionError(f"weight {j} of {len(x)} has code {codes[j]}, and {right[j]} is nearer"
                             f"{small}{order}.")


@check_of("pack_codes", "write the byte of the codes 3 and 12 in hexadecimal: 0x3C.")
def check_packing(pack_codes):
    for n in (64, 65, 1):
        codes = torch.arange(n).mul(7).remainder(16).to(torch.uint8)
        swapped = reference.pack_codes(codes[: n - n % 2].view(-1, 2).flip(1).reshape(-1))
        expect_near(f"the bytes of {n} codes", pack_codes(codes.clone()),
                    reference.pack_codes(codes), [
            ("the first code of each pair is in the low four bits, and must be in the high.",
             swapped)])


@check_of("double_quantize", "absmax values are all positive: what would the sign bit of 8-bit "
          "codes be for, if nothing were subtracted?")
def check_double(double_quantize):
    absmax = weights(600).abs() + 1
    found = double_quantize(absmax.clone(), DYNAMIC_CODEBOOK, reference.quantize_blocks)
    expect_tuple("double_quantize", found, ("codes", "nested_absmax", "offset"))
    codes, nested, offset = found
    right, scales, mean = reference.double_quantize(absmax, DYNAMIC_CODEBOOK, None)
    expect_near("offset", offset, mean, [
        ("offset is the largest absmax, and must be the mean.", absmax.max()),
        ("offset is the smallest absmax, and must be the mean.", absmax.min())], 1e-6)
    of_all = reference.quantize_blocks(absmax, DYNAMIC_CODEBOOK, 256)
    sizes = tuple(nested.shape)
    expect(sizes == (3,), f"nested_absmax has the shape {sizes}, and must have (3,) for 600 "
           "scales: blocks here have 256 values.")
    expect_near("nested_absmax", nested, scales, [
        ("the offset is not subtracted before the scales are quantized.", of_all[1])], 1e-6)
    expect_near("codes", codes, right, [
        ("the offset is not subtracted before the scales are quantized.", of_all[0])])


@check_of("dequantize", "do it in the order scales, codes, product, and print the shape of each.")
def check_dequantize(dequantize):
    for n in (40_000, 40_001, 77):
        q = quantize_4bit(weights(n))
        args = q.codes, q.absmax, q.nested_absmax, q.offset, NF4_CODEBOOK, DYNAMIC_CODEBOOK, n
        without = reference.dequantize(*args[:3], torch.zeros(()), *args[4:])
        swapped = (q.codes << 4) | (q.codes >> 4)
        expect_near(f"{n} weights", dequantize(*args), reference.dequantize(*args), [
            ("offset is not added to the scales.", without),
            ("each pair of weights is swapped: the first code is in the high four bits.",
             reference.dequantize(swapped, *args[1:])),
            ("the levels are not multiplied by their scales.",
             NF4_CODEBOOK[unpacked(q.codes)[:n]]),
        ], tolerance=1e-6)
        single = quantize_4bit(weights(n), double_quant=False)
        args = single.codes, single.absmax, None, None, NF4_CODEBOOK, DYNAMIC_CODEBOOK, n
        expect_near("without double quantization, the result", dequantize(*args),
                    reference.dequantize(*args), tolerance=1e-6)


def unpacked(codes):
    """The level of each code has its index as value here."""
    ones, n = torch.ones(-(-2 * len(codes) // 64)), 2 * len(codes)
    levels = reference.dequantize(codes, ones, None, None, NF4_CODEBOOK, None, n)
    return (levels.unsqueeze(1) - NF4_CODEBOOK).abs().argmin(dim=1)


class Watched(Quantized4bit):
    """A 4-bit weight that notes what was unpacked of it."""

    def dequantize(self, dtype=torch.float32, out=None):
        weight = super().dequantize(dtype, out)
        self.unpacked.append(weakref.ref(weight))
        return weight


@check_of("FrozenLinear", "y = x W^T. Which of x and W does dL/dx need, and which can be made "
          "again from the 4-bit weight? `ctx.weight = weight` keeps no tensor of its own.")
def check_linear(frozen):
    q = quantize_4bit(weights(64 * 64).view(64, 64))
    weight = Watched(q.codes, q.absmax, q.nested_absmax, q.offset, q.shape)
    weight.unpacked = []
    dense, bias = q.dequantize(), weights(64, 1)
    leaf = weights(2 * 3 * 64, 2).view(2, 3, 64).requires_grad_()
    x, kept = leaf * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen.apply(x, weight, bias)
    expect_near("y", y, F.linear(x, dense, bias), [
        ("y has no bias.", F.linear(x, dense)),
        ("x is multiplied by W, and must be by its transpose.", F.linear(x, dense.T, bias))])
    expect_near("without a bias, y", frozen.apply(x, weight, None), F.linear(x, dense))
    expect(y.requires_grad, "y has no graph: call it by `apply`, and compute from x.")
    attributes = {k: v for k, v in vars(y.grad_fn).items() if isinstance(v, torch.Tensor)}
    sizes = [t.shape for t in (*kept, *attributes.values())]
    expect(x.shape not in sizes, "x is kept for backward: a frozen weight has no gradient, and "
           "only that would need x.")
    alive = dense.shape in sizes or any(ref() is not None for ref in weight.unpacked)
    expect(not alive, "the unpacked W is kept for backward: unpack it again there.")
    grad = weights(2 * 3 * 64, 3).view(2, 3, 64)
    (found,) = torch.autograd.grad(y, leaf, grad)
    expect_near("dL/dx", found, grad @ dense, [
        ("dL/dx is grad times the transpose of W: look again which way W goes.", grad @ dense.T),
        ("dL/dx is grad itself: W is missing.", grad)], 1e-4)
    half = frozen.apply(x.bfloat16(), weight, bias.bfloat16())
    expect_like("for x in bf16, y", half, F.linear(x, dense).bfloat16())
