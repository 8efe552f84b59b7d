"""Tell one frozen base from another: a side network works only with the base of its training.

Quantized weights are the same numbers wherever they are loaded, and are hashed. Other weights are
rounded to the dtype to compute in, and two copies of a checkpoint may have two dtypes. So only
their signs are hashed, and a few values are stored and compared up to rounding.
"""

import hashlib
import json

import torch

from quant import Linear4bit, Quantized

SAMPLES = 8  # of each tensor


def fingerprint(base):
    """How a base is stored, two hashes of its shape and weights, and some values in bf16.

    The hashes cover some 1,000 values of a tensor, so that a 70B model takes a moment. "weights"
    covers the scales, too, whose rounding may depend on the device.
    """
    if hasattr(base, "known_fingerprint"):  # only a part of the base is in memory
        return base.known_fingerprint
    unused = [k for k in ("qk_norm", "no_rope") if not getattr(base.config, k)]  # not in old files
    shape = {k: v for k, v in vars(base.config).items() if k not in ("bos_id", "eos_id", *unused)}
    codes = hashlib.sha256(json.dumps(shape).encode())
    weights, values = codes.copy(), []
    for name, tensor in tensors_of(base):
        flat = tensor.flatten()
        part = flat[:: max(1, len(flat) // 1024)]
        part = (part if name else part.signbit()).cpu().numpy().tobytes()
        weights.update(part)
        if name in ("codes", None):
            codes.update(part)
        if name is None:
            at = (2 * torch.arange(SAMPLES) + 1) * len(flat) // (2 * SAMPLES)
            values.append(flat[at.to(flat.device)].bfloat16().cpu())
    hashes = {"codes": codes.hexdigest()[:16], "weights": weights.hexdigest()[:16]}
    values = torch.cat(values).view(torch.uint8).numpy().tobytes().hex()
    return {"quant": quant_kind(base)} | hashes | {"values": values}


def tensors_of(base):
    """Yield (name, tensor) for tensors of quantized weights, and (None, tensor) for the others."""
    for module in base.modules():
        if isinstance(module, Linear4bit):  # data/devices/stream.py loads a weight from its source
            weight = module.source() if hasattr(module, "source") else module.weight
            yield from weight.named_buffers()
        if not isinstance(module, Quantized):
            yield from ((None, tensor) for tensor in module.buffers(recurse=False))


def quant_kind(base):
    """How a base's linear layers are stored: "nf4", ..., or "none"."""
    return next((m.kind for m in base.modules() if isinstance(m, Quantized)), "none")


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
