"""Optimizers that torch does not have: AdamW with moments of 8 bits, and Muon."""

import math

import torch

from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, codebook_on, dequantize_blockwise, quantize_blockwise,
)  # fmt: skip


def told_to_skip(optimizer):
    """Whether this step is to be left out: what torch's fused optimizers look up on the GPU."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and found_inf.item() > 0


def load_optimizer(optimizer, state):
    """Optimizer.load_state_dict, which would turn moments of 8 bits into the parameters' dtype."""
    optimizer.load_state_dict(state | dict(state={}))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        on = parameters[number].device
        moments = {k: v.to(on) if isinstance(v, torch.Tensor) else v for k, v in moments.items()}
        optimizer.state[parameters[number]] = moments


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its two moments in 8 bits (arXiv 2110.02861 §2).

    In blocks of 256, with the code book of the absmax values in quant.py. Of the second moment it
    keeps the root, which is as large as the first moment and needs half as many decades; and never
    0, so that nothing is divided by 0.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in () if told_to_skip(self) else self.param_groups:
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
            moments.append(dequantize_blockwise(codes, codebook, absmax, ABSMAX_BLOCK_SIZE))
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


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982 §2) for groups with `muon=True`, all of matrices; AdamW for the rest.

    A matrix moves along its momentum with all singular values set to about 1, so that no direction
    of the input is learned at the cost of the others. The factor 0.2 sqrt(max(m, n)) makes the step
    as large as one of AdamW, so that one learning rate serves both.
    """

    momentum = 0.95

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False  # torch's GradScaler must unscale the gradients

    @torch.no_grad()
    def step(self, closure=None):
        if told_to_skip(self):
            return None
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self.update(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW below leaves out what has no gradient
        return super().step(closure)

    def update(self, matrix, lr, weight_decay):
        grad, state = matrix.grad.float(), self.state[matrix]
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.mul_(self.momentum).add_(grad)
        direction = orthogonalize(grad + self.momentum * momentum)  # Nesterov's look ahead
        size = 0.2 * math.sqrt(max(matrix.shape))
        matrix.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * size)


def orthogonalize(matrix, steps=5):
    """Set the singular values of a matrix (m, n) to about 1, by Newton-Schulz iterations with the
    coefficients of Muon, which end between 0.7 and 1.2 and not exactly at 1, but soon."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
