"""What torch.save has written, such as pytorch_model.bin: a zip archive with a pickle in it.

A pickle is a program that may call any function of Python. torch.load with weights_only calls some
of torch's only, and we let it see a pickle that names no others than plain tensors need: the rest
can do no harm, but take all memory. Nothing is copied: the tensors lie in one memory map.
What we give up: files from before torch 1.6, of 2020; a pickle_protocol other than torch.save's; a
file larger than the machine's memory, which is not mapped as one. And of a pickle we limit the
size, not the steps: tuples or lists that each hold another twice can take years, or all memory.
"""

import pickle
import pickletools
import warnings
import zipfile

import torch

from data import InputError
from data.formats.fields import TEXT, reason, shown
from data.formats.files import file_size

ADVICE = "save it anew with torch.save, as a table of names and tensors"
LARGEST_PROGRAM = 1 << 21  # bytes; a tensor takes some 200
MOST_TUPLES = 1 << 14  # a tensor takes 4; Python dies of a key of 200,000 in each other
GLOBALS = ["collections OrderedDict"]  # what a pickle may name
GLOBALS += [f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "parameter")]
GLOBALS += [f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Byte")]


def read_tensors(path, advice=ADVICE):
    """Check a file of names and tensors: {name: function that returns the tensor}."""
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    content, sizes = load(path, refuse)
    if not isinstance(content, dict):
        raise refuse("holds no table of names and tensors")
    return checked(path, dict.items(content), sizes, refuse)  # a pickle can hide its own `items`


def read_tensor(path, advice=ADVICE):
    """Read a file of one tensor."""
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    content, sizes = load(path, refuse)
    return checked(path, [("its tensor", content)], sizes, refuse)["its tensor"]()


def load(path, refuse):
    """Load a file: what it holds, and the sizes of its storages, in the file's order."""
    file_size(path, ADVICE)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            if any(info.compress_type or info.flag_bits & 1 for info in infos):
                raise ValueError("its members are compressed or encrypted")
            (program,) = [i for i in infos if i.filename.lower().endswith("/data.pkl")]
            if program.file_size > LARGEST_PROGRAM:
                raise ValueError("its pickle is too long")
            check(archive.read(program))
        with warnings.catch_warnings(action="ignore"):  # of what torch then refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content, [i.file_size for i in infos if "/data/" in i.filename and i.file_size]
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


def checked(path, tensors, sizes, refuse):
    """Check pairs of a name and a tensor: {name: function that returns the tensor}.

    sizes: of the storages in the file; torch.load does not see where one ends
    """
    readers, storages, total = {}, {}, 0
    for name, tensor in tensors:
        if not TEXT.fits(name):
            raise refuse("has a name that is no text")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_neg():
            raise refuse(f"has {shown(name)}, which is no tensor of a kind that we read")
        total += tensor.numel() * tensor.itemsize
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        aligned = tensor.data_ptr() % tensor.itemsize == 0
        readers[name] = tensor.detach if aligned else tensor.detach().clone
    if [size for _, size in sorted(storages.items()) if size] != sizes:
        raise refuse("has fewer or more bytes than its tensors")
    if total > 2 * file_size(path, ADVICE):  # a tied head is there twice
        raise refuse("has many tensors of the same bytes")
    return readers
