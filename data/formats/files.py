"""Files of text and JSON: read strictly, written whole or not at all.

Every file that comes from outside is opened here, or behind `file_size`, which refuses what is no
file on a disk: a device never ends, and a pipe may never begin.
"""

import hashlib
import io
import json
import math
import os
import stat
import tempfile
from pathlib import Path

from data import InputError
from data.formats.fields import reason, shown

HUGGING_FACE = "give a folder in Hugging Face's layout"
LARGEST_SETTINGS = 1 << 26  # bytes; the largest tokenizer.json have half of it


def file_size(path, advice):
    """The size of a file, also behind links. advice: what to do if there is none"""
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {advice}.") from None
    except (OSError, ValueError) as error:  # a ValueError: this cannot be the name of a file
        raise InputError(f"{path} cannot be read ({reason(error)}): {advice}.") from None
    if stat.S_ISDIR(about.st_mode):
        raise InputError(f"{path} is a folder: {advice}.")
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path} is a device or a pipe, and no file: {advice}.")
    return about.st_size


def read_bytes(path, advice, most=math.inf):
    """The whole of a file, or its first `most` bytes: not more than its size, which is 0 for the
    endless files of /proc."""
    size = min(most, file_size(path, advice))
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): {advice}.") from None


def read_text(path, advice="give a file of UTF-8 text", newline=None):
    """A file of UTF-8 text. newline: None makes every end of a line "\\n", "" leaves it as it is"""
    try:
        content = io.BytesIO(read_bytes(path, advice))
        return io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline).read()
    except UnicodeDecodeError as error:
        message = f"{path} cannot be read as UTF-8 text ({reason(error)}): {advice}."
        raise InputError(message) from None


def parse_json(text):
    """Read strict JSON; a ValueError, in few words, says what is wrong with it.

    Strict: every number is finite, and no table has a name twice, as the standard wants it.
    text: str, or bytes of UTF-8
    """

    def refuse(constant):
        raise ValueError(f"{constant} is no number of JSON")

    def finite(digits):
        if math.isinf(value := float(digits)):
            raise ValueError(f"{shown(digits)} is too large a number")
        return value

    def table(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{shown(twice)} stands twice in a table")
        return found

    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(reason(error)) from None


def read_json(path, optional=False, advice=HUGGING_FACE):
    """Read a file that holds one JSON object; {} if it is optional and not there."""
    if optional and not os.path.exists(path):
        return {}
    if file_size(path, advice) > LARGEST_SETTINGS:
        raise InputError(f"{path} is larger than {LARGEST_SETTINGS:,} bytes: {advice}.")
    content = read_bytes(path, advice)
    try:
        content = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def read_records(path, flag="--data"):
    """Read JSON or JSON lines: [(where it stands, for messages, and the record), ...]."""
    advice = f"give {flag} a list in JSON, or JSON lines"
    text, where = read_text(path, advice), "as a list"
    try:
        if text.lstrip().startswith("["):
            records = [(f"entry {i}", record) for i, record in enumerate(parse_json(text), 1)]
        else:
            records = []
            for i, line in enumerate(text.split("\n"), 1):
                where = f"line {i}"
                if line.strip():
                    records.append((where, parse_json(line)))
    except ValueError as error:
        raise InputError(f"{path}, {where} is not JSON ({error}): {advice}.") from None
    if not records:
        raise InputError(f"{path} holds no {'instructions' if flag == '--data' else 'questions'}.")
    return records


def write_atomically(path, write):
    """Call `write(file)` on a temporary file and rename it: a path never holds half a file."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process has another one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        message = f"{path} could not be written ({error.strerror}); what was there is whole."
        raise InputError(message) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    """Write strict JSON, which has neither NaN nor Infinity: they become null."""
    text = json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def without_nan(content):
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def make_writable_folder(folder, flag):
    """Make a folder where there is none, and see that files can be written to it."""
    if Path(folder).is_file():
        raise InputError(f"{flag} {folder} is a file: give a folder.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written to ({error.strerror}).") from None


def checksum(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
