"""Settings of the side network by name, for --variant, and of many runs, for --sweep; and what a
method or the paper sets."""

import itertools
from dataclasses import fields, replace
from pathlib import Path

from data import InputError
from data.settings.methods import SIDE_METHODS
from data.settings.setting import true_or_false

# What it builds: SideConfig(**RELEASED). Unlike the paper, it has a gate and a mix per channel,
# norms, a bias and a shared downsampler, and the mix starts at sigmoid(1) = 0.73, so that training
# does not start at the LLM.
# differs from the released code: our mix is trained on a GPU too, and OPT's is not swapped.
RELEASED = dict(
    downsample_norm=True, share_first=True, gate="channel", mix="released", upsample_bias=True,
    final_norm=True,
)

PAPER = dict(  # QST §3.2; what a `SideConfig` has where nothing else is said
    every=1, read_embedding=True, downsample="adapter", standardize=False, downsample_norm=False,
    share_first=False, gate="scalar", mix="alpha", upsample_bias=False, final_norm=False,
)
LST = dict(downsample="linear", mix="side")  # arXiv 2206.06522 is the same with these two

# What we found to learn fastest on a real model: see "Why QST learns slowly" in tests/README.md.
# In the study it was six steps, every fifth layer of 30. Of other models: as few as divide the
# layers evenly, but at least six; 8 of LLaMA-2-7B's 32 layers and of LLaMA-2-70B's 80.
FAST = dict(
    every=0, read_embedding=False, reduction=8, downsample="linear", standardize=True, gate="sum",
    mix="residual", final_norm=True,
)
VARIANTS = {"paper": {}, "released": RELEASED, "fast": FAST}

# What --sweep may vary beside the settings of the side network; what changes the base, the batches,
# or when to evaluate may not.
ALSO = (
    "rank learning_rate alpha_lr_factor lr_schedule warmup_iters weight_decay beta1 beta2"
    " grad_clip optimizer optimizer_bits checkpoint seed"
).split()


def settings_of_run(variant, task):
    """What --variant sets in a run: its architecture; and of fast the optimizer and the rate. The
    embedded default, 128 channels wide, needs a side network of more than 16."""
    if variant != "fast":
        return VARIANTS[variant]
    small = dict(reduction=4) if task == "tiny" else {}
    return FAST | dict(optimizer="muon", learning_rate=1e-2) | small


def settings_of_runs(given, cfg, resolve):
    """--sweep -> the settings of each run, by what varies: {"gate=sum,seed=2": settings, ...}; of
    a run without, {"": cfg}.

    given, cfg: settings before and after `resolve`
    """
    if not cfg.sweep:
        return {"": cfg}
    own = [f for f in fields(cfg) if f.metadata["of"] == SIDE_METHODS or f.name in ALSO]
    kinds = {f.name: true_or_false if f.type is bool else f.type for f in own}
    axes = []
    for word in cfg.sweep.split():
        name, _, values = word.partition("=")
        if name not in kinds or not values:
            raise InputError(
                f"--sweep {word}: it takes NAME=VALUE,VALUE ..., apart by spaces. What leaves the "
                f"base and the batches as they are can be a NAME: {', '.join(kinds)}."
            )
        try:
            axes.append([(name, kinds[name](value)) for value in values.split(",")])
        except ValueError:
            message = f"not all of these are values of {name}; after a comma comes no space"
            raise InputError(f"--sweep {word}: {message}.") from None
    runs = {}
    for row in itertools.product(*axes):
        name = ",".join(f"{name}={value}" for name, value in row)
        if name in runs:
            raise InputError(f"--sweep has {name} twice.")
        same = dict(sweep="", data_seed=cfg.data_seed, out_dir=str(Path(cfg.out_dir) / name))
        runs[name] = resolve(replace(given, **same | dict(row)))
    return runs
