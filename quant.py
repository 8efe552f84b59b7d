"""Four bits per weight: code books, block-wise quantization, double quantization, `Linear4bit`.

A weight matrix is cut into blocks of 64 consecutive weights. For each block we store the largest
magnitude, its `absmax`. For each weight we store 4 bits: the index of the level nearest to
weight / absmax in a code book of 16. So `weight ~ codebook[code] * absmax`. NF4, the code book of
QLoRA (arXiv 2305.14314 §3), has levels where the weights are: at quantiles of N(0, 1).

One fp32 absmax per 64 weights costs 32 / 64 = 0.5 bits per weight. Double quantization applies *the
same function* again: the mean of the absmax values is subtracted, and blocks of 256 of them, which
belong to 16,384 weights, are quantized to 8 bits. That costs 8 / 64 + 32 / (64 * 256) = 0.127 bits
per weight, so 4.127 in all.

How memory is laid out, for a weight of n values (row-major, rows are outputs)
    codes          uint8 (ceil(n / 2),)        two codes a byte, the first in the high nibble
    absmax         uint8 (ceil(n / 64),)       8-bit codes; fp32 itself without double quantization
    nested_absmax  fp32  (ceil(n / 64 / 256),) scale of each block of absmax codes
    offset         fp32  ()                    the mean that was subtracted

The bytes are those of the library bitsandbytes, as in checkpoints on the Hub. One difference: up to
0.3 % of bitsandbytes' absmax codes are off by one step, because it looks them up in a table of
65,536 points; ours are exactly the nearest. Weights are buffers, and the product is `F.linear`.

`python quant.py` prints the code books, the errors and the bits per weight;
tests/lectures/four_bits.py draws them. data/frozen/integers.py has integers of 3 or 4 bits.
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from data import InputError, leaf

BLOCK_SIZE = 64  # weights that share an absmax
ABSMAX_BLOCK_SIZE = 256  # absmax values that share a nested absmax


# --------------------------------------------------------------------------------------
# Code books

# Quantiles of N(0, 1), divided by the largest (QLoRA §3). The eight positive ones have equal steps
# of probability from 0.9677083 to 1/2, without 1/2; the seven negative ones from 1 - 0.9677083 to
# 1/2, without 1/2. Between them is 0. tests/core/test_quant.py derives them.
NF4_CODEBOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])

# bitsandbytes' FP4: a sign, 2 bits of exponent and 1 of mantissa, in units of 1/12. The index of a
# level is its bit pattern, so the levels are not sorted.
FP4_CODEBOOK = torch.tensor([
    0.0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3
]) / 12

CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4_CODEBOOK}


def dynamic_codebook():
    """Make the 8-bit "dynamic" code book for absmax values: (256,), sorted, in (-1, 1].

    One sign bit, then a unary exponent: each zero bit in front divides by ten, and what is left
    is a linear fraction of [0.1, 1]. So it has seven decades, and the larger a number, the finer
    its steps relative to it. (8-bit Optimizers, arXiv 2110.02861 §2.)
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        centres = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(levels))


DYNAMIC_CODEBOOK = dynamic_codebook()


@cache
def codebook_on(codebook, device):
    """A code book on a device, copied there once."""
    return codebook.to(device)


@cache
def byte_table(kind, device):
    """For each byte of two codes their two levels, as one 64-bit word: int64 (256,).

    byte 0x3C = codes 3 and 12 -> codebook[3], codebook[12]: two fp32 side by side, the first code
    in front. One look-up decodes two weights, and `.view(torch.float32)` separates them.
    """
    byte = torch.arange(256)
    levels = CODEBOOKS[kind][torch.stack([byte >> 4, byte & 15], dim=1)]  # (256, 2)
    return levels.view(torch.int64).view(256).to(device)


# --------------------------------------------------------------------------------------
# Block-wise quantization: one function for the weights, and again for their scales


def chunk_size(device):
    """Weights per chunk: few on a CPU, so that temporaries stay in its cache."""
    return 1 << 20 if device.type == "cpu" else 1 << 26


@cache  # otherwise each call would copy them to the GPU, and wait
def bounds_on(codebook, device):
    """The midpoints between a code book's sorted levels, and the code of each sorted level."""
    levels, order = codebook.sort(stable=True)  # FP4's are in the order of their bits
    return ((levels[1:] + levels[:-1]) / 2).to(device), order.to(device, torch.uint8)


