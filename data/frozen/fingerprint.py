"""Tell one frozen base from another: a side network works only with the base of its training.

Quantized weights are the same numbers wherever they are loaded, and are hashed. Other weights are
rounded to the dtype to compute in, and two copies of a checkpoint may have two dtypes. So only
their signs are hashed, and a few values are stored and compared up to rounding.
"""

import hashlib
import json
from dataclasses import asdict

import torch

from quant import Linear4bit, Quantized

SAMPLES = 8  # of each tensor


def fingerprint(base):
    """{"quant", "codes", "weights", "values"}: how a base is stored, two hashes of its shape and
    weights, and some of its values.

    The hashes cover some 1,000 values of every tensor, so that a 70B model takes a moment: the
    codes of quantized weights and the signs of the rest. "weights" covers the scales, too, whose
    rounding may depend on the device.
    """
    if hasattr(base, "known_fingerprint"):  # only a part of the base is in memory
        return base.known_fingerprint
    shape = {k: v for k, v in asdict(base.config).items() if k not in ("bos_id", "eos_id")}
    codes = hashlib.sha256(json.dumps(shape).encode())
    weights = codes.copy()
    for module in modules(base):
        for name, tensor in packed(module):
            part = some(tensor).cpu().numpy().tobytes()
            weights.update(part)
            if name == "codes":
                codes.update(part)
        for tensor in unpacked(module):
            part = some(tensor).signbit().cpu().numpy().tobytes()
            weights.update(part)
            codes.update(part)
    hashes = {"codes": codes.hexdigest()[:16], "weights": weights.hexdigest()[:16]}
    return {"quant": quant_kind(base)} | hashes | {"values": sample(base)}


def some(tensor):
    return tensor.flatten()[:: max(1, tensor.numel() // 1024)]


def packed(module):
    """The tensors of a quantized weight by name; also of one that devices/stream.py will load."""
    if not isinstance(module, Linear4bit):
        return ()
    return (module.source() if hasattr(module, "source") else module.weight).named_buffers()


def unpacked(module):
    """A module's own tensors that are not quantized."""
    return [] if isinstance(module, Quantized) else [*module.buffers(recurse=False)]


def modules(base):
    """All modules of a base, without --repair's branches, which belong to the side network."""
    return [module for path, module in base.named_modules() if not path.endswith(".branch")]


def quant_kind(base):
    """How a base's linear layers are stored: "nf4", ..., or "none"."""
    return next((m.kind for m in base.modules() if isinstance(m, Quantized)), "none")


def sample(base):
    """Values of every tensor that is not quantized, in bf16, as hexadecimal digits."""
    found = []
    for module in modules(base):
        for tensor in unpacked(module):
            at = (2 * torch.arange(SAMPLES) + 1) * tensor.numel() // (2 * SAMPLES)
            found.append(tensor.flatten()[at.to(tensor.device)].bfloat16().cpu())
    return torch.cat(found).view(torch.uint8).numpy().tobytes().hex()


def differences(theirs, ours):
    """List the differences of two results of `fingerprint`, of a file and of a base, in words."""
    keys = {"quant": "quant", "weights": "codes"}
    found = [f"{name} {theirs[key]} there and {ours[key]} here" for name, key in keys.items()
             if theirs[key] != ours[key]]
    if not alike(theirs["values"], ours["values"]):
        found.append("other weights in what is not quantized")
    return found


def alike(one, other):
    """Compare values up to rounding to bf16, or to fp16 with its smallest step 2^-24."""
    values = lambda text: torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float()
    x, y = values(one), values(other)
    if len(x) != len(y):
        return False
    return bool(((x - y).abs() <= 2**-7 * torch.maximum(x.abs(), y.abs()) + 2**-23).all())
