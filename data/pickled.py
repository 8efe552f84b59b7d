"""What torch.save has written, such as pytorch_model.bin: read as plain tensors, and nothing else.

torch's own reader runs no code with `weights_only`, and with `mmap` copies no tensor. What it does
not look at is checked here: that no member of the archive is compressed, which a memory map would
take for the values; that what is in the file are dense tensors, each with bytes of its own; and
that the bytes are as many as the tensors say.
"""

import warnings
import zipfile

import torch

from data.fields import TEXT, reason, shown
from data.files import file_size
from data.safetensors import DTYPES
from quant import InputError

ADVICE = "save it anew with torch.save, as a dict of names and tensors"


def read_tensors(path, advice=ADVICE):
    """Read a file of names and tensors: {name: tensor}."""
    return _read(path, advice, lambda content: content)


def read_tensor(path, advice=ADVICE):
    """Read a file of one tensor."""
    return _read(path, advice, lambda content: {"its tensor": content})["its tensor"]


def _read(path, advice, as_table):
    refuse = lambda why: InputError(f"{path} {why}: {advice}.")
    size = file_size(path, advice)
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            members, comment = archive.infolist(), archive.comment
            if comment or any(m.compress_type or m.file_size != m.compress_size for m in members):
                raise ValueError("it has compressed members, or a comment")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        raise refuse(f"cannot be read as a file of plain tensors ({reason(error)})") from None
    content = as_table(content)
    if not isinstance(content, dict) or not all(map(TEXT.fits, content)):
        raise refuse("holds no table of names")
    tensors, storages = {}, {}
    for name, value in content.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise refuse(f"has {shown(name)}, which is {type(value).__name__} and no tensor")
        tensor = torch.Tensor.detach(value)  # without what a pickle may hang on it
        kinds = tensor.layout == torch.strided, tensor.device.type == "cpu"
        if not all(kinds) or tensor.dtype not in DTYPES.values():
            raise refuse(f"has {shown(name)}, which is {tensor.dtype}, or not dense")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.nbytes > storage.nbytes():
            raise refuse(f"has {shown(name)}, whose values are not all in it")
        tensors[name] = tensor
    members = sorted((m for m in members if "/data/" in m.filename), key=lambda m: m.header_offset)
    stored = [m.file_size for m in members if m.file_size]
    if [n for _, n in sorted(storages.items()) if n] != stored:
        raise refuse("has other bytes than its tensors say")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:  # a tied head counts twice
        raise refuse("has many tensors of the same bytes")
    return tensors
