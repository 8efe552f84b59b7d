"""Four bits per weight: code books, block-wise quantization, double quantization, `Linear4bit`.

How it works
    A weight matrix is cut into blocks of 64 consecutive weights. Of each block we keep the largest
    magnitude, its `absmax`, and of each weight the index of the code-book level nearest to
    weight / absmax: 4 bits. So `weight ~ codebook[code] * absmax`.

    NF4, the code book of QLoRA (arXiv 2305.14314 §3), puts its 16 levels where the weights are: at
    quantiles of the normal distribution, with an exact zero, scaled to [-1, 1].

    One fp32 absmax per 64 weights costs 32 / 64 = 0.5 bits per weight. Double quantization shrinks
    it with *the same function*: the absmax values, their mean subtracted, are themselves quantized
    in blocks of 256, to 8 bits. That costs 8 / 64 + 32 / (64 * 256) = 0.127 bits, 4.127 in all.

How memory is laid out, for a weight of n values (row-major, rows are outputs)
    codes          uint8 (ceil(n / 2),)        two codes a byte, the first in the high nibble
    absmax         uint8 (ceil(n / 64),)       index into the 8-bit code book; fp32 without double quant
    nested_absmax  fp32  (ceil(n / 64 / 256),) scale of each block of absmax codes
    offset         fp32  ()                    the mean that was subtracted
    The bytes are those of the library bitsandbytes, which is what checkpoints on the Hub contain.

What we do differently
    - Weights are buffers of an ordinary module and the product is `F.linear`: no tensor subclass.
    - A whole byte is looked up at once, in a table of the 256 *pairs* of levels (one machine word
      an entry), so that dequantizing is one lookup and one multiply.
    - The frozen model runs layer by layer and keeps no graph, so one scratch buffer, as large as
      the largest weight, holds whichever weight is in use.
    - Absmax codes are the true nearest entries. bitsandbytes searches a grid of 65,536 points on
      the CPU and is off by one step in up to 0.3 % of them; the code it *reads* is the same.
What we give up: other block sizes, 8-bit weights, storage types other than bytes.

Run `python quant.py` to see the code books, the errors and the bits per weight.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import nn
from torch.nn import functional as F

BLOCK_SIZE = 64  # weights that share an absmax
ABSMAX_BLOCK_SIZE = 256  # absmax values that share a nested absmax



class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and says what to do."""


# --------------------------------------------------------------------------------------
# Code books

NF4_CODEBOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# A tiny floating-point number: sign, 2 bits of exponent, 1 of mantissa. In the order of the bit
# patterns (not sorted), in units of 1/12.
FP4_CODEBOOK = torch.tensor([
    0.0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3
]) / 12  # fmt: skip

CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4_CODEBOOK}


def normal_codebook(offset=0.9677083):
    """Derive NF4 from the normal distribution (QLoRA §3).

    Eight positive and seven negative levels are quantiles at equal steps of probability between
    1/2 and `offset`, which is just short of 1, where the quantile is infinite; the eighth negative
    step is given to an exact zero. Agrees with the published table to 1e-6.
    """
    steps = lambda n: torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1].tolist()
    positive = [NormalDist().inv_cdf(p) for p in steps(9)]
    negative = [-NormalDist().inv_cdf(p) for p in steps(8)]
    levels = torch.tensor(sorted(negative + [0.0] + positive), dtype=torch.float64)
    return (levels / levels.max()).float()


