"""All methods on SST-2, RTE, CoLA and Dolly: losses, scores, memory and time, in one table.

Each run is a row of --runs, a file. A call makes the runs that are missing there, in an order in
which what matters most comes first, and stops after --minutes. So several calls, also on several
machines, fill the table. What is not run yet is an empty cell. A file has runs of one base: others
are refused. A run that diverges has an infinite loss; any other error ends the call.

    1. rates    several learning rates with seed 1: each method's best is used from here on
    2. seeds    three seeds
    3. seconds  as many iterations as fit into the training time of QLoRA's, for side networks

--time measures instead: a few iterations of each method, in turn. Nothing else may run beside it.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, print_row, print_table
from data import InputError, find_folder
from data.formats.files import locked, make_writable_folder, read_text
from data.frozen.hidden_cache import of_files
from data.run.report import SCORES
from data.settings.flags import Parser, refuse_if
from data.tasks.instruct import csv_rows

RUNS = sorted(Path(__file__).parent.glob("compare*.csv"))  # of HEALED (tests/NOTEBOOK.md)
NUMBERS = "learning_rate", "seed", "iterations", "loss", "score", "step_s", "peak_mb"
COLUMNS = "task", "method", "base", *NUMBERS, "commit"
SEEDS, TIMED = (1, 2, 3), 5
COMMON = "--data_seed 1 --lr_schedule linear --warmup_iters 10"
GLUE = "--head lm --batch_size 16 --eval_interval 50"
TASKS = {  # name: (iterations, the task's flags, few-shot examples of "fast, best")
    "dolly": (60, "--batch_size 4 --sequence_len 256 --eval_interval 20 --eval_examples 40", 0),
    "sst2": (100, f"{GLUE} --sequence_len 256 --eval_examples 96 --max_examples 4000 "
                  "--score_examples 400", 2),
    "rte": (100, f"{GLUE} --sequence_len 384 --eval_examples 96", 2),
    "cola": (300, f"{GLUE} --sequence_len 256 --eval_examples 400 --score_examples 600", 4),
}
SIDE_RATES, RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2), (5e-4, 1e-3, 2e-3)
METHODS = {  # name: (flags, learning rates, the tasks on which these are tried)
    "fast": ("--variant fast", SIDE_RATES, TASKS),
    "fast, best": ("--variant fast", SIDE_RATES, TASKS),  # calibrated base, few-shot examples
    "qlora": ("--method qlora", RATES, ("dolly", "sst2")),
    "qlora, calibrated": ("--method qlora", (2e-3,), ("dolly",)),  # with qlora's rate
    "qlora, checkpoint": ("--method qlora --checkpoint true", (), ()),  # qlora's losses
    "lora": ("--method lora", RATES, ("dolly", "sst2")),
    "paper": ("", SIDE_RATES, TASKS),
    "lst": ("--method lst", SIDE_RATES, TASKS),
    "full": ("--method full", (3e-5, 1e-4, 3e-4), ("dolly", "sst2")),
}
IS_SIDE = ("fast", "fast, best", "paper", "lst")
CALIBRATED = ("fast, best", "qlora, calibrated")


def compare(*words):
    """Print the table of all methods; with --base, first make runs that are missing in it."""
    parser = Parser("bench.py compare", description=compare.__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", default=RUNS,
                        help="CSV files of runs; new ones go into the last")
    parser.add_argument("--base", help="model folder; without it, the table is only printed")
    parser.add_argument("--calibrated", help="the same from `model.py quantize --calibrate`")
    parser.add_argument("--glue", help="folder with the folders of SST-2, RTE and CoLA")
    parser.add_argument("--dolly", help="file of Dolly's instructions")
    parser.add_argument("--minutes", type=float, default=60, help="no run starts after so many")
    names = [*TASKS, *METHODS]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--time", action="store_true", help="measure steps; run nothing beside it")
    args = parser.parse_args(words)
    args.only += [name for part in (TASKS, METHODS) for name in part if not {*part} & {*args.only}]
    own = args.runs[-1]
    refuse_if((not args.minutes >= 0, f"--minutes {args.minutes}: give 0 or more"),
              *((not path.exists() and (path != own or not args.base),
                 f"--runs {path} is missing") for path in args.runs))
    if args.base:
        make_writable_folder(own.resolve().parent, "--runs: the folder")
        with locked(own.resolve().parent, f"Another call writes to {own}: wait."):
            make_runs(args, own)
    for task in TASKS:
        print_task(task, read(*args.runs))


def make_runs(args, own):
    """Make what is missing in --runs until the time is over, in its last file, `own`."""
    refuse_if(
        ("dolly" in args.only and not args.dolly, "--dolly is missing: give the file, or --only"),
        ({*TASKS} & {*args.only} - {"dolly"} and not args.glue,
         "--glue is missing: give its folder, or --only dolly"),
        ({*CALIBRATED} & {*args.only} and not args.calibrated,
         f"--calibrated is missing: give the folder, or --only without {CALIBRATED}"),
    )
    for row in read(own):
        if row["method"] in args.only and row["base"] != base_of(args, row["method"]):
            raise InputError(f"{own} has runs of another base: give another file to --runs.")
    stop = time.monotonic() + 60 * args.minutes
    while time.monotonic() < stop and (job := next_job(read(*args.runs), args)):
        task, method, iterations, cells = job
        print(f"{task}, {method}, {iterations} iterations: {cells}", file=sys.stderr, flush=True)
        append(own, run(args, *job))


def base_of(args, method):
    """A short hash of the files of a method's base."""
    return of_files(find_folder(args.calibrated if method in CALIBRATED else args.base))[:12]


