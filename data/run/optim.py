"""The learning rate of an iteration, the optimizer, and what it keeps of each parameter."""

import math
from functools import cache

import torch

from data import leaf


def learning_rate_at(iteration, cfg):
    """The learning rate of iteration 0, 1, ...: a linear warm-up, then --lr_schedule."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    done = (iteration - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    factors = dict(constant=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2)
    return cfg.learning_rate * factors[cfg.lr_schedule]


def make_optimizer(model, cfg):
    """Make AdamW or Muon, with groups of one learning rate each; only matrices decay.

    differs from the paper: alpha has a larger learning rate. The side network's gradient has the
    factor 1 - alpha, which is 0 at the start.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = cfg.alpha_lr_factor if name.endswith("alpha") else 1.0
            matrix = parameter.dim() == 2 and name.endswith("weight")
            table = "embed" in name or "lm_head" in name  # one row per token: not for Muon
            muon = cfg.optimizer == "muon" and matrix and not table
            kind = dict(factor=factor, weight_decay=cfg.weight_decay * matrix, muon=muon)
            groups.setdefault(tuple(kind.items()), []).append(parameter)
    groups = [dict(kind, params=parameters) for kind, parameters in groups.items()]
    muon = leaf("muon") if cfg.optimizer == "muon" else None
    common = dict(lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2))
    if cfg.optimizer_bits == 8:
        return (muon.Muon8bit if muon else leaf("adamw8bit").AdamW8bit)(groups, **common)
    optimizer = muon.Muon if muon else torch.optim.AdamW
    return optimizer(groups, fused=parameter.device.type != "meta", **common)


def together(optimizer, group, size, kind=lambda p: None):
    """Lists of parameters with gradients: one device, `kind` and step, about `size` values."""
    found, n = {}, 0
    for p in group["params"]:
        if p.grad is not None:
            state = optimizer.state[p]
            key = p.device, kind(p), len(state), state.get("step"), n // size
            found.setdefault(key, []).append(p)
            n += p.numel()
    return found.values()


def must_skip(optimizer, like):
    """Whether to leave out this step, as torch's fused optimizers ask: bool () on a device."""
    return getattr(optimizer, "found_inf", like.new_zeros(())).to(like.device) > 0


@cache
def kept_state(kind, muon, shape, dtype):
    """What an optimizer of a kind keeps of a parameter after a step: {name: meta tensor, count}."""
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    optimizer = kind([dict(params=[parameter], muon=muon)], lr=0.0)
    optimizer.step()
    return optimizer.state[parameter]


def optimizer_bytes(optimizer):
    """Bytes that an optimizer keeps, without the counts of steps."""
    kept = [kept_state(type(optimizer), group.get("muon"), p.shape, p.dtype).items()
            for group in optimizer.param_groups for p in group["params"]]
    return sum(value.nbytes for own in kept for name, value in own if name != "step")