def dynamic_codebook():
    """Make the 8-bit "dynamic" code book for absmax values: (256,), sorted, in (-1, 1].

    One sign bit, then a unary exponent: each zero bit in front divides by ten, and what is left
    is a linear fraction of [0.1, 1]. So it has seven decades, and the larger the number the finer
    its steps. (8-bit Optimizers, arXiv 2110.02861 §2.)
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        centres = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(levels))


DYNAMIC_CODEBOOK = dynamic_codebook()


# --------------------------------------------------------------------------------------
# Block-wise quantization: one function for the weights, and again for their scales


def chunk_size(device):
    """Weights to handle at a time: on a CPU, what is in between should stay in the cache."""
    return 1 << 18 if device.type == "cpu" else 1 << 26


def nearest(values, codebook):
    """Index of the level nearest to each value, as uint8; on a tie, the lower level."""
    levels, order = codebook.sort(stable=True)
    bounds = (levels[1:] + levels[:-1]) / 2
    if len(bounds) > 15:
        return torch.bucketize(values, bounds.to(values.device), out_int32=True).to(torch.uint8)
    # Count the bounds below each value: 15 comparisons are vectorized, a search is not.
    index = torch.zeros_like(values, dtype=torch.uint8)
    above = torch.empty_like(values, dtype=torch.bool)
    for bound in bounds.tolist():
        index += torch.gt(values, bound, out=above).view(torch.uint8)
    if torch.equal(levels, codebook):
        return index
    return order.to(values.device, torch.uint8)[index.int()]


def quantize_blockwise(values, codebook, block_size):
    """Quantize to the nearest of `codebook`'s levels times each block's largest magnitude.

    values: any shape, taken as one row of n values in blocks, of which the last may be short
    returns codes, uint8 (n,), or (ceil(n / 2),) two a byte for a code book of 16 levels,
    and absmax, fp32 (number of blocks,)
    """
    values = values.reshape(-1)
    n, per_byte = values.numel(), 2 if len(codebook) == 16 else 1
    codes = torch.empty(-(-n // per_byte), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-n // block_size), device=values.device)
    step = chunk_size(values.device)
    for start in range(0, n, step):
        chunk = values[start : start + step].float()
        blocks = F.pad(chunk, (0, -len(chunk) % block_size)).view(-1, block_size)
        peak = blocks.abs().amax(dim=1)
        # Times the reciprocal, as in bitsandbytes: dividing, as it does in a last, short block on
        # the CPU, breaks exact ties another way.
        index = nearest((blocks * (1 / peak.clamp(min=1e-38)).unsqueeze(1)).view(-1), codebook)
        if per_byte == 2:  # of an odd n, the last nibble is padding and stands for 0
            index = index[::2] << 4 | index[1::2]
        part = codes[start // per_byte : (start + step) // per_byte]
        part.copy_(index[: len(part)])
        absmax[start // block_size :][: len(peak)] = peak
    return codes, absmax


def dequantize_blockwise(codes, codebook, absmax, block_size):
    """Undo `quantize_blockwise`: fp32 (codes.numel(),)."""
    levels = codebook.to(codes.device).index_select(0, codes.int())
    return levels * absmax.repeat_interleave(block_size)[: codes.numel()]


# --------------------------------------------------------------------------------------
# A 4-bit tensor


@dataclass
class Quantized4bit:
    """A quantized tensor; the fields are described at the top of this file."""

    codes: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple
    kind: str = "nf4"

    @property
    def nbytes(self):
        """All bytes it takes to store the tensor."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(t.nbytes for t in parts if t is not None)

    def scales(self):
        """Each block's absmax in fp32, (blocks,)."""
        if self.nested_absmax is None:
            return self.absmax
        centred = dequantize_blockwise(
            self.absmax, DYNAMIC_CODEBOOK, self.nested_absmax, ABSMAX_BLOCK_SIZE
        )
        return centred + self.offset

    def dequantize(self, dtype=torch.float32, out=None):
        """Return the weights, rounded once, from the fp32 product to `dtype`.

        out: optional buffer of that dtype to write to; what is returned is a view of it
        """
        n, blocks = self.shape.numel(), len(self.absmax)
        if out is None or out.numel() < blocks * BLOCK_SIZE:
            out, small = torch.empty(blocks * BLOCK_SIZE, dtype=dtype, device=self.codes.device), out
        else:
            out, small = out.view(-1)[: blocks * BLOCK_SIZE], None
        _dequantize(self.codes, self.scales(), _pair_table(self.kind, self.codes.device), out)
        weight = out[:n].view(self.shape)
        return weight if small is None else small.copy_(weight)