def read(*paths):
    """The rows of --runs: dicts of numbers and words, each with the mark of its file."""
    rows, seen = [], {}
    for number, path in enumerate(filter(Path.exists, paths)):
        if not read_text(path).endswith("\n"):
            raise InputError(f"{path}: its last line is cut off: remove it.")
        for line, fields in csv_rows(path):
            where = f"{path}, line {line}"
            if line > 1:
                rows.append(numbers(fields, where) | dict(mark="'" * number))
                run = tuple(rows[-1][name] for name in COLUMNS[:2] + NUMBERS[:3])
                if run[-1] != TIMED and run in seen:
                    raise InputError(f"{where} and {seen[run]} are the same run: remove one.")
                seen[run] = where
            elif fields != [*COLUMNS]:
                raise InputError(f"{where} must be {','.join(COLUMNS)}.")
    return rows


def numbers(fields, where):
    """A row, checked."""
    try:
        row = dict(zip(COLUMNS, fields, strict=True))
        row |= {name: float(row[name]) for name in NUMBERS[:4]}
        row |= {name: float(row[name]) if row[name] else None for name in NUMBERS[4:]}
        TASKS[row["task"]], METHODS[row["method"]]
    except (ValueError, KeyError):
        raise InputError(f"{where} is not a run: correct or remove it.") from None
    return row


def append(path, rows):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def find(rows, task, method, iterations, seeds=(0, *SEEDS)):
    """The rows of a method on a task; seed 0 is of --time."""
    wanted = task, method, iterations
    rows = [row for row in rows if (row["task"], row["method"], row["iterations"]) == wanted]
    return [row for row in rows if row["seed"] in seeds]


def best_rate(rows, task, method, so_far=False):
    """The learning rate of the lowest loss with seed 1, or None: before all are tried, if not
    `so_far`, and where all diverge."""
    _, rates, tried_on = METHODS[method]
    if task not in tried_on and "sst2" in tried_on:
        task = "sst2"  # of the same kind
    done = find(rows, task, method, TASKS[task][0])
    losses = {row["learning_rate"]: row["loss"] for row in done if row["seed"] == SEEDS[0]}
    best = min(losses, key=losses.get, default=None)
    ready = so_far or set(rates) <= set(losses)
    return best if ready and losses.get(best, math.inf) < math.inf else None


def step_seconds(rows, task, method):
    """The median of the measured steps, or None."""
    times = [row["step_s"] for row in find(rows, task, method, TIMED)]
    return statistics.median(times) if times else None


def iterations_in_time(rows, task, method):
    """How many iterations take as long as QLoRA's, or None where that is not measured."""
    own, qlora = (step_seconds(rows, task, name) for name in (method, "qlora"))
    return round(TASKS[task][0] * qlora / own) if own and qlora else None


def next_job(rows, args):
    """(task, method, iterations, [(learning rate, seed), ...]) of the next run, or None."""
    chosen = [(t, m) for t in TASKS for m in METHODS if t in args.only and m in args.only]
    if args.time:
        counts = {pair: len(find(rows, *pair, TIMED)) for pair in chosen}
        pair = min(counts, key=counts.get)
        return (*pair, TIMED, [(1e-3, 0)]) if counts[pair] < 3 else None
    rates, seeds, seconds = [], [], []
    for task, method in chosen:
        iterations, tried = TASKS[task][0], METHODS[method][1]
        best = best_rate(rows, task, method)
        longer = iterations_in_time(rows, task, method) if method in IS_SIDE else None
        if task in METHODS[method][2]:
            rates.append((task, method, iterations, [(rate, SEEDS[0]) for rate in tried]))
        if best:
            seeds.append((task, method, iterations, [(best, seed) for seed in SEEDS]))
        if best and longer:
            seconds.append((task, method, longer, [(best, seed) for seed in SEEDS]))
    for task, method, iterations, cells in rates + seeds + seconds:
        done = find(rows, task, method, iterations)
        done = {(row["learning_rate"], row["seed"]) for row in done}
        left = [cell for cell in cells if cell not in done]
        if left:  # several side networks share one pass of the base
            return task, method, iterations, left if method in IS_SIDE else left[:1]
    return None


