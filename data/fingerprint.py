"""Some values of a frozen base that tell it from another of the same shape, in whatever dtype.

What is quantized is the same numbers wherever it is loaded, and `qst.fingerprint` hashes it. Other
weights are rounded to the dtype to compute in, and two copies of a checkpoint may be stored in two
dtypes. No hash can be the same for all of them: it would have to be blind to every step from one
16-bit number to the next, and so to everything but the sign. Hence a few values are kept as they
are, and compared up to rounding.
"""

import torch

from quant import Linear4bit

SAMPLES = 8  # of each tensor


def sample(base):
    """Values of every tensor that is not quantized, in bf16, as hexadecimal digits."""
    found = []
    for module in base.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name == "bias" or not isinstance(module, Linear4bit):
                at = (2 * torch.arange(SAMPLES) + 1) * tensor.numel() // (2 * SAMPLES)
                found.append(tensor.flatten()[at.to(tensor.device)].bfloat16().cpu())
    return torch.cat(found).view(torch.uint8).numpy().tobytes().hex()


def differences(theirs, ours):
    """In what two bases differ, in words: {"quant", "weights", "values"} of a file and of a base.

    Side checkpoints of older commits have no values.
    """
    found = [f"{key} {theirs[key]} there and {ours[key]} here" for key in ("quant", "weights")
             if theirs[key] != ours[key]]  # fmt: skip
    if theirs.get("values") and not alike(theirs["values"], ours["values"]):
        found.append("other weights in what is not quantized")
    return found


def alike(one, other):
    """Whether values are the same up to rounding to bf16, or to fp16 with its least step 2^-24."""
    values = lambda text: torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float()
    x, y = values(one), values(other)
    if len(x) != len(y):
        return False
    return bool(((x - y).abs() <= 2**-7 * torch.maximum(x.abs(), y.abs()) + 2**-23).all())
