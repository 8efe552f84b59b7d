"""--optimizer_bits 8: AdamW with two moments in 8 bits, and how a moment is kept in 8 bits."""

import math

import torch

from data.run.optim import must_skip
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, codebook_on, dequantize_blockwise, quantize_blockwise,
)

LEVELS = {  # of each moment
    "mean": DYNAMIC_CODEBOOK,
    "root": DYNAMIC_CODEBOOK,  # in states of earlier commits
    # Nearer to AdamW than with an unsigned dynamic code book, if gradients span up to 3 decades.
    "unsigned_root": (torch.arange(256) / 255) ** 2,
    "momentum": torch.arange(-128, 128) / 127,  # Muon's, evenly spaced: arXiv 2509.23106
}


def decode(state, name, like):
    """A moment in fp32; zeros before the first step. like: a tensor of its shape"""
    if f"{name}_absmax" not in state:  # in 32 bits, or there is none yet
        return state[name] if name in state else torch.zeros(like.shape, device=like.device)
    moment = torch.empty(like.shape, device=like.device)
    levels, absmax = codebook_on(LEVELS[name], like.device), state[f"{name}_absmax"]
    dequantize_blockwise(state[name], levels, absmax, ABSMAX_BLOCK_SIZE, moment.view(-1))
    return moment


def encode(state, name, moment):
    codes, absmax = quantize_blockwise(moment, LEVELS[name], ABSMAX_BLOCK_SIZE)
    if name == "unsigned_root":
        codes.clamp_(min=1)  # never 0: it is the divisor
    state[name], state[f"{name}_absmax"] = codes, absmax


class AdamW8bit(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) that keeps its two moments in 8 bits (arXiv 2110.02861 §2).

    They are quantized in blocks of 256. Of the second moment it stores the root, which needs half
    as many decades.
    """

    @torch.no_grad()
    def step(self):
        for group in () if must_skip(self) else self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], **group)

    def update(self, parameter, state, lr, betas, eps, weight_decay, **_):
        grad = parameter.grad.float()
        t = state["step"] = state.get("step", 0) + 1
        mean, root = decode(state, "mean", grad), decode(state, "unsigned_root", grad)
        mean.lerp_(grad, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt_()
        encode(state, "mean", mean)
        encode(state, "unsigned_root", root)
        root.div_(math.sqrt(1 - betas[1] ** t)).add_(eps)
        step = mean.div_(root).mul_(lr / (1 - betas[0] ** t))
        parameter.copy_(parameter.float() * (1 - lr * weight_decay) - step)