def flags_of(args, task, method):
    """The flags of train.py for a method on a task."""
    names = dict(sst2="SST-2", rte="RTE", cola="CoLA")
    best, shots = method == "fast, best", TASKS[task][2]
    data = [args.dolly] if task == "dolly" else [str(Path(args.glue, names[task])), "--task", task]
    own = [*COMMON.split(), *TASKS[task][1].split(), *METHODS[method][0].split()]
    own += ["--shots", str(shots)] if best and shots else []
    base = args.calibrated if method in CALIBRATED else args.base
    return ["--base", base, "--data", *data, *own]


def run(args, task, method, iterations, cells):
    """Train, and return the rows of --runs."""
    flags = [*flags_of(args, task, method), "--max_iters", str(iterations)]
    one = len(cells) == 1
    if one:
        flags += ["--learning_rate", str(cells[0][0]), "--seed", str(cells[0][1])]
    else:
        rates, seeds = ([*dict.fromkeys(values)] for values in zip(*cells))
        join = lambda values: ",".join(map(str, values))
        flags += ["--sweep", f"learning_rate={join(rates)} seed={join(seeds)}"]
    if args.time:
        flags += ["--eval_examples", "4", "--score_examples", "4"]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, str(ROOT / "train.py"), *flags, "--out_dir", out]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=one_thread)
        for rate, seed in cells:
            path = Path(out, "" if one else f"learning_rate={rate},seed={seed}", "result.json")
            result = json.loads(path.read_text()) if path.exists() else {}
            sweep = Path(out, "sweep.json")  # has the errors of those that end early
            said = done.stderr + (sweep.read_text() if sweep.exists() else "")
            if result.get("interrupted") or not result and "is not a number" not in said:
                raise InputError(f"train.py: {(done.stderr.splitlines() or ['no result'])[-1]}")
            score = [result[f"{name}_after"] for name in SCORES if f"{name}_after" in result]
            row = dict(task=task, method=method, learning_rate=rate, seed=seed, commit=commit)
            row |= dict(base=base_of(args, method))
            row |= dict(iterations=iterations, loss=result.get("loss_after", math.inf))
            row |= dict(score=score[0]) if score else {}
            if args.time:
                row |= dict(step_s=result["step_ms"] / 1e3)
                row |= dict(peak_mb=result["peak_memory_bytes"] / 1e6)
            rows.append(row)
    return rows


def print_task(task, rows):
    """A row a method: losses of the learning rates; then those of the best, and memory and time."""
    iterations = TASKS[task][0]
    first = {m: find(rows, task, m, iterations, SEEDS[:1]) for m in METHODS}
    tried = sorted({row["learning_rate"] for method in METHODS for row in first[method]})
    print_table(f"{task}, {iterations} iterations, seed 1: learning rate, held-out loss",
                "method", *(f"{rate:g}" for rate in tried))
    for method in filter(first.get, METHODS):
        losses = {row["learning_rate"]: results([row])[0] for row in first[method]}
        best = best_rate(first[method], task, method, so_far=True)
        print_row(method, *(f"**{losses[r]}**" if r == best else losses.get(r, "") for r in tried))
    print_table(f"{task}, at the best rate", "method", "held-out loss", "score, %",
                "in QLoRA's time: iterations", "loss", "score, %", "step, s", "peak, MB")
    for method in METHODS:
        rate = best_rate(rows, task, method, so_far=True)
        longer = iterations_in_time(rows, task, method)
        at_rate = lambda n: [r for r in find(rows, task, method, n) if r["learning_rate"] == rate]
        equal, more = at_rate(iterations), at_rate(longer) if method in IS_SIDE else []
        cells = [*results(equal), longer if more else "", *results(more)]
        cells[0] = "as qlora" if method == "qlora, checkpoint" else cells[0]
        timed, qlora = (find(rows, task, name, TIMED) for name in (method, "qlora"))
        print_row(method, *cells, *(beside(timed, qlora, name) for name in NUMBERS[-2:]))


def results(rows):
    """The losses, marked by their file, and the scores, one a seed."""
    rows = sorted(rows, key=lambda row: row["seed"])
    scores = [f"{row['score']:.1%}".rstrip("%") for row in rows if row["score"] is not None]
    return ", ".join(f"{row['loss']:.3f}{row['mark']}" for row in rows), ", ".join(scores)


def beside(rows, others, name):
    """The median of some measurements, and the ratio to the median of others."""
    if not rows:
        return ""
    median = lambda rows: statistics.median(row[name] for row in rows)
    form = ",.0f" if median(rows) > 100 else ".3g"
    ratio = f" ({median(rows) / median(others):.2f})" if others else ""
    return f"{median(rows):{form}}{ratio}"
