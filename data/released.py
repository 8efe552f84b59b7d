"""The authors' released code: the settings of its side network, and its side checkpoints, which are
files of state dicts with no config."""

from pathlib import Path

import torch

from data.hub import OPT_NAMES
from quant import InputError

# What it builds: SideConfig(**RELEASED). Unlike the paper, it has a gate and a mix per channel, norms,
# a bias and a shared downsampler, and the mix starts at sigmoid(1) = 0.73, so that training does not
# start at the LLM.
# differs from the released code: our mix is trained on a GPU too, and OPT's is not swapped.
RELEASED = dict(
    downsample_norm=True, share_first=True, gate="channel", mix="released", upsample_bias=True,
    final_norm=True,
)  # fmt: skip

RELEASED_FILES = {  # ours: (theirs, and their names of what is in it)
    "layers": ("qst_layers_parameters.pt", OPT_NAMES),
    "downsample": (
        "qst_downsample_parameters.pt",
        {"down.": "adapter_A.", "up.": "adapter_B.", "norm.": "post_layer_norm."},
    ),
    "gamma": ("qst_z_parameters.pt", {}),
    "norm": ("qst_norm_parameters.pt", {}),
    "upsample": ("qst_upsample_parameters.pt", {}),
}


def read(folder, config):
    """Read the six files: {our name: tensor}, and the sizes, {"reduction", "rank"}, that they imply.

    config: the base's. The mix of the OPT variant, which gives the side network the weight sigmoid(z)
    where LLaMA's gives it 1 - sigmoid(z), is ours with alpha = -z.
    """
    folder, opt, found = Path(folder), config.family == "opt", {}
    for ours, (file, names) in RELEASED_FILES.items():
        for name, tensor in read_pt(folder / file).items():
            for our_part, their_part in names.items() if ours != "layers" or opt else ():
                name = name.replace(their_part, our_part)
            found[f"{ours}.{name}"] = tensor
    gates = [found.pop(f"gamma.{i}", None) for i in range(config.n_layer)]
    if any(gate is None for gate in gates) or "downsample.0.down.weight" not in found:
        raise InputError(f"{folder} is not of a model with {config.n_layer} layers like {config.family}.")
    mix = read_pt(folder / f"lm_head_z_{'parameters' if opt else 'path'}.pt")
    found |= {"gamma": torch.stack(gates), "alpha": -mix if opt else mix}
    rank = len(found["downsample.0.down.weight"])
    return found, dict(reduction=config.n_embd // len(gates[0]), rank=rank)


def read_pt(path):
    if not path.exists():
        raise InputError(f"{path} is missing: a released side checkpoint has six .pt files.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a file of plain tensors ({reason}).") from None
