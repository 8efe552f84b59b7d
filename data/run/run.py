"""A run of train.py: a model, the optimizer that trains it, and what it leaves in --out_dir."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from data import InputError
from data.devices import distributed
from data.formats.files import write_json
from data.frozen.fingerprint import fingerprint
from data.frozen.sources import watch
from data.run.checkpoint import digest
from data.run.log import TrainingLog
from data.run.optim import make_optimizer
from data.run.state import remove_earlier_run, save_state
from data.settings.flags import SETTINGS_FILE
from data.tasks.examples import examples_fingerprint


def refuse_other_processes(task, base, models, out_dir):
    """Refuse processes with other data, another base or other weights; or another out_dir, from
    which all read what the first one writes."""
    if distributed.size() > 1:
        weights = [digest("", dict(model.named_parameters()))[:8] for model in models]
        distributed.refuse_different({
            "The data (examples, tokens, checksum)":
                examples_fingerprint(task.train + task.held_out),
            "The checksum of the base": digest(repr(fingerprint(base)), {})[:8],
            "The checksum of the weights to train": weights,
            "--out_dir": str(Path(out_dir).resolve()),
        })


class Run:
    """A model with its optimizer, and from `keep_files` on with the files of its out_dir. A sweep
    has several runs, with one base. result: what result.json will contain"""

    def __init__(self, model, cfg):
        self.model, self.cfg, self.optimizer = model, cfg, make_optimizer(model, cfg)
        half = getattr(model, "base", model).embed_tokens.weight.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.losses = []  # of the batches since the last step

    def loss(self, h, targets, share):
        """The loss of a batch, scaled for fp16. h: what `hidden` returned; share: of the targets"""
        loss = self.model.loss_of(h, targets) * share
        self.losses.append(loss.detach())
        return self.scaler.scale(loss)

    def step(self, learning_rate):
        """Clip the gradients and step. A step with a NaN or an infinite value is left out.

        returns the mean loss of a token, and whether the step was taken. Both are tensors on the
        device: nothing waits for their values.
        """
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        total = sum(self.losses, torch.zeros((), device=parameters[0].device))
        self.losses, self.learning_rate = [], learning_rate
        distributed.sum_([total, *(p.grad for p in parameters if p.grad is not None)])
        for group in groups:
            group["lr"] = learning_rate * group["factor"]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.grad_clip or math.inf)
        taken = (total + norm).isfinite()
        if not self.scaler.is_enabled():
            # An optimizer skips its step where found_inf is 1. In fp16 the scaler sets it.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - taken.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, taken

    def keep_files(self, task, result, shown, base_folder):
        """Name the files in out_dir; write nothing yet. shown: whether there is a progress bar"""
        self.out_dir, self.result = Path(self.cfg.out_dir), result
        self.first = distributed.rank() == 0  # the process that writes
        self.refuse_changes = watch(base_folder)
        self.log = TrainingLog(self.first and self.out_dir, self.cfg, self.model.device, shown)
        examples = examples_fingerprint(task.train + task.held_out)
        # Settings and data, which must be the same when the run continues.
        self.about = asdict(self.cfg) | dict(base=self.model.fingerprint, data=examples)
        self.about["nproc_per_node"] = distributed.size()
        return self

    def begin(self, files):
        """Make room in out_dir, unless the run continues, and write the settings for --resume.
        files: an `ExitStack`, which closes the log's files"""
        if self.first and not self.log.iteration:
            remove_earlier_run(self.out_dir)
        if self.first:
            write_json(self.out_dir / SETTINGS_FILE, asdict(self.cfg))
        files.enter_context(self.log)

    def record_evaluation(self, held_out_loss):
        """Note a held-out loss. Save the side network if it is the best one so far."""
        self.refuse_changes()  # nothing is saved that fits no file any more
        if self.log.evaluated(held_out_loss) and self.first:
            self.model.save_side(self.out_dir)

    def record_step(self, loss, taken, batches, wait):
        """Note an iteration; see `TrainingLog.stepped`."""
        tokens = distributed.size() * sum(idx.numel() for idx, *_ in batches)
        cached = getattr(self.model.base.source, "is_read", False)  # by --cache_hidden
        return self.log.stepped(loss, taken, tokens, wait, cached)

    def write(self, save):
        """Show the iteration and write it to the log. save: write the state for --resume, too"""
        self.log.write(self.learning_rate, self.model.side)
        if save and not self.error and self.first:
            self.save()

    def save(self):
        """Write all that --resume needs."""
        save_state(self.out_dir, dict(
            side=self.model.side.state_dict(), moments=self.optimizer.state_dict()["state"],
            scaler=self.scaler.state_dict(), about=self.about, log=self.log.state(),
        ))

    @property
    def error(self):
        """Why the run has ended before its last iteration; None while all is well."""
        return self.result.get("error") or self.log.error

    @property
    def interrupted(self):
        return self.log.iteration < self.cfg.max_iters

    def end(self):
        """Save the last side network, load the best one, and fill in `result`."""
        log = self.log
        if self.error:
            raise InputError(self.error)
        if self.first:
            self.model.save_side(self.out_dir / "last")
        distributed.join([None])  # the other processes wait for the files
        if log.best_iteration:
            self.model.load_side(self.out_dir)
        self.result |= log.speed() | dict(
            loss_before=log.loss_before, loss_last=log.held_out_loss,
            best_iteration=log.best_iteration,
            loss_after=log.best_loss if log.best_iteration else None,  # none was evaluated
            iterations=log.iteration, skipped_iterations=log.skipped, interrupted=self.interrupted,
            curves=log.curves,
        )
