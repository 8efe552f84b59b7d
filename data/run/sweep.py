"""--sweep: train several side networks with one pass of the frozen base."""

import copy
import itertools
import math
from dataclasses import asdict, fields, replace
from itertools import accumulate
from pathlib import Path

from data import InputError, leaf
from data.formats.files import write_json
from data.run.report import SCORES
from data.settings.flags import SETTINGS_FILE, true_or_false
from data.settings.methods import SIDE_METHODS

# What --sweep may vary beside the settings of the side network. What changes the base, the batches
# or when to evaluate may not vary.
ALSO = "rank learning_rate alpha_lr_factor lr_schedule warmup_iters weight_decay grad_clip".split()
ALSO += "beta1 beta2 optimizer optimizer_bits checkpoint seed".split()


def settings_of_runs(given, cfg, resolve):
    """--sweep -> the settings of each run, by what varies: {"gate=sum,seed=2": settings, ...}.
    given, cfg: settings before and after `resolve`"""
    kinds = {f.name: true_or_false if f.type is bool else f.type for f in fields(cfg)
             if f.metadata["of"] == SIDE_METHODS or f.name in ALSO}
    axes = []
    for word in cfg.sweep.split():
        name, _, values = word.partition("=")
        if name not in kinds or not values:
            names = f"a NAME is one of {', '.join(kinds)}"
            raise InputError(f"--sweep {word}: it takes NAME=VALUE,VALUE ...; {names}.")
        try:
            axes.append([(name, kinds[name](value)) for value in values.split(",")])
        except ValueError:
            message = f"not all of these are values of {name}; after a comma comes no space"
            raise InputError(f"--sweep {word}: {message}.") from None
    runs = {}
    for row in itertools.product(*axes):
        name = ",".join(f"{name}={value}" for name, value in row)
        if name in runs:
            raise InputError(f"--sweep has two runs for the folder {name}.")
        same = dict(sweep="", data_seed=cfg.data_seed, out_dir=str(Path(cfg.out_dir) / name))
        runs[name] = resolve(replace(given, **same | dict(row)))
    return runs


class SideNetworks:
    """Side networks that read one stream of hidden states, with the methods of one `SideNetwork`.
    What is a tensor of one side network is a list here."""

    def __init__(self, sides):
        self.sides = sides
        self.every = math.gcd(*(side.every for side in sides))
        self.n_layer = sides[0].n_layer * sides[0].every // self.every
        self.starts = [0, *accumulate(side.n_layer for side in sides)]  # of each one's caches

    def new_cache(self, max_len):
        return [cache for side in self.sides for cache in side.new_cache(max_len)]

    def rotary_table(self, positions, dtype):
        return [side.rotary_table(positions, dtype) for side in self.sides]

    def cast(self, dtype):
        return SideNetworks([side.cast(dtype) for side in self.sides])

    def start(self, h_f):
        return [side.start(h_f) for side in self.sides]

    def step(self, i, h_f, h_g, mask, rope, caches=None):
        """Side networks with a larger `every` leave out some of the steps."""
        for k, side in enumerate(self.sides):
            if i * self.every % side.every == 0:
                own = caches and caches[self.starts[k] : self.starts[k + 1]]
                h_g[k] = side.step(i * self.every // side.every, h_f, h_g[k], mask, rope[k], own)
        return h_g

    def mix(self, h_f, h_g):
        return [side.mix(h_f, h) for side, h in zip(self.sides, h_g)]


def as_one(models):
    """Models with one base as one model, whose side network is the `SideNetworks` of all."""
    new = copy.copy(models[0])
    new._modules = {"base": new.base}
    new.side = SideNetworks([model.side for model in models])
    return new


def conclude(cfg, runs, results):
    """Print and return the table of a sweep: a row for each run, the best first. runs, results:
    {name: settings}, {name: result}"""
    rows = []
    kept = ["best_iteration", "iterations", "interrupted", "trainable_parameters", "error"]
    kept += [f"{score}_after" for score in SCORES]
    for name, settings in runs.items():
        result = results[name]
        row = dict(settings=name, out_dir=settings.out_dir, loss=result.get("loss_after"))
        rows.append(row | {key: result[key] for key in kept if key in result})
    rows.sort(key=lambda row: math.inf if row["loss"] is None else row["loss"])
    best = None if rows[0]["loss"] is None else rows[0]["out_dir"]
    table = dict(runs=rows, best=best, config=asdict(cfg))
    if all("error" in row for row in rows):
        raise InputError(f"No run of the sweep has ended well. The first: {rows[0]['error']}")
    write_json(Path(cfg.out_dir) / "sweep.json", table)
    curves = [results[row["settings"]].get("curves", {}).get("held out", []) for row in rows]
    curves = {str(place): curve for place, curve in enumerate(curves, 1)}
    write_json(Path(cfg.out_dir) / SETTINGS_FILE, asdict(cfg))
    leaf("charts").line_chart(Path(cfg.out_dir) / "sweep.svg", "Held-out loss", "iteration", curves)
    width = max(len(row["settings"]) for row in rows)
    scores = [score for score in SCORES if f"{score}_after" in rows[0]]
    print(f"\n      {'':{width}}  held-out loss", *scores)
    for i, row in enumerate(rows, 1):
        loss = row.get("error", "not evaluated" if row["loss"] is None else f"{row['loss']:>13.4f}")
        values = [f"{row.get(f'{score}_after', math.nan):>{len(score)}.1%}" for score in scores]
        print(f"{i:4}  {row['settings']:{width}}  {loss}", *values)
    if best:
        print(f"\nThe best is in {best!r}.")
    return table
