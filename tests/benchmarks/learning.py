"""How fast QST's variants and the other methods learn, as tables and as pictures."""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, print_row, print_table
from data import InputError
from data.run import report
from benchmarks.charts import bar_chart
from data.run.charts import COLOURS, line_chart
from data.settings.flags import Parser

RUNS = {  # name: flags of train.py
    "qst": "", "alpha x 1": "--alpha_lr_factor 1", "released": "--variant released",
    "residual": "--mix residual", "sum": "--gate sum", "standardize": "--standardize",
    "fast": "--variant fast",
    # On the embedded default, 1e-2 is the best of several rates for all but the last two.
    "lst": "--method lst", "qlora": "--method qlora", "lora": "--method lora",
    "adapter": "--method adapter", "peqa": "--method peqa --learning_rate 3e-3",
    "full": "--method full --learning_rate 3e-3",
}
SCORES = [f"{name}_{when}" for name in report.SCORES for when in ("before", "after")]
PARTS = ("weights", "optimizer", "activations")


def learn(*words):
    """Held-out loss at each evaluation, and score: mean (smallest to largest) over the seeds."""
    parser = Parser("bench.py learn", description=f"{learn.__doc__} Other flags are train.py's.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--learning_rates", nargs="+", default=[""],
        help="try each; the one of the lowest held-out loss is marked, and drawn")
    parser.add_argument("--out", help="a folder that keeps the runs, and has pictures of them; "
        "what an earlier call left there for other rates counts too")
    args, flags = parser.parse_known_args(words)
    print_table("Held-out loss and score", "", "learning rate", "trainable", "step, ms", "peak, MB",
                "held-out loss", "score")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(args.out or scratch, name) for name in args.only]
        for folder in folders:
            for rate in args.learning_rates:
                own = [*RUNS[folder.name].split(), *flags, *["--learning_rate", rate] * bool(rate)]
                for seed in args.seeds:
                    learn_once([*own, "--seed", seed], folder / f"{rate} {seed}".strip())
            print_runs(folder)
        if args.out:
            draw(folders, args.out)


def learn_once(flags, out):
    """A run of train.py. One that fails, as where it diverges, is reported and left out."""
    (out / "result.json").unlink(missing_ok=True)
    words = [sys.executable, str(ROOT / "train.py"), *flags, "--out_dir", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"{out}: {done.stderr.splitlines()[-1]}", file=sys.stderr)


def read_runs(folder):
    """What train.py left in a folder and those below, the best learning rate first:
    {rate: [(result.json, {iteration: held-out loss}), ...]}"""
    runs = {}
    for path in sorted(Path(folder).rglob("result.json")):
        result = json.loads(path.read_text())
        with open(path.with_name("log.csv"), newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
        losses = {int(row["iteration"]): float(row["held_out_loss"]) for row in rows}
        losses = {0: result["loss_before"]} | losses
        runs.setdefault(result["config"]["learning_rate"], []).append((result, losses))
    if not runs:
        message = f"{folder} holds no run: give the --out_dir of a run of train.py, or of several."
        raise InputError(message)
    return dict(sorted(runs.items(), key=lambda item: mean(item[1], "loss_after")))


def mean(runs, key):
    return statistics.mean(result[key] for result, _ in runs)


def spread(values):
    """The mean, and if there are several, the smallest and the largest."""
    ends = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{ends}"


def print_runs(folder):
    """Print a line a learning rate, the best one first, and marked if there are several."""
    tried = read_runs(folder)
    for i, (rate, runs) in enumerate(tried.items()):
        mark = " *" if i == 0 and len(tried) > 1 else ""
        losses = [spread(values) for values in zip(*(losses.values() for _, losses in runs))]
        scores = [key for key in SCORES if key in runs[0][0]]
        scores = [f"{key} {spread([result[key] for result, _ in runs])}" for key in scores]
        print_row(
            folder.name, f"{rate:g}{mark}", f"{runs[0][0]['trainable_parameters']:,}",
            f"{mean(runs, 'step_ms'):.0f}", f"{mean(runs, 'peak_memory_bytes') / 1e6:.0f}",
            "  ".join(losses), "  ".join(scores),
        )


def pictures(*words):
    """Draw runs of train.py."""
    parser = Parser("bench.py pictures", description=pictures.__doc__)
    parser.add_argument("folders", nargs="+", help="of a run each, or of a run for each seed")
    parser.add_argument("--out", required=True, help="the folder of the pictures")
    args = parser.parse_args(words)
    draw(args.folders, args.out)


def draw(folders, out):
    """Draw what memory is for, the held-out loss in time, and the score in the order of the peak
    memory; of each folder the runs of the best learning rate."""
    out = Path(out)
    runs = {Path(folder).name: next(iter(read_runs(folder).values())) for folder in folders}
    parts = lambda r: {part: mean(r, f"{part}_bytes") / 1e6 for part in PARTS}
    bars = {name: parts(r) for name, r in runs.items()}
    bar_chart(out / "memory.svg", "Memory of a run, MB", bars)

    curves = {name: curve(r) for name, r in runs.items()}
    names = list(curves)
    for start in range(0, len(names), len(COLOURS)):  # a picture has room for so many
        some = {name: curves[name] for name in names[start : start + len(COLOURS)]}
        file = f"loss-{start // len(COLOURS) + 1}.svg" if start else "loss.svg"
        line_chart(out / file, "Held-out loss", "seconds of training", some)

    drawn = lambda key: all(result.get(key, 0) > 0 for r in runs.values() for result, _ in r)
    score = next((key for key in SCORES[1::2] if drawn(key)), "loss_after")
    what = score.removesuffix("_after").replace("_", " ")
    points = sorted((mean(r, "peak_memory_bytes") / 1e6, name) for name, r in runs.items())
    bars = {f"{name}, {peak:,.0f} MB": {what: mean(runs[name], score)} for peak, name in points}
    bar_chart(out / "score.svg", f"{what}, by peak memory", bars)


def curve(runs):
    """(seconds, held-out loss) at each evaluation, the mean of some runs."""
    losses = np.mean([list(losses.values()) for _, losses in runs], axis=0)
    return [(i * mean(runs, "step_ms") / 1000, y) for i, y in zip(runs[0][1], losses.tolist())]
