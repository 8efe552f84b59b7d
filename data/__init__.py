"""Input, output and everything around the method, in rooms: README.md explains each.

This file has what all rooms share, and the table of the leaves.
"""

from importlib import import_module
from pathlib import Path

IGNORE_INDEX = -100  # the target of a token that is not in the loss


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and says what to do."""


class Refused(ValueError):
    """What is wrong with a record or a conversation: words that follow "it", and what was found."""


# The leaves: modules that a plain run does not need. `leaf` imports one when it is asked for; no
# file of the core imports one. To remove a leaf, delete its file, its tests and its row.
TASKS = {  # --task
    "tiny": "tasks.tiny",
    "instruct": "tasks.instruct",
    "text": "tasks.text",
    "mmlu": "tasks.mmlu",
    **dict.fromkeys("rte mrpc stsb cola sst2 qnli qqp mnli mnli-mm".split(), "tasks.glue"),
}
LEAVES = TASKS | {
    "command": "settings.command",  # what a command prints, and how it ends
    "charts": "run.charts",  # curves as pictures
    "sweep": "run.sweep",  # --sweep
    "resume": "run.resume",  # --resume
    "muon": "run.muon",  # --optimizer muon
    "adamw8bit": "run.adamw8bit",  # --optimizer_bits 8
    "prefix_cache": "frozen.prefix_cache",  # a prefix that all examples share is computed once
    "hidden_cache": "frozen.hidden_cache",  # --cache_hidden
    "calibrate": "frozen.calibrate",  # model.py quantize --calibrate
    "integers": "frozen.integers",  # --quant int4, for PEQA
    "placement": "devices.placement",  # --devices
    "stream": "devices.stream",  # --stream
    "bpe": "tokens.bpe_files",  # tokenizer.json, or vocab.json and merges.txt
    "chat": "tokens.chat",  # chat templates, for conversations
    "hub_names": "formats.hub_names",  # --base ORG/MODEL, of the Hugging Face Hub
    "save": "formats.save",  # writes a model folder: merge, quantize
    "bnb": "formats.bnb",  # a folder in bitsandbytes' 4 bits
    "pickled": "formats.pickled",  # pytorch_model.bin
    "released": "formats.released",  # qst.py import-released
    "talk": "generate.talk",  # qst.py generate, chat
    "mt_bench": "tasks.mt_bench",  # qst.py answer
    "oasst": "tasks.oasst",  # trees of messages as instructions
}


def leaf(name):
    """Import a leaf and return the module."""
    return import_module(f"data.{LEAVES[name]}")


def find_folder(name, weights=True):
    """Return a model's folder, which may be named as ORG/MODEL[@REVISION] of huggingface.co."""
    return Path(name) if Path(name).exists() else leaf("hub_names").model_folder(name, weights)
