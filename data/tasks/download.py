"""Downloads of the tasks' files. Each is checked, and an archive is unpacked beside itself."""

import argparse
import gzip
import shutil
import tarfile
import zipfile
from pathlib import Path

from data import InputError
from data.formats.download import download
from data.formats.files import write_atomically
from data.settings.flags import Parser, run_main

SOURCES = {}  # {name: {path in the folder: (address of the file's folder, SHA-256)}}
for row in Path(__file__).with_name("sources.txt").read_text().splitlines():
    if not row.startswith("#"):
        name, path, sha256, base = row.split()
        SOURCES.setdefault(name, {})[path] = base, sha256


def command_line(show, *names):
    """Run `python data/tasks/NAME.py`: print where its data comes from, download it, show it.

    show: function that prints what a file or folder holds; its docstring is the help
    """
    addresses = [
        f"  {name:9} {base}/{Path(path).name}"
        for name in names for path, (base, _) in SOURCES[name].items()
    ]
    parser = Parser(
        description=show.__doc__, epilog="\n".join(["where it comes from", *addresses]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="a file or folder to show")
    parser.add_argument("--download", metavar="FOLDER", help="a folder to download the data to")
    parser.add_argument("--only", choices=names, nargs=1, default=names,
        help="the one to download; default: all")

    def fetch_and_show():
        args = parser.parse_args()
        if not (args.data or args.download):
            parser.error("give --data or --download")
        if args.download:
            for name in args.only:
                for path, (base, sha256) in SOURCES[name].items():
                    file = Path(args.download) / path
                    unpack(download(f"{base}/{Path(path).name}", file, sha256))
                print(f"{name} is in {args.download}")
        if args.data:
            show(args.data)

    run_main(fetch_and_show, "give a smaller file")


def unpack(path):
    """Unpack a .zip, .tar or .gz beside itself, and write to no other folder."""
    try:
        if path.suffix in (".zip", ".tar"):  # of a .zip no name outside of the folder is unpacked
            shutil.unpack_archive(path, path.parent, filter={".tar": "data"}.get(path.suffix))
        elif path.suffix == ".gz":
            with gzip.open(path) as source:
                write_atomically(path.with_suffix(""), lambda out: shutil.copyfileobj(source, out))
    except (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be unpacked ({error}).") from None
