"""Read the side checkpoints of the authors' released code: state dicts without a config."""

from pathlib import Path

import torch

from data import InputError
from data.formats.fields import shown
from data.formats.hub import OPT_NAMES
from data.formats.pickled import read_tensors

ADVICE = "a released side checkpoint has six .pt files, of plain tensors"
DOWNSAMPLE_NAMES = {"down.": "adapter_A.", "up.": "adapter_B.", "norm.": "post_layer_norm."}
RELEASED_FILES = {  # our module: (their file, {our part of a name: theirs})
    "layers": ("qst_layers_parameters.pt", OPT_NAMES),
    "downsample": ("qst_downsample_parameters.pt", DOWNSAMPLE_NAMES),
    "gamma": ("qst_z_parameters.pt", {}),
    "norm": ("qst_norm_parameters.pt", {}),
    "upsample": ("qst_upsample_parameters.pt", {}),
}


def read(folder, config):
    """Read the six files: {our name: tensor}, and their sizes, {"reduction", "rank", "heads"}.

    config: the base's `ModelConfig`. Their z weighs the side network by sigmoid(z) for OPT and by
    1 - sigmoid(z) for LLaMA, as our alpha does: so OPT's alpha is -z.
    """
    folder, opt, found = Path(folder), config.family == "opt", {}
    refuse = lambda why: InputError(f"{folder} {why}: give --base the model of the training.")
    for ours, (file, names) in RELEASED_FILES.items():
        for theirs, read in read_tensors(folder / file, ADVICE).items():
            name, tensor = theirs, read()
            for our_part, their_part in names.items() if ours != "layers" or opt else ():
                name = name.replace(their_part, our_part)
            if f"{ours}.{name}" in found or not tensor.is_floating_point():
                raise refuse(f"has {shown(theirs)} twice in {file}, or not as floats")
            found[f"{ours}.{name}"] = tensor
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
