"""Muon, an optimizer for matrices: --optimizer muon, also with --optimizer_bits 8."""

import math

import torch

from data.run.adamw8bit import AdamW8bit, decode, encode
from data.run.optim import must_skip

AT_ONCE = 1 << 24  # weights of one shape that take a step together: a GPU starts fewer kernels


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
            alike = {}  # {shape: its matrices}
            for matrix in group["params"] if group["muon"] else ():
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in alike.items():
                n = max(1, AT_ONCE // shape.numel())
                for i in range(0, len(matrices), n):
                    self.update_alike(matrices[i : i + n], group["lr"], group["weight_decay"])
        super().step()  # of AdamW, in `Muon8bit` of AdamW8bit

    def update_alike(self, matrices, lr, weight_decay):
        """Take the step of several matrices of one shape."""
        grads = [matrix.grad.float() for matrix in matrices]
        momenta = [decode(self.state[m], "momentum", grad) for m, grad in zip(matrices, grads)]
        torch._foreach_mul_(momenta, self.momentum)
        torch._foreach_add_(momenta, grads)
        ahead = torch.stack(grads).add_(torch.stack(momenta), alpha=self.momentum)  # Nesterov's
        size = 0.2 * math.sqrt(max(matrices[0].shape))
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_sub_(matrices, orthogonalize(ahead).unbind(), alpha=lr * size)
        for matrix, momentum in zip(matrices, momenta):
            self.keep(self.state[matrix], "momentum", momentum)
            matrix.grad = None  # AdamW leaves out what has no gradient


class Muon8bit(Muon, AdamW8bit):
    """Muon with a momentum and an AdamW in 8 bits. The momentum has evenly spaced levels."""

    keep = staticmethod(encode)


def orthogonalize(matrices, steps=5):
    """Set the singular values of matrices (k, m, n) to 0.7 to 1.2, by Muon's Newton-Schulz
    iterations; as its authors do, in bf16 on a GPU."""
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    x = x.mT if x.shape[1] > x.shape[2] else x
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).float()
