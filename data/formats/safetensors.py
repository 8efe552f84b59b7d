"""Safetensors, by hand: a file of named tensors that no one has to trust.

8 bytes of header length (little endian), a JSON header that gives each tensor's dtype, shape and
place, and then nothing but the tensors' bytes, which are read straight from a memory map.
"""

import json
import math
import mmap

import torch

from data import InputError
from data.formats.fields import (
    TABLE, TEXT, field, first_few, list_of, one_of, reason, shown, table_of, whole,
)
from data.formats.files import file_size, parse_json, read_bytes, write_atomically
from quant import Quantized4bit

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8
}
LARGEST_HEADER = 1 << 24  # bytes; a tensor takes some 100
LARGEST_TENSOR = 1 << 60  # values
LARGEST_WEIGHT = 1e30  # beyond, the sums of quantization overflow; no model comes near
PLACE = whole(0, LARGEST_TENSOR)
ENTRY = {  # the fields of a tensor
    "dtype": one_of(*DTYPES), "shape": list_of(PLACE, most=8), "data_offsets": list_of(PLACE, 2, 2)
}


def read_header(path):
    """Check a file's header: {name: (dtype, shape, begin, end)}, where the places count from the
    start of the file, and the metadata, {name: text}."""
    advice = "give a safetensors file"
    bad = lambda why: InputError(f"{path} is damaged or not a safetensors file: {why}.")
    size = file_size(path, advice)
    first = read_bytes(path, advice, 8)
    if first == b"version ":  # the first word of a pointer
        raise bad("it looks like a pointer of git-lfs; run `git lfs pull` in its folder")
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise bad("the header is longer than the file, or than any of a model")
    try:
        header = parse_json(read_bytes(path, advice, 8 + length)[8:])
    except ValueError as error:
        raise bad(f"the header is not JSON ({error})") from None
    if not TABLE.fits(header):
        raise bad("the header is not a table")
    metadata = field(path, header, "__metadata__", table_of(TEXT), {})
    entries, start = {}, 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not (TEXT.fits(name) and TABLE.fits(entry)):
            raise bad(f"the entry of {shown(name)} is no table")
        where = f"{path}: the tensor {shown(name)}"
        kind, shape, (begin, end) = (field(where, entry, f, k) for f, k in ENTRY.items())
        if math.prod(max(1, n) for n in shape) > LARGEST_TENSOR:
            raise bad(f"{shown(name)} has the shape {shown(shape)}, which is too large")
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            sizes = f"{kind} {shown(shape)}, does not fit its offsets {begin} to {end}"
            raise bad(f"{shown(name)}, {sizes}")
        entries[name] = (DTYPES[kind], shape, start + begin, start + end)
    place = start
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != place:
            raise bad(f"{shown(name)} does not start where the one before it ends")
        place = end
    if place != size:
        raise bad(f"its tensors end at byte {place} and the file at {size}")
    return entries, metadata


def read_safetensors(path):
    """Check a file and return {name: function that reads the tensor}.

    The tensor is a view of a memory map of its own: its pages are freed when it goes.
    """
    reader = lambda dtype, shape, begin, _: lambda: map_tensor(path, dtype, shape, begin)
    return {name: reader(*entry) for name, entry in read_header(path)[0].items()}


def map_tensor(path, dtype, shape, offset):
    """A tensor whose values are the bytes of a file from `offset` on."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    nbytes = math.prod(shape) * dtype.itemsize
    length, access = offset - start + nbytes, mmap.ACCESS_COPY
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), length, access=access, offset=start)
    except (OSError, ValueError) as error:  # it is no longer there, or the machine is too small
        raise InputError(f"{path} cannot be read ({reason(error)}): close what you can.") from None
    raw = torch.frombuffer(view, dtype=torch.uint8, offset=offset - start)
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def tensor_bytes(tensor):
    """A tensor's bytes as they stand in a file; of one on the CPU, nothing is copied."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} of any mix of the dtypes above, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]
        }
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))

    write_atomically(path, write)


def check_values(tensor, dtype, name):
    """Return a tensor, if `dtype` can hold its values: no NaN, nothing infinite, in fp16 no 1e5.

    tensor: floats, or a `Quantized4bit`, whose few outer scales bound its values: of the codes
    nothing is read; name: for the message
    """
    values = tensor
    if isinstance(tensor, Quantized4bit):
        nested = tensor.nested_absmax is not None  # then no scale is larger than these
        values = tensor.nested_absmax.abs() + tensor.offset.abs() if nested else tensor.absmax
    if values.is_meta or not values.numel():
        return tensor
    low, high = (value.item() for value in values.aminmax())  # of a NaN anywhere, both are NaN
    most = min(torch.finfo(dtype).max, LARGEST_WEIGHT)
    if not -math.inf < low <= high < math.inf:
        raise InputError(f"{name} has NaN or infinite values: get the file anew.")
    if max(-low, high) > most:
        kind = str(dtype).removeprefix("torch.")
        found = f"values from {low:.3g} to {high:.3g}, and in {kind} they may be {most:.3g} at most"
        raise InputError(f"{name} has {found}: give another --dtype, or get the file anew.")
    return tensor


def copy_into(module, tensors, where):
    """Copy {name: tensor} into a module: every tensor must be there, fit, and no other."""
    own = module.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise InputError(f"{where} lacks {first_few(missing)}.")
    if surplus := sorted(set(tensors) - set(own)):
        raise InputError(f"{where} has {first_few(surplus)}, which the side network does not.")
    for name, tensor in own.items():
        theirs, ours = tuple(tensors[name].shape), tuple(tensor.shape)
        if theirs != ours:
            raise InputError(f"{where}: {name} has shape {theirs}, and not {ours}.")
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise InputError(f"{where}: {name} is {tensors[name].dtype}, and not {tensor.dtype}.")
        if tensor.is_floating_point():
            check_values(tensors[name], tensor.dtype, f"{where}: {name}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
