"""The command line: flags made of a dataclass of settings, and a mistake told in one line."""

import argparse
import re
import sys
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import torch

from data import InputError
from data.devices import distributed
from data.formats.fields import TABLE, TEXT
from data.formats.fields import field as field_of_file
from data.formats.files import read_json
from data.settings.setting import SETTINGS_FILE, default_out_dir, from_table, true_or_false


class Parser(argparse.ArgumentParser):
    """Flags in full, and a mistake in one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        near = unknown and get_close_matches(unknown[1], self._option_string_actions, 1)
        message += f" (did you mean {near[0]}?)" if near else ""
        message = message if len(message) < 300 else message[:300] + "..."
        sys.exit(f"error: {message}; --help lists the flags")


def run_main(main):
    """Run a command line's `main`; the user's mistake is one line, ours a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        if number := distributed.rank():  # whose own output is off
            print(f"error in process {number}: {error}", file=sys.__stderr__)
            sys.exit(1)
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: The GPU has no more memory: give a shorter text, or --quant nf4.")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # a CPU has no exception of its own for it
            raise
        advice = "lower --batch_size, or leave the layers of a 4-bit folder on disk (--stream)"
        sys.exit(f"error: The machine has no more memory: {advice}.")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def add_flags(parser, settings, shown_defaults=()):
    """Add a flag for each field of a dataclass of settings.

    shown_defaults: {field: default to show in --help} for those that depend on something
    """
    for f in fields(settings):
        if not f.metadata["flag"]:
            continue
        flag = dict(type=true_or_false, nargs="?", const=True)
        kind = flag if f.type is bool else dict(type=f.type)
        default = dict(shown_defaults).get(f.name, f.default)
        known = "" if default in (None, "") else f" (default: {default})"  # else the help has it
        help = (f.metadata["help"] + known).replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=help, **kind)


def parse_settings(parser, kind, argv, shown_defaults=()):
    """The command line as a dataclass of settings. --config FILE gives them too, as a table or in a
    run's result.json, and --resume those of the run in --out_dir; flags count more, and what the
    method does not read is left out."""
    add_flags(parser, kind, shown_defaults)
    parser.add_argument("--config", help="a file of settings, such as a run's result.json; flags "
        "on the command line count more")
    given = parser.parse_args(argv)
    path = given.config
    if path is None and vars(given).get("resume"):
        path = Path(given.out_dir or default_out_dir()) / SETTINGS_FILE
        path = path if path.exists() else None
    if path is not None:
        table = read_json(Path(path), advice="give --config a JSON file, such as a result.json")
        own = {f.name: f for f in fields(kind)}
        table = field_of_file(path, table, "config", TABLE, table)
        found = vars(from_table(kind, path, table, own, TEXT))
        parser.set_defaults(method=found["method"])
        method = parser.parse_args(argv).method
        readers = lambda name: own[name].metadata["of"] or (method,)
        parser.set_defaults(**{n: v for n, v in found.items() if method in readers(n)})
    args = vars(parser.parse_args(argv))
    return kind(**{name: value for name, value in args.items() if name != "config"})
