"""What a field of a file may be: each value that comes from a file is looked at once, here.

A reader has a table of its fields with a kind for each, and takes them out with `field`. A value of
another kind is refused in one sentence, so that the code behind the table needs no doubts.
"""

import re
import reprlib
from dataclasses import dataclass
from typing import Callable

from data import InputError

NEEDED = object()  # what it means that a field is not there: the file is refused


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    text: in words, behind "must be"; fits: function of a value; each: the kind of its parts
    """

    text: str
    fits: Callable
    each: "Kind" = None


def whole(low, high):
    """A number that JSON writes without a point: neither 4.0 nor true."""
    return Kind(
        f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high
    )


def number(low, high):
    """A number, but no NaN, which is not between any two."""
    return Kind(
        f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high
    )


def one_of(*known):
    """One of some values. 1 is 1.0, and not true."""
    same = lambda v, k: v == k and isinstance(v, bool) == isinstance(k, bool)
    return Kind(" or ".join(map(repr, known)), lambda v: any(same(v, k) for k in known))


def either(*kinds):
    return Kind(" or ".join(k.text for k in kinds), lambda v: any(k.fits(v) for k in kinds))


def list_of(kind, least=0, most=1 << 30):
    fits = lambda v: type(v) is list and least <= len(v) <= most and all(map(kind.fits, v))
    size = f" of {least} to {most:,}" if most < 1 << 30 else ""
    return Kind(f"a list{size} (each: {kind.text})", fits, kind)


def table_of(kind):
    """A JSON object; its names are texts too."""
    fits = lambda v: type(v) is dict and all(map(TEXT.fits, v)) and all(map(kind.fits, v.values()))
    return Kind(f"a table of names (each: {kind.text})", fits, kind)


# Half a surrogate pair, which JSON can spell and no other file can hold.
HALF = re.compile("[\ud800-\udfff]")
TEXT = Kind("a text", lambda v: type(v) is str and not HALF.search(v))
WORD = Kind("a text that is not empty", lambda v: v != "" and TEXT.fits(v))
NAME = Kind("a short name", lambda v: type(v) is str and re.fullmatch(r"[\w.-]{0,80}", v))
TRUE_OR_FALSE = Kind("true or false", lambda v: type(v) is bool)
TABLE = Kind("a table", lambda v: type(v) is dict)
LIST = Kind("a list", lambda v: type(v) is list)


def field(where, record, name, kind, absent=NEEDED):
    """Return a field of a table that was read from a file; what is no `kind` is refused.

    where: names the file; name: may say where the table stands in it, as in "model.type"
    absent: what is returned where the field is not there, or null
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
    """The first part of a value that does not fit: its name, itself, and what it must be."""
    if kind.each and type(value) in (list, dict):
        for key, part in value.items() if type(value) is dict else enumerate(value, 1):
            if not kind.each.fits(part):
                return misfit(f"{name}[{shown(key)}]", part, kind.each)
    return name, value, kind


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 78
_short.maxlevel = 3


def shown(value):
    """A value from a file, for a message: on one line, and at most some 80 characters of it."""
    text = _short.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error):
    """What an error of Python's or a library's says, for a message: on one line, and not long."""
    text = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in text)


def first_few(names):
    """The first of a list of names from a file, for a message."""
    spelled = [n if re.fullmatch(r"[\w.\-/ ]{1,80}", n) else shown(n) for n in names[:3]]
    return ", ".join(spelled) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
