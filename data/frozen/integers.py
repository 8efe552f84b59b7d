"""Weights as integers of 3 or 4 bits with trainable scales (PEQA, arXiv 2305.14152 §3).

For the weights of an output channel, or of a group of neighbours in it, we store a step `scale`,
the integer `zero` that stands for 0, and for each weight an integer of b bits:

    code = clamp(round(W / scale) + zero, 0, 2^b - 1)            W ~ scale * (code - zero)

The codes are packed eight at a time, b bits each, into b bytes: 3 bits take 3 bits.
"""

import torch
from torch.nn import functional as F

from data import InputError
from quant import Quantized, chunk_size


def pack(codes, bits):
    """uint8 (n,) below 2^bits -> uint8 (ceil(n / 8) * bits,), the first code in the lowest bits."""
    eights = F.pad(codes, (0, -len(codes) % 8)).view(-1, 8).long()
    words = (eights << bits * torch.arange(8, device=codes.device)).sum(dim=1, keepdim=True)
    return (words >> 8 * torch.arange(bits, device=codes.device) & 255).to(torch.uint8).view(-1)


def unpack_codes(packed, bits):
    """Undo `pack`: int32 (n,), n a multiple of 8."""
    order = torch.arange(8, dtype=torch.int32, device=packed.device)
    shifted = packed.view(-1, bits).int() << 8 * order[:bits]
    words = shifted.sum(dim=1, keepdim=True, dtype=torch.int32)
    return (words >> bits * order & 2**bits - 1).view(-1)


class QuantizedInt(Quantized):
    """A matrix of packed integers.

    codes: uint8 (ceil(n / 8) * bits,)
    scales: fp32 (rows, groups); zeros: uint8 (rows, groups)
    """

    def __init__(self, codes, scales, zeros, shape, bits):
        groups = scales.shape[1]
        kind = f"int{bits}-{shape[1] // groups}" if groups > 1 else f"int{bits}"
        super().__init__(shape, kind, codes=codes, scales=scales, zeros=zeros)
        self.bits = bits

    def centred(self):
        """code - zero, in the scales' dtype: (rows, groups, group_size)."""
        codes = unpack_codes(self.codes, self.bits)[: self.shape.numel()]
        centred = codes.view(*self.zeros.shape, -1) - self.zeros.unsqueeze(-1)
        return centred.to(self.scales.dtype)

    @torch.no_grad()
    def fill(self, out):
        out.copy_(self.centred().mul_(self.scales.unsqueeze(-1)).view(-1))

    def grad_of_scales(self, x, grad):
        """dL/dscale = the sum of dL/dW * (code - zero) over the group."""
        centred, grad_weight = self.centred(), grad.flatten(0, -2).T @ x.flatten(0, -2)
        return centred.mul_(grad_weight.view_as(centred)).sum(dim=-1)


def quantize_kind(weight, kind="int4", name="the weight"):
    """Round a matrix to the nearest of 2^bits equal steps between each group's smallest and largest
    weight. 0 is always between them, so that the zero point fits in as many bits.

    kind: "int4", ...; in "int3-64" not all weights of a row share a scale, but 64 neighbours
    """
    bits, *group = map(int, kind.removeprefix("int").split("-"))
    columns, top = weight.shape[1], 2**bits - 1
    (group_size,) = group or [columns]
    if columns % group_size:
        message = f"--quant {kind} does not divide the {columns} columns of {name}"
        raise InputError(f"{message}; powers of two do, up to {columns & -columns}.")
    parts = []
    eights = max(1, chunk_size(weight.device) // columns // 8)  # 8 rows are whole bytes
    for rows in weight.split(8 * eights):
        groups = rows.float().unflatten(1, (-1, group_size))
        low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
        # By a tensor: by a number, CUDA multiplies with the reciprocal, and rounds otherwise.
        scale = (groups.amax(dim=-1, keepdim=True).clamp(min=0) - low) / torch.full_like(low, top)
        scale = torch.where(scale == 0, 1.0, scale)  # of nothing but zeros
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, top).to(torch.uint8)
        parts.append((pack(codes.view(-1), bits), scale.squeeze(-1), zero.squeeze(-1)))
    codes, scales, zeros = map(torch.cat, zip(*parts))
    if not weight.is_meta and not scales.isfinite().all():
        raise InputError(f"{name} has NaN, infinite or too large values and cannot be quantized.")
    return QuantizedInt(codes, scales, zeros.to(torch.uint8), weight.shape, bits)
