"""Safetensors, by hand: a file of named tensors that no one has to trust.

8 bytes of header length (little endian), a JSON header that gives each tensor's dtype, shape and place,
and then nothing but the tensors' bytes, which are read straight from a memory map.
"""

import json
import math
import mmap
from pathlib import Path

import torch

from data.files import first_few, write_atomically
from quant import InputError

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8
}  # fmt: skip


def read_safetensors(path):
    """Check a file's header and return {name: function that reads the tensor}.

    The tensor is a view of a memory map of its own: its pages are freed when it goes.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing.")
    size = path.stat().st_size
    bad = lambda why: InputError(f"{path} is damaged or not a safetensors file: {why}.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise bad("the header is longer than the file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise bad("the header is not JSON") from None
    if not isinstance(header, dict):
        raise bad("the header is not a table")
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numel = math.prod(shape)
            natural = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise bad(f"the entry of {name} is not as it should be") from None
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {kind}; {', '.join(DTYPES)} can be read.")
        if not natural or end - begin != numel * DTYPES[kind].itemsize:
            raise bad(f"{name}, {kind} {shape}, does not fit its offsets {begin} to {end}")
        entries[name] = (DTYPES[kind], shape, begin, end)
    place = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != place:
            raise bad(f"{name} starts at {begin} and not at {place}, where the one before it ends")
        place = end
    if place != size - 8 - length:
        raise bad(f"its tensors take {place} bytes and the file has {size - 8 - length}")
    reader = lambda dtype, shape, begin, end: lambda: _map_tensor(
        path, dtype, shape, 8 + length + begin
    )
    return {name: reader(*entry) for name, entry in entries.items()}


def _map_tensor(path, dtype, shape, offset):
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    nbytes = math.prod(shape) * dtype.itemsize
    with open(path, "rb") as file:
        view = mmap.mmap(
            file.fileno(), offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start
        )
    raw = torch.frombuffer(view, dtype=torch.uint8, offset=offset - start)
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} of any mix of the dtypes above, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]
        }  # fmt: skip
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")

    write_atomically(path, write)


def copy_into(module, tensors, where):
    """Copy {name: tensor} into a module, strictly: every tensor must be there, fit, and no other."""
    own = module.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise InputError(f"{where} lacks {first_few(missing)}.")
    if surplus := sorted(set(tensors) - set(own)):
        raise InputError(f"{where} has {first_few(surplus)}, which the side network does not.")
    for name, tensor in own.items():
        theirs, ours = tuple(tensors[name].shape), tuple(tensor.shape)
        if theirs != ours:
            raise InputError(f"{where}: {name} has shape {theirs}, and not {ours}.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
