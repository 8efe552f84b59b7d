"""What torch.save has written, such as pytorch_model.bin: a zip archive with a pickle in it.

A pickle is a program that may call any function of Python. torch.load with weights_only calls some
of torch's only, and we let it see a pickle that names no others than plain tensors need: the rest
can do no harm, but take all memory. Its memory map only tells us where the tensors are to be read.
What we give up: files from before torch 1.6, of 2020; a pickle_protocol other than torch.save's; a
file larger than the machine's memory, which is not mapped as one. And of a pickle we limit the
size, not the steps: tuples or lists that each hold another twice can take years, or all memory.
"""

import pickle
import pickletools
import struct
import warnings
import zipfile
from functools import partial

import torch

from data import InputError
from data.formats.fields import TEXT, reason, shown
from data.formats.files import file_size
from data.formats.safetensors import read_part, version_of

ADVICE = "save it anew with torch.save, as a table of names and tensors"
LARGEST_PROGRAM = 1 << 21  # bytes; a tensor takes some 200
MOST_TUPLES = 1 << 14  # a tensor takes 4; Python dies of a key of 200,000 in each other
GLOBALS = ["collections OrderedDict"]  # what a pickle may name
GLOBALS += [f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "parameter")]
GLOBALS += [f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Byte")]


def read_tensors(path, advice=ADVICE, alone=False):
    """Check a file of names and tensors, or of a tensor alone, called "its tensor": {name: function
    that returns the tensor}."""
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    content, version, start, sizes = load(path, refuse)
    content = {"its tensor": content} if alone else content
    if not isinstance(content, dict):
        raise refuse("holds no table of names and tensors")
    found, storages, total = {}, {}, 0
    for name, tensor in dict.items(content):  # a pickle can hide its own `items`
        if not TEXT.fits(name):
            raise refuse("has a name that is no text")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_neg():
            raise refuse(f"has {shown(name)}, which is no tensor of a kind that we read")
        total += tensor.numel() * tensor.itemsize
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        found[name] = tensor.detach()
    places = sorted(place for place, size in storages.items() if size)
    if [storages[place] for place in places] != sizes:  # torch.load does not see where one ends
        raise refuse("has fewer or more bytes than its tensors")
    if total > 2 * file_size(path, ADVICE):  # a tied head is there twice
        raise refuse("has many tensors of the same bytes")
    start -= min(places, default=0)  # from a place in the map to one in the file

    def read(x):
        storage = x.untyped_storage()
        n, at = storage.nbytes() // x.itemsize, start + storage.data_ptr()
        whole = read_part(path, version, x.dtype, (n,), at)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset()).contiguous()

    return {name: partial(read, x) for name, x in found.items()}


def load(path, refuse):
    """Load a file: what it holds, in a memory map; its version, where the bytes of its first
    storage begin, and the sizes of all, in the file's order."""
    version = version_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            if any(info.compress_type or info.flag_bits & 1 for info in infos):
                raise ValueError("its members are compressed or encrypted")
            (program,) = [i for i in infos if i.filename.lower().endswith("/data.pkl")]
            if program.file_size > LARGEST_PROGRAM:
                raise ValueError("its pickle is too long")
            check(archive.read(program))
            if any(archive.read(i) == b"big" for i in infos if i.filename.endswith("/byteorder")):
                raise ValueError("its numbers are big-endian")
            storages = [i for i in infos if "/data/" in i.filename and i.file_size]
            start = (storages or infos)[0].header_offset + 30  # then its name and its padding
            archive.fp.seek(start - 4)
            start += sum(struct.unpack("<2H", archive.fp.read(4)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch then refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content, version, start, [i.file_size for i in storages]
    except pickle.UnpicklingError:  # whose message is a page about weights_only
        why = "its pickle does what tensors do not need"
    except Exception as error:  # whatever zipfile, torch and a strange pickle end in
        why = reason(error).partition(". ")[0]
    raise refuse(f"cannot be read as a file of plain tensors ({why})")


def check(program):
    """Refuse a pickle that is not like those of torch.save; nothing of it is run."""
    tuples = 0
    for instruction, argument, _ in pickletools.genops(program):
        name, tuples = instruction.name, tuples + instruction.name.startswith("TUPLE")
        if name == "PROTO" and argument != 2 or name == "GLOBAL" and argument not in GLOBALS:
            raise ValueError(f"it wants {name} {shown(argument)}")
        if tuples > MOST_TUPLES:
            raise ValueError("its pickle has too many tuples")
