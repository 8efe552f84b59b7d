"""data/sweep.py: many side networks beside one base are, to the bit, what each is alone."""

import json
import os
import re
import signal
from pathlib import Path

import account
import pytest
import torch
from helpers import left, small_config

import train
from data import InputError
from data.devices.device import loss_and_kept
from data.tasks.scoring import choice_logits
from model import PRESETS, quantize_folder
from qst import SharedBase, read_side, add_trainable
from quant import Linear4bit
from train import TrainConfig, prepare, side_config

SWEEPS = {
    "architecture": "variant=paper,fast standardize=true seed=1,2",
    "memory": "h_f_bits=16,4 checkpoint=false,true downsample=linear",
    "width and steps": "reduction=2,4 optimizer=adamw,muon optimizer_bits=8 mix=residual",
}


@pytest.mark.parametrize("words", SWEEPS.values(), ids=SWEEPS)
def test_each_run_is_what_it_is_alone(words, cfg):
    """The bytes of the side network, the log, the scores."""
    cfg |= dict(max_iters=5)
    table = train.main(TrainConfig(**cfg, sweep=words))
    names = [row["settings"] for row in table["runs"]]
    assert len(names) == 4 == len(set(names))
    assert json.loads((Path(cfg["out_dir"]) / "sweep.json").read_text()) == table
    losses = [row["loss"] for row in table["runs"]]
    assert losses == sorted(losses) and table["best"].endswith(names[0])
    for name in sorted(names)[::3]:  # the first and the last
        together = Path(cfg["out_dir"]) / name
        settings = json.loads((together / "result.json").read_text())["config"]
        assert settings["sweep"] == "" and settings["data_seed"] == 1337
        result = train.main(TrainConfig(**settings | dict(out_dir=cfg["out_dir"] + "-alone")))
        assert left(together) == left(cfg["out_dir"] + "-alone")
        row = table["runs"][names.index(name)]
        assert result["loss_after"] == row["loss"]


@pytest.mark.parametrize("words", ["", "gate=scalar,sum"])
def test_epochs_are_the_iterations_that_they_need(words, cfg, monkeypatch, capsys):
    """To the bit; --resume with the same flag, or with another number, goes on. What a run leaves
    tells the iterations. 32 examples are trained on, 4 at a time."""
    given = dict(cfg, max_iters=None, sweep=words, eval_interval=8)
    short, whole = (str(Path(cfg["out_dir"]) / name) for name in ("a", "b"))
    train.main(TrainConfig(**given | dict(epochs=1, out_dir=short)))
    train.main(TrainConfig(**given | dict(max_iters=16, out_dir=whole, lr_schedule="constant")))
    name = words.replace(",sum", "")
    result = json.loads((Path(short) / name / "result.json").read_text())
    assert result["iterations"] == 8 == result["config"]["max_iters"]
    assert result["config"]["epochs"] is None and "]]: " in capsys.readouterr().out
    again = train.parse_args(["--resume", "--out_dir", short, "--epochs", "2"])
    assert (again.epochs, again.max_iters) == (2, None)
    train.main(again)
    assert left(Path(short) / name) == left(Path(whole) / name)
    longer = train.parse_args(["--resume", "--out_dir", short, "--max_iters", "20"])
    assert (longer.epochs, longer.max_iters) == (None, 20)


