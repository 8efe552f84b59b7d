"""A side checkpoint on disk: side.safetensors, which is complete by itself, and side.json to read.

    side.safetensors   the tensors; in its metadata "side", JSON of {"format": 2, "config", "base"},
                       and "sha256", of that text and of the tensors
    side.json          {"format": 2, "config", "base", "sha256"}, a copy, with the sum of the file

A file takes its name whole or not at all. So a crash at any moment leaves the old checkpoint or the
new one, and never the weights of one with the settings of the other. side.json may then still be
the old one; nothing is read from it.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from data import InputError
from data.formats.fields import NAME, TABLE, Kind, field, one_of
from data.formats.files import checksum, parse_json, read_json, write_json
from data.formats.safetensors import read_header, read_safetensors, tensor_bytes, write_safetensors
from data.settings.flags import from_table

WEIGHTS, COPY = "side.safetensors", "side.json"
ADVICE = "give the --out_dir of a run of train.py"
HEX = Kind("hexadecimal digits", lambda v: type(v) is str and re.fullmatch("([0-9a-f]{4})+", v))
BASE = {"quant": NAME, "codes": NAME, "weights": NAME, "values": HEX}


def write(folder, tensors, config, base):
    """Save a checkpoint. config: a dataclass of settings; base: the base's `fingerprint`"""
    path, about = Path(folder) / WEIGHTS, {"format": 2, "config": asdict(config), "base": base}
    text = json.dumps(about)
    write_safetensors(path, tensors, dict(format="pt", side=text, sha256=digest(text, tensors)))
    write_json(Path(folder) / COPY, about | {"sha256": checksum(path)})


def digest(text, tensors):
    found = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor_bytes(tensor))
    return found.hexdigest()


def read(folder, kind):
    """Read the settings, as the dataclass `kind`, and the base's fingerprint; no tensors."""
    weights = Path(folder) / WEIGHTS
    if not weights.exists():
        raise InputError(f"{weights} is missing: {ADVICE}, its folder last, or one run of a sweep.")
    metadata = read_header(weights)[1]
    wrong = f"{weights}: its settings are no JSON"
    about = parse_json(metadata.get("side", "null"), wrong, f": {ADVICE}")
    if not TABLE.fits(about):
        raise InputError(f"{weights} has no table of settings: {ADVICE}.")
    copy = read_json(Path(folder) / COPY, optional=True)
    if copy.pop("sha256", None) == checksum(weights) and copy != about:
        raise InputError(f"{Path(folder) / COPY} has other settings than {weights}: remove {COPY}.")
    where = f"{weights}, its settings"
    field(where, about, "format", one_of(2))
    own, base = field(where, about, "config", TABLE), field(where, about, "base", TABLE)
    config = from_table(kind, where, own, ("heads", "layers"))  # newer ones
    return config, {name: field(where, base, f"base.{name}", k) for name, k in BASE.items()}


def load(folder, name=WEIGHTS):
    """Read and verify the tensors of a side checkpoint, or of a state: {name: tensor}."""
    path = Path(folder) / name
    tensors = {name: read() for name, read in read_safetensors(path).items()}
    metadata = read_header(path)[1]
    if digest(metadata.get("side", ""), tensors) != metadata.get("sha256"):
        raise InputError(f"{path} is damaged, its bytes are not those that were saved: {ADVICE}.")
    return tensors
