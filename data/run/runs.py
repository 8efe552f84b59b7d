"""What a run of train.py has: what learns, how, and what it leaves. A sweep has several at once."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from data.devices import distributed
from data.devices.memory import peak_memory
from data.formats.files import write_json
from data.run.optim import make_optimizer
from data.run.state import RunState, remove_earlier_run
from data.run.training_log import TrainingLog
from data.settings.setting import SETTINGS_FILE
from data.tasks.examples import examples_fingerprint


class Learner:
    """A model with the optimizer that steps it, and the scaler of fp16."""

    def __init__(self, model, cfg):
        self.model, self.cfg, self.optimizer = model, cfg, make_optimizer(model, cfg)
        self.hidden, self.loss_of, self.device = model.hidden, model.loss_of, model.device
        if cfg.compile:  # up to the loss, which takes as many tokens as have a target
            self.hidden = torch.compile(model.hidden, dynamic=True)
        half = getattr(model, "base", model).embed_tokens.weight.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)
        self.losses = []  # of the batches since the last step

    def learn(self, h, targets, share):
        """Add the gradient of a batch, with its share of the loss. h: what `hidden` made of it"""
        loss = self.loss_of(h, targets) * share
        self.scaler.scale(loss).backward()
        self.losses.append(loss.detach())

    def step(self, learning_rate):
        """Clip, and step. A step with a NaN or infinity is left out.

        returns the mean loss of a token, and whether the step was taken: tensors, not waited for
        """
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        total = torch.zeros((), device=parameters[0].device)
        for loss in self.losses:
            total += loss
        self.losses, self.learning_rate = [], learning_rate
        distributed.sum_([total, *(p.grad for p in parameters if p.grad is not None)])
        for group in groups:
            group["lr"] = learning_rate * group["factor"]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.grad_clip or math.inf)
        taken = (total + norm).isfinite()
        if not self.scaler.is_enabled():
            # An optimizer skips its step where found_inf is 1 (in fp16 the scaler tells it).
            self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - taken.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, taken


class Run(Learner):
    """A `Learner` that leaves files in its out_dir, and goes on from them.

    result: what result.json is to have
    shown: whether it has a progress bar, which of several runs the first alone has
    """

    def __init__(self, model, cfg, task, result, shown):
        super().__init__(model, cfg)
        self.out_dir, self.result = Path(cfg.out_dir), result
        self.first = distributed.rank() == 0  # the process that writes
        self.log = TrainingLog(self.out_dir if self.first else None, cfg, model.device, shown)
        about = dict(base=model.fingerprint, data=examples_fingerprint(task.train + task.held_out))
        self.state = RunState(
            self.out_dir, asdict(cfg) | about, model.side, self.optimizer, self.scaler, self.log
        )

    def evaluated(self, held_out_loss):
        """Note a loss on the held-out examples; keep the best side network that has learned."""
        if self.log.evaluated(held_out_loss) and self.first:
            self.model.save_side(self.out_dir)

    def begin(self, files):
        """Make room in out_dir, unless the run goes on, and leave the settings for --resume.

        files: an `ExitStack`, which closes the log's
        """
        if self.first and not self.log.iteration:
            remove_earlier_run(self.out_dir)
        if self.first:
            write_json(self.out_dir / SETTINGS_FILE, asdict(self.cfg))
        files.enter_context(self.log)

    def stepped(self, loss, taken, batches, wait):
        """Note an iteration; see `TrainingLog.stepped`."""
        tokens = distributed.size() * sum(idx.numel() for idx, *_ in batches)
        cached = getattr(self.model.base.source, "is_read", False)  # from --cache_hidden
        return self.log.stepped(loss, taken, tokens, wait, cached)

    def write(self, save):
        """Show the iteration, and write it down; save: whether to go on from it, too"""
        self.log.write(self.learning_rate, self.model.side)
        if save and not self.error:
            self.state.save()

    @property
    def error(self):
        return self.log.error

    @property
    def interrupted(self):
        return self.log.iteration < self.cfg.max_iters

    def end(self):
        """Keep the last side network, load the best one, and fill in `result`."""
        log = self.log
        if self.error:
            self.result = dict(error=self.error)
            return
        if self.first:
            self.model.save_side(self.out_dir / "last")
        distributed.join([None])  # the others wait for the files
        if log.best_iteration:
            self.model.load_side(self.out_dir)
        self.result |= log.speed() | dict(
            loss_before=log.loss_before, loss_last=log.held_out_loss,
            best_iteration=log.best_iteration,
            loss_after=log.best_loss if log.best_iteration else None,  # none was evaluated
            iterations=log.iteration, skipped_iterations=log.skipped, interrupted=self.interrupted,
            peak_memory_bytes=peak_memory(self.model.device), curves=log.curves,
        )
