"""The base's hidden states: packed in a few bits for backward, and measured."""

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from data.tasks.examples import collate
from quant import BLOCK_SIZE, NF4_CODEBOOK, Quantized4bit, quantize_blockwise

# A memo of `pack_hidden` for as long as a hidden state lives: {state: {bits: its packed form}}.
PACKED = WeakTensorKeyDictionary()


def pack_hidden(x, bits):
    """Pack a tensor of any shape: 16 bits, x itself; 8 bits, codes and a scale per block of 64, a
    127th of its largest magnitude; 4 bits, NF4's codes and absmax."""
    if bits == 16:
        return (x,)
    if bits == 4:
        return quantize_blockwise(x, NF4_CODEBOOK, BLOCK_SIZE)
    short = -x.numel() % BLOCK_SIZE  # padding by nothing would copy x
    blocks = (F.pad(x.flatten(), (0, short)) if short else x).reshape(-1, BLOCK_SIZE)
    largest = torch.linalg.vector_norm(blocks, torch.inf, 1, keepdim=True, dtype=torch.float32)
    steps = torch.rsub(largest, 1e-30, alpha=-1 / 127)  # a 127th, and never 0, by one kernel
    return (blocks / steps).round_().to(torch.int8), steps


def pack_once(h_f, bits):
    """`pack_hidden` with the memo PACKED: h_f must not change any more. A sweep packs once for all
    side networks, and a state from --cache_hidden is packed already."""
    if bits == 16 or torch.compiler.is_compiling():
        return pack_hidden(h_f, bits)
    packed = PACKED.setdefault(h_f, {})
    if bits not in packed:
        packed[bits] = pack_hidden(h_f, bits)
    return packed[bits]


def unpack_hidden(packed, shape, bits, dtype):
    """Undo `pack_hidden`, up to rounding."""
    if bits == 16:
        return packed[0]
    codes, scales = packed
    if bits == 4:
        return Quantized4bit(codes, scales, None, None, shape).dequantize(dtype)
    values = torch.mul(codes, scales, out=torch.empty_like(codes, dtype=dtype))
    return values.view(-1)[: shape.numel()].view(shape)


class PackedInputFunction(torch.autograd.Function):
    """`F.linear` whose input needs no gradient. Backward needs the input only for dL/dweight, and
    stores it in `bits` bits."""

    @staticmethod
    def forward(ctx, h_f, weight, bits):
        ctx.shape, ctx.bits, ctx.dtype = h_f.shape, bits, weight.dtype
        ctx.save_for_backward(*pack_once(h_f, bits))
        return F.linear(h_f, weight.to(h_f.dtype))

    @staticmethod
    def backward(ctx, grad):
        h_f = unpack_hidden(ctx.saved_tensors, ctx.shape, ctx.bits, grad.dtype)
        return None, (grad.flatten(0, -2).T @ h_f.flatten(0, -2)).to(ctx.dtype), None


@torch.no_grad()
def channel_statistics(base, prompts, every=1, skip=1):
    """Mean and variance of each channel of a base's hidden states over the tokens of some texts.

    prompts: lists of ids; skip: how many positions at the start of each do not count. The first
        position has activations a hundred times larger than all others
    returns two of (N / every + 1, C), in fp64: of the embedding and of each every-th layer's output
    """
    n, C = base.config.n_layer // every + 1, base.config.n_embd
    sums = torch.zeros(2, n, C, dtype=torch.float64)
    for start in range(0, len(prompts), 4):  # a few at a time, so that little memory is needed
        rows = prompts[start : start + 4]
        idx, _ = collate([(list(ids), []) for ids in rows])
        counts = torch.tensor([[skip <= i < len(ids) for i in range(idx.shape[1])] for ids in rows])
        states = (base.source or base).states(idx, None, None, every)
        for i, h in zip(range(n), states):  # not the last, which is normed
            exact = torch.float32 if h.device.type == "mps" else torch.float64
            h = h[counts.to(h.device)].to(exact)
            sums[:, i] += torch.stack([h.sum(dim=0), h.square().sum(dim=0)]).cpu()
    mean, square = sums / max(1, sum(max(0, len(prompt) - skip) for prompt in prompts))
    return mean, square - mean.square()
