"""Logging during training: log.csv, loss.svg, mix.svg, progress bar, best held-out loss."""

import csv
import math
import time
from copy import deepcopy
from statistics import median

import torch

from data import leaf
from data.devices.device import peak_memory, show_bytes
from data.run.report import progress, start_name

NAMES = "training", "held out", "alpha", "gate"  # of the curves
COLUMNS = "iteration loss held_out_loss learning_rate tokens_per_second step_ms alpha gate".split()


def mixing(side):
    """alpha and the mean gate beta of a side network; None where it has none."""
    alpha, gamma = getattr(side, "alpha", None), getattr(side, "gamma", None)
    if alpha is not None and side.config.mix == "released":
        alpha = torch.sigmoid(alpha)
    gate = None if gamma is None else torch.sigmoid(gamma)
    return [None if x is None else x.detach().float().mean().item() for x in (alpha, gate)]


class TrainingLog:
    """The files above, the progress bar, the best held-out loss, and the speed of a run.

    out_dir: folder for the files; False in all processes but the first; shown: the progress bar is
    """

    START = dict(  # what a run that continues needs of the one before it, as it starts
        iteration=0, loss=math.nan, held_out_loss=math.inf, loss_before=math.inf,
        best_loss=math.inf, best_iteration=0,
        skipped=0, failures=0,  # steps left out, and the last of them in a row
        before={},  # the scores of the base
        tokens=0, seconds=0.0, step_ms=[], rows=[], curves={name: [] for name in NAMES},
        cached_iterations=0,  # with hidden states from --cache_hidden
    )

    def __init__(self, out_dir, cfg, device, shown=True):
        self.out_dir, self.cfg, self.device, self.shown = out_dir, cfg, device, shown
        vars(self).update(deepcopy(self.START))
        self.unread = []  # (loss, whether its step was taken), still on the device

    def state(self):
        return {name: getattr(self, name) for name in self.START}

    def __enter__(self):
        counts = dict(initial=self.iteration, total=self.cfg.max_iters)
        self.bar = progress(None, self.cfg.method, disable=not self.shown, **counts)
        if self.out_dir:
            file = open(self.out_dir / "log.csv", "w", newline="")
            self.file = leaf("command").Output(file)  # a full disk costs lines
            csv.writer(self.file).writerows([COLUMNS, *self.rows])
        return self

    def __exit__(self, *error):
        """Draw the losses, with the first as a horizontal line, and alpha with the mean gate."""
        self.bar.close()
        if self.out_dir:
            self.file.close()
        if not self.out_dir or not self.rows:
            return
        lines = {name: self.curves[name] for name in NAMES[:2]}
        lines[start_name(self.cfg)] = [(i, self.loss_before) for i in (0, self.iteration)]
        leaf("charts").line_chart(self.out_dir / "loss.svg", "Loss of a token", "iteration", lines)
        if lines := {name: self.curves[name] for name in NAMES[2:] if self.curves[name]}:
            title = "alpha: how much of h_f the LM head reads; gate: how much of h_g a step keeps"
            leaf("charts").line_chart(self.out_dir / "mix.svg", title, "iteration", lines)

    def begin(self):
        """Start the clock, unless earlier iterations are still unread."""
        if not self.unread:
            self.start = time.perf_counter()

    def stepped(self, loss, taken, tokens, wait, cached=False):
        """Note an iteration; returns whether the values were read back from the device.

        loss, taken: tensors. On a GPU they are read back at each log_interval, and if `wait` is set
        cached: whether the base's hidden states came from --cache_hidden
        """
        self.iteration, self.tokens = self.iteration + 1, self.tokens + tokens
        self.bar.update()
        self.unread.append((loss, taken))
        self.cached_iterations += cached
        self.due = wait or self.iteration % self.cfg.log_interval == 0
        if not self.due and self.device.type != "cpu":
            return False
        for loss, taken in self.unread:
            self.loss = loss.item()
            self.failures = 0 if taken.item() else self.failures + 1
            self.skipped += self.failures > 0
        seconds = time.perf_counter() - self.start
        self.seconds += seconds
        self.step_ms.append(1000 * seconds / len(self.unread))
        self.unread = []
        return True

    def evaluated(self, held_out_loss):
        """Note a held-out loss; returns whether it is the best one after a step."""
        self.held_out_loss = held_out_loss
        self.curves["held out"].append((self.iteration, held_out_loss))
        if not self.iteration:
            self.loss_before = held_out_loss
        elif held_out_loss < self.best_loss:
            self.best_loss, self.best_iteration = held_out_loss, self.iteration
        return self.best_iteration == self.iteration > 0

    @property
    def error(self):
        """Why the run must end: ten losses in a row, or a held-out loss, are no numbers."""
        if self.failures < 10 and math.isfinite(self.held_out_loss):
            return None
        kept = f"{self.cfg.out_dir} holds the side network of iteration {self.best_iteration}"
        return (f"The loss is not a number at iteration {self.iteration}: lower --learning_rate, or"
                f" try --dtype bf16 or fp32. {kept if self.best_iteration else 'Nothing is kept'}.")

    def write(self, learning_rate, side=None):
        """Show the iteration, and write a line if one is due. side: the trained part"""
        rate = self.speed()["tokens_per_second"]
        if self.due:
            new, mixed = self.curves["held out"][-1][0] == self.iteration, mixing(side)
            for name, value in zip(("training", "alpha", "gate"), (self.loss, *mixed)):
                if value is not None:
                    self.curves[name].append((self.iteration, value))
            self.rows.append([
                self.iteration, f"{self.loss:.5f}", f"{self.held_out_loss:.5f}" if new else "",
                f"{learning_rate:.3e}", f"{rate:.0f}", f"{self.step_ms[-1]:.1f}",
                *("" if value is None else f"{value:.5f}" for value in mixed),
            ])
            if self.out_dir:
                csv.writer(self.file).writerow(self.rows[-1])
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, held out {self.held_out_loss:.3f}, {rate:.0f} tokens/s, "
            f"peak {show_bytes(peak_memory(self.device))}", refresh=False
        )

    def speed(self):
        """The tokens per second of all iterations, and the median time of one."""
        return dict(
            tokens_per_second=self.tokens / (self.seconds or 1),
            cached_iterations=self.cached_iterations, step_ms=median(self.step_ms or [0.0]),
        )
