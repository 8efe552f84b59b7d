"""Many side networks on one forward pass of the frozen base: `--sweep "gate=scalar,sum seed=1,2"`.

What the base says of a batch is the same for every side network, so a sweep is as many ordinary
runs, each in a thread of its own, that share the base. One of them runs at a time. At each layer
of the base it lets all others come to the same layer; the first computes it, and the others take
the result. So no more than one hidden state is held, backward keeps it once for all, and what each
run computes is to the bit what it computes alone. Runs that ask for something else, as in
generating, compute it themselves.
"""

import itertools
import math
import threading
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from data import hidden
from data.charts import line_chart
from data.files import make_writable_folder, write_json
from data.methods import SIDE_METHODS
from data.report import SCORES
from data.settings import SETTINGS_FILE, true_or_false
from data.state import stop_signals
from quant import InputError

# What may vary beside the settings of the side network; what changes the base, the batches, or when
# to evaluate may not.
ALSO = (
    "rank learning_rate alpha_lr_factor lr_schedule warmup_iters weight_decay beta1 beta2"
    " grad_clip optimizer optimizer_bits checkpoint seed"
).split()
THREAD = threading.local()  # of a run's thread: its `number`, and the `turns` that it takes


def settings_of_runs(given, cfg, resolve):
    """--sweep -> the settings of each run, by what varies: {"gate=sum,seed=2": settings, ...}.

    given, cfg: settings before and after `resolve`
    """
    own = [f for f in fields(cfg) if f.metadata["of"] == SIDE_METHODS or f.name in ALSO]
    kinds = {f.name: true_or_false if f.type is bool else f.type for f in own}
    axes = []
    for word in cfg.sweep.split():
        name, _, values = word.partition("=")
        if name not in kinds or not values:
            raise InputError(
                f"--sweep {word}: it takes NAME=VALUE,VALUE ..., apart by spaces. What leaves the "
                f"base and the batches as they are can be a NAME: {', '.join(kinds)}."
            )
        try:
            axes.append([(name, kinds[name](value)) for value in values.split(",")])
        except ValueError:
            raise InputError(f"--sweep {word}: not all of these are values of {name}.") from None
    runs = {}
    for row in itertools.product(*axes) if cfg.sweep else ():
        name = ",".join(f"{name}={value}" for name, value in row)
        if name in runs:
            raise InputError(f"--sweep has {name} twice.")
        same = dict(sweep="", data_seed=cfg.data_seed, out_dir=str(Path(cfg.out_dir) / name))
        runs[name] = resolve(replace(given, **same | dict(row)))
    return runs


class Turns:
    """Threads of which one runs at a time: the first of `waiting`, until it lets the others run."""

    def __init__(self, n):
        self.waiting, self.changed = list(range(n)), threading.Condition()
        self.arrived, self.meetings = set(), 0
        # A function of the base, its arguments, the keys and values then, and what it returned.
        self.last = None, (), None, None

    def take(self):
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == THREAD.number)

    def leave(self):
        with self.changed:
            self.waiting.pop(0)
            self.changed.notify_all()

    def others(self):
        """Let every other run go on until it comes here, too."""
        with self.changed:
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()
        self.take()

    def meet(self):
        """Wait until all runs are at this place."""
        meeting = self.meetings
        self.arrived.add(THREAD.number)
        while self.meetings == meeting:
            if self.arrived >= set(self.waiting):
                self.arrived, self.meetings = set(), meeting + 1
            else:
                self.others()

    def once(self, function, *args):
        """What a function of the base returns; computed once for all runs that ask for the same."""
        if torch.is_grad_enabled() or not hasattr(THREAD, "turns"):
            return function(*args)
        self.others()
        cache = args[3] if len(args) > 3 else None
        asked, given, theirs, result = self.last
        alike = asked == function and all(map(same, args[:2], given))
        if alike and was_alike(cache, theirs, args[0]):
            if cache is not None:
                vars(cache).update(vars(theirs), shared=True)
            return result
        if hasattr(cache, "shared"):  # what they write from now on is not ours
            cache.k, cache.v = cache.k.clone(), cache.v.clone()
            del cache.shared
        result = function(*args)
        self.last = function, args[:2], cache, result
        return result


