"""Settings of the side network by name, for --variant; and what a method or the paper sets."""

from data.released import RELEASED

PAPER = dict(  # QST §3.2; what a `SideConfig` has where nothing else is said
    every=1, read_embedding=True, downsample="adapter", standardize=False, downsample_norm=False,
    share_first=False, gate="scalar", mix="alpha", upsample_bias=False, final_norm=False,
)  # fmt: skip
LST = dict(downsample="linear", mix="side")  # arXiv 2206.06522 is the same with these two

# What we found to learn fastest on a real model: see "Why QST learns slowly" in tests/README.md.
# In the study it was six steps, every fifth layer of 30. Of other models: as few as divide the
# layers evenly, but at least six; 8 of LLaMA-2-7B's 32 layers and of LLaMA-2-70B's 80.
FAST = dict(
    every=0, read_embedding=False, reduction=8, downsample="linear", standardize=True, gate="sum",
    mix="residual", final_norm=True,
)  # fmt: skip
VARIANTS = {"paper": {}, "released": RELEASED, "fast": FAST}


def settings_of_run(variant, task):
    """What --variant sets in a run: its architecture; and of fast the optimizer and the rate. The
    embedded default, 128 channels wide, needs a side network of more than 16."""
    if variant != "fast":
        return VARIANTS[variant]
    small = dict(reduction=4) if task == "tiny" else {}
    return FAST | dict(optimizer="muon", learning_rate=1e-2) | small
