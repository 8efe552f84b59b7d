"""Forgetting: the perplexity of a text after finetuning on instructions, at an equal gain.

The gain is how far the loss of held-out instructions falls, below that of the method's own base:
the base in NF4 for QST and QLoRA, the unquantized one for full finetuning. QST is trained first.
Each other method stops at its first evaluation with at least QST's best gain.
"""

import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

import train
from benchmarks.cached import without_score
from benchmarks.common import alone, perplexity, print_row, print_table
from data import InputError, find_folder
from data.settings.flags import Parser, refuse_if
from data.tasks import text
from data.tasks.scoring import mean_loss
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained, read_config
from qst import QST, SharedBase

WINDOW = 512  # tokens of the text that are read at once
SHARED = "--max_iters 100 --batch_size 4 --sequence_len 256 --eval_interval 10 " \
    "--eval_examples 40 --warmup_iters 10 --data_seed 1"
METHODS = {
    "qst": "--variant fast --learning_rate 3e-3", "qlora": "--method qlora --learning_rate 1e-3",
    "full": "--method full --learning_rate {full_rate}",
}


def forgetting(folder, data, test, *words):
    """Held-out loss of instructions, and perplexity of another text, of the base and of finetuned
    models with an equal gain."""
    parser = Parser("bench.py forgetting", description=f"{forgetting.__doc__} Other flags are "
                    "train.py's; --max_iters is the most iterations of a method.")
    parser.add_argument("--out", required=True, help="folder that keeps the runs; a second call "
        "continues a stopped run, and repeats none")
    parser.add_argument("--full_rate", default="3e-5", help="learning rate of full finetuning")
    parser.add_argument("--every", type=int, default=2, help="iterations between two evaluations "
        "of QLoRA and full finetuning; QST has --eval_interval")
    parser.add_argument("--windows", type=int, default=12, help=f"windows of {WINDOW} tokens")
    args, flags = parser.parse_known_args(words)
    folder, out = str(find_folder(folder)), Path(args.out)
    flags = [*SHARED.split(), *flags, "--base", folder, "--data", data]
    cfg = train.resolve(train.parse_args(flags))
    refuse_if(
        (cfg.lr_schedule != "constant", "--lr_schedule must be constant: a method may stop early"),
        (min(args.every, args.windows) < 1, "--every and --windows must be at least 1"),
    )
    tokenizer = load_tokenizer(folder)
    windows = text.read(test, tokenizer, WINDOW, args.windows)
    with redirect_stdout(sys.stderr):
        task = train.load_task(cfg, tokenizer, read_config(folder))
    held_out = task.held_out[: cfg.eval_examples]

    def run(name, step, ends, least=math.inf):
        own = METHODS[name].format(full_rate=args.full_rate).split()
        own += ["--eval_interval", str(step), "--out_dir", str(out / name)]
        return train_until(least, [*flags, *own], ends)

    def measure(model):
        loss = mean_loss(SharedBase([model]), held_out, cfg.batch_size)[0]
        return loss, perplexity(model, windows)

    n, step = cfg.max_iters, args.every
    runs = {"qst": run("qst", cfg.eval_interval, [n])}
    target = gain(runs["qst"])
    for name in ("qlora", "full"):
        runs[name] = run(name, step, [*range(step, n, step), n], target)
    print_models(folder, out, runs, measure)
    print(f"\n{len(windows)} windows of at most {WINDOW} tokens, {len(held_out)} held-out "
          f"examples. QST's best gain in training is {target:.3f}.")
    for name in [name for name, result in runs.items() if gain(result) < target]:
        print(f"--method {name} did not reach it in {runs[name]['iterations']} iterations.")


def train_until(least, words, ends):
    """Train to one number of iterations after the other, until the gain is the least wanted.
    Returns the content of result.json. A run that has come so far already is not repeated."""
    for end in ends:
        flags = [*words, "--max_iters", str(end)]
        cfg = train.resolve(train.parse_args(flags))
        path = Path(cfg.out_dir) / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {"iterations": 0}
        may_differ = "max_iters", "resume", "preamble", "out_dir"
        for name, value in result.get("config", {}).items():
            if name not in may_differ and vars(cfg).get(name) != value:
                raise InputError(f"{path} is of a run with another --{name}: give another --out.")
        if result["iterations"] < end:
            result = alone(train_once, [*flags, "--resume"])
            if result["interrupted"]:
                raise InputError(f"{cfg.out_dir} was stopped: the same command continues.")
        if gain(result) >= least:
            break
    return result


def train_once(words):
    """Run train.py, without the answers before and after it."""
    train.load_task = without_score(train.load_task)
    with redirect_stdout(sys.stderr):
        return train.main(train.parse_args(words))


def gain(result):
    """How far the held-out loss of a run fell, at its best evaluation."""
    return result["loss_before"] - result["loss_after"]


def print_models(folder, out, runs, measure):
    """Print a row for each model. measure: function of a model, its loss and its perplexity"""
    start = {}  # {--quant: the measures of the base}

    def load(quant, name=None):
        base = from_pretrained(folder, quant, torch.float32)
        return QST.from_side(base, out / name) if name else base

    def row(title, model, quant, name=None):
        loss, after = measure(model)
        first, before = start.setdefault(quant, (loss, after))
        print_row(
            title, runs[name]["best_iteration"] if name else 0, f"{first:.3f}", f"{loss:.3f}",
            f"{first - loss:.3f}", f"{before:.2f}", f"{after:.2f}", f"{after / before:.3f}",
        )

    print_table("Forgetting", "model", "iterations", "held-out loss before", "after", "gain",
                "perplexity before", "after", "after / before")
    row("base, NF4", load("nf4"), "nf4")
    row("base, unquantized", load("none"), "none")
    model = load("nf4", "qst")
    row("QST", model, "nf4", "qst")
    same = "bit for bit the base" if same_logits(model.base, load("nf4")) else "not the base"
    row(f"QST, side network off: {same}", model.base, "nf4", "qst")
    model = load("nf4", "qlora")
    row("QLoRA, pairs beside NF4", model, "nf4", "qlora")
    row("QLoRA, merged in fp32", model.merge(torch.float32), "nf4", "qlora")
    row("full, merged in fp32", load("none", "full").merge(torch.float32), "none", "full")


@torch.no_grad()
def same_logits(model, other):
    """Whether two models have the same logits of a random batch, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    return torch.equal(model(idx), other(idx))
