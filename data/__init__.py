"""Input, output and everything around the method, in rooms: README.md explains each.

This file has what all rooms share. leaves.txt is the table of the leaves.
"""

from importlib import import_module
from pathlib import Path

IGNORE_INDEX = -100  # the target of a token that is not in the loss


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names it and says what to do."""


class Refused(ValueError):
    """What is wrong with a record or a conversation: words that follow "it", and what was found."""


TASKS = {  # --task
    "tiny": "tasks.tiny",
    "instruct": "tasks.instruct",
    "text": "tasks.text",
    "mmlu": "tasks.mmlu",
    **dict.fromkeys("rte mrpc stsb cola sst2 qnli qqp mnli mnli-mm".split(), "tasks.glue"),
}
rows = Path(__file__).with_name("leaves.txt").read_text().splitlines()
LEAVES = TASKS | dict(row.split()[:2] for row in rows if not row.startswith("#"))


def leaf(name):
    """Import a leaf and return the module."""
    return import_module(f"data.{LEAVES[name]}")


def find_folder(name, weights=True):
    """Return a model's folder, which may be named as ORG/MODEL[@REVISION] of huggingface.co."""
    return Path(name) if Path(name).exists() else leaf("hub_names").model_folder(name, weights)
