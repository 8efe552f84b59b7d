"""Training steps on a GPU: seconds and peak memory, beside the forward pass alone, other methods,
the account, and QLoRA of peft and bitsandbytes.

A step is train.py's `train_step`, of every position with a target. Its memory is measured where
gradients accumulate, as the account has it. The workspaces of cuBLAS, which the account leaves out,
are measured at the start and left out of the comparison.
"""

import importlib.util
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from types import SimpleNamespace

import torch

from account import memory_report, parse_args, rows, settings_of_step
from benchmarks.gpu_common import (
    forget, peak_of, random_base, target, timed, workspace_bytes,
)
from benchmarks.gpu_theirs import LIBRARIES, their_qlora
from data.run.optim import make_optimizer
from data.run.run import Run
from qst import add_trainable
from train import prepare, side_config, train_step

COLUMNS = "model tokens what whose ms tokens_per_s peak_GB account_GB"
MEMORY_COLUMNS = "model tokens what ms peak_GB workspace_GB account_GB"
QLORA = (("qlora", "--checkpoint false"), ("qlora, checkpoint", "--checkpoint true"))


def parse(sizes, tokens, flags):
    B, T = tokens
    shape = ["--batch_size", str(B), "--sequence_len", str(T)]
    return parse_args([*sizes.flags, *shape, *flags.split()])


def steps_7b(sizes):
    workspace = workspace_bytes(sizes.device, sizes.dtype)
    for tokens in sizes.steps:
        yield from steps(sizes, "large", tokens, workspace)


def steps_70b(sizes):
    workspace = workspace_bytes(sizes.device, sizes.dtype)
    yield from steps(sizes, "huge", sizes.steps[-1], workspace)


def steps(sizes, which, tokens, workspace):
    """A step of QST beside what its table compares it with. which: "large" or "huge" """
    config = getattr(sizes, which)
    about = dict(model=f"{config.n_layer} x {config.n_embd}", tokens="{} x {}".format(*tokens))
    found = {}
    qst = parse(sizes, tokens, "--method qst")
    ours = {"qst": qst} | {
        name: parse(sizes, tokens, f"--method qlora {flags}") for name, flags in QLORA
    }
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    with accounts(ours, config, sizes) as account:
        for quant in ("none", "nf4"):
            name = f"forward alone, {'16 bits' if quant == 'none' else quant}"
            found[name] = attempt(forward_alone, sizes, config, quant, settings_of_step(qst))
            yield about | dict(what=name, whose="ours") | found[name]
        for name, cfg in ours.items():
            report = account(name)
            found[name] = attempt(our_step, sizes, config, cfg, report, workspace)
            yield about | dict(what=name, whose="ours") | found[name]
    for name, flags in QLORA:
        if absent:
            yield about | dict(what=name, whose="theirs", error=f"needs {', '.join(absent)}")
            continue
        cfg = settings_of_step(parse(sizes, tokens, f"--method qlora {flags}"))
        found[f"theirs {name}"] = attempt(their_step, sizes, config, cfg)
        yield about | dict(what=name, whose="theirs") | found[f"theirs {name}"]
    yield about | dict(what="qst beside them", targets=list(compared(found, which)))


def compared(found, which):
    """QST's targets, as far as there are figures."""
    ms = {name: figures["ms"] for name, figures in found.items() if "ms" in figures}
    peak = {name: figures["peak_GB"] for name, figures in found.items() if "peak_GB" in figures}
    limits = {"forward alone, 16 bits": 1.35, "theirs qlora": 0.4, "theirs qlora, checkpoint": 0.4}
    for other, limit in limits.items():
        if "qst" in ms and other in ms:
            yield target(f"time / {other}", ms["qst"] / ms[other], f"<= {limit}")
        if "qst" in peak and other in peak and other.startswith("theirs") and which == "large":
            yield target(f"memory / {other}", peak["qst"] / peak[other], "<= 0.6")


def attempt(function, sizes, *args):
    """The figures of a function, or why there are none."""
    forget(sizes.device)
    try:
        return function(sizes, *args)
    except torch.OutOfMemoryError as error:
        return dict(error=f"out of memory: {error}".splitlines()[0])
    except Exception as error:  # the next row may do
        return dict(error=f"{type(error).__name__}: {error}".splitlines()[0])


