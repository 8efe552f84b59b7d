"""Read and write safetensors files; a file from outside is checked before it is used.

A file has 8 bytes with the header's length (little endian), a JSON header with the dtype, shape and
place of each tensor, and the tensors' bytes.
A tensor is read into memory of its own: maps would keep a file open for each, or all that was read
in memory; and a file that is cut off under a map ends Python.
"""

import json
import math
import mmap
import os
from functools import partial

import torch

from data import InputError
from data.formats.fields import (
    TABLE, TEXT, field, first_few, list_of, one_of, reason, shown, table_of, whole,
)
from data.formats.files import file_size, parse_json, read_bytes, write_atomically
from quant import Quantized4bit

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
LARGEST_HEADER = 1 << 24  # bytes; a tensor takes some 100
LARGEST_TENSOR = 1 << 60  # values
LARGEST_WEIGHT = 1e30  # the sums of quantization overflow beyond it; no model has such weights
PLACE = whole(0, LARGEST_TENSOR)
ENTRY = {  # the fields of a tensor
    "dtype": one_of(*DTYPES), "shape": list_of(PLACE, most=8), "data_offsets": list_of(PLACE, 2, 2)
}


def read_header(path):
    """Check a header: {name: (dtype, shape, begin in the file, end)} and its metadata."""
    advice = "give a safetensors file"
    damaged = f"{path} is damaged or not a safetensors file"
    bad = lambda why: InputError(f"{damaged}: {why}.")
    size = file_size(path, advice)
    length = int.from_bytes(read_bytes(path, advice, 8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise bad("the header is longer than the file, or than a model's header can be")
    text = read_bytes(path, advice, 8 + length)[8:]
    header = {"header": parse_json(text, f"{damaged}: the header is not JSON")}
    header = field(path, header, "header", table_of(TABLE))
    metadata = field(path, header, "__metadata__", table_of(TEXT), {})
    header.pop("__metadata__", None)
    entries, place = {}, 8 + length
    for name, entry in header.items():
        where = f"{path}: the tensor {shown(name)}"
        dtype, shape, (begin, end) = (field(where, entry, *kind) for kind in ENTRY.items())
        if math.prod(max(1, n) for n in shape) > LARGEST_TENSOR:
            raise bad(f"{shown(name)} has the shape {shown(shape)}, which is too large")
        entries[name] = DTYPES[dtype], shape, 8 + length + begin, 8 + length + end
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != place or end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"{shown(name)} does not fit its offsets, or leaves a gap before it")
        place = end
    if place != size:
        raise bad(f"its tensors end at byte {place} and the file at {size}")
    return entries, metadata


def read_safetensors(path):
    """Check a file and return {name: function that reads the tensor}."""
    version = version_of(path)
    entries, _ = read_header(path)
    return {name: partial(read_part, path, version, *e[:3]) for name, e in entries.items()}


def version_of(path):
    """What differs when a file was written to or replaced."""
    return file_size(path, "get it again"), os.stat(path).st_mtime_ns


def read_part(path, version, dtype, shape, offset):
    """Read a part of a file as a tensor. version: what the file had when it was checked"""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    try:
        # Memory of the system, which has it back at once; malloc would keep some of it.
        memory = mmap.mmap(-1, nbytes, access=mmap.ACCESS_COPY)
        with open(path, "rb") as file:
            file.seek(offset)
            whole = file.readinto(memory) == nbytes
    except OSError as error:  # the file is gone, or the memory is full
        raise InputError(f"{path} cannot be read ({reason(error)}): is it there?") from None
    if not whole or version_of(path) != version:
        raise InputError(f"{path} was changed while it was read: put the right file there again.")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def tensor_bytes(tensor):
    """Return a tensor's bytes as a file has them; a tensor on the CPU is not copied."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} atomically; each may have any dtype of DTYPES."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        dtype, shape, end = names[tensor.dtype], list(tensor.shape), place + tensor.nbytes
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[place, end])
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))

    write_atomically(path, write)


def check_values(tensor, dtype, name):
    """Return a tensor, or refuse it if `dtype` cannot hold its values: NaN, infinite or too large.

    tensor: floats, or a `Quantized4bit`, whose outer scales bound its values; name: for messages
    """
    values = tensor
    if isinstance(tensor, Quantized4bit):
        values = tensor.absmax
        if tensor.nested_absmax is not None:
            values = tensor.nested_absmax.abs() + tensor.offset.abs()
    if values.is_meta or not values.numel():
        return tensor
    low, high = (value.item() for value in values.aminmax())  # NaN if any value is NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} has NaN or infinite values: download it again.")
    most = min(torch.finfo(dtype).max, LARGEST_WEIGHT)
    if not -most <= low <= high <= most:
        kind = str(dtype).removeprefix("torch.")
        found = f"values from {low:.3g} to {high:.3g}; in {kind} they may be at most {most:.3g}"
        raise InputError(f"{name} has {found}: give another --dtype, or download it again.")
    return tensor


def copy_into(module, tensors, where):
    """Copy {name: tensor} into a module, whose names, shapes and kinds of numbers must be equal."""
    own = module.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise InputError(f"{where} lacks {first_few(missing)}.")
    if surplus := sorted(set(tensors) - set(own)):
        raise InputError(f"{where} has {first_few(surplus)}, which the side network lacks.")
    for name, ours in own.items():
        theirs, name = tensors[name], f"{where}: {name}"
        if theirs.shape != ours.shape:
            raise InputError(f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}.")
        if theirs.is_floating_point() != ours.is_floating_point():
            raise InputError(f"{name} is {theirs.dtype}, not {ours.dtype}.")
        if ours.is_floating_point():
            check_values(theirs, ours.dtype, name)
    for name, ours in own.items():
        ours.copy_(tensors[name])
