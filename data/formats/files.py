"""Read text and JSON strictly, and write files completely or not at all.

A file from outside is opened only after `file_size` has refused devices and pipes: reading from
them might never end.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from data import InputError
from data.formats.fields import reason, shown

NOT_TEXT = {  # how other files begin, and what to do with them
    b"PAR1": "Parquet: save it as JSON or CSV", b"PK\3\4": "a zip or .xlsx: save it as JSON or CSV",
    b"\x1f\x8b": "a gzip archive: unpack it", b"\xff\xfe": "UTF-16 text: save it as UTF-8",
}


def file_size(path, advice):
    """Return the size of a file or of a link's target. advice: what to do if there is none"""
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {advice}.") from None
    except (OSError, ValueError) as error:  # ValueError: no possible file name
        raise InputError(f"{path} cannot be read ({reason(error)}): {advice}.") from None
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a device or a pipe, not a file"
        raise InputError(f"{path} is {kind}: {advice}.")
    if 0 < about.st_size < 1000 and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            if file.read().startswith(b"version https://git-lfs"):
                raise InputError(f"{path} is a git-lfs pointer: run `git lfs pull` in its folder.")
    return about.st_size


def read_bytes(path, advice, most=math.inf):
    """Read a file, or its first `most` bytes."""
    size = min(most, file_size(path, advice))  # 0 for the endless files of /proc
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): {advice}.") from None


def read_text(path, advice="give a file of UTF-8 text", newline=None):
    """Read UTF-8 text. newline: None turns every line end into "\\n"; "" keeps them"""
    content = read_bytes(path, advice)
    for start, kind in NOT_TEXT.items():
        if content.startswith(start):
            raise InputError(f"{path} is {kind}.")
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=newline).read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({reason(error)}): save it as UTF-8.") from None


def parse_json(text, wrong="", advice=""):
    """Read strict JSON, str or UTF-8: only finite numbers, no name twice; else a ValueError.

    wrong, advice: make it an `InputError`, in which they stand before and behind the reason
    """

    def finite(digits):
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:40]} is not a JSON number, or is too large")
        return value

    def table(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{shown(name)} occurs twice in a table")
            found[name] = value
        return found

    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=table)
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = reason(error).replace("line 1 column", "column")
    raise InputError(f"{wrong} ({why}){advice}.") if wrong else ValueError(why)


def read_json(path, optional=False, advice="give a folder in Hugging Face's layout"):
    """Read a file with one JSON object; return {} if it is optional and missing."""
    if optional and not os.path.exists(path):
        return {}
    content = parse_json(read_bytes(path, advice), f"{path} cannot be read as JSON")
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def read_records(path, flag="--data"):
    """Read JSON or JSON lines: [(place in the file, for messages; record), ...]."""
    advice = f"give a list in JSON, JSON lines{', or a .csv' * (flag == '--data')}"
    text = read_text(path, advice)
    parse = lambda part, where: parse_json(part, f"{path}, {where} is not JSON", f": {advice}")
    if re.match(r"\s*(\[|\{[^}\n]*\n)", text):  # a list, or an object over several lines
        whole = parse(text, "as a whole")
        entries = enumerate(whole if isinstance(whole, list) else [whole], 1)
        records = [(f"entry {i}", record) for i, record in entries]
    else:
        lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1))
        records = [(where, parse(line, where)) for where, line in lines if line.strip()]
    if not records:
        raise InputError(f"{path} holds no {'instructions' if flag == '--data' else 'questions'}.")
    return records


def write_atomically(path, write):
    """Call `write(file)` on a temporary file and rename it, so that no file is left incomplete."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # one per process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # not every system can flush a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        message = f"{path} could not be written ({error.strerror}); nothing was changed."
        raise InputError(message) from None
    finally:
        with suppress(OSError):  # it is there only if something failed
            temporary.unlink()


def write_json(path, content):
    """Write strict JSON: NaN and Infinity become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    text = json.dumps(finite, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def make_writable_folder(folder, flag):
    """Make a folder, unless it exists, and check that files can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written to ({error.strerror}).") from None


@contextmanager
def locked(path, refusal=""):
    """Hold the lock of a folder, or of a file, which is made. A process that is killed has none.

    refusal: the message if another process holds it; without one we wait
    """
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError as error:
            print(f"{path} cannot be locked ({error.strerror}): let no other run write there.")
        yield
    finally:
        os.close(descriptor)


def checksum(path, digest=None):
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