def random_ids(config, cfg):
    return torch.randint(config.vocab_size, (cfg.batch_size, cfg.sequence_len))


def forward_alone(sizes, config, quant, cfg):
    """Seconds of the base's forward pass with the loss. In 16 bits all layers are one, so that 70B
    fits; there is so much in a layer that none of it is in the cache when it comes again."""
    base = random_base(config, quant, sizes.dtype, sizes.device, one_layer=quant == "none")
    idx = random_ids(config, cfg)
    moved = idx.to(sizes.device)
    seconds = timed(torch.no_grad()(lambda: base.loss(moved, idx)), sizes.device)
    return dict(ms=1000 * seconds, tokens_per_s=idx.numel() / seconds)


def our_model(sizes, config, cfg):
    """A model with random weights, and what --method trains."""
    base = random_base(config, cfg.quant, sizes.dtype, sizes.device)
    return prepare(add_trainable(base, side_config(cfg)), cfg)


def our_step(sizes, config, cfg, report, workspace, seconds=3.0):
    """A step of ours, beside the account."""
    own = sizes.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory
    if own and report["total_bytes"] > own:
        return dict(account_GB=report["total_bytes"] / 1e9, error="too large, by the account")
    cfg = settings_of_step(cfg)
    model = our_model(sizes, config, cfg)
    figures = costs(sizes, model, model.loss, config, cfg, seconds)
    ratio = report["total_bytes"] / 1e9 / max(1e-9, figures["peak_GB"] - workspace / 1e9)
    beside = [target("account / peak", ratio, bound) for bound in (">= 0.97", "<= 1.03")]
    about = dict(account_GB=report["total_bytes"] / 1e9, workspace_GB=workspace / 1e9)
    return figures | about | dict(targets=beside)


def their_step(sizes, config, cfg):
    model, loss_of = their_qlora(sizes, config, cfg)
    return costs(sizes, model, loss_of, config, cfg)


class LossAlone(Run):
    """A run of any model, with a loss that is a function of idx and targets."""

    def __init__(self, model, loss_of, cfg):
        self.model, self.losses = SimpleNamespace(loss_of=loss_of), []
        self.optimizer, self.cfg = make_optimizer(model, cfg), cfg
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.models = SimpleNamespace(compute=lambda idx: [idx], device=device, compiled=False)


def costs(sizes, model, loss_of, config, cfg, seconds=3.0):
    """Milliseconds of a step, and the peak memory of one of two batches.

    loss_of: function of idx on the device and targets on the CPU
    """
    run, idx = LossAlone(model, loss_of, cfg), random_ids(config, cfg)
    batches = lambda shares: [(idx, idx, share) for share in shares]
    step = lambda shares: train_step([run], batches(shares), 1, run.models)
    seconds = timed(lambda: step([1.0]), sizes.device, seconds)
    peak = peak_of(lambda: step([0.5, 0.5]), sizes.device)
    return dict(ms=1000 * seconds, tokens_per_s=idx.numel() / seconds, peak_GB=peak / 1e9)


# --------------------------------------------------------------------------------------
# Memory


@contextmanager
def accounts(settings, config, sizes):
    """A function of a name that gives the account of its settings: {name: settings}. They are
    computed in other processes, while the GPU measures."""
    if sizes.device.type != "cuda":
        yield lambda name: memory_report(settings[name], config)
        return
    workers = min(8, len(settings), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        asked = {name: pool.submit(memory_report, cfg, config) for name, cfg in settings.items()}
        yield lambda name: asked[name].result()


def memory(sizes):
    """Peak memory beside the account: every saving of QST on 7B, and all methods on a 1B shape."""
    workspace = workspace_bytes(sizes.device, sizes.dtype)
    subjects = (
        ("--savings", sizes.steps[-1], sizes.large), ("", sizes.steps[0], sizes.billion)
    )
    for flag, tokens, config in subjects:
        settings = dict(rows(parse(sizes, tokens, flag)))
        about = dict(model=f"{config.n_layer} x {config.n_embd}", tokens="{} x {}".format(*tokens))
        with accounts(settings, config, sizes) as account:
            for name, cfg in settings.items():
                figures = attempt(our_step, sizes, config, cfg, account(name), workspace, 0.5)
                yield about | dict(what=name) | figures

