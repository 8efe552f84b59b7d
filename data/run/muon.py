"""Muon, an optimizer for matrices: --optimizer muon."""

import math

import torch

from data.run.optim import adamw_state, must_skip


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982 §2) for groups of matrices with `muon=True`; AdamW for the rest.

    A matrix moves along its momentum with all singular values set to about 1. The factor 0.2
    sqrt(max(m, n)) makes the step as large as AdamW's, so that both have one learning rate.
    """

    momentum = 0.95

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False  # torch's GradScaler must unscale the gradients

    def kept_state(self, group, p):
        """See `kept_state` in data/run/optim.py."""
        return {"momentum": (p.shape, torch.float32)} if group["muon"] else adamw_state(p)

    @torch.no_grad()
    def step(self, closure=None):
        if must_skip(self):
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
    """Set the singular values of a matrix (m, n) to 0.7 to 1.2, by a few Newton-Schulz iterations
    with Muon's coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
