"""The benchmarks: what they print is whole, and both sides of a comparison compute the same."""

import contextlib
import io
import json
import re

import bench
import pytest

from model import ModelConfig

# Matrices of fewer than 64 x 64 weights bitsandbytes 0.50.2 dequantizes wrongly on a CPU.
TINY = ModelConfig(32000, n_layer=2, n_head=2, n_embd=64, n_ffn=128)


@pytest.fixture
def together(monkeypatch):
    """`bench.alone` in this process, where torch is loaded already."""

    def alone(function, *args, **environment):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            getattr(bench, function)(*args)
        return [float(word) for word in printed.getvalue().split()]

    monkeypatch.setattr(bench, "alone", alone)
    monkeypatch.setattr(bench, "MODEL", TINY)
    monkeypatch.setattr(bench, "STEP", bench.STEP + " --reduction 2 --batch_size 1")


def test_methods(together, monkeypatch, capsys):
    """A row for each step, with positive figures; without the libraries, relative to our QLoRA."""
    steps = ("forward alone, nf4", "qst", "qlora")
    monkeypatch.setattr(bench, "STEPS", {name: bench.STEPS[name] for name in steps})
    monkeypatch.setattr(bench, "LIBRARIES", ("no_such_library",))
    bench.methods(rounds=1)
    told = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.*?) \| ours (\|.*)$", told, re.M))
    assert set(rows) == set(steps) and "pip install no_such_library" in told
    for name, row in rows.items():
        seconds, megabytes, trainable, *ratios = (float(c.replace(",", "")) for c in row.strip("| ").split(" | "))
        assert seconds > 0 and megabytes > 10 and (trainable > 0) == (name != "forward alone, nf4")
        assert ratios == [1, 1] if name == "qlora" else min(ratios) > 0


@pytest.mark.parametrize("name", ["qlora", "lora"])
def test_theirs_is_the_same_step(together, name, tmp_path):
    """The libraries' model has our loss on the same weights, and as many trainable parameters."""
    for library in bench.LIBRARIES:
        pytest.importorskip(library)
    bench.alone("make_model", tmp_path, bench.asdict(TINY))
    ours, theirs = (bench.alone("step_once", who, bench.STEPS[name], tmp_path) for who in ("ours", "theirs"))
    assert ours[2] == pytest.approx(theirs[2], abs=2e-5) and ours[3] == theirs[3]


@pytest.fixture
def runs(tmp_path):
    """Two methods' runs as train.py leaves them; of the first, two learning rates of two seeds."""
    for name, rate, seed, loss in (
        ("qst", 1e-3, 1, 2.5), ("qst", 1e-2, 1, 1.5), ("qst", 1e-2, 2, 1.7), ("qlora", 1e-3, 1, 1.0),
    ):  # fmt: skip
        out = tmp_path / name / f"{rate} {seed}"
        out.mkdir(parents=True)
        result = dict(
            loss_before=3.0, loss_after=loss, exact_match_before=0.0, exact_match_after=0.5,
            step_ms=100.0, peak_memory_bytes=5e8, weights_bytes=2e6, optimizer_bytes=1e6,
            activations_bytes=3e6, trainable_parameters=1000, config=dict(learning_rate=rate),
        )  # fmt: skip
        (out / "result.json").write_text(json.dumps(result))
        (out / "log.csv").write_text(f"iteration,held_out_loss\n5,\n10,{loss + 1}\n20,{loss}\n")
    return tmp_path


def test_the_best_learning_rate_is_marked(runs, capsys):
    """A line a rate: means over the seeds, the best rate first."""
    bench.tell(runs / "qst")
    best, other = capsys.readouterr().out.splitlines()
    assert "| 0.01 * |" in best and "1.600 (1.500-1.700)" in best
    assert "| 0.001 |" in other and "3.000  3.500  2.500" in other


def test_pictures(runs, capsys, monkeypatch):
    """The three charts as Mermaid, of the best rate's runs; without matplotlib it says so."""
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    bench.pictures([runs / "qst", runs / "qlora"], runs / "out")
    told = capsys.readouterr().out
    assert told.count("xychart-beta") == 3 and "No PNGs" in told and not (runs / "out").exists()
    # From the largest, which lies behind, to the smallest.
    assert re.findall(r"bar \[(.*)\]", told)[:3] == ["6.000, 6.000", "3.000, 3.000", "2.000, 2.000"]
    assert re.findall(r"line \[(.*)\]", told)[0].split(", ")[::4] == ["3.000", "2.600", "1.600"]


def test_pictures_are_drawn(runs, capsys):
    """With matplotlib, the same as three PNGs."""
    pytest.importorskip("matplotlib")
    bench.pictures([runs / "qst", runs / "qlora"], runs / "out")
    for name in ("memory", "loss", "score"):
        assert (runs / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_fails_is_told(tmp_path, capsys):
    """Its error is one line, nothing of an earlier run is taken for it, and no run at all ends it."""
    (tmp_path / "result.json").write_text("{}")
    bench.learn_once(["--max_iters", "0"], tmp_path)
    assert "--max_iters 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no run"):
        bench.read_runs(tmp_path)
