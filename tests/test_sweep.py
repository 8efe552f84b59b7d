"""data/sweep.py: many side networks beside one base are, to the bit, what each is alone."""

import json
import os
import re
import signal
import threading
from functools import partial
from pathlib import Path

import account
import pytest
import torch
from conftest import small_config
from test_resume import cfg, left, one_thread  # noqa: F401

import train
from data import choice_logits, run_of_sweep, sweep
from data.report import activation_bytes
from data.sampling import KVCache
from model import PRESETS, quantize_folder
from qst import read_side, tune
from quant import InputError, Linear4bit
from train import TrainConfig, prepare, side_config

SWEEPS = {
    "architecture": "variant=paper,fast standardize=true seed=1,2",
    "memory": "h_f_bits=16,4 checkpoint=false,true downsample=linear",
    "width and steps": "reduction=2,4 optimizer=adamw,muon lr_schedule=cosine mix=residual",
}


@pytest.mark.parametrize("words", SWEEPS.values(), ids=SWEEPS)
def test_each_run_is_what_it_is_alone(words, cfg):  # noqa: F811
    """The bytes of the side network, the log, the scores."""
    cfg |= dict(max_iters=8)
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


def test_the_base_computes_once(cfg, tmp_path, monkeypatch):  # noqa: F811
    """Six runs ask each linear layer as often as one does, also for a score after a beginning that
    all prompts share; two that are standardized, also for a look at the 36 training examples, four
    at a time. What they generate, of lengths of their own, is what each generates alone."""
    asked, forward, load = [], Linear4bit.forward, train.load_task
    prompts = [[1, 5, 9, i, *range(i, 12)] for i in range(3, 12)]

    def counted(layer, x):
        asked.extend([1] * (len(x) > 1))  # what is generated, one row, may be each run's own
        return forward(layer, x)

    def answering(*args):
        task, length = load(*args), lambda: 1 + 2 * (run_of_sweep() or 0)  # they part, and meet
        said = lambda model: model.generate(torch.tensor([[1, 5]]), length()).tolist()
        scored = lambda model: choice_logits(model, prompts, [3, 7]).tolist()
        task.score = lambda model: dict(scored=scored(model), said=said(model))
        return task

    monkeypatch.setattr(Linear4bit, "forward", counted)
    monkeypatch.setattr(train, "load_task", answering)
    counts = []
    cfg |= dict(max_iters=4)
    for words in ("seed=1", "seed=1,2,3 gate=scalar,sum", "standardize=true,false seed=1,2"):
        asked.clear()
        names = [row["settings"] for row in train.main(TrainConfig(**cfg, sweep=words))["runs"]]
        counts.append(len(asked))
        results = [json.loads((Path(cfg["out_dir"]) / name / "result.json").read_text())
                   for name in names]  # fmt: skip
        for result in results[-1:] * (len(results) == 6):
            alone = train.main(TrainConfig(**result["config"] | dict(out_dir=str(tmp_path / "a"))))
            for when in ("before", "after"):
                assert alone[f"scored_{when}"] == result[f"scored_{when}"]
                said = [r[f"said_{when}"][0] for r in (alone, result)]
                assert all(map(int.__eq__, *said))
    assert counts[0] == counts[1] == counts[2] - 9 * 3 * 7


def test_a_run_that_fails_leaves_the_others(cfg, monkeypatch):  # noqa: F811
    """Its row has the reason; they are what they would have been. If none ends well, so it says."""
    words = "learning_rate=1e-2,3e-3,1e-3"
    cfg |= dict(max_iters=12)
    expected = train.main(TrainConfig(**cfg, sweep=words))
    step = train.train_step

    def broken(loss_of, optimizer, scaler, batches, learning_rate, settings):
        loss, taken = step(loss_of, optimizer, scaler, batches, learning_rate, settings)
        return (loss * float("nan"), ~taken) if settings.learning_rate in lost else (loss, taken)

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


def test_a_bug_is_not_swallowed(cfg, monkeypatch):  # noqa: F811
    """What is no mistake of the user comes out of the thread, and the base is as it was."""
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(TrainConfig(**cfg, sweep="seed=1,2"))
    assert threading.active_count() < 5


