"""Settings: a dataclass whose fields say what they are, what they may be, and become flags."""

import operator
from dataclasses import field, fields


from data import InputError
from data.formats.fields import NAME, NEEDED, TRUE_OR_FALSE, first_few, number, one_of, shown, whole
from data.formats.fields import field as field_of_file

BOUNDS = dict(at_least=operator.ge, above=operator.gt, below=operator.lt)


def setting(default, help, choices=(), of=None, flag=True, text=None, **bounds):
    """A field of a dataclass of settings: its default, its line in --help, and what it may be.

    of: the only methods that read it, if not all do; flag: whether it is one
    text: what it may be in a file (formats/fields.py), if that is more than others may be there
    bounds: names of BOUNDS
    """
    if choices:
        help += f" ({', '.join(map(str, choices))})"
    metadata = dict(help=help, choices=choices, of=of, flag=flag, text=text, bounds=bounds)
    return field(default=default, metadata=metadata)


def check(settings):
    """Refuse values that their fields do not allow; None is a default that is not filled in yet."""
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata["choices"]
        bounds = f.metadata["bounds"]
        if value is not None and choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise InputError(f"--{f.name} {shown(value)} is unknown: choose {known}.")
        if value == "" and f.default is None:
            raise InputError(f"--{f.name} is empty: give a value, or leave it out.")
        for bound, limit in bounds.items() if value is not None else ():
            if not BOUNDS[bound](value, limit):
                raise InputError(f"--{f.name} {value} must be {bound.replace('_', ' ')} {limit}.")


def default_out_dir(eval_only=False):
    """Where a run of train.py leaves its files, if --out_dir does not say."""
    return "out-eval" if eval_only else "out"


def from_table(kind, where, table, optional=(), text=NAME):
    """Make a dataclass of settings, `kind`, of a table from a file: each of its type, within its
    bounds; only those that are optional may be left out. text: what a text may be"""
    own = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(table) - set(own)):
        names = first_few(unknown)
        raise InputError(f"{where}: config has {names}, which this code does not know: update it.")
    absent = lambda f: f.default if f.name in optional else NEEDED
    read = lambda f: field_of_file(where, table, f"config.{f.name}", kind_of(f, text), absent(f))
    return kind(**{name: read(f) for name, f in own.items()})


def kind_of(f, text=NAME):
    """What a setting may be, in a file."""
    choices, bounds = f.metadata["choices"], f.metadata["bounds"]
    if choices:
        return one_of(*choices)
    numbers = whole(bounds.get("at_least", 0), bounds.get("below", 1 << 20))
    text = f.metadata["text"] or text
    kinds = {int: numbers, float: number(-1e9, 1e9), bool: TRUE_OR_FALSE, str: text}
    return kinds[f.type]


def check_used(settings, methods):
    """Refuse flags that the chosen method ignores. methods: the names of all"""
    for f in fields(settings):
        readers = f.metadata["of"] or methods
        if settings.method not in readers and getattr(settings, f.name) != f.default:
            readers = " and ".join(readers)
            raise InputError(f"--{f.name} is of --method {readers}, and not of {settings.method}.")


def refuse_if(*rows):
    """Raise the sentence of the first (is it so?, sentence) that is so."""
    for so, sentence in rows:
        if so:
            raise InputError(sentence + ".")


SETTINGS_FILE = "settings.json"  # which a run leaves in its --out_dir when it begins


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError
