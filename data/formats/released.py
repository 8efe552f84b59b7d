"""Read the side checkpoints of the authors' released code: state dicts without a config."""

from pathlib import Path

import torch

from data import InputError
from data.formats.hub import OPT_NAMES
from data.formats.pickled import read_tensors

ADVICE = "a released side checkpoint has six .pt files, of plain tensors"
NAMES = OPT_NAMES | {"down.": "adapter_A.", "up.": "adapter_B.", "norm.": "post_layer_norm."}
FILES = dict(layers="layers", downsample="downsample", gamma="z", norm="norm", upsample="upsample")


def read(folder, config):
    """Read the six files: {our name: tensor}, and their sizes, {"reduction", "rank", "heads"}.

    config: the base's `ModelConfig`. Their z weighs the side network by sigmoid(z) for OPT and by
    1 - sigmoid(z) for LLaMA, as our alpha does: so OPT's alpha is -z.
    """
    folder, opt, found = Path(folder), config.family == "opt", {}
    refuse = lambda why: InputError(f"{folder} {why}: give --base the model of the training.")
    for ours, theirs in FILES.items():
        for name, read in read_tensors(folder / f"qst_{theirs}_parameters.pt", ADVICE).items():
            for our_part, their_part in NAMES.items():
                name = name.replace(their_part, our_part)
            found[f"{ours}.{name}"] = read()
    mix = folder / f"lm_head_z_{'parameters' if opt else 'path'}.pt"
    mix = read_tensors(mix, ADVICE, alone=True)["its tensor"]()
    gates = [found.pop(f"gamma.{i}", None) for i in range(config.n_layer)]
    down = found.get("downsample.0.down.weight")
    if down is None or any(gate is None for gate in gates):
        raise refuse(f"does not fit a {config.family} model with {config.n_layer} layers")
    c, pair = gates[0].numel(), 1 if opt else 2  # rotary positions rotate pairs of channels
    if c == 0 or config.n_embd % c or c % (pair * config.n_head):
        raise refuse(f"has gates of {c} channels, which do not divide {config.n_embd}")
    if {gate.shape for gate in gates} != {(c,)} or down.dim() != 2 or not len(down):
        raise refuse("has gates or downsamplers of unequal shapes")
    found |= {"gamma": torch.stack(gates), "alpha": -mix if opt else mix}
    return found, dict(reduction=config.n_embd // c, rank=len(down), heads=config.n_head)
