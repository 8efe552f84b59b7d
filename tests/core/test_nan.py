"""Steps whose loss or gradient is no number, and runs that have nothing else."""

import json
import math
from pathlib import Path

import pytest
from helpers import METHOD_RUNS

import train
from data import InputError
from data.tasks.examples import collate
from train import TrainConfig


def broken_step(iterations, value=math.nan):
    """`train_step` whose loss is no number in some iterations, counted from 1."""
    original = train.train_step

    def step(runs, *args):
        step.count += 1
        (run,) = runs
        with pytest.MonkeyPatch.context() as patch:
            if step.count in iterations:
                right = run.model.loss_of
                patch.setattr(run.model, "loss_of", lambda *batch: right(*batch) * value)
            return original(runs, *args)

    step.count = 0
    return step


@pytest.mark.parametrize("changes", METHOD_RUNS[:3] + METHOD_RUNS[-1:], ids=str)
def test_a_step_without_a_number_is_left_out(changes, cfg, monkeypatch):
    """NaN and infinite gradients change nothing, neither weights nor moments: without those
    iterations the run is the same. They are counted, and result.json has no NaN."""
    kept = []
    for value in (None, math.nan, math.inf):
        model, original = [], train.make_model
        with monkeypatch.context() as patch:
            keep = lambda *args: model.append(original(*args)) or model[0]
            patch.setattr(train, "make_model", keep)
            patch.setattr(train, "learning_rate_at", lambda iteration, cfg: 1e-2)
            patch.setattr(train, "iteration_batches", lambda examples, *args: same_batch(examples))
            if value:
                patch.setattr(train, "train_step", broken_step({2, 4}, value))
            run = cfg | changes | dict(max_iters=6 if value else 4, eval_interval=100)
            result = train.main(TrainConfig(**run))
        assert result["skipped_iterations"] == (2 if value else 0)
        text = (Path(cfg["out_dir"]) / "result.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
        kept.append((Path(cfg["out_dir"]) / "last/side.safetensors").read_bytes())
    assert kept[1] == kept[0] == kept[2]


def same_batch(examples):
    idx, targets = collate(examples[:4])
    while True:
        yield [(idx, targets, 1.0)]


def test_ten_in_a_row_end_the_run(cfg, monkeypatch):
    """With a sentence on likely causes; what was good stays, and an earlier run's files do not pass
    for this run's."""
    train.main(TrainConfig(**cfg))
    monkeypatch.setattr(train, "train_step", broken_step(set(range(100))))
    with pytest.raises(InputError, match="--learning_rate.*Nothing is kept"):
        train.main(TrainConfig(**cfg | dict(eval_interval=50)))
    out_dir = Path(cfg["out_dir"])
    left = [path.name for pattern in ("s*", "r*") for path in out_dir.rglob(pattern)]
    assert left == ["settings.json"]
    assert json.loads((out_dir / "settings.json").read_text())["eval_interval"] == 50  # its own
    monkeypatch.setattr(train, "train_step", broken_step(set(range(5, 100))))
    with pytest.raises(InputError, match="holds the side network of iteration 4"):
        train.main(TrainConfig(**cfg | dict(max_iters=100)))
    train.read_side(cfg["out_dir"])


def test_a_held_out_loss_that_is_not_a_number(cfg, monkeypatch):
    """It is the same kind of end: an earlier best is kept, and never reported as this one's."""
    original, calls = train.mean_loss, []

    def lost_at_last(*args):
        calls.append(1)
        return original(*args) if len(calls) < 3 else [math.nan]

    monkeypatch.setattr(train, "mean_loss", lost_at_last)
    with pytest.raises(InputError, match="iteration 8.*iteration 4"):
        train.main(TrainConfig(**cfg))
