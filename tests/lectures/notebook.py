# The source of qst.ipynb: `python tests/lectures/make_notebook.py` writes it. This file also runs.

# %% [markdown]
# # QST and QLoRA side by side
#
# Quantized Side Tuning ([arXiv 2401.07159](https://arxiv.org/abs/2401.07159)) freezes a language
# model in 4 bits, and trains a narrow network beside it. QLoRA trains low-rank pairs inside it.
#
# - With a GPU this should take minutes. On Colab choose Runtime, Change runtime type.
# - Without a GPU it also runs, but slowly. It needs about 3 GB of memory.
# - Inside a copy of the repository, `REPOSITORY` is not used.
#
# Set these first:

# %%
REPOSITORY = ""  # the address of your copy, such as https://github.com/YOU/YOUR-COPY
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # or "Qwen/Qwen3-0.6B", or a folder; "": built-in
FILE = ""  # your instructions; "": Dolly is downloaded
EXAMPLES, ITERATIONS = 200, 40  # of the real model
BATCH_SIZE, SEQUENCE_LEN = 4, 256
BUILT_IN = dict(max_iters=150)  # settings of train.py for the built-in example
QUESTION = "Give three tips for a good night's sleep."
OUT = "out-notebook"  # the folder of what the runs leave

# %% [markdown]
# ## Install
#
# Colab keeps its own torch, which must be 2.9.1 or newer. Only `sentencepiece` is added.

# %%
import json
import os
import subprocess
import sys
from pathlib import Path

globals().update(json.loads(os.environ.get("QST_NOTEBOOK", "{}")))  # for tests: other settings
here = Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "qst.py").exists()), None)
if root is None:
    root = here / "qst"
    if not root.exists():
        assert REPOSITORY, "Set REPOSITORY in the first cell, or open this inside the repository."
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(root)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "sentencepiece"], check=True)
os.chdir(root)
sys.path[:0] = [str(root), str(root / "tests")]

import torch

print("torch", torch.__version__, "on", "a GPU" if torch.cuda.is_available() else "the CPU")

# %% [markdown]
# ## The built-in example
#
# The first run trains a LLaMA with a million weights. It answers questions about English stories in
# English. Then a side network learns to make it answer in French.

# %%
import train
from train import TrainConfig

OUT = Path(OUT)
built_in = train.main(TrainConfig(**BUILT_IN, out_dir=str(OUT / "built-in")))

# %% [markdown]
# ## A real model
#
# QST and QLoRA train on the same instructions, for as many iterations. Each has a learning rate
# that suited it on SmolLM2. QLoRA stores its activations here, as in the paper's comparison.

# %%
from data.tasks import tiny

BASE = BASE or str(tiny.base_folder(train.make_tiny_base))
if not FILE:
    FILE = "dolly/databricks-dolly-15k.jsonl"
    if not Path(FILE).exists():
        script = [sys.executable, "data/tasks/instruct.py", "--download", "dolly"]
        subprocess.run([*script, "--only", "Dolly"], check=True)
shared = dict(
    base=BASE, data=FILE, max_examples=EXAMPLES, max_iters=ITERATIONS, batch_size=BATCH_SIZE,
    sequence_len=SEQUENCE_LEN, warmup_iters=ITERATIONS // 5, eval_interval=max(1, ITERATIONS // 4),
    log_interval=1,
)
settings = {
    "QST": dict(variant="fast"),
    "QLoRA": dict(method="qlora", checkpoint=False, learning_rate=1e-3),
}
results = {
    name: train.main(TrainConfig(**shared | own, out_dir=str(OUT / name)))
    for name, own in settings.items()
}

# %% [markdown]
# ## What both have learned, and what they need
#
# At equal iterations QLoRA learns more. QST stores fewer activations.

# %%
import csv

from data.run.charts import line_chart


def show(path):
    """Show a picture in a notebook; elsewhere, say where it is."""
    try:
        from IPython.display import SVG, display
    except ImportError:
        print(f"The picture is in {path}.")
    else:
        display(SVG(str(path)))


def held_out(name):
    """The held-out losses of a run: [(iteration, loss), ...]."""
    with open(OUT / name / "log.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
    later = [(int(row["iteration"]), float(row["held_out_loss"])) for row in rows]
    return [(0, results[name]["loss_before"]), *later]


print(f"{'':8}{'loss before':>12}{'after':>8}{'trainable':>13}{'activations':>14}{'step':>10}")
for name, result in results.items():
    losses = f"{result['loss_before']:12.3f}{result['loss_after']:8.3f}"
    memory = f"{result['activations_bytes'] / 1e6:11.1f} MB{result['step_ms']:7.0f} ms"
    print(f"{name:8}{losses}{result['trainable_parameters']:13,}{memory}")
line_chart(
    OUT / "losses.svg", "Held-out loss", "iteration", {name: held_out(name) for name in results}
)
show(OUT / "losses.svg")

# %% [markdown]
# ## Live bytes through a step
#
# This is counted: the real modules run one step on tensors without memory. The curve rises in
# forward and falls in backward.

# %%
from lectures import timeline

shape = ["--base", BASE, "--batch_size", str(BATCH_SIZE), "--sequence_len", str(SEQUENCE_LEN)]
timeline.main(timeline.parse_args([*shape, "--out_dir", str(OUT)]))
show(OUT / "timeline.svg")

# %% [markdown]
# ## The same question to both

# %%
import qst

for name in results:
    print(f"\n{name}:")
    ask = ["--base", BASE, "--side", str(OUT / name), "--prompt", QUESTION]
    qst.main([*ask, "--max_new_tokens", "60", "--temperature", "0"])

# %% [markdown]
# ## The proof: a cap on memory
#
# The account counts both steps as on a GPU. Then the GPU's memory is capped between what the two
# runs above have reserved. QLoRA's plain step should not fit, and QST's should.
#
# This cell has not run on a GPU yet.

# %%
import gc

from account import memory_report, parse_args

flags = {"QST": ["--variant", "fast"], "QLoRA": ["--method", "qlora", "--checkpoint", "false"]}
for name, words in flags.items():
    total = memory_report(parse_args([*shape, "--method", "qst", *words]))["total_bytes"]
    print(f"{name:8}{total / 1e6:10,.1f} MB by the account")
if torch.cuda.is_available():
    reserved = {name: result["peak_reserved_bytes"] for name, result in results.items()}
    cap = sum(reserved.values()) / 2
    print(*(f"{name:8}{n / 1e6:10,.1f} MB reserved" for name, n in reserved.items()), sep="\n")
    print(f"cap     {cap / 1e6:10,.1f} MB")
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
    for name in ("QLoRA", "QST"):
        gc.collect()
        torch.cuda.empty_cache()
        short = dict(max_iters=2, warmup_iters=0, out_dir=str(OUT / f"capped-{name}"))
        try:
            train.main(TrainConfig(**shared | settings[name] | short))
            print(f"{name} fits under the cap.")
        except torch.OutOfMemoryError as error:
            print(f"{name} does not fit under the cap: {error}")
    torch.cuda.set_per_process_memory_fraction(1.0)
else:
    print("The cap needs a GPU: on a CPU there is only the account.")
