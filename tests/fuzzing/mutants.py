"""What fuzz.py does to a good folder: bytes, lines, values of JSON, tensors, whole files.

Each function takes a random generator and bytes, and returns bytes and what was done.
"""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch

# Values of every type of JSON; a text that begins with RAW stands in the file without quotes.
RAW = "\x01"
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1000000, 2**31, 2**64, -(2**64), 10**300, 4.0, 0.5, -1e-9,
    1e300, "", "x", "4", "../x", "/etc/passwd", "\ud800", "\0", "a\nb\x1b[31m", "é" * 3000, [],
    [[]], {}, [0], [None], [0, 2**64], ["x"], {"x": 1}, {"content": 3}, [1, [2, [3]]],
    [10**300] * 2000,
    *(RAW + raw for raw in ("NaN", "-Infinity", "1e999", "[" * 99999, '{"a":1,"a":2}', "1" * 5000)),
]
BITS = [
    b"", b"\xff\xfe", b"\0", b"\t", b"\t" * 9, b"nan", b"-1", b'"', b"\r", b"<s>", b"\xef\xbb\xbf"
]
INSTEAD = ["nothing", "a hole", "a folder", "a pipe", "/dev/zero", "/dev/null", "/proc/self/mem"]


def dump(tree):
    """JSON in which the raw texts stand as they are."""
    first, *parts = json.dumps(tree).split(json.dumps(RAW)[:-1])
    for part in parts:
        end = next(i for i, c in enumerate(part) if c == '"' and part[i - 1] != "\\")
        first += json.loads(f'"{part[:end]}"') + part[end + 1 :]
    return first.encode()