def same(one, other):
    """Whether two arguments are; what follows from the first two need not be compared."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return one is other or tensors and torch.equal(one, other)


def was_alike(cache, theirs, x):
    """Whether a layer's cache holds what another one held before it took those of x (B, T, C)."""
    if cache is None or theirs is None:
        return cache is theirs
    n = cache.length
    if (n, cache.max_len) != (theirs.length - x.shape[1], theirs.max_len):
        return False
    if n == 0 or cache.k is theirs.k:
        return True
    past = lambda tensor: tensor[:, :, :n]
    return same(past(cache.k), past(theirs.k)) and same(past(cache.v), past(theirs.v))


def pack_once(pack, h_f, bits):
    """What backward keeps of h_f, for all side networks that read it and keep as many bits."""
    packed = h_f.__dict__.setdefault("packed", {})
    if bits not in packed:
        packed[bits] = pack(h_f, bits)
    return packed[bits]


def meet():
    """Where all runs of a sweep begin the same; nothing in a run of its own."""
    if hasattr(THREAD, "turns"):
        THREAD.turns.meet()


def run(cfg, runs, base, run_one):
    """Train a side network for each of `runs`; write sweep.json and sweep.svg, and print a table.

    cfg: the settings as given, before what depends is filled in
    run_one: function of a run's settings that trains and returns its result
    """
    turns, results, crashes = Turns(len(runs)), {}, []

    def thread(number, name, settings):
        THREAD.number, THREAD.turns = number, turns
        turns.take()
        try:
            results[name] = run_one(settings)
        except InputError as error:
            results[name] = dict(error=str(error))
        except BaseException as error:
            crashes.append(error)
        turns.leave()

    write_json(Path(cfg.out_dir) / SETTINGS_FILE, asdict(cfg))
    threads = []
    for number, (name, settings) in enumerate(runs.items()):
        make_writable_folder(settings.out_dir, "--out_dir")
        args = number, name, settings
        called = f"sweep {number}"  # see data.run_of_sweep
        threads.append(threading.Thread(target=thread, args=args, name=called, daemon=True))
    shared = [(base, "embed"), (base, "final"), *((layer, "forward") for layer in base.layers)]
    own = [getattr(*place) for place in shared]
    for place, function in zip(shared, own):
        setattr(*place, partial(turns.once, function))
    pack, hidden.pack_hidden = hidden.pack_hidden, partial(pack_once, hidden.pack_hidden)
    try:
        with stop_signals():
            for one in threads:
                one.start()
            for one in threads:
                one.join()
    finally:
        for place, function in zip(shared, own):
            setattr(*place, function)
        hidden.pack_hidden = pack
    if crashes:
        raise crashes[0]
    return conclude(cfg, runs, results)


def conclude(cfg, runs, results):
    """The table of a sweep: a row for each run, the best first."""
    rows = []
    for name, settings in runs.items():
        result = results[name]
        row = dict(settings=name, out_dir=settings.out_dir, loss=result.get("loss_after"))
        kept = "best_iteration", "iterations", "interrupted", "trainable_parameters", "error"
        scores = [f"{score}_after" for score in SCORES]
        rows.append(row | {key: result[key] for key in (*kept, *scores) if key in result})
    rows.sort(key=lambda row: math.inf if row["loss"] is None else row["loss"])
    best = None if rows[0]["loss"] is None else rows[0]["out_dir"]
    table = dict(runs=rows, best=best, config=asdict(cfg))
    if all("error" in row for row in rows):
        raise InputError(f"No run of the sweep has ended well. The first: {rows[0]['error']}")
    write_json(Path(cfg.out_dir) / "sweep.json", table)
    curves = [results[row["settings"]].get("curves", {}).get("held out", []) for row in rows]
    curves = {str(place): curve for place, curve in enumerate(curves, 1)}
    line_chart(Path(cfg.out_dir) / "sweep.svg", "Held-out loss", "iteration", curves)
    width = max(len(row["settings"]) for row in rows)
    scores = [score for score in SCORES if f"{score}_after" in rows[0]]
    print(f"\n      {'':{width}}  held-out loss", *scores)
    for i, row in enumerate(rows, 1):
        loss = f"{'not evaluated':>13}" if row["loss"] is None else f"{row['loss']:>13.4f}"
        loss = row.get("error", loss)
        values = [f"{row.get(f'{score}_after', math.nan):>{len(score)}.1%}" for score in scores]
        print(f"{i:4}  {row['settings']:{width}}  {loss}", *values)
    if best:
        print(f"\nThe best is in {best!r}.")
    return table
