"""The seven methods, with the base that each needs, and named settings of the side network."""

import re
from functools import partial

from data import InputError
from data.settings.flags import setting

# The --quant of each method; the first is the default. "int4" stands for "int4-64", too.
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
of_side = partial(setting, of=SIDE_METHODS)  # a setting for only these


def layers_per_side(every, N):
    """The number of base layers per side layer: --every, or for 0 the most that leave six."""
    fitting = [k for k in range(1, N + 1) if N % k == 0]
    every = every or max(k for k in fitting if k == 1 or N // k >= 6)
    if every not in fitting:
        known = ", ".join(map(str, fitting))
        raise InputError(f"--every {every} does not divide {N} layers: choose one of {known}.")
    return every


def heads_of_side(heads, most, width, pair):
    """The number of attention heads of a side network with `width` channels, a multiple of `pair`
    in each: that of its checkpoint, where 0 is the base's, `most`. None: as many as the base has,
    or fewer, so that each has an even number of channels, 8 or more, as fused attention needs."""
    fitting = [h for h in range(1, width + 1) if width % (pair * h) == 0]
    if heads is None:
        fused = range(8, width + 1, 2)
        return max(h for h in fitting if h == 1 or h <= most and width // h in fused)
    if (heads or most) not in fitting:
        raise InputError(f"{heads or most} heads do not divide a side network of {width} channels.")
    return heads or most


def check_kind(kind):
    """Refuse a --quant that does not exist."""
    if not re.fullmatch(r"nf4|fp4|none|int[34](-[1-9]\d*)?", kind):
        raise InputError(f"--quant {kind} is unknown: choose nf4, fp4, none, int4, int3, int4-64.")


def check_quant(method, quant, streamed=False):
    """Refuse a base that is not stored as the method needs it."""
    if streamed and method not in SIDE_METHODS:
        why = "whose backward reads no weight of the base"
        raise InputError(f"--stream is for qst and lst, {why}; not for --method {method}.")
    if quant.partition("-")[0] not in METHODS[method]:
        kinds = " or ".join(METHODS[method])
        raise InputError(f"--method {method} needs a base with --quant {kinds}, and not {quant}.")


# The authors' released code. Its mix starts at sigmoid(1) = 0.73, and so not at the LLM.
# differs from the released code: our mix is trained on a GPU, too, and OPT's is not swapped.
RELEASED = dict(
    downsample_norm=True, share_first=True, gate="channel", mix="released", upsample_bias=True,
    final_norm=True,
)

PAPER = dict(  # QST §3.2; the defaults of a `SideConfig`
    every=1, read_embedding=True, downsample="adapter", standardize=False, downsample_norm=False,
    share_first=False, gate="scalar", mix="alpha", upsample_bias=False, final_norm=False,
)
LST = dict(downsample="linear", mix="side")  # arXiv 2206.06522 is the same with these two

# What learned fastest in "Why does QST learn slowly?", tests/NEGATIVE.md.
FAST = dict(
    every=0, read_embedding=False, reduction=8, downsample="linear", standardize=True, gate="sum",
    mix="residual", final_norm=True,
)
VARIANTS = {
    "paper": {}, "released": RELEASED, "fast": FAST | dict(optimizer="muon", learning_rate=5e-3),
}


def settings_of_run(variant, task):
    """The settings of --variant. The built-in base is narrow, and its run short."""
    tiny = dict(reduction=4, learning_rate=1e-2)
    return VARIANTS[variant] | (tiny if (variant, task) == ("fast", "tiny") else {})
