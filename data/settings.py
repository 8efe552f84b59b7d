"""Settings: a dataclass whose fields say what they are, what they may be, and become flags."""

import argparse
import operator
import sys
from dataclasses import field, fields

from quant import InputError

BOUNDS = dict(at_least=operator.ge, above=operator.gt, below=operator.lt)


def setting(default, help, choices=(), of=None, **bounds):
    """A field of a dataclass of settings: its default, its line in --help, and what it may be.

    of: the only methods that read it, if not all do; bounds: of BOUNDS
    """
    told = help + f" ({', '.join(map(str, choices))})" * bool(choices)
    return field(default=default, metadata=dict(help=told, choices=choices, of=of, bounds=bounds))


def check(settings):
    """Refuse values that their fields do not allow; None is a default that is not filled in yet."""
    for f in fields(settings):
        value, choices, bounds = getattr(settings, f.name), f.metadata["choices"], f.metadata["bounds"]
        if value is not None and choices and value not in choices:
            raise InputError(f"--{f.name} {value} is unknown: choose {', '.join(map(str, choices))}.")
        for bound, limit in bounds.items() if value is not None else ():
            if not BOUNDS[bound](value, limit):
                raise InputError(f"--{f.name} {value} must be {bound.replace('_', ' ')} {limit}.")


def refuse(*rows):
    """Raise the sentence of the first (is it so?, sentence) that is so."""
    for wrong, sentence in rows:
        if wrong:
            raise InputError(sentence + ".")


class Parser(argparse.ArgumentParser):
    """Flags in full, and a mistake in one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.exit(f"error: {message}; --help lists the flags")


def run(main):
    """Run a command line's `main`; the user's mistake is one line, ours a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError


def parse_flags(settings, parser, argv, defaults):
    """Flags, one a field of a dataclass -> an instance. defaults: {field: what --help says of it}"""
    for f in fields(settings):
        kind = dict(type=true_or_false, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        if f.name == "preset":  # alone, it asks what there is
            kind |= dict(nargs="?", const="?")
        told = f"{f.metadata['help']} (default: {defaults.get(f.name, f.default)})"
        parser.add_argument(f"--{f.name}", default=f.default, help=told.replace("%", "%%"), **kind)
    return settings(**vars(parser.parse_args(argv)))