def quantize_4bit(weight, kind="nf4", double_quant=True, name="the weight"):
    """Quantize a tensor of any shape and float dtype to 4 bits (QLoRA §3; QST §3.1, Eqs. 1-3).

    kind: "nf4" or "fp4"; name: what to call the tensor when it cannot be quantized
    """
    if kind not in CODEBOOKS:
        raise InputError(f"4-bit type {kind!r} is unknown: choose one of {', '.join(CODEBOOKS)}.")
    codes, absmax = quantize_blockwise(weight, CODEBOOKS[kind], BLOCK_SIZE)
    if not weight.is_meta and not absmax.isfinite().all():
        raise InputError(f"{name} has NaN or infinite values and cannot be quantized.")
    nested_absmax = offset = None
    if double_quant:
        offset = absmax.mean()
        absmax, nested_absmax = quantize_blockwise(
            absmax - offset, DYNAMIC_CODEBOOK, ABSMAX_BLOCK_SIZE
        )
    return Quantized4bit(codes, absmax, nested_absmax, offset, weight.shape, kind)


@cache
def _pair_table(kind, device):
    """The two levels that each byte stands for, as one 64-bit word: int64 (256,)."""
    byte = torch.arange(256)
    levels = CODEBOOKS[kind][torch.stack([byte >> 4, byte & 15], dim=1)]
    return levels.view(torch.int64).view(256).to(device)


def _dequantize(codes, scales, pairs, out):
    """Write levels times scales to `out`, a flat buffer of len(scales) whole blocks."""
    step = min(chunk_size(out.device), out.numel())
    words = torch.empty(step // 2, dtype=torch.int64, device=out.device)
    for start in range(0, out.numel(), step):
        target = out[start : start + step].view(-1, BLOCK_SIZE)
        index = codes[start // 2 : (start + step) // 2].int()
        torch.index_select(pairs, 0, index, out=words[: len(index)])
        levels = words[: target.numel() // 2].view(torch.float32).view(-1, BLOCK_SIZE)
        scale = scales[start // BLOCK_SIZE :][: len(target)].unsqueeze(1)
        torch.mul(levels, scale, out=target)


# --------------------------------------------------------------------------------------
# A frozen linear layer

_scratch = {}


def scratch(numel, dtype, device):
    """Return the one buffer that every 4-bit weight of this dtype and device is unpacked into."""
    buffer = _scratch.get((dtype, device))
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[dtype, device] = torch.empty(numel, dtype=dtype, device=device)
    return buffer


class _Linear4bitFunction(torch.autograd.Function):
    """`F.linear` that keeps nothing for backward: the 4-bit weight is simply unpacked again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.unpack(grad.dtype), None


class Linear4bit(nn.Module):
    """A frozen linear layer with 4-bit weights.

    x: (..., in_features), any float dtype, in which the product is computed and returned
    """

    def __init__(self, weight: Quantized4bit, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = weight.kind
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear, kind="nf4", double_quant=True, name="the weight"):
        """Quantize an `nn.Linear`, of which only the bias, if any, is kept as it is."""
        return cls(quantize_4bit(linear.weight.detach(), kind, double_quant, name), linear.bias)

    @property
    def quantized(self):
        shape = torch.Size((self.out_features, self.in_features))
        return Quantized4bit(
            self.codes, self.absmax, self.nested_absmax, self.offset, shape, self.kind
        )

    def unpack(self, dtype):
        """The weight in the shared scratch buffer: (out_features, in_features), good until the
        next call of any layer."""
        numel = len(self.absmax) * BLOCK_SIZE
        return self.quantized.dequantize(dtype, scratch(numel, dtype, self.codes.device))

    def forward(self, x):
        return _Linear4bitFunction.apply(x, self)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def main():
    print("NF4 ", " ".join(f"{level:.4f}" for level in NF4_CODEBOOK))
    print("FP4 ", " ".join(f"{level:.4f}" for level in FP4_CODEBOOK.sort().values))
    print(f"NF4 derived from normal quantiles: off by {(normal_codebook() - NF4_CODEBOOK).abs().max():.1e}\n")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator)
    print("4096 x 4096 weights, N(0, 1)       mean |error|   bits per weight")
    for kind in CODEBOOKS:
        for double_quant in (False, True):
            q = quantize_4bit(weight, kind, double_quant)
            error = (q.dequantize() - weight).abs().mean()
            label = f"{kind}{', double quantization' if double_quant else ''}"
            print(f"{label:34} {error:.5f}        {8 * q.nbytes / weight.numel():.3f}")


if __name__ == "__main__":
    main()
