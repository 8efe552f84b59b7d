"""--optimizer_bits 8: AdamW with two moments in 8 bits. Many parameters are computed at once, in
rows of 256 values that share an absmax: each begins a row, and has the codes of one alone."""

import math

import torch

from data.run.optim import must_skip, together
from quant import (
    ABSMAX_BLOCK_SIZE as ROW, DYNAMIC_CODEBOOK, chunk_size, codebook_on, dequantize_blockwise,
    quantize_blockwise,
)

LEVELS = {  # of each moment
    "mean": DYNAMIC_CODEBOOK,
    "root": DYNAMIC_CODEBOOK,  # in states of earlier commits
    # Nearer to AdamW than with an unsigned dynamic code book, if gradients span up to 3 decades.
    "unsigned_root": (torch.arange(256) / 255) ** 2,
    "momentum": torch.arange(-128, 128) / 127,  # Muon's, evenly spaced: arXiv 2509.23106
}


def in_rows(tensors, rest=0):
    """Tensors one behind the other, (rows, 256). Where one ends within a row, `rest` follows."""
    rest = tensors[0].new_full((ROW,), rest)
    parts = [part for t in tensors for part in (t.flatten(), rest[: -t.numel() % ROW])]
    return torch.cat(parts).view(-1, ROW)


def out_of(rows, like):
    """Undo `in_rows`: flat views of what belongs to each of the tensors `like`."""
    parts = rows.split([-(-tensor.numel() // ROW) for tensor in like])
    return [part.flatten()[: tensor.numel()] for part, tensor in zip(parts, like)]


def kept(states, name, like):
    """A moment of the parameters `like`, at first zeros: codes (rows, 256), and absmax (rows,)."""
    zero = LEVELS[name].abs().argmin().item()
    if name not in states[0]:
        rows = in_rows(like)
        return torch.full_like(rows, zero, dtype=torch.uint8), torch.zeros_like(rows[:, 0]).float()
    absmax = torch.cat([state[f"{name}_absmax"] for state in states])
    return in_rows([state[name] for state in states], zero), absmax


def decode(states, name, like):
    """The moment in fp32, (rows, 256)."""
    codes, absmax = kept(states, name, like)
    moment = torch.empty(codes.shape, device=codes.device)
    levels = codebook_on(LEVELS[name], codes.device)
    return dequantize_blockwise(codes.view(-1), levels, absmax, ROW, moment.view(-1)).view_as(codes)


def encode(states, name, like, moment, skip):
    """Keep a moment in 8 bits. skip: bool (), whether the earlier one stays"""
    codes, absmax = quantize_blockwise(moment, LEVELS[name], ROW)
    if name == "unsigned_root":
        codes.clamp_(min=1)  # never 0: it is the divisor
    old, new = kept(states, name, like), (codes.view_as(moment), absmax)
    for key, *both in zip((name, f"{name}_absmax"), old, new):
        for state, own in zip(states, out_of(torch.where(skip, *both), like)):
            state[key] = own


class AdamW8bit(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) with its two moments in 8 bits (arXiv 2110.02861 §2), in blocks of
    256. Of the second moment it stores the root, which needs half as many decades."""

    _step_supports_amp_scaling = True  # it looks at `found_inf` itself
    left_out = torch.zeros(())  # steps, which only the device knows until `state_dict`

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # On a GPU 2^23 values at a time: in 0.25 GB, and backward has freed more.
            for parameters in together(self, group, chunk_size(group["params"][0].device) // 8):
                self.update(parameters, [self.state[p] for p in parameters], **group)
        self.left_out = self.left_out + must_skip(self, self.param_groups[0]["params"][0])

    def state_dict(self):
        left_out, self.left_out = int(self.left_out), torch.zeros(())
        for state in self.state.values():
            if "step" in state:  # Muon's matrices have none
                state["step"] -= left_out
        return super().state_dict()

    def update(self, parameters, states, lr, betas, eps, weight_decay, **_):
        grad, skip = in_rows([p.grad for p in parameters]).float(), must_skip(self, parameters[0])
        t = (n := states[0].get("step", 0) + 1) - self.left_out.to(grad.device)
        mean, root = (decode(states, name, parameters) for name in ("mean", "unsigned_root"))
        mean.lerp_(grad, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt_()
        encode(states, "mean", parameters, mean, skip)
        encode(states, "unsigned_root", parameters, root, skip)
        of_mean, of_square = (-torch.expm1(t * math.log(beta)) for beta in betas)  # 1 - beta^t
        root.div_(of_square.sqrt()).add_(eps)
        step = mean.div_(root).mul_(lr / of_mean)
        old = in_rows(parameters).float()
        new = out_of(torch.where(skip, old, (old * (1 - lr * weight_decay)).sub_(step)), parameters)
        torch._foreach_copy_(parameters, [own.view_as(p) for own, p in zip(new, parameters)])
        for state in states:
            state["step"] = n