def nearest(values, codebook):
    """Index of the level nearest to each value in [-1, 1], (n,); on a tie, of the lower level."""
    bounds, order = bounds_on(codebook, values.device)
    return order[torch.bucketize(values, bounds, out_int32=True)]


def quantize_blockwise(values, codebook, block_size):
    """Quantize to the nearest of `codebook`'s levels times each block's largest magnitude.

    values: any shape, as one row of n values in blocks; the last block may be short
    returns codes, uint8 (n,), or for 16 levels (ceil(n / 2),) with two codes per byte; and absmax,
    fp32 (number of blocks,)
    """
    values = values.reshape(-1)
    n, per_byte = values.numel(), 2 if len(codebook) == 16 else 1
    codes = torch.empty(-(-n // per_byte), dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-n // block_size), device=values.device)
    if values.is_meta:  # there is nothing to compute
        return codes, absmax
    # The temporaries of a chunk take 8 times its own bytes on a CPU, and 32 times on a GPU.
    size = chunk_size(values.device) // (8 if values.is_cpu else 32)
    for start in range(0, n, size):
        chunk = values[start : start + size].float()
        short = -len(chunk) % block_size  # padding by nothing would copy
        blocks = (F.pad(chunk, (0, short)) if short else chunk).view(-1, block_size)
        peak = blocks.abs().amax(dim=1)
        # Multiply by the reciprocal, as bitsandbytes does: division decides exact ties differently.
        index = nearest((blocks * (1 / peak.clamp(min=1e-38)).unsqueeze(1)).view(-1), codebook)
        if per_byte == 2:  # for an odd n, the last nibble is padding
            index = (index[::2] << 4) | index[1::2]
        part = codes[start // per_byte : (start + size) // per_byte]
        part.copy_(index[: len(part)])
        absmax[start // block_size :][: len(peak)] = peak
    return codes, absmax


def dequantize_blockwise(codes, table, absmax, block_size, out):
    """Undo `quantize_blockwise` into `out`, (n,), round to its dtype, and return it.

    table: the levels of a byte of codes: a code book of 256 levels, or a `byte_table`
    """
    size, per_byte = chunk_size(codes.device), table.itemsize // 4  # fp32 levels in an entry
    for start in range(0, len(out), size):
        part = out[start : start + size]
        byte = codes[start // per_byte : (start + size) // per_byte].int()
        levels = table.index_select(0, byte).view(torch.float32)
        scale = absmax[start // block_size : (start + size) // block_size].unsqueeze(1)
        if len(part) % block_size == 0:
            torch.mul(levels.view(-1, block_size), scale, out=part.view(-1, block_size))
        else:  # the last block is short
            levels = F.pad(levels, (0, -len(levels) % block_size)).view(-1, block_size)
            part.copy_((levels * scale).view(-1)[: len(part)])
    return out


# --------------------------------------------------------------------------------------
# A quantized tensor

unpack_buffers = {}  # {(dtype, device): one buffer, as large as the largest weight so far}


def unpack_buffer(numel, dtype, device):
    """The one buffer that all weights are unpacked into. On a CPU, new memory costs more time than
    the arithmetic that fills it."""
    buffer = unpack_buffers.get((dtype, device))
    if buffer is None or buffer.numel() < numel:
        buffer = unpack_buffers[dtype, device] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


class Quantized(nn.Module):
    """Base class of quantized tensors, which are stored as buffers.

    shape: the tensor's torch.Size; kind: "nf4", "int4-64", ...
    """

    def __init__(self, shape, kind, **tensors):
        super().__init__()
        self.shape, self.kind = shape, kind
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def nbytes(self):
        """The bytes of all buffers."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def dequantize(self, dtype=torch.float32, out=None):
        """Return the weights. The fp32 product is rounded once, to `dtype`.

        out: optional buffer of that dtype; the result is then a view of it
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        out = out.view(-1)[: self.shape.numel()]
        self.fill(out)
        return out.view(self.shape)

    def unpack(self, dtype):
        """Dequantize into the buffer that all weights share. The next `unpack` overwrites it."""
        return self.dequantize(dtype, unpack_buffer(self.shape.numel(), dtype, self.codes.device))

    def product(self, x, bias=None):
        """x (..., in_features) -> x @ W.T + bias"""
        return F.linear(x, self.unpack(x.dtype), bias)


class Quantized4bit(Quantized):
    """A tensor of 4-bit codes; the buffers are described at the top of this file."""

    scales = None  # there are no trainable scales; integers have them

    def __init__(self, codes, absmax, nested_absmax, offset, shape, kind="nf4"):
        tensors = dict(codes=codes, absmax=absmax, nested_absmax=nested_absmax, offset=offset)
        super().__init__(shape, kind, **tensors)

    @property
    def op_args(self):
        """The arguments of the operators below."""
        return self.codes, self.absmax, self.nested_absmax, self.offset, self.kind

    def fill(self, out):
        """Write the weights into `out`, (n,)."""
        torch.ops.qst.dequantize(*self.op_args, out)

    def product(self, x, bias=None):
        """x (..., in_features) -> x @ W.T + bias. For a few rows of x on a GPU, one kernel decodes
        and multiplies, and the unpacked W is never in memory."""
        rows = x.numel() // self.shape[1]
        if not 0 < rows <= MAX_ROWS:
            return super().product(x, bias)
        y = torch.ops.qst.matvec(x.reshape(rows, -1), *self.op_args, self.shape[0])
        y = y.view(*x.shape[:-1], self.shape[0])
        return y if bias is None else y + bias


def quantize_4bit(weight, kind="nf4", double_quant=True, name="the weight"):
    """Quantize a tensor of any shape and float dtype to 4 bits (QLoRA §3; QST §3.1, Eqs. 1-3).

    kind: "nf4" or "fp4"; name: the tensor's name in error messages
    """
    if kind not in CODEBOOKS:
        raise InputError(f"4-bit type {kind!r} is unknown: choose one of {', '.join(CODEBOOKS)}.")
    codes, absmax = quantize_blockwise(weight, CODEBOOKS[kind], BLOCK_SIZE)
    offset = absmax.mean()  # not finite if any value is not, or if the sum overflows
    if not weight.is_meta and not offset.isfinite():
        raise InputError(f"{name} is empty, or has values that are NaN, infinite or too large.")
    if not double_quant:
        return Quantized4bit(codes, absmax, None, None, weight.shape, kind)
    nested = quantize_blockwise(absmax - offset, DYNAMIC_CODEBOOK, ABSMAX_BLOCK_SIZE)
    return Quantized4bit(codes, *nested, offset, weight.shape, kind)


# --------------------------------------------------------------------------------------
# The two operators in plain torch: the reference, and the implementation for CPUs


def plain_dequantize(codes, absmax, nested_absmax, offset, kind, out):
    """Unpack a weight into `out`, (n,): first its scales, then the weight, by one function."""
    if nested_absmax is not None:
        table, scales = codebook_on(DYNAMIC_CODEBOOK, out.device), torch.empty_like(absmax).float()
        dequantize_blockwise(absmax, table, nested_absmax, ABSMAX_BLOCK_SIZE, scales)
        absmax = scales.add_(offset)
    dequantize_blockwise(codes, byte_table(kind, codes.device), absmax, BLOCK_SIZE, out)


def plain_matvec(x, codes, absmax, nested_absmax, offset, kind, out_features):
    """x (rows, in_features) -> x @ W.T (rows, out_features)."""
    weight = unpack_buffer(out_features * x.shape[1], x.dtype, x.device)
    torch.ops.qst.dequantize(codes, absmax, nested_absmax, offset, kind, weight)
    return x @ weight.view(out_features, -1).T


# Registered operators let torch choose the plain version or a CUDA kernel by the device, and let
# torch.compile and the meta device work with them. `custom_op` would take 17 us a call, not 2.
library = torch.library.Library("qst", "DEF")
WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str kind"
library.define(f"dequantize({WEIGHT}, Tensor(a!) out) -> ()")
library.define(f"matvec(Tensor x, {WEIGHT}, int out_features) -> Tensor")
library.impl("dequantize", plain_dequantize, "CompositeExplicitAutograd")
library.impl("matvec", plain_matvec, "CompositeExplicitAutograd")
torch.library.register_fake("qst::dequantize", lambda *args: None, lib=library)
torch.library.register_fake(
    "qst::matvec", lambda x, *args: x.new_empty(len(x), args[-1]), lib=library
)

# --------------------------------------------------------------------------------------
# The same two as CUDA kernels, where there is Triton (it comes with torch on Linux)
#
# With many rows of x, unpacking takes little of a product's time. When a token is generated, x has
# one row, and the time is that of reading the weight: 4 bits are faster.

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import current_target, is_hip
except ImportError:
    triton = None

MAX_ROWS = 16  # of x, for matvec
TILE = {"FEATURES": 16, "BLOCKS": 8}  # of the weight, for the 256 threads of matvec

if triton:
    BLOCK, HALF = tl.constexpr(BLOCK_SIZE), tl.constexpr(BLOCK_SIZE // 2)
    NESTED, LARGEST = tl.constexpr(ABSMAX_BLOCK_SIZE), tl.constexpr(torch.finfo(torch.float32).max)

    @triton.jit
    def decode(codes, absmax, nested_absmax, offset, codebook, dynamic, nbytes, block):
        """Decode blocks by their numbers, int64 (m,): fp32 (m, 64), zeros past the weight's end."""
        at = block[:, None] * HALF + tl.arange(0, HALF)
        byte = tl.load(codes + at, mask=at < nbytes, other=0).to(tl.int32)  # (m, 32)
        # Each thread has both codes of a byte, so that it stores neighbours.
        code = tl.join(byte >> 4, byte & 15).ravel()
        level = tl.gather(tl.load(codebook + tl.arange(0, 16)), code, 0)
        there = block * HALF < nbytes
        scale = tl.load(absmax + block, mask=there, other=0)  # (m,)
        if nested_absmax is not None:  # decided at compile time
            nested = tl.load(nested_absmax + block // NESTED, mask=there, other=0)
            scale = tl.load(dynamic + scale.to(tl.int32)) * nested + tl.load(offset)
        weight = level.reshape(block.shape[0], BLOCK) * tl.where(there, scale, 0.0)[:, None]
        # AMD's GPUs would multiply and round to fp16 in one step, which gives other bits.
        return tl.minimum(weight, LARGEST) if is_hip() else weight

    @triton.jit
    def dequantize_kernel(
        codes, absmax, nested_absmax, offset, codebook, dynamic, nbytes, out, n,
        BLOCKS: tl.constexpr,
    ):
        """Decode a tile of blocks and store it: one pass over the memory."""
        # 64 bits from the first product on: a weight may have more than 2^31 values.
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        weight = decode(codes, absmax, nested_absmax, offset, codebook, dynamic, nbytes, block)
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, weight.to(out.dtype.element_ty), mask=at < n)

    @triton.jit
    def matvec_kernel(
        codes, absmax, nested_absmax, offset, codebook, dynamic, nbytes, x, y, rows,
        in_features, out_features, ROWS: tl.constexpr, FEATURES: tl.constexpr, BLOCKS: tl.constexpr,
    ):
        """Some features of y for some rows of x. Each warp multiplies every eighth block of their
        weights, on tensor cores where there are any; then the warps' sums are added."""
        feature = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
        row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        total, n_blocks = tl.zeros((BLOCKS, FEATURES, ROWS), tl.float32), in_features // BLOCK
        for first in range(0, n_blocks, BLOCKS):
            part = first + tl.arange(0, BLOCKS).to(tl.int64)[:, None]
            # Past the end of a feature's weights both factors are zeros: inf * 0 is NaN.
            block = tl.where(part < n_blocks, feature * n_blocks + part, nbytes).ravel()
            weight = decode(codes, absmax, nested_absmax, offset, codebook, dynamic, nbytes, block)
            weight = weight.to(x.dtype.element_ty).reshape(BLOCKS, FEATURES, BLOCK)
            at = row[:, None] * in_features + part[:, None] * BLOCK + tl.arange(0, BLOCK)
            there = (part < n_blocks)[:, None] & (row < rows)[:, None]
            value = tl.load(x + at, mask=there, other=0).trans(0, 2, 1)  # (BLOCKS, 64, ROWS)
            total = tl.dot(weight, value, total, input_precision="ieee")
        there = (row < rows) & (feature < out_features)[:, None]
        y_row = tl.sum(total, axis=0).to(y.dtype.element_ty)
        tl.store(y + row * out_features + feature[:, None], y_row, mask=there)

    def launch(kernel, grid, threads, weight, *arguments, **constants):
        """Launch a kernel on the weight's device; Triton alone would take the current one."""
        codes, absmax, nested_absmax, offset, kind = weight
        codebooks = [codebook_on(c, codes.device) for c in (CODEBOOKS[kind], DYNAMIC_CODEBOOK)]
        with torch.cuda.device_of(codes):
            # No fused multiply-add: a scale's product and sum are rounded one by one, as in the
            # plain version, so that `dequantize` has the same bits on every device.
            kernel[grid](
                codes, absmax, nested_absmax, offset, *codebooks, len(codes), *arguments,
                num_warps=threads // current_target().warp_size, enable_fp_fusion=False, **constants
            )

    def launch_dequantize(*weight_and_out):
        *weight, out = weight_and_out
        n, blocks = out.numel(), 32 // out.itemsize  # a thread stores 16 bytes, the widest access
        grid = (triton.cdiv(n, blocks * BLOCK_SIZE),)
        launch(dequantize_kernel, grid, 128, weight, out, n, BLOCKS=blocks)
        # Tell autograd that the buffer has changed: Triton writes to it behind torch's back.
        torch.autograd.graph.increment_version(out)

    def launch_matvec(x, *weight_and_features):
        *weight, out_features = weight_and_features
        if x.shape[1] % BLOCK_SIZE:  # a row of the matrix begins inside of a block
            return plain_matvec(x, *weight_and_features)
        # Matrix units of AMD take 16 rows; elsewhere more than 16 bytes need too many registers.
        at_once = 16 if is_hip() else min(triton.next_power_of_2(len(x)), 16 // x.itemsize)
        grid = triton.cdiv(out_features, TILE["FEATURES"]), triton.cdiv(len(x), at_once)
        x, y = x.contiguous(), x.new_empty(len(x), out_features)
        launch(matvec_kernel, grid, 256, weight, x, y, *x.shape, out_features, ROWS=at_once, **TILE)
        return y

    library.impl("dequantize", launch_dequantize, "CUDA")
    library.impl("matvec", launch_matvec, "CUDA")


# --------------------------------------------------------------------------------------
# A frozen linear layer


class _FrozenLinear(torch.autograd.Function):
    """`F.linear` with a packed weight. Backward unpacks the weight again instead of storing a copy;
    x is stored only if the scales are trained.

    scales: `weight.scales`, an argument of its own so that autograd sees it
    """

    @staticmethod
    def forward(ctx, x, scales, weight, bias):
        ctx.weight = weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return weight.product(x, bias)

    @staticmethod
    def backward(ctx, grad):
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad_x = grad @ weight.unpack(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_scales = weight.grad_of_scales(x, grad) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scales, None, None


class Linear4bit(nn.Module):
    """A linear layer with a frozen weight: `Quantized4bit`, or integers with trainable scales.

    x: (..., in_features), any float dtype, in which the product is computed and returned
    """

    def __init__(self, weight: Quantized, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(cls, linear, kind="nf4", double_quant=True, name="the weight"):
        """Quantize the weight of an `nn.Linear`; its bias is unchanged."""
        return cls(quantize_4bit(linear.weight.detach(), kind, double_quant, name), linear.bias)

    def forward(self, x):
        scales, bias = self.weight.scales, None if self.bias is None else self.bias.to(x.dtype)
        needs_graph = x.requires_grad or (scales is not None and scales.requires_grad)
        if torch.is_grad_enabled() and needs_graph:
            return _FrozenLinear.apply(x, scales, self.weight, bias)
        return self.weight.product(x, bias)


def main():
    for kind, codebook in CODEBOOKS.items():
        print(kind, *(f"{level:.3f}" for level in codebook.sort().values))
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    print("\n2048 x 2048 weights, N(0, 1)       mean |error|   bits per weight")
    for kind in CODEBOOKS:
        for double_quant in (False, True):
            q = quantize_4bit(weight, kind, double_quant)
            label = kind + ", double quantization" * double_quant
            error = (q.dequantize() - weight).abs().mean()
            print(f"{label:34} {error:.5f}        {8 * q.nbytes / weight.numel():.3f}")


if __name__ == "__main__":
    leaf("command").run(main, "close other programs")