def paths(tree, path=()):
    """The paths to the values of a tree; to those of a long list or table, of the first 40."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items)[:40] if isinstance(tree, (dict, list)) else ():
        yield from paths(value, (*path, key))


def mutate_json(rng, content):
    """Replace, remove or rename one value."""
    tree = json.loads(content)
    value = rng.choice(VALUES)
    path = rng.choice([*paths(tree)])
    if not path:
        return dump(value), f"all of it is {value!r:.50}"
    parent, key, where = tree, path[-1], ".".join(map(str, path))
    for step in path[:-1]:
        parent = parent[step]
    how = rng.choice(["replace"] * 6 + ["remove", "rename", "copy"])
    if how == "remove":
        del parent[key]
        return dump(tree), f"without {where}"
    if how == "rename" and isinstance(parent, dict) and isinstance(value, str) and value[:1] != RAW:
        parent[value] = parent.pop(key)
        return dump(tree), f"{where} is called {value!r:.50}"
    if how == "copy":
        value = rng.choice([*parent.values()] if isinstance(parent, dict) else parent)
    parent[key] = value
    return dump(tree), f"{where} is {value!r:.50}"


def mutate_bytes(rng, content):
    content, at = bytearray(content), rng.randrange(len(content) + 1)
    how = rng.choice(["flip", "flip", "cut", "insert", "drop", "double"])
    if how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = rng.choice([*BITS, rng.randbytes(9)])
    elif how == "drop":
        del content[at : at + rng.choice([1, 4, 100])]
    elif how == "double":
        content[at:at] = content[at : at + rng.choice([1, 8, 1000])]
    elif content:
        content[at % len(content)] ^= 1 << rng.randrange(8)
    return bytes(content), f"{how} at {at}"


def mutate_lines(rng, content):
    """Change one line, as JSON if it is; or remove, double or move it."""
    rows = content.split(b"\n")
    i = rng.randrange(len(rows))
    how = rng.choice(["change"] * 4 + ["remove", "double", "swap fields"])
    if how == "remove":
        del rows[i]
    elif how == "double":
        rows.insert(rng.randrange(len(rows)), rows[i])
    elif how == "swap fields":
        fields = rows[i].split(b"\t")
        rng.shuffle(fields)
        fields[0] = rng.choice([fields[0], *BITS])
        rows[i] = b"\t".join(fields)
    elif rows[i][:1] in (b"{", b"["):
        rows[i], how = mutate_json(rng, rows[i])
    else:
        rows[i], how = mutate_bytes(rng, rows[i])
    return b"\n".join(rows), f"line {i + 1}: {how}"


def mutate_safetensors(rng, content):
    """Change the header, the JSON that stands in a tensor or in the metadata, or bytes."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], bytearray(content[8 + length :])
    header, how = json.loads(text), rng.choice(["header", "header", "inside", "floats", "bytes"])
    states = [name for name in header if "quant_state" in name]
    if how == "inside" and states:  # a quant_state is as long as it was, or the file is refused
        begin, end = header[rng.choice(states)]["data_offsets"]
        state, told = mutate_json(rng, data[begin:end])
        data[begin:end] = state[: end - begin].ljust(end - begin)
    elif how == "inside" and "side" in header.get("__metadata__", {}):
        side, told = mutate_json(rng, header["__metadata__"]["side"])
        header["__metadata__"]["side"] = side.decode()
        text = json.dumps(header).encode()
    elif how == "floats":
        at = rng.randrange(len(data) // 4) * 4
        bad = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"])
        data[at : at + 4], told = bad, f"{bad.hex()} at {at} of the data"
    elif how == "bytes":
        return mutate_bytes(rng, content)
    else:
        text, told = mutate_json(rng, text)
    return len(text).to_bytes(8, "little") + text + bytes(data), told


def mutate_torch(rng, content):
    """Another object in the place of a tensor, a name or all; other compression; or bytes."""
    how = rng.choice(["object", "object", "deflate", "pickle", "pickle", "bytes"])
    if how == "bytes":
        return mutate_bytes(rng, content)
    file, told = io.BytesIO(), how
    if how in ("deflate", "pickle"):
        kind = zipfile.ZIP_DEFLATED if how == "deflate" else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", kind) as new:
            for name in old.namelist():
                data = old.read(name)
                if how == "pickle" and name.endswith("data.pkl"):
                    data, told = mutate_bytes(rng, data)
                new.writestr(name, data)
        return file.getvalue(), f"{how}: {told}"
    tree, odd = torch.load(io.BytesIO(content)), torch.randn(4)
    objects = [v for v in VALUES if not isinstance(v, str) or v[:1] != RAW] + [
        odd.to_sparse(), odd.double(), odd.int(), odd.to(torch.complex64), odd * float("nan"),
        odd.expand(10**6, 4), torch.zeros(0), torch.tensor(1.0), torch.nn.Parameter(odd),
        {"a": odd},
        odd.to(torch.float8_e4m3fn), torch.quantize_per_tensor(odd, 0.1, 0, torch.qint8), (odd,),
        torch.zeros(0, 2**40), torch.Size([2]), odd[::2], odd.half(),
    ]
    value, key = rng.choice(objects), rng.choice([*tree]) if isinstance(tree, dict) else None
    if key is None or rng.random() < 0.1:
        tree, told = value, f"all of it is {value!r:.50}"
    elif rng.random() < 0.2:
        name = rng.choice([1, None, (1, 2), "x", "\ud800", "", b"x"])
        tree[name], told = tree.pop(key), f"{key} is called {name!r}"
    else:
        tree[key], told = value, f"{key} is {value!r:.50}"
    torch.save(tree, file)
    return file.getvalue(), told


def mutate_protobuf(rng, content):
    """Change a number or a text of a message, or of a message in it, or remove or double it."""
    parts = list(fields_of(content))
    i, how = rng.randrange(len(parts)), rng.choice(["inside"] * 4 + ["remove", "double"])
    if rng.random() < 0.5:  # one of the few that are no pieces
        i = rng.choice([j for j, part in enumerate(parts) if part[0] >> 3 != 1])
    tag, value = parts[i]
    told = f"{how} {tag >> 3}"
    if how == "inside" and isinstance(value, bytes) and len(value) > 1 and tag >> 3 < 6:
        try:
            value, told = mutate_protobuf(rng, value)
        except (IndexError, ValueError):  # it is a text
            value, told = mutate_bytes(rng, value)
        parts[i], told = (tag, value), f"{tag >> 3}: {told}"
    elif how == "inside":
        huge = [0, 1, 2, 99, 2**31, 2**64 - 1]
        bad = [b"\0\0\xc0\x7f", b"\xff" * 4, b"", b"\xff\xfe", b"<0xZZ>"]
        parts[i] = tag, rng.choice(huge) if isinstance(value, int) else rng.choice(bad)
    else:
        parts[i : i + 1] = [] if how == "remove" else [parts[i]] * 2
    found = b""
    for tag, value in parts:
        number = varint(value if isinstance(value, int) else len(value))
        own = value if tag & 7 == 5 else number if isinstance(value, int) else number + value
        found += varint(tag) + own
    return found, told


def fields_of(content):
    """The fields of a message: (tag, number or bytes)."""
    at = 0

    def number():
        nonlocal at
        n = shift = 0
        while content[at] > 127:
            n, shift, at = n | (content[at] & 127) << shift, shift + 7, at + 1
        n, at = n | content[at] << shift, at + 1
        return n

    while at < len(content):
        tag = number()
        if tag & 7 == 0:
            yield tag, number()
            continue
        size = {2: number, 5: lambda: 4}.get(tag & 7, int)()
        if not size or at + size > len(content):
            raise ValueError("no message")
        yield tag, content[at : at + size]
        at += size


def varint(n):
    found = []
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])


BY_SUFFIX = {
    ".json": mutate_json, ".jsonl": mutate_lines, ".safetensors": mutate_safetensors,
    ".bin": mutate_torch, ".pt": mutate_torch, ".model": mutate_protobuf,
}


def mutant(seeds, rng):
    """A mutant of one of the seeds: {file: bytes, or one of INSTEAD}, and what was done."""
    files, told = dict(rng.choice(seeds)), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice([*files])
        if isinstance(files[name], str):
            continue
        if rng.random() < 0.02:
            files[name] = what = rng.choice(INSTEAD)
        else:
            change = BY_SUFFIX.get(Path(name).suffix, mutate_lines)
            change = mutate_bytes if rng.random() < 0.15 else change
            try:
                files[name], what = change(rng, files[name])
            except Exception:  # what an earlier change has broken
                files[name], what = mutate_bytes(rng, files[name])
        told.append(f"{name}: {what}")
    return files, "; ".join(told)


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "a hole":  # 64 GB of nothing, which need no room on the disk
            path.touch()
            os.truncate(path, 1 << 36)
        elif content == "a folder":
            path.mkdir()
        elif content == "a pipe":
            os.mkfifo(path)
        elif content != "nothing":
            path.symlink_to(content)
