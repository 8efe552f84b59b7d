"""Muon, an optimizer for matrices: --optimizer muon, also with --optimizer_bits 8."""

import torch

from data.run.adamw8bit import AdamW8bit, decode, encode
from data.run.optim import must_skip


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982 §2) for groups of matrices with `muon=True`, and AdamW for the rest.

    A matrix moves along its momentum with all singular values set to about 1. The factor 0.2
    sqrt(max(m, n)) makes the step as large as AdamW's, so that both have one learning rate.
    """

    momentum = 0.95
    keep = staticmethod(dict.__setitem__)  # of the arguments state, "momentum", momentum

    @torch.no_grad()
    def step(self):
        if must_skip(self):
            return
        for group in self.param_groups:
            alike = {}  # {(shape, part of 2^26 weights): matrices}: fewer kernels on a GPU
            for i, matrix in enumerate(group["params"] if group["muon"] else ()):
                if matrix.grad is not None:
                    alike.setdefault((matrix.shape, i * matrix.numel() >> 26), []).append(matrix)
            for matrices in alike.values():
                self.update_alike(matrices, group["lr"], group["weight_decay"])
        super().step()  # of AdamW, in `Muon8bit` of AdamW8bit

    def update_alike(self, matrices, lr, weight_decay):
        """Take the step of several matrices of one shape."""
        grad = torch.stack([matrix.grad for matrix in matrices]).float()
        momentum = torch.stack([decode(self.state[m], "momentum", m) for m in matrices])
        momentum.mul_(self.momentum).add_(grad)
        update = orthogonalize(grad.add(momentum, alpha=self.momentum))  # Nesterov's look ahead
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_sub_(matrices, update.unbind(), alpha=0.2 * lr * max(grad.shape[1:]) ** 0.5)
        for matrix, own in zip(matrices, momentum):
            self.keep(self.state[matrix], "momentum", own)
            matrix.grad = None  # AdamW leaves out what has no gradient


class Muon8bit(Muon, AdamW8bit):
    """Muon with a momentum and an AdamW in 8 bits. The momentum has evenly spaced levels."""

    keep = staticmethod(encode)


def orthogonalize(matrices, steps=5):
    """Set the singular values of k matrices, (k, m, n), to 0.7 to 1.2, by Newton-Schulz."""
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x  # as Muon's authors do
    x = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).float()
