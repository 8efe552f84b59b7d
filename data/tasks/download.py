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

HUB, GITHUB = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
MMLU = f"{HUB}/cais/mmlu/resolve/c30699e8356da336a370243923dbaf21066bb9fe"
ALPACA = f"{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a"
DOLLY = f"{HUB}/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
OASST1 = f"{HUB}/OpenAssistant/oasst1/resolve/fdf72ae0827c1cda404aff25b6603abec9e3399b"
FASTCHAT = f"{GITHUB}/lm-sys/FastChat/587d5cfa1609a43d192cedb8441cac3c17db105d"
MT_BENCH = f"{FASTCHAT}/fastchat/llm_judge/data/mt_bench"

# {name: {path in the folder: (address of the file's folder, SHA-256)}}. The sums were published in
#   GLUE: github.com/huggingface/datasets, datasets/glue/dataset_infos.json, "download_checksums"
#   the others: several projects on GitHub, together with the revision. MMLU's sum also belongs to
#     people.eecs.berkeley.edu/~hendrycks/data.tar.
# We could compare only MT-Bench's sum with its file.
SOURCES = {
    "CoLA": {"CoLA.zip": (
        GLUE, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")},
    "SST-2": {"SST-2.zip": (
        GLUE, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")},
    "MRPC": {"MRPC/msr_paraphrase_train.txt": (
        SENTEVAL, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        "MRPC/mrpc_dev_ids.tsv": (  # which rows of it are GLUE's dev set
        GLUE, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")},
    "STS-B": {"STS-B.zip": (
        GLUE, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")},
    "QQP": {"QQP-clean.zip": (
        GLUE, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")},
    "MNLI": {"MNLI.zip": (
        GLUE, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")},
    "QNLI": {"QNLIv2.zip": (
        GLUE, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")},
    "RTE": {"RTE.zip": (
        GLUE, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")},
    "MMLU": {"data.tar": (
        MMLU, "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b")},
    "Alpaca": {"alpaca_data.json": (
        ALPACA, "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419")},
    "Dolly": {"databricks-dolly-15k.jsonl": (
        DOLLY, "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec")},
    "OASST1": {"2023-04-12_oasst_ready.trees.jsonl.gz": (
        OASST1, "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7")},
    "MT-Bench": {"question.jsonl": (
        MT_BENCH, "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7")},
}


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
                fetch(name, args.download)
                print(f"{name} is in {args.download}")
        if args.data:
            show(args.data)

    run_main(fetch_and_show, "give a smaller file")


def fetch(name, folder):
    """Download all files of a name into a folder, and unpack them."""
    for path, (base, sha256) in SOURCES[name].items():
        unpack(download(f"{base}/{Path(path).name}", Path(folder) / path, sha256))


def unpack(path):
    """Unpack a .zip, .tar or .gz beside itself, and write to no other folder."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(path.parent)  # it drops ".." and a leading "/" from names
        elif path.suffix == ".tar":
            with tarfile.open(path) as archive:
                archive.extractall(path.parent, filter="data")
        elif path.suffix == ".gz":
            with gzip.open(path) as source:
                write_atomically(path.with_suffix(""), lambda out: shutil.copyfileobj(source, out))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be unpacked ({error}).") from None