def test_the_base_computes_once(cfg, tmp_path, monkeypatch):
    """Four runs ask each linear layer as often as one does, also for a score after a beginning that
    all prompts share; two that are standardized, also look at the 32 training examples, four
    at a time. What they generate, of lengths of their own, is what each generates alone."""
    asked, forward, load = [], Linear4bit.forward, train.load_task
    prompts = [[1, 5, 9, i, *range(i, 12)] for i in range(3, 8)]

    def counted(layer, x):
        asked.extend([1] * (len(x) > 1))  # what is generated, one row, may be each run's own
        return forward(layer, x)

    def answering(*args):
        task = load(*args)
        said = lambda model: model.generate(torch.tensor([[1, 5]]), 5).tolist()
        scored = lambda beside: [each.tolist() for each in choice_logits(beside, prompts, [3, 7])]
        task.score = lambda beside: [dict(scored=scores, said=said(model)) for model, scores
                                     in zip(beside.models, scored(beside))]
        return task

    monkeypatch.setattr(Linear4bit, "forward", counted)
    monkeypatch.setattr(train, "load_task", answering)
    counts = []
    cfg |= dict(max_iters=4)
    for words in ("seed=1", "seed=1,2 gate=scalar,sum", "standardize=true,false seed=1,2"):
        asked.clear()
        names = [row["settings"] for row in train.main(TrainConfig(**cfg, sweep=words))["runs"]]
        counts.append(len(asked))
        results = [json.loads((Path(cfg["out_dir"]) / name / "result.json").read_text())
                   for name in names]
        for result in results[-1:] * ("gate" in words):
            alone = train.main(TrainConfig(**result["config"] | dict(out_dir=str(tmp_path / "a"))))
            for when in ("before", "after"):
                for what in ("scored", "said"):
                    assert alone[f"{what}_{when}"] == result[f"{what}_{when}"]
    look = 8 * 3 * 7  # at the channels of 64 texts, once for both
    measure = 3 * 7  # what each run but the first keeps for backward
    assert counts[1] - 3 * measure == counts[0] == counts[2] - look - 3 * measure


def test_a_run_that_fails_leaves_the_others(cfg, monkeypatch):
    """Its row has the reason; they are what they would have been. If none ends well, so it says."""
    words = "learning_rate=1e-2,3e-3,1e-3"
    cfg |= dict(max_iters=12)
    expected = train.main(TrainConfig(**cfg, sweep=words))
    step = train.train_step

    def broken(runs, *args):
        return [
            (loss * float("nan"), ~taken) if run.cfg.learning_rate in lost else (loss, taken)
            for run, (loss, taken) in zip(runs, step(runs, *args))
        ]

    monkeypatch.setattr(train, "train_step", broken)
    lost = [3e-3]
    table = train.main(TrainConfig(**cfg, sweep=words))
    assert [row["settings"] for row in table["runs"]][-1] == "learning_rate=0.003"
    assert "not a number" in table["runs"][-1]["error"]
    ended = {row["settings"]: row for row in expected["runs"]}
    assert all(row == ended[row["settings"]] for row in table["runs"][:-1])
    lost = [1e-2, 3e-3, 1e-3]
    with pytest.raises(InputError, match="No run of the sweep has ended well. The first: The loss"):
        train.main(TrainConfig(**cfg, sweep=words))


def test_a_bug_is_not_swallowed(cfg, monkeypatch):
    """What is no mistake of the user comes out of the thread, and the base is as it was."""
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(TrainConfig(**cfg, sweep="seed=1,2"))


@pytest.mark.parametrize("words, at", [("seed=1,2", 2), ("seed=1,2 gate=scalar,sum", 5)])
def test_stopped_and_gone_on_with(words, at, cfg, monkeypatch, capsys):
    """One signal stops all runs, and --resume ends them as if nothing had happened. None is called
    the best before one was evaluated."""
    cfg |= dict(max_iters=8)
    names = [row["settings"] for row in train.main(TrainConfig(**cfg, sweep=words))["runs"]]
    expected = {name: left(Path(cfg["out_dir"]) / name) for name in names}
    again = cfg | dict(out_dir=cfg["out_dir"] + "-again", resume=True)
    step, steps = train.train_step, []

    def signalled(*args):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        table = train.main(TrainConfig(**again, sweep=words))
    assert all(row["interrupted"] and row["iterations"] < 7 for row in table["runs"])
    printed = capsys.readouterr().out.split("Stopped")[1]
    evaluated = at == 5
    assert bool(table["best"]) == evaluated
    assert ("not evaluated" in printed, "The best is" in printed) == (not evaluated, evaluated)
    train.main(TrainConfig(**again, sweep=words))
    assert {name: left(Path(again["out_dir"]) / name) for name in names} == expected
    with pytest.raises(InputError, match="is missing: .*or one run of a sweep"):
        read_side(again["out_dir"])
    train.main(TrainConfig(**again | dict(resume=False, max_iters=1)))  # one run in its place
    assert not list(Path(again["out_dir"]).glob("sweep.*"))