@pytest.mark.parametrize("words, at", [("seed=1,2", 3), ("seed=1,2 gate=scalar,sum", 20)])
def test_stopped_and_gone_on_with(words, at, cfg, monkeypatch, capsys):  # noqa: F811
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
    evaluated = at == 20
    assert bool(table["best"]) == evaluated
    assert ("not evaluated" in printed, "The best is" in printed) == (not evaluated, evaluated)
    train.main(TrainConfig(**again, sweep=words))
    assert {name: left(Path(again["out_dir"]) / name) for name in names} == expected
    with pytest.raises(InputError, match="is of a sweep: give the folder of one of its runs"):
        read_side(again["out_dir"])
    train.main(TrainConfig(**again | dict(resume=False, max_iters=1)))  # one run in its place
    assert not list(Path(again["out_dir"]).glob("sweep.*"))


@pytest.mark.parametrize("words, message", {
    "gate": "--sweep gate: it takes", "max_iters=1,2": "it takes NAME=VALUE,VALUE ...",
    "quant=nf4,none": "it takes NAME=VALUE", "reduction=x": "not all of these are values",
    "seed=1,1": "has seed=1 twice", "gate=sum,round": "--gate 'round' is unknown",
    "learning_rate=-1": "--learning_rate -1.0 must be above 0",
}.items())  # fmt: skip
def test_mistakes(words, message, cfg):  # noqa: F811
    """Before anything is loaded or written."""
    with pytest.raises(InputError, match=re.escape(message)):
        train.main(TrainConfig(**cfg, sweep=words))
    assert not Path(cfg["out_dir"]).exists()
    with pytest.raises(InputError, match="--sweep is not for"):
        train.main(TrainConfig(**cfg | dict(reduction=None), sweep="seed=1,2", method="qlora"))


def in_turns(n, function):
    """What a function of turns and a number returns for 0 ... n - 1, each in a thread."""
    turns, found = sweep.Turns(n), {}

    @torch.no_grad()
    def one(number):
        sweep.THREAD.number, sweep.THREAD.turns = number, turns
        turns.take()
        found[number] = function(turns, number)
        turns.leave()

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return found


@pytest.mark.parametrize("length", [6, 7])
def test_caches_that_part(length):
    """Keys and values are shared while they are the same, whatever is appended afterwards and where
    there is room for more tokens in one of them."""
    asked = []

    def layer(x, mask, rope, cache):
        asked.append(x)
        k, v = cache.append(x[:, None], 2 * x[:, None])
        return (k * v).sum(dim=2)

    def generate(turns, number):
        """Three tokens that are the same for all, one of one's own, and the same again."""
        cache = KVCache(6 if number else length)
        sizes = 3, 1, 2
        tokens = [torch.full((2, n, 4), 9.0 + number * (n == 1)) for n in sizes]
        once = turns.once if turns else lambda function, *args: function(*args)
        return torch.cat([once(layer, x, None, None, cache) for x in tokens], dim=1)

    found = in_turns(3, generate)
    assert len(asked) == (1 if length == 6 else 2) + 3 + 3
    assert all(torch.equal(found[i], generate(None, i)) for i in range(3))


def test_runs_that_part_and_meet():
    """Who asks for something else computes it, and loses nobody."""
    calls = []
    double = lambda x: calls.append(x) or 2 * x

    def one(turns, number):
        own = [turns.once(double, number) for _ in range(number)]
        turns.meet()
        return [*own, turns.once(double, "ab"), turns.once(double, "cd")]

    found = in_turns(3, one)
    assert found == {i: [2 * i] * i + ["abab", "cdcd"] for i in range(3)}
    assert calls.count("ab") == calls.count("cd") == 1


def test_a_streamed_base(cfg, tmp_path):  # noqa: F811
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


class Beside(torch.nn.Module):
    """Side networks beside one base, each of whose functions computes once, as in a sweep."""

    def __init__(self, models):
        super().__init__()
        base, self.models, self.last = models[0].base, torch.nn.ModuleList(models), {}
        layers = ((layer, "forward") for layer in base.layers)
        for place in (base, "embed"), (base, "final"), *layers:
            setattr(*place, partial(self.once, getattr(*place)))

    def once(self, function, *args):
        if function not in self.last:
            self.last[function] = function(*args)
        return self.last[function]

    def loss(self, idx, targets):
        return sum(model.loss(idx, targets) for model in self.models)


@pytest.mark.parametrize("words", [
    "gate=scalar,sum", "h_f_bits=16,8 seed=1,2", "downsample=adapter,maxpool,linear h_f_bits=4",
    "standardize=true,false every=3,1",
])  # fmt: skip
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
        models.append(prepare(tune(base, side_config(settings)), settings))
    assert both["activations_bytes"] == activation_bytes(Beside(models), idx, idx)
