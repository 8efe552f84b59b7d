"""The seven methods: how each needs the base to be stored, and what learns."""

from functools import partial

from data import InputError
from data.settings.setting import setting

# How the base may be stored for each method; the first is the default. "int4" means "int4-64" too.
METHODS = {
    "qst": ("nf4", "fp4", "none"),
    "lst": ("none", "nf4", "fp4"),
    "qlora": ("nf4", "fp4"),
    "lora": ("none",),
    "adapter": ("none", "nf4", "fp4"),
    "peqa": ("int4", "int3"),
    "full": ("none",),
}
SIDE_METHODS = ("qst", "lst")  # the methods that train a side network
of_side = partial(setting, of=SIDE_METHODS)  # a setting that only these read
of_4_bits = partial(setting, of=(*SIDE_METHODS, "qlora", "adapter"))

LEARNS = dict.fromkeys(
    SIDE_METHODS, "a side network {reduction} times narrower, {downsample} downsamplers"
) | {
    "lora": "low-rank branches of rank {rank}", "qlora": "low-rank branches of rank {rank}",
    "adapter": "bottlenecks of rank {rank}", "peqa": "the scales of the base's integers",
    "full": "the base itself",
}


def step_length(every, N):
    """How many of a base's N layers there are to a step: --every, or for 0 as many as leave six."""
    fitting = [k for k in range(1, N + 1) if N % k == 0]
    every = every or max(k for k in fitting if k == 1 or N // k >= 6)
    if every not in fitting:
        known = ", ".join(map(str, fitting))
        raise InputError(f"--every {every} does not divide {N} layers: choose one of {known}.")
    return every


def check_quant(method, quant, streamed=False):
    """Refuse a base that is not stored as the method needs it."""
    if streamed and method not in SIDE_METHODS:
        why = "whose backward reads no weight of the base"
        raise InputError(f"--stream is for qst and lst, {why}; that of --method {method} does.")
    if quant.partition("-")[0] not in METHODS[method]:
        kinds = " or ".join(METHODS[method])
        raise InputError(f"--method {method} needs a base with --quant {kinds}, and not {quant}.")
