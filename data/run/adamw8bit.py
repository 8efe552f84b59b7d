"""AdamW whose two moments take 8 bits each: --optimizer_bits 8."""

import math

import torch

from data.run.optim import must_skip
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, codebook_on, dequantize_blockwise, quantize_blockwise,
)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its two moments in 8 bits (arXiv 2110.02861 §2).

    They are quantized in blocks of 256 with quant.py's code book for absmax values. Of the second
    moment it stores the root, which needs half as many decades, and never 0, the divisor.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    def kept_state(self, group, p):
        """See `kept_state` in data/run/optim.py."""
        blocks = torch.Size([-(-p.numel() // ABSMAX_BLOCK_SIZE)])
        codes = dict.fromkeys(("mean", "root"), (torch.Size([p.numel()]), True))
        return codes | dict.fromkeys(("mean_absmax", "root_absmax"), (blocks, False))

    @torch.no_grad()
    def step(self):
        for group in () if must_skip(self) else self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], **group)

    def update(self, parameter, state, lr, betas, eps, weight_decay, **_):
        grad = parameter.grad.float().flatten()
        t = state["step"] = state.get("step", 0) + 1
        codebook = codebook_on("dynamic", grad.device)
        moments = []
        for name in ("mean", "root"):
            if t == 1:
                moments.append(torch.zeros_like(grad))
                continue
            codes, absmax = state[name], state[f"{name}_absmax"]
            moment = torch.empty_like(grad)
            dequantize_blockwise(codes, codebook, absmax, ABSMAX_BLOCK_SIZE, moment)
            moments.append(moment)
        mean, root = moments
        mean.lerp_(grad, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt_()
        for name, moment in (("mean", mean), ("root", root)):
            codes, absmax = quantize_blockwise(moment, DYNAMIC_CODEBOOK, ABSMAX_BLOCK_SIZE)
            state[name], state[f"{name}_absmax"] = codes, absmax
        smallest = DYNAMIC_CODEBOOK.tolist().index(0.0) + 1
        state["root"].clamp_(min=smallest)
        root.div_(math.sqrt(1 - betas[1] ** t)).add_(eps)
        step = mean.div_(root).mul_(lr / (1 - betas[0] ** t)).view_as(parameter)
        parameter.copy_(parameter.float() * (1 - lr * weight_decay) - step)
