"""The optimizer and the learning rate of a run; AdamW with moments of 8 bits, and Muon, which torch
does not have."""

import math

import torch

from data import InputError
from data.formats.fields import Kind, field, first_few, whole
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, codebook_on, dequantize_blockwise, quantize_blockwise,
)

COUNT = whole(0, 1 << 50)
MOMENT = Kind("a tensor or a count", lambda v: isinstance(v, torch.Tensor) or COUNT.fits(v))


def learning_rate_at(iteration, cfg):
    """The learning rate of iteration 0, 1, ...: a linear warm-up, and then the schedule."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    done = (iteration - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    factors = dict(constant=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2)
    return cfg.learning_rate * factors[cfg.lr_schedule]


def make_optimizer(model, cfg):
    """AdamW or Muon, in groups of one learning rate each; only matrices decay.

    differs from the paper: alpha has a larger learning rate. The side network's gradient has the
    factor 1 - alpha, 0 at the start, so that it learns only as fast as alpha moves.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = cfg.alpha_lr_factor if name.endswith("alpha") else 1.0
            matrix = parameter.dim() == 2 and name.endswith("weight")
            table = "embed" in name or "lm_head" in name  # a row a token: not for Muon
            muon = cfg.optimizer == "muon" and matrix and not table
            kind = dict(factor=factor, weight_decay=cfg.weight_decay * matrix, muon=muon)
            groups.setdefault(tuple(kind.items()), []).append(parameter)
    groups = [dict(kind, params=parameters) for kind, parameters in groups.items()]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer_bits == 8:
        return AdamW8bit(groups, cfg.learning_rate, betas)
    optimizer = Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    fused = parameter.device.type != "meta"
    return optimizer(groups, lr=cfg.learning_rate, betas=betas, fused=fused)


def told_to_skip(optimizer):
    """Whether this step is to be left out: what torch's fused optimizers look up on the GPU."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and found_inf.item() > 0


def kept_of(optimizer, group, p):
    """What an optimizer keeps of a parameter: {name: (shape, whether in 8 bits)}."""
    if isinstance(optimizer, AdamW8bit):
        blocks = torch.Size([-(-p.numel() // ABSMAX_BLOCK_SIZE)])
        codes = dict.fromkeys(("mean", "root"), (torch.Size([p.numel()]), True))
        return codes | dict.fromkeys(("mean_absmax", "root_absmax"), (blocks, False))
    if group.get("muon"):
        return {"momentum": (p.shape, False)}
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), (p.shape, False))
    return moments | {"step": (torch.Size([]), False)}


def load_moments(optimizer, moments, where):
    """Optimizer.load_state_dict, which would turn moments of 8 bits into the parameters' dtype; and
    strict. The groups, and with them the rates, stay this optimizer's own.

    moments: {number of a parameter, as a text: {name: tensor}}, and "step", a number, for 8 bits
    """
    parameters = [(g, p) for g in optimizer.param_groups for p in g["params"]]
    numbers = {str(i) for i in range(len(parameters))}
    if unknown := sorted(set(moments) - numbers):
        raise InputError(f"{where}: the optimizer has no parameter {first_few(unknown)}.")
    for number, own in moments.items():
        group, p = parameters[int(number)]
        expected = kept_of(optimizer, group, p)
        counted = "step" not in expected and not group.get("muon")
        own = {name: field(where, own, name, MOMENT) for name in own}
        loaded = {"step": own.pop("step")} if counted and COUNT.fits(own.get("step")) else {}
        fits = set(own) == set(expected) and bool(loaded) == counted and all(
            isinstance(own[name], torch.Tensor) and own[name].shape == shape
            and (own[name].dtype == torch.uint8) == in_8_bits
            for name, (shape, in_8_bits) in expected.items()
        )
        if not fits:
            message = f"the moments of parameter {number} are not of this optimizer"
            raise InputError(f"{where}: {message}: leave out --resume.")
        loaded |= {name: tensor.to(p.device, copy=True) for name, tensor in own.items()}
        optimizer.state[p] = loaded


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


def optimizer_bytes(optimizer):
    """Bytes that an optimizer keeps: AdamW's two moments, of which in 8 bits each block has its
    scale in fp32; or the one of Muon."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            in_8_bits = p.numel() + 4 * -(-p.numel() // ABSMAX_BLOCK_SIZE)
            moment = in_8_bits if isinstance(optimizer, AdamW8bit) else p.nbytes
            total += moment if group["muon"] else 2 * moment
    return total