@pytest.mark.parametrize("words, message", {
    "gate": "--sweep gate: it takes", "max_iters=1,2": "it takes NAME=VALUE,VALUE ...",
    "quant=nf4,none": "it takes NAME=VALUE", "reduction=x": "not all of these are values",
    "seed=1,1": "has two runs for the folder", "gate=sum,round": "--gate 'round' is unknown",
    "learning_rate=-1": "--learning_rate -1.0 must be above 0",
}.items())
def test_mistakes(words, message, cfg):
    """Before anything is loaded or written."""
    with pytest.raises(InputError, match=re.escape(message)):
        train.main(TrainConfig(**cfg, sweep=words))
    assert not Path(cfg["out_dir"]).exists()
    with pytest.raises(InputError, match="--sweep trains: evaluate each --side alone"):
        train.main(TrainConfig(**cfg, sweep=words, eval_only=True))
    with pytest.raises(InputError, match="--sweep is for --method qst and lst"):
        train.main(TrainConfig(**cfg | dict(reduction=None), sweep="seed=1,2", method="qlora"))


def test_a_streamed_base(cfg, tmp_path):
    """Its layers come once a batch for all, and each run is what it is alone with the whole base;
    also from a cache, which a streamed base has written."""
    quantize_folder(cfg["base"], tmp_path / "nf4")
    cfg |= dict(base=str(tmp_path / "nf4"), max_iters=12, h_f_bits=16)
    table = train.main(TrainConfig(**cfg, sweep="gate=scalar,sum", stream=True))
    alone = TrainConfig(**cfg | dict(gate="sum", out_dir=str(tmp_path / "alone")))
    loss = train.main(alone)["loss_after"]
    assert left(Path(cfg["out_dir"]) / "gate=sum") == left(alone.out_dir)
    cached = dict(cache_hidden=str(tmp_path / "cache"))
    for stream in (True, False):
        table = train.main(TrainConfig(**cfg, **cached, sweep="gate=scalar,sum", stream=stream))
        (row,) = [row for row in table["runs"] if row["settings"] == "gate=sum"]
        assert row["loss"] == pytest.approx(loss, abs=5e-3)


class Summed(torch.nn.Module):
    """The losses of models beside one base, as one."""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def hidden(self, idx):
        return SharedBase(self.models).hidden(idx)

    def loss_of(self, states, targets):
        return sum(model.loss_of(h, targets) for model, h in zip(self.models, states))


@pytest.mark.parametrize("words", [
    "gate=scalar,sum", "h_f_bits=16,8 seed=1,2", "downsample=adapter,maxpool,linear h_f_bits=4",
    "standardize=true,false every=3,1",
])
def test_a_sweep_has_the_base_once(words, tmp_path, capsys, monkeypatch):
    """A row for each side network, and one for all: the base and the largest transient once, and
    the activations that they keep together."""
    monkeypatch.setitem(PRESETS, "small", small_config())
    flags = "--preset small --reduction 4 --batch_size 3 --sequence_len 8 --device cpu --out_dir"
    cfg = account.parse_args([*flags.split(), str(tmp_path), "--sweep", words])
    *each, both = account.main(cfg)
    assert [row["label"] for row in (*each, both)] == [*dict(account.rows(cfg)), "all of them"]
    for part in ("gradients", "optimizer"):
        assert both[f"{part}_bytes"] == sum(row[f"{part}_bytes"] for row in each)
    learning = [row["learning_bytes"] for row in each]
    (base,) = {row["weights_bytes"] - own for row, own in zip(each, learning)}
    assert base > 1e4 and both["weights_bytes"] == base + sum(learning)
    assert both["total_bytes"] < sum(row["total_bytes"] - base for row in each) + base
    assert "all of them" in capsys.readouterr().out

    models, base, idx = [], None, torch.zeros(3, 8, dtype=torch.long)
    for settings in dict(account.rows(cfg)).values():
        base = base or account.untrained(settings, small_config(), torch.float32, "cpu").base
        models.append(prepare(add_trainable(base, side_config(settings)), settings))
    assert both["activations_bytes"] == loss_and_kept(Summed(models), idx, idx)[1]
