"""Settings: a dataclass whose fields have help texts and allowed values, and become flags."""

import argparse
import operator
import re
import sys
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path

from data import InputError, leaf
from data.formats.fields import (
    NEEDED, TABLE, TEXT, TRUE_OR_FALSE, first_few, number, one_of, shown, whole,
)
from data.formats.fields import field as field_of_file
from data.formats.files import read_json

GROUPS = (  # of flags, in the order of --help
    "most used", "task and data", "model", "side network", "training", "memory", "evaluation",
    "output",
)
ALIASES = {"--lr": "--learning_rate", "--num_train_epochs": "--epochs", "--load_in_4bit": "--quant"}
BOUNDS = dict(at_least=operator.ge, above=operator.gt, below=operator.lt)


def setting(default, help, choices=(), of=None, flag=True, group=None, **bounds):
    """A field of a dataclass of settings: its default, its help text and its allowed values.

    of: the only methods that use it, if not all do; flag: whether it is a flag; bounds: see BOUNDS
    group: the title in --help of this setting, and of those below it
    """
    if choices:
        help += f" ({', '.join(map(str, choices))})"
    about = dict(help=help, choices=choices, of=of, flag=flag, group=group)
    return field(default=default, metadata=about | {"bounds": bounds})


def check(settings):
    """Refuse values that their fields do not allow. None is a default that is not filled in yet."""
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata["choices"]
        if value is not None and choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise InputError(f"--{f.name} {shown(value)} is unknown: choose {known}.")
        if value == "" and f.default is None:
            raise InputError(f"--{f.name} is empty: give a value, or leave it out.")
        for bound, limit in f.metadata["bounds"].items():
            if value is not None and not BOUNDS[bound](value, limit):
                raise InputError(f"--{f.name} {value} must be {bound.replace('_', ' ')} {limit}.")


def from_table(kind, where, table, optional=()):
    """Make the dataclass `kind` from a table in a file. Each value has its type and bounds; only
    `optional` ones may be missing."""
    own = {f.name: f for f in fields(kind)}
    if "downsample" in table and "heads" in own:
        table = {"heads": 0} | table  # older files: as many as the base
    # Older commits repaired a base that they loaded. QLoRA only began at it.
    if table.get("repair") and table.get("method") != "qlora":
        do = "write one with `python model.py quantize IN OUT --calibrate FILE`, and train again"
        raise InputError(f"{where}: its base had a --repair, which there is no more: {do}.")
    gone = "repair", "samples_interval", "threads"
    table = {name: value for name, value in table.items() if name not in gone}
    if unknown := sorted(set(table) - set(own)):
        names = first_few(unknown)
        raise InputError(f"{where}: config has {names}, which this code does not know: update it.")
    values = {}
    for name, f in own.items():
        bounds, absent = f.metadata["bounds"], f.default if name in optional else NEEDED
        numbers = whole(bounds.get("at_least", 0), bounds.get("below", 1 << 20))
        known = {int: numbers, float: number(-1e9, 1e9), bool: TRUE_OR_FALSE, str: TEXT}
        allowed = one_of(*f.metadata["choices"]) if f.metadata["choices"] else known[f.type]
        values[name] = field_of_file(where, table, f"config.{name}", allowed, absent)
    return kind(**values)


def check_used(settings, methods):
    """Refuse flags that the chosen method ignores. methods: the names of all"""
    for f in fields(settings):
        readers = f.metadata["of"] or methods
        if settings.method not in readers and getattr(settings, f.name) != f.default:
            readers = " and ".join(readers)
            raise InputError(f"--{f.name} is for --method {readers}, not for {settings.method}.")


def refuse_if(*rows):
    """Raise InputError with the message of the first (condition, message) whose condition holds."""
    for condition, message in rows:
        if condition:
            raise InputError(message + ".")


SETTINGS_FILE = "settings.json"  # in --out_dir, from the start of a run


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags that reports an error in one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        flags = self._option_string_actions
        near = unknown and get_close_matches(ALIASES.get(unknown[1], unknown[1]), flags, 1)
        message += f" (did you mean {near[0]}?)" if near else ""
        message = message if len(message) < 300 else message[:300] + "..."
        sys.exit(leaf("command").printable(f"error: {message}; --help lists the flags"))


SAVINGS = "give a lower --batch_size, --checkpoint, --optimizer_bits 8, less --data, or --stream " \
    "a 4-bit folder; `python tests/account.py` with the same flags prints the memory of a step"


def run_main(main, less=SAVINGS):
    """Call `main` for a command. A user's mistake is printed in one line; a bug raises a traceback.
    less: what to do if there is too little memory"""
    leaf("command").run(main, less)


def add_flags(parser, settings, shown_defaults=()):
    """Add a flag for each field of a dataclass of settings, in GROUPS. shown_defaults: {field:
    default to show in --help} for those that depend on something"""
    groups, group = {title: parser.add_argument_group(title) for title in GROUPS}, parser
    for f in fields(settings):
        group = groups[f.metadata["group"]] if f.metadata["group"] else group
        if not f.metadata["flag"]:
            continue
        flag = dict(type=true_or_false, nargs="?", const=True)
        kind = flag if f.type is bool else dict(type=f.type)
        default = dict(shown_defaults).get(f.name, f.default)
        known = "" if default in (None, "") else f" (default: {default})"  # else the help has it
        help = (f.metadata["help"] + known).replace("%", "%%")
        group.add_argument(f"--{f.name}", default=f.default, help=help, **kind)


def parse_settings(parser, kind, argv, shown_defaults=()):
    """Make the dataclass `kind` from the command line. Settings in --config FILE, or with --resume
    those of the run in --out_dir, count less. What the method does not use is left out."""
    add_flags(parser, kind, shown_defaults)
    parser.add_argument("--config", help="file of settings, such as a result.json; flags on the "
        "command line count more")
    given = parser.parse_args(argv)
    path, optional = given.config, given.config is None
    if optional and vars(given).get("resume"):
        path = Path(given.out_dir or "out") / SETTINGS_FILE
    if path is not None:
        table = read_json(Path(path), optional, "give --config a JSON file, such as a result.json")
        own = {f.name: f for f in fields(kind)}
        table = field_of_file(path, table, "config", TABLE, table)
        found = vars(from_table(kind, path, table, own))
        if given.epochs or given.max_iters:  # either replaces both in the file
            found |= dict(epochs=None, max_iters=None)
        parser.set_defaults(method=found["method"])
        method = parser.parse_args(argv).method
        readers = lambda name: own[name].metadata["of"] or (method,)
        parser.set_defaults(**{n: v for n, v in found.items() if method in readers(n)})
    args = vars(parser.parse_args(argv))
    del args["config"]
    return kind(**args)
