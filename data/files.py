"""Files of text and JSON: read strictly, written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path

from quant import InputError


def read_json(path, optional=False):
    """Read a file that holds one JSON object; {} if it is optional and not there."""
    if optional and not Path(path).exists():
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: give a folder in Hugging Face's layout.") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}).") from None


def write_atomically(path, write):
    """Call `write(file)` on a temporary file and rename it: a path never holds half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise InputError(f"{path} could not be written ({error.strerror}); nothing was lost.") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def first_few(names):
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def make_writable_folder(folder, flag):
    """Make a folder where there is none, and see that files can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag} {folder} cannot be written to ({error.strerror}).") from None
