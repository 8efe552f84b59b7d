"""What torch.save has written, such as pytorch_model.bin, by hand: no one has to trust it either.

The file is a zip archive: NAME/data.pkl is a pickle, a little program that builds a table of names
and tensors, and NAME/data/KEY are the bytes that the tensors are views of. A pickle may call any
function of Python. We know the dozen instructions and the three functions that tensors need, and
refuse all others; so nothing is run. Nothing is copied either: tensors lie in a memory map.
What we give up: files of before torch 1.6, of 2020, sparse tensors, and other dtypes than weights'.
"""

import math
import pickletools
import zipfile
from dataclasses import dataclass

import torch

from data import InputError
from data.formats.fields import TEXT, list_of, reason, shown, whole
from data.formats.files import file_size
from data.formats.safetensors import LARGEST_TENSOR, map_tensor

ADVICE = "save it anew with torch.save, as a table of names and tensors"
LARGEST_PROGRAM = 1 << 21  # bytes; a tensor takes some 200
PLACE = whole(0, LARGEST_TENSOR)
PLACES = list_of(PLACE, most=8)


@dataclass(repr=False, eq=False)
class Storage:
    """A member of the archive, NAME/data/KEY."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(repr=False, eq=False)
class Tensor:
    """A view of a storage; offset and stride count values."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


GLOBALS = {  # what a pickle may name, and what we take for it
    "collections OrderedDict": lambda *_: {},
    "torch._utils _rebuild_tensor_v2": lambda storage, offset, shape, stride, *_: Tensor(
        storage, offset, shape, stride
    ),
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch ByteStorage": torch.uint8,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE")


def run(program):
    """Run a pickle as far as we know its instructions, on a stack, and return what it builds."""
    stack, marks, memo = [], [], {}

    def pop_to_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for instruction, argument, _ in pickletools.genops(program):
        name = instruction.name
        if name in ARGUMENTS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL" and argument in GLOBALS:
            stack.append(GLOBALS[argument])
        elif name == "STACK_GLOBAL" and " ".join(stack[-2:]) in GLOBALS:
            stack[-2:] = [GLOBALS[" ".join(stack[-2:])]]
        elif name == "BINPERSID":
            _, dtype, key, _, numel = stack.pop()
            stack.append(Storage(dtype, key, numel))
        elif name == "REDUCE":
            function, arguments = stack[-2:]
            stack[-2:] = [function(*arguments)]
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                marks.append(len(stack) - 2)
            items = pop_to_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not TEXT.fits(key):
                    raise ValueError("it has a table whose names are no texts")
                stack[-1][key] = value
        elif name == "BUILD":
            stack.pop()  # attributes of a table, such as a module's version
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it wants {name} {shown(argument)}")
    raise ValueError("it has no end")


def read_tensors(path, advice=ADVICE):
    """Check a file of names and tensors: {name: function that reads the tensor}."""
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    members, content = open_archive(path, refuse)
    if not isinstance(content, dict):
        raise refuse("holds no table of names and tensors")
    readers = {name: checked(path, members, name, t, refuse) for name, t in content.items()}
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in content.values())
    if total > 2 * file_size(path, advice):  # a tied head is there twice
        raise refuse("has many tensors of the same bytes")
    return readers


def read_tensor(path, advice=ADVICE):
    """Read a file of one tensor."""
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    members, tensor = open_archive(path, refuse)
    return checked(path, members, "its tensor", tensor, refuse)()


def open_archive(path, refuse):
    """Open a file: {member: (where its bytes begin, how many)}, and what the pickle builds.

    The member of a storage is called by its key.
    """
    size = file_size(path, ADVICE)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            infos, members = archive.infolist(), {}
            if any(info.compress_type or info.flag_bits & 1 for info in infos):
                raise ValueError("its members are compressed or encrypted")
            (program,) = [info for info in infos if info.filename.endswith("/data.pkl")]
            if program.file_size > LARGEST_PROGRAM:
                raise ValueError("its pickle is too long")
            root = program.filename.removesuffix("data.pkl")
            for info in infos:
                file.seek(info.header_offset + 26)  # the lengths of a name and of what follows it
                lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
                start = info.header_offset + 30 + sum(lengths)
                if start + info.file_size > size:
                    raise ValueError("it is cut off")
                members[info.filename.removeprefix(f"{root}data/")] = start, info.file_size
            order = f"{root}byteorder"
            if order in members and archive.read(order) != b"little":
                raise ValueError("its bytes are in another order")
            return members, run(archive.read(program))
    except Exception as error:  # whatever zipfile and a strange program end in
        raise refuse(f"cannot be read as a file of plain tensors ({reason(error)})") from None


def checked(path, members, name, tensor, refuse):
    """Check a tensor, and return the function that reads it."""
    has = f"has {shown(name)}, "
    if not isinstance(tensor, Tensor) or not isinstance(tensor.storage, Storage):
        raise refuse(has + "which is no tensor of a kind that we read")
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    if not all(type(p) is tuple and PLACES.fits([*p]) for p in (shape, stride, (tensor.offset,))):
        raise refuse(has + "whose shape or place is not as it should be")
    if not TEXT.fits(storage.key) or not isinstance(storage.dtype, torch.dtype):
        raise refuse(has + "whose storage is not as it should be")
    start, nbytes = members.get(storage.key, (0, -1))
    if not PLACE.fits(storage.numel) or storage.numel * storage.dtype.itemsize != nbytes:
        raise refuse(has + "whose bytes are not there")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, stride))
    inside = 0 in shape or last < storage.numel
    if len(shape) != len(stride) or not inside or math.prod(shape) > storage.numel:
        raise refuse(has + "whose values are not all there")

    def read():
        values = map_tensor(path, storage.dtype, [storage.numel], start)
        return values.as_strided(shape, stride, tensor.offset)

    return read
