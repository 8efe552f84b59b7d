"""A run that ends at any moment goes on as if it had not: data/run/state.py and train.fit."""

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import METHOD_RUNS, left, run_forked

import train
from data import InputError
from data.run import resume, state
from data.run.log import TrainingLog
from data.run.run import Run
from train import TrainConfig

def stop_after(monkeypatch, iteration):
    """Let a run be asked to stop while it computes an iteration."""
    steps = []

    @contextlib.contextmanager
    def stop_signals():
        asked = []
        steps.append(asked)
        yield asked

    original = train.train_step

    def step(*args):
        step.count += 1
        if step.count == iteration:
            steps[-1].append(signal.SIGTERM)
        return original(*args)

    step.count = 0
    monkeypatch.setattr(train, "stop_signals", stop_signals)
    monkeypatch.setattr(train, "train_step", step)


def test_a_stop_before_anything_is_kept(cfg, monkeypatch, capsys):
    """It says how to go on, not that nothing was learned; nor a loss that nobody has measured. What
    it has learned so far can be asked."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        result = train.main(TrainConfig(**cfg))
    printed = capsys.readouterr().out
    assert result["interrupted"] and not result["best_iteration"] and "--resume" in printed
    assert "has not learned" not in printed and f"--side {cfg['out_dir']}/last" in printed
    assert result["loss_after"] is None and "QST\n" not in printed
    with pytest.raises(InputError, match="missing: give .*, its folder last"):
        train.read_side(cfg["out_dir"])
    train.read_side(cfg["out_dir"] + "/last")
    for printed in ("Ask it", "continues after iteration 16. It had ended, and is scored again."):
        train.main(TrainConfig(**cfg, resume=True))
        assert printed in capsys.readouterr().out


@pytest.mark.parametrize("changes", METHOD_RUNS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_method_goes_on_to_the_bit(changes, cfg, tmp_path, monkeypatch, capsys):
    """Stopped after 5 of 8 iterations, between two evaluations, and gone on: same bytes."""
    cfg = cfg | changes | dict(max_iters=8)
    train.main(TrainConfig(**cfg))
    expected = left(cfg["out_dir"])
    again = cfg | dict(out_dir=str(tmp_path / "again"), resume=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = train.main(TrainConfig(**again))
    assert stopped["interrupted"] and stopped["iterations"] == 5
    kept, _ = resume.load_state(tmp_path / "again")
    assert kept["log"]["iteration"] == 5  # none is computed twice
    result = train.main(TrainConfig(**again))
    assert not result["interrupted"] and result["iterations"] == 8
    assert "again continues after iteration 5." in capsys.readouterr().out
    assert left(again["out_dir"]) == expected


@pytest.mark.parametrize("words", ["", "variant=paper,fast gate=scalar"])
def test_resume_knows_the_settings(words, cfg, monkeypatch):
    """--resume with --out_dir alone, whatever the run or sweep was given; flags count more."""
    cfg = TrainConfig(**cfg | dict(sweep=words, max_iters=8))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.main(cfg)
    again = train.parse_args(["--resume", "--out_dir", cfg.out_dir])
    assert train.resolve(again) == train.resolve(replace(cfg, resume=True))
    train.main(again)
    folder = Path(cfg.out_dir) / words.replace(" ", ",").replace(",fast", "")
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == cfg.max_iters and not result["interrupted"]
    longer = train.parse_args(["--resume", "--out_dir", cfg.out_dir, "--max_iters", "20"])
    assert longer.max_iters == 20 and longer.base == cfg.base
    other = str(Path(cfg.out_dir) / "none")  # nothing there: what --resume always was
    assert train.parse_args(["--resume", "--out_dir", other]).base == TrainConfig().base


def test_killed_again_and_again(cfg, tmp_path, capfd):
    """SIGKILL at random moments, also while files are written: after each, what is there is whole;
    and in the end every byte is that of a run that was left alone."""
    train.main(TrainConfig(**cfg))
    expected, rng, kills = left(cfg["out_dir"]), random.Random(0), 0
    again = TrainConfig(**cfg | dict(out_dir=str(tmp_path / "again"), resume=True))
    for _ in range(200):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                train.main(again)
                os._exit(0)
            os._exit(1)
        # Some soon after the start, and most when a state is written, or what is written after it.
        patience = rng.choice((0.1, 60, 60))
        if status := kill_at_the_next_state(child, again.out_dir, patience, rng.uniform(0, 0.03)):
            assert os.WIFSIGNALED(status), capfd.readouterr().err
            kills += 1
        else:
            break
        if (Path(again.out_dir) / "side.safetensors").exists():
            train.read_side(again.out_dir)
    train.main(again)
    assert kills >= 3 and left(again.out_dir) == expected


def kill_at_the_next_state(child, out_dir, patience, later):
    """Wait until a process writes a state, or for some seconds; kill it a moment later, and return
    its exit status."""
    path, start, ended = Path(out_dir) / "state.safetensors", time.time(), 0

    def written():
        with contextlib.suppress(FileNotFoundError):  # also for the moment in which it is replaced
            return path.stat().st_mtime_ns

    before = written()
    while not ended and written() == before and time.time() - start < patience:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        time.sleep(later)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside(number, cfg):
    """SIGTERM of a job scheduler and SIGHUP of a lost ssh end a real process in good order."""
    words = [f"--{name}={value}" for name, value in (cfg | dict(max_iters=100000)).items()]
    run = run_forked("train.py", *words)
    out_dir = Path(cfg["out_dir"])
    while not (out_dir / "state.safetensors").exists() and not run.ended():
        time.sleep(0.01)
    run.kill(number)
    code, printed, _ = run.wait()
    assert code == 0 and "continue with --resume" in printed
    result = json.loads((out_dir / "result.json").read_text())
    assert result["interrupted"] and 4 <= result["iterations"] < 100000
    assert resume.load_state(out_dir)[0]["log"]["iteration"] == result["iterations"]


def test_a_damaged_state(cfg):
    """It is refused, and nothing is touched."""
    cfg |= dict(max_iters=8)
    train.main(TrainConfig(**cfg))
    expected, path = left(cfg["out_dir"]), Path(cfg["out_dir"]) / state.FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(InputError, match="state.safetensors is damaged: without --resume"):
        train.main(TrainConfig(**cfg | dict(resume=True)))
    assert left(path.parent) == expected and path.exists()


def test_a_state_of_a_crash_of_earlier_commits(cfg):
    """It has the name of the one before, and is used."""
    cfg |= dict(max_iters=8)
    train.main(TrainConfig(**cfg))
    out_dir = Path(cfg["out_dir"])
    (out_dir / state.FILES[0]).rename(out_dir / state.FILES[1])
    expected = left(out_dir)
    train.main(TrainConfig(**cfg | dict(resume=True)))
    assert left(out_dir) == expected


def test_a_state_holds_all_that_a_run_needs(tmp_path):
    """What learns, its moments, fp16's scale and the log are in another process what they were."""
    runs = []
    for scale in (8.0, 2.0):
        side = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(side.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        log = TrainingLog(None, TrainConfig(max_iters=9), torch.device("cpu"))
        log.evaluated(9.0)
        runs.append(SimpleNamespace(
            out_dir=tmp_path, about={}, model=SimpleNamespace(side=side), optimizer=optimizer,
            scaler=scaler, log=log, interrupted=True,
        ))
    one, two = runs
    assert not resume.load(two)
    one.model.side(torch.ones(3)).sum().backward()
    one.optimizer.step()
    one.log.iteration = 7
    Run.save(one)
    assert resume.load(two) and two.log.iteration == 7 and two.scaler.get_scale() == 8
    for ours, theirs in zip(one.model.side.parameters(), two.model.side.parameters()):
        assert torch.equal(ours, theirs)
        moments = one.optimizer.state[ours], two.optimizer.state[theirs]
        assert len(moments[1]) == 3 and all(map(torch.equal, *(m.values() for m in moments)))


def test_signals_are_noted(capfd):
    """The first asks to stop, and says so; a second Ctrl-C stops at once; afterwards as before."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    with state.stop_signals() as asked:
        assert all(signal.getsignal(n) != old for n, old in zip(numbers, before))
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM] and "Ctrl-C again stops" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    try:
        with state.stop_signals() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked
    finally:
        signal.signal(signal.SIGHUP, old)


def test_other_settings_are_refused(cfg):
    """They and other data, before anything of the run is replaced."""
    train.main(TrainConfig(**cfg | dict(max_iters=4)))
    before = (Path(cfg["out_dir"]) / "settings.json").read_bytes()
    with pytest.raises(InputError) as refusal:
        train.main(TrainConfig(**cfg | dict(resume=True, learning_rate=2e-2)))
    assert "another --learning_rate, 0.01 and not 0.02" in str(refusal.value)
    assert (Path(cfg["out_dir"]) / "settings.json").read_bytes() == before
    text = Path(cfg["data"]).read_text()
    moved = "\n".join(text.split("\n")[::-1])  # as many tokens, in another order
    for other in (text + '\n{"instruction": "One", "output": "more"}', moved):
        Path(cfg["data"]).write_text(other)
        with pytest.raises(InputError, match="another --data"):
            train.main(TrainConfig(**cfg | dict(resume=True)))


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), "1", None])
def test_a_number_that_none_can_be(seconds, cfg):
    """A state with the right checksum is still checked, value by value."""
    out_dir = Path(cfg["out_dir"])
    train.main(TrainConfig(**cfg | dict(max_iters=4)))
    tree, _ = resume.load_state(out_dir)
    tree["log"]["seconds"] = seconds
    state.save_state(out_dir, tree)
    with pytest.raises(InputError, match="state.safetensors.*log.seconds"):
        train.main(TrainConfig(**cfg | dict(max_iters=8, resume=True)))


def test_two_runs_in_one_folder(cfg):
    """The second is refused while the first one writes."""
    Path(cfg["out_dir"]).mkdir()
    with state.only_run_in([cfg["out_dir"]]):
        with pytest.raises(InputError, match="Another run writes to"):
            train.main(TrainConfig(**cfg))
    Path(cfg["out_dir"], "seed=2").mkdir()  # a sweep writes to a folder of each run, too
    with state.only_run_in([f"{cfg['out_dir']}/seed=2"]):
        with pytest.raises(InputError, match="Another run writes to .*seed=2"):
            train.main(TrainConfig(**cfg, sweep="seed=1,2"))
    train.main(TrainConfig(**cfg | dict(max_iters=1)))
    for path in Path(cfg["out_dir"]).glob("state*"):
        path.unlink()
    with pytest.raises(InputError, match="has a result.json, and no state: leave out --resume"):
        train.main(TrainConfig(**cfg | dict(resume=True)))


def test_the_same_seed_is_the_same_run(cfg, tmp_path, capsys):
    """Bit for bit; and another seed is another run, which says what it replaces."""
    runs = []
    for name, seed in ("first", 1), ("second", 1), ("second", 2):
        capsys.readouterr()
        out_dir = str(tmp_path / name)
        train.main(TrainConfig(**cfg | dict(seed=seed, out_dir=out_dir, max_iters=6)))
        runs.append(left(out_dir))
        message = f"The files of an earlier run in {out_dir} are replaced."
        replaced = message in capsys.readouterr().out
        assert replaced == (seed == 2)
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]
