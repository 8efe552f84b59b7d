"""Check the fields of files: every value that comes from a file passes through `field`, once.

A reader gives a `Kind` for each field. `field` refuses a value of another kind in one sentence, so
the code after it needs no checks.
"""

import re
import reprlib
from dataclasses import dataclass
from typing import Callable

from data import InputError

NEEDED = object()  # marks a field without which a file is refused


@dataclass(frozen=True)
class Kind:
    """Describe what a value may be: text follows "must be" in a message, fits tests a value, and
    each is the kind of the parts of a list or table."""

    text: str
    fits: Callable
    each: "Kind" = None


def whole(low, high):
    """Allow a number that JSON writes without a point: neither 4.0 nor true."""
    fits = lambda v: type(v) is int and low <= v <= high
    return Kind(f"a whole number from {low:,} to {high:,}", fits)


def number(low, high):
    """Allow a number; NaN is refused, because it is between no two numbers."""
    fits = lambda v: type(v) in (int, float) and low <= v <= high
    return Kind(f"a number from {low:g} to {high:g}", fits)


def one_of(*known):
    """Allow some values. 1 equals 1.0, but not true."""
    same = lambda v, k: v == k and isinstance(v, bool) == isinstance(k, bool)
    return Kind(" or ".join(map(repr, known)), lambda v: any(same(v, k) for k in known))


def either(*kinds):
    return Kind(" or ".join(k.text for k in kinds), lambda v: any(k.fits(v) for k in kinds))


def list_of(kind, least=0, most=1 << 30):
    fits = lambda v: type(v) is list and least <= len(v) <= most and all(map(kind.fits, v))
    size = f" of {least} to {most:,}" if most < 1 << 30 else ""
    return Kind(f"a list{size} (each: {kind.text})", fits, kind)


def table_of(kind):
    """Allow a JSON object with such values; its names are checked as texts."""
    fits = lambda v: type(v) is dict and all(map(TEXT.fits, v)) and all(map(kind.fits, v.values()))
    return Kind(f"a table of names (each: {kind.text})", fits, kind)


HALF = re.compile("[\ud800-\udfff]")  # half a surrogate pair: JSON can spell it, UTF-8 cannot
TEXT = Kind("a text", lambda v: type(v) is str and not HALF.search(v))
WORD = Kind("a text that is not empty", lambda v: v != "" and TEXT.fits(v))
NAME = Kind("a short name", lambda v: type(v) is str and re.fullmatch(r"[\w.-]{0,80}", v))
TRUE_OR_FALSE = Kind("true or false", lambda v: type(v) is bool)
TABLE = Kind("a table", lambda v: type(v) is dict)
LIST = Kind("a list", lambda v: type(v) is list)


def field(where, record, name, kind, absent=NEEDED):
    """Return a field of a table from a file, or refuse a value that does not fit `kind`.

    where: names the file; name: may include the path in the file, as in "model.type"
    absent: returned if the field is missing or null
    """
    value = record.get(name.rpartition(".")[2])
    if value is None and absent is not NEEDED:
        return absent
    if value is None:
        raise InputError(f"{where} lacks the field '{name}', which must be {kind.text}.")
    if not kind.fits(value):
        name, value, kind = misfit(name, value, kind)
        raise InputError(f"{where}: {name} is {shown(value)}; it must be {kind.text}.")
    return value


def misfit(name, value, kind):
    """Find the first part of a value that does not fit: (its name, the part, its kind)."""
    if kind.each and type(value) in (list, dict):
        for key, part in value.items() if type(value) is dict else enumerate(value, 1):
            if not kind.each.fits(part):
                return misfit(f"{name}[{shown(key)}]", part, kind.each)
    return name, value, kind


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 78
_short.maxlevel = 3


def shown(value):
    """Format a value from a file for a message: on one line, with at most 80 characters."""
    text = _short.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error):
    """Format the text of a Python or library error for a message: one short, printable line."""
    text = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in text)


def first_few(names):
    """List the first three names from a file for a message."""
    spelled = [n if re.fullmatch(r"[\w.\-/ ]{1,80}", n) else shown(n) for n in names[:3]]
    return ", ".join(spelled) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
