"""--repair: correct the quantization error with a frozen low-rank branch beside each 4-bit layer.

A layer should compute W x, and computes Q x. The branch adds the low-rank part of the error E =
W - Q that matters most for the layer's inputs. Let s be the root mean square of each input channel
over some texts. The branch is

    U_r S_r V_r^T diag(1 / s)        of E diag(s) = U S V^T, the r largest singular values

It minimizes the mean square of (E - branch) x among all of that rank, for inputs with uncorrelated
channels (LQER, arXiv 2402.02446). Without s it is LoftQ's SVD (arXiv 2310.08659).
"""

from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data import InputError
from data.devices.device import device_of
from data.formats import hub
from data.formats.safetensors import copy_into, read_safetensors, write_safetensors
from data.generate.sampling import pad_left
from quant import Linear4bit

TEXTS, LENGTH = 24, 256  # number of texts, and of the first tokens of each
EXTRA, ITERATIONS = 16, 2  # of the randomized SVD (arXiv 0909.4061): vectors above the rank


class LowRank(nn.Module):
    """x (..., in) -> (..., out) through `rank` channels, frozen, kept in 16 bits."""

    def __init__(self, linear, rank, device):
        super().__init__()
        zeros = dict(dtype=torch.bfloat16, device=device)
        self.register_buffer("down", torch.zeros(rank, linear.in_features, **zeros))
        self.register_buffer("up", torch.zeros(linear.out_features, rank, **zeros))

    def forward(self, x):
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def branches(base, rank):
    """Give every 4-bit layer of a base a branch of this rank, unless it has one, and return all by
    name. A new one is 0."""
    found = {path: m for path, m in base.named_modules() if isinstance(m, Linear4bit)}
    if not found:
        raise InputError("--repair corrects a 4-bit base: give --quant nf4, or leave it out.")
    for path, linear in found.items():
        if rank > (most := min(linear.in_features, linear.out_features)):
            raise InputError(f"--repair {rank} is more than {path} has, {most}: give less.")
        if linear.branch is None or len(linear.branch.down) != rank:
            # Beside the layer's norms: its matrices may be absent, with --cache_hidden.
            device = device_of(base.layers[int(path.split(".")[1])])
            linear.branch = LowRank(linear, rank, device)
    return nn.ModuleDict({path.replace(".", "/"): m.branch for path, m in found.items()})


def low_rank_part(error, size, rank):
    """The low-rank part of a weight's error (out, in) that matters most for inputs of this size
    (in,): two matrices, (rank, in) and (out, rank)."""
    size = size.clamp(min=1e-6 * size.max().item() + 1e-30)  # a channel that was 0 has no say
    U, S, V = torch.svd_lowrank(error * size, min(rank + EXTRA, *error.shape), ITERATIONS)
    root = S[:rank].sqrt()
    return (V[:, :rank] * root).T / size, U[:, :rank] * root


@torch.no_grad()
def mend(base, folder, prompts, rank, kept=None):
    """Compute the branches of a 4-bit base during one pass of some texts. A layer's branch is
    computed when its inputs arrive, so the inputs have passed corrected layers only. It takes the
    memory of the base and of one weight.

    folder: with the weights before quantization; prompts: lists of ids
    kept: a file in --cache_hidden; if it exists, the branches are read from it
    """
    if not prompts:
        raise InputError("--repair needs training examples: it is not for --eval_only alone.")
    all_branches = branches(base, rank)
    if kept and kept.exists():
        tensors = {name: read() for name, read in read_safetensors(kept).items()}
        return copy_into(all_branches, tensors, kept)
    tensors = hub.open_files(folder, base.config)
    idx, keep = pad_left([ids[:LENGTH] for ids in prompts[:TEXTS]], device=base.device)
    layers = {m: path for path, m in base.named_modules() if isinstance(m, Linear4bit)}
    bar = tqdm(total=len(layers), desc="repair", unit="layer", leave=False)

    def before(linear, args):
        name = hub.their_name(base.config.family, f"{layers[linear]}.weight")
        weight, x = tensors[name](), args[0][keep.bool().to(args[0].device)].float()  # (tokens, in)
        if not weight.is_floating_point():
            raise InputError(f"{folder} is in 4 bits: --repair needs the weights before that.")
        error = weight.to(x.device).float() - linear.weight.dequantize()
        down, up = low_rank_part(error, x.square().mean(dim=0).sqrt(), rank)
        linear.branch.down.copy_(down)
        linear.branch.up.copy_(up)
        bar.update()

    with bar, ExitStack() as hooks:
        for linear in layers:
            hooks.enter_context(linear.register_forward_pre_hook(before))
        base.hidden(idx, keep)
    if kept:
        write_safetensors(kept, all_branches.state_dict())
