"""Measurements. `python tests/bench.py` lists them; each is a function in tests/benchmarks.

To add one, write a function, and give it a line in COMMANDS. What the user writes after its name
are its arguments.
"""

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import InputError  # noqa: E402
from data.settings.flags import run_main  # noqa: E402

COMMANDS = {  # the function's name: (its file in tests/benchmarks, its arguments, what it does)
    "load": ("speed", "", "peak memory of `from_pretrained`"),
    "quant": ("speed", "", "speed of quantizing and dequantizing, beside bitsandbytes"),
    "tokens": ("speed", "", "speed of generating from a 4-bit and from an fp32 base"),
    "kernels": ("kernels", "[all]", "how many kernels a GPU is given for a step, without a GPU"),
    "gpu": ("gpu", "[--help] ...", "all of it on one GPU: kernels, tokens, steps, memory"),
    "account": ("memory", "", "the memory account beside the peak memory of real steps"),
    "fits": ("memory", "", "the largest batches that fit into GPUs, by the account"),
    "stream": ("streaming", "[LAYERS [STEPS]]", "a model four times a hard limit on memory"),
    "lean": ("memory", "FOLDER", "what each saving of account.py --savings saves in real steps"),
    "soak": ("soak", "[MINUTES [BASE]]", "`qst.py serve` for an hour, with clients that do wrong"),
    "paper": ("paper", "", "the paper's tables of memory, and ours, as Markdown"),
    "methods": ("methods", "", "a step of each method, beside transformers, peft, bitsandbytes"),
    "loop": ("loop", "[ITERATIONS]", "what the training loop costs beside its steps"),
    "sweep": ("sweep", "FLAGS", "several side networks on one forward pass, beside one"),
    "cached": ("cached", "FLAGS", "an epoch from the cache of hidden states, beside one without"),
    "prefix": ("cached", "FLAGS", "a prefix that all examples share, read once and every time"),
    "learn": ("learning", "[--help] ...", "how fast QST's variants and the other methods learn"),
    "pictures": ("learning", "FOLDERS --out FOLDER", "draw runs of train.py"),
    "compare": ("compare", "[--help] ...", "all methods on GLUE and Dolly; makes missing runs"),
    "forgetting": ("forgetting", "FOLDER FILE TEXT --out FOLDER [FLAGS]",
                   "a text's perplexity after finetuning, at an equal gain"),
    "calibrate": ("calibrate", "FOLDER FILE TEXT [NUMBERS [DRAWS]]", "what --calibrate gives back"),
    "channels": ("probe", "FLAGS", "how many texts --standardize needs"),
    "probe": ("probe", "FLAGS", "what a reader of the base's hidden states has before it"),
    "reader": ("probe", "FLAGS", "what a linear reader of them learns, trained to the end"),
}


def usage():
    rows = (f"    {f'{name} {words}':30} {what}" for name, (_, words, what) in COMMANDS.items())
    return "\n".join(["python tests/bench.py NAME ..., where NAME is one of", *rows])


def main(words):
    if not words or words[0] in ("-h", "--help"):
        return print(usage())
    name, *arguments = words
    if name not in COMMANDS:
        raise InputError(f"{name} is no benchmark: choose {', '.join(COMMANDS)}.")
    file, wanted, _ = COMMANDS[name]
    function = getattr(import_module(f"benchmarks.{file}"), name)
    try:
        signature(function).bind(*arguments)
    except TypeError:
        raise InputError(f"It is `{f'python tests/bench.py {name} {wanted}'.strip()}`.") from None
    function(*arguments)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
