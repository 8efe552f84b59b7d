"""Muon, an optimizer for matrices: --optimizer muon, also with --optimizer_bits 8."""

import torch

from data.run.adamw8bit import AdamW8bit, decode, encode, in_rows
from data.run.optim import must_skip, together


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982 §2) for groups of matrices with `muon=True`, and AdamW for the rest.

    A matrix moves along its momentum with all singular values set to about 1. The factor 0.2
    sqrt(max(m, n)) makes the step as large as AdamW's, so that both have one learning rate.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                for matrices in together(self, group, 1 << 26, lambda matrix: matrix.shape):
                    self.update_alike(matrices, group["lr"], group["weight_decay"])
        super().step()  # of AdamW, in `Muon8bit` of AdamW8bit

    def update_alike(self, matrices, lr, weight_decay):
        """Take the step of several matrices of one shape."""
        states, skip = [self.state[matrix] for matrix in matrices], must_skip(self, matrices[0])
        grad = torch.stack([matrix.grad for matrix in matrices]).float()
        old = self.read(states, grad)
        momentum = old.mul(self.momentum).add_(grad)
        self.keep(states, old, momentum, skip)
        update = orthogonalize(grad.add(momentum, alpha=self.momentum))  # Nesterov's look ahead
        size = 0.2 * max(grad.shape[1:]) ** 0.5
        if weight_decay:
            update = update.add(torch.stack(matrices), alpha=weight_decay / size)
        update.masked_fill_(skip, 0)
        torch._foreach_sub_(matrices, update.unbind(), alpha=lr * size)
        for matrix in matrices:
            matrix.grad = None  # AdamW leaves out what has no gradient

    def read(self, states, grad):
        """The momentum of k matrices, (k, m, n) in fp32; zeros before the first step."""
        if not states[0]:
            return torch.zeros_like(grad)
        return torch.stack([state["momentum"] for state in states])

    def keep(self, states, old, new, skip):
        for state, own in zip(states, torch.where(skip, old, new)):
            state["momentum"] = own


class Muon8bit(Muon, AdamW8bit):
    """Muon with a momentum and an AdamW in 8 bits. The momentum has evenly spaced levels."""

    def read(self, states, grad):
        rows = decode(states, "momentum", grad).view(len(grad), -1)
        return rows[:, : grad[0].numel()].unflatten(1, grad[0].shape)

    def keep(self, states, old, new, skip):
        encode(states, "momentum", new, in_rows(new), skip)


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
