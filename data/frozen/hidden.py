"""Hidden states of the frozen base in a few bits: what backward keeps of them."""

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from quant import BLOCK_SIZE, NF4_CODEBOOK, Quantized4bit, quantize_blockwise


PACKED = WeakTensorKeyDictionary()  # what has been packed of a state while it lives, by bits


def pack_hidden(x, bits):
    """A tensor of any shape -> the tensors that are kept of it: x alone (16 bits), or codes and a
    scale per block of 64: steps of a 127th of the largest magnitude (8 bits), or NF4 (4 bits)."""
    if bits == 16:
        return (x,)
    if bits == 4:
        return quantize_blockwise(x, NF4_CODEBOOK, BLOCK_SIZE)
    x = x.reshape(-1)
    blocks = F.pad(x, (0, -len(x) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    steps = blocks.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-30) / 127
    return (blocks / steps).round_().to(torch.int8), steps


def pack_once(h_f, bits):
    """`pack_hidden`, noted in PACKED, so that h_f must not change any more: once for all side
    networks of a sweep, and not at all where h_f comes packed from --cache_hidden."""
    if bits == 16 or torch.compiler.is_compiling():
        return pack_hidden(h_f, bits)
    packed = PACKED.setdefault(h_f, {})
    if bits not in packed:
        packed[bits] = pack_hidden(h_f, bits)
    return packed[bits]


def unpack_hidden(packed, shape, bits, dtype):
    """Undo `pack_hidden`, as far as it can be undone."""
    if bits == 16:
        return packed[0]
    codes, scales = packed
    if bits == 4:
        return Quantized4bit(codes, scales, None, None, shape).dequantize(dtype)
    return (codes * scales).view(-1)[: shape.numel()].view(shape).to(dtype)


class PackedInputFunction(torch.autograd.Function):
    """`F.linear` whose input needs no gradient. Backward needs the input for dL/dweight alone, and
    so it is kept in `bits` bits."""

    @staticmethod
    def forward(ctx, h_f, weight, bits):
        ctx.shape, ctx.bits, ctx.dtype = h_f.shape, bits, weight.dtype
        ctx.save_for_backward(*pack_once(h_f, bits))
        return F.linear(h_f, weight.to(h_f.dtype))

    @staticmethod
    def backward(ctx, grad):
        h_f = unpack_hidden(ctx.saved_tensors, ctx.shape, ctx.bits, grad.dtype)
        return None, (grad.flatten(0, -2).T @ h_f.flatten(0, -2)).to(ctx.dtype), None
