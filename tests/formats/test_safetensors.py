"""data/formats/safetensors.py: what is written is read, and a file that lies is refused."""

import json
import os
import struct

import pytest
import torch

from data import InputError
from data.formats.safetensors import read_header, read_safetensors, write_safetensors


def test_safetensors_round_trip(tmp_path):
    """What we write, we read, whatever the dtype and shape."""
    tensors = {
        "a": torch.randn(3, 5), "half": torch.randn(7).half(), "b": torch.randn(2, 1, 3).bfloat16(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    readers = read_safetensors(tmp_path / "x.safetensors")
    assert list(readers) == list(tensors)
    for name, tensor in tensors.items():
        read = readers[name]()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_tensors_are_aligned(tmp_path):
    """The first begins at a multiple of 8, however long the header is: other readers map them."""
    path = tmp_path / "x.safetensors"
    for n in range(8):
        write_safetensors(path, {"a": torch.ones(2)}, {"side": "x" * n})
        assert (path.stat().st_size - torch.ones(2).nbytes) % 8 == 0
        assert read_header(path)[1] == {"side": "x" * n}


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "too long": dict(header={"a": ENTRY}, data=bytes(8), length=1 << 40),
    "not JSON": dict(header=b"{nonsense", data=bytes(8)),
    "not UTF-8": dict(header=b'{"\xff": 1}', data=bytes(8)),
    "not a table": dict(header=[1, 2]),
    "out of range": dict(header={"a": ENTRY | {"data_offsets": [8, 16]}}, data=bytes(8)),
    "negative": dict(header={"a": ENTRY | {"data_offsets": [-8, 0]}}, data=bytes(8)),
    "wrong size": dict(header={"a": ENTRY | {"shape": [3]}}, data=bytes(8)),
    "unknown dtype": dict(header={"a": ENTRY | {"dtype": "Q7"}}, data=bytes(8)),
    "negative shape": dict(header={"a": ENTRY | {"shape": [-1, -2]}}, data=bytes(8)),
    "fractional shape": dict(header={"a": ENTRY | {"shape": [2.0]}}, data=bytes(8)),
    "overlap": dict(header={"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, data=bytes(12)),
    "hole": dict(header={"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, data=bytes(20)),
    "bytes left": dict(header={"a": ENTRY}, data=bytes(20)),
    "cut short": dict(header={"a": ENTRY}, data=bytes(4)),
    "no offsets": dict(header={"a": {"dtype": "F32", "shape": [2]}}, data=bytes(8)),
    "entry is a list": dict(header={"a": [1]}, data=bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    """One sentence that names the file, and no byte beyond it is read."""
    path = tmp_path / "x.safetensors"
    write_raw(path, **LIES[lie])
    with pytest.raises(InputError, match="x.safetensors"):
        read_safetensors(path)


def test_an_empty_file_is_refused(tmp_path):
    """So is one without even the length of a header."""
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="x.safetensors"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_full_disk_leaves_nothing(tmp_path):
    """Writing to a full device is one sentence, and no part of a file stays."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / f"x.safetensors.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="x.safetensors could not be written"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(100000)})
    assert list(tmp_path.iterdir()) == []
