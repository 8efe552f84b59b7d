"""What the pages claim, tried on a GPU: that a step runs within a card's memory, and that streaming
layers changes no bit.

A larger GPU stands in for a card: torch gets as much memory as the card has beside what CUDA takes.
"""

import os
from contextlib import contextmanager

import torch

from account import settings_of_step
from benchmarks.gpu_common import forget, random_base, target
from benchmarks.gpu_steps import attempt, costs, our_model, parse, random_ids
from benchmarks.gpu_stream import streamed_base
from qst import add_trainable
from train import prepare, side_config

COLUMNS = "model tokens what card_GB peak_GB reserved_GB ms"
OF_CUDA = 0.5  # GB that CUDA takes for itself


@contextmanager
def card_of(gigabytes, device):
    """Let torch have as much memory as a card of so many GB of 10^9 bytes. On a CPU: all of it."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    if whole < gigabytes * 1e9:
        raise ValueError(f"this GPU has less than {gigabytes} GB")
    torch.cuda.set_per_process_memory_fraction((gigabytes - OF_CUDA) * 1e9 / whole, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def fits(sizes):
    """Two batches of a step on each card that the README names for it."""
    for gigabytes, config, tokens, flags in sizes.claims:
        cfg = parse(sizes, tokens, flags)
        figures = attempt(on_card, sizes, gigabytes, config, cfg)
        about = dict(model=f"{config.n_layer} x {config.n_embd}", tokens="{} x {}".format(*tokens))
        done = target("runs", int("error" not in figures), ">= 1")
        yield about | dict(what=flags, card_GB=gigabytes, targets=[done]) | figures


def on_card(sizes, gigabytes, config, cfg):
    cfg, cuda = settings_of_step(cfg), sizes.device.type == "cuda"
    with card_of(gigabytes, sizes.device):
        if cuda:
            torch.cuda.reset_peak_memory_stats(sizes.device)
        if cfg.stream:
            base = streamed_base(config, sizes.dtype, sizes.device)
            model = prepare(add_trainable(base, side_config(cfg)), cfg)
        else:
            model = our_model(sizes, config, cfg)
        figures = costs(sizes, model, model.loss, config, cfg, 0.5)
        reserved = torch.cuda.max_memory_reserved(sizes.device) / 1e9 if cuda else 0.0
    return figures | dict(reserved_GB=reserved)


# --------------------------------------------------------------------------------------
# The same step again and again


def repeats(sizes):
    """One step 20 times, streamed from pinned memory, and with its layers on the GPU: gradients
    that differ from the first time's in any bit. All layers have weights of their own: one that is
    read too early, or is overwritten too soon, would be seen."""
    with deterministic():
        for what in ("on the GPU", "streamed"):
            cfg = settings_of_step(parse(sizes, sizes.steps[0], "--method qst"))
            yield dict(what=what) | attempt(compare, sizes, what == "streamed", cfg)


@contextmanager
def deterministic():
    """Let torch add in one order, where it can, so that only what is wrong differs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compare(sizes, streamed, cfg):
    """How many gradients differ, and in how many of the steps."""
    forget(sizes.device)
    torch.manual_seed(0)
    make = dict(distinct=True) if streamed else dict(quant="nf4")
    make_base = streamed_base if streamed else random_base
    base = make_base(sizes.billion, dtype=sizes.dtype, device=sizes.device, **make)
    model = prepare(add_trainable(base, side_config(cfg)), cfg)
    with torch.no_grad():
        model.side.alpha.fill_(0.5)  # at the start all gradients but alpha's are zeros
    idx = random_ids(sizes.billion, cfg)
    first, steps, different = None, 0, 0
    for _ in range(20):
        model.zero_grad()
        loss = model.loss(idx.to(sizes.device), idx)
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        first = first or found
        unequal = sum(not torch.equal(a, b) for a, b in zip(first, found))
        steps, different = steps + (unequal > 0), different + unequal
    figures = dict(gradients=len(first) - 1, different=different, steps=steps)
    return figures | dict(targets=[target("steps that differ", steps, "<= 0")])
