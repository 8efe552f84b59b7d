"""Muon, an optimizer for matrices: --optimizer muon, also with --optimizer_bits 8."""

import math

import torch

from data.run.adamw8bit import AdamW8bit, decode, encode
from data.run.optim import must_skip


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982 §2) for groups of matrices with `muon=True`, and AdamW for the rest.

    A matrix moves along its momentum with all singular values set to about 1. The factor 0.2
    sqrt(max(m, n)) makes the step as large as AdamW's, so that both have one learning rate.
    """

    momentum = 0.95
    keep = staticmethod(dict.__setitem__)  # (state, name, momentum)

    @torch.no_grad()
    def step(self):
        if must_skip(self):
            return
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self.update_matrix(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW leaves out what has no gradient
        super().step()  # of AdamW, in `Muon8bit` of AdamW8bit

    def update_matrix(self, matrix, lr, weight_decay):
        grad, state = matrix.grad.float(), self.state[matrix]
        momentum = decode(state, "momentum", grad).mul_(self.momentum).add_(grad)
        self.keep(state, "momentum", momentum)
        direction = orthogonalize(grad + self.momentum * momentum)  # Nesterov's look ahead
        size = 0.2 * math.sqrt(max(matrix.shape))
        matrix.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * size)


class Muon8bit(Muon, AdamW8bit):
    """Muon with a momentum and an AdamW in 8 bits. The momentum has evenly spaced levels."""

    keep = staticmethod(encode)


def orthogonalize(matrix, steps=5):
    """Set the singular values of a matrix to 0.7 to 1.2, by Muon's Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
