"""The state of a run, for tests/fuzzing/fuzz.py: seeds, and a function that goes on from one."""

import contextlib
import io
from types import SimpleNamespace

import torch
from helpers import small_config

from data import InputError
from data.formats.safetensors import read_header
from data.run import checkpoint, resume
from data.run.log import TrainingLog
from data.run.run import Run
from data.run.state import FILES
from side import SideConfig, SideNetwork
from train import TrainConfig


def run_state(folder):
    """What `resume.load` needs of a `Run`, before its first step."""
    torch.manual_seed(0)
    cfg = TrainConfig(max_iters=9)
    side = SideNetwork(small_config(), SideConfig(reduction=4, rank=2))
    optimizer = torch.optim.AdamW(side.parameters())
    log = TrainingLog(None, cfg, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    about, model = {"seed": 1, "data": [3, 9]}, SimpleNamespace(side=side)
    return SimpleNamespace(
        out_dir=folder, about=about, model=model, optimizer=optimizer, scaler=scaler, log=log,
        interrupted=True,
    )


def read_state(folder, signed=False):
    """A state that is damaged is left out; another is complete, and the next step can be taken."""
    true_sum, run = checkpoint.digest, run_state(folder)
    newest = folder / FILES[0]
    if signed:  # of someone who has put the right sum on whatever is in the file
        checkpoint.digest = lambda *_: read_header(newest)[1].get("sha256")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if not resume.load(run):
                raise InputError(f"{newest} is damaged.")
    finally:
        checkpoint.digest = true_sum
    run.model.side.alpha.grad = torch.ones(())
    run.optimizer.step()
    assert all(p.isfinite().all() for p in run.model.side.state_dict().values())
    assert run.log.speed()["step_ms"] is not None and run.log.curves["held out"][-1][0] is not None


def states(work):
    run = run_state(work)
    for p in run.model.side.parameters():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.log.evaluated(3.0)
    run.log.curves["training"].append((0, 2.5))
    run.log.curves["alpha"].append((0, 1.0))
    run.log.rows.append([1, "2.5", "", "1e-3", "9", "8.1", "1", ""])
    Run.save(run)
    return [{name: (work / name).read_bytes() for name in FILES[:1]}]
