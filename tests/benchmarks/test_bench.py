"""The benchmarks: what they print is whole, and both sides of a comparison compute the same."""

import importlib
import json
import re
import subprocess
from dataclasses import replace

import bench
import pytest
from benchmarks import kernels, learning, memory, methods, paper, speed, step, streaming
from benchmarks.common import write_model
from helpers import run_forked

from data import InputError
from model import PRESETS, ModelConfig

# Matrices of fewer than 64 x 64 weights bitsandbytes 0.50.2 dequantizes wrongly on a CPU.
TINY = ModelConfig(32000, n_layer=2, n_head=2, n_embd=64, n_ffn=128)


@pytest.fixture
def tiny(monkeypatch):
    """Small models, in this process, where torch is loaded already."""
    for module in (memory, methods, speed, streaming):
        monkeypatch.setattr(module, "alone", lambda function, *args, **environment: function(*args))
    monkeypatch.setattr(streaming, "LARGE", streaming.SMALL)
    monkeypatch.setattr(streaming.resource, "setrlimit", lambda *args: None)
    monkeypatch.setattr(step, "MODEL", TINY)
    monkeypatch.setattr(step, "STEP", step.STEP + " --batch_size 1")
    monkeypatch.setattr(memory, "LEAN", "--savings --sequence_len 64")
    monkeypatch.setattr(memory, "ACCOUNTS", {"qst, 4 bits": step.FEW_BITS, "peqa": "--method peqa"})
    monkeypatch.setattr(speed, "SHAPES", [(64, 64)])
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    shape = ModelConfig(100, n_layer=1, n_head=2, n_embd=256, n_ffn=512)
    monkeypatch.setattr(speed, "LARGE", shape)
    for name in PRESETS:
        monkeypatch.setitem(PRESETS, name, shape)
    monkeypatch.setattr(paper, "METHOD_ROWS", ("qlora", "qst"))
    monkeypatch.setattr(paper, "TABLE_1", {"qlora": {"opt-1.3b": 31.3}})
    monkeypatch.setattr(paper, "TABLE_2", {"qst": {"llama-2-7b": 7.3}})
    curve = paper.curve
    two = lambda title, name, values, *methods: curve(title, name, values[:2], *methods)
    monkeypatch.setattr(paper, "curve", two)


def test_each_command_is_a_function(capsys):
    """The list names every command, and each has its function; a wrong call is one sentence."""
    bench.main([])
    listed = capsys.readouterr().out
    for name, (file, _, what) in bench.COMMANDS.items():
        assert callable(getattr(importlib.import_module(f"benchmarks.{file}"), name))
        assert re.search(f"^    {name} .*{re.escape(what)}$", listed, re.M)
    with pytest.raises(InputError, match="loud is no benchmark: choose load, "):
        bench.main(["loud"])
    with pytest.raises(InputError, match="It is `python tests/bench.py lean FOLDER`."):
        bench.main(["lean"])
    with pytest.raises(InputError, match="It is `python tests/bench.py load`."):
        bench.main(["load", "--fast"])


@pytest.mark.parametrize("command, tables", [
    ("load", [3]), ("quant", [2]), ("tokens", [2]), ("account", [2]), ("lean", [6]),
    ("stream", [2, 1]), ("paper", [6, 5, 4, 4, 5, 3, 3, 2]),
])
def test_tables_are_whole(command, tables, tiny, tmp_path, capsys):
    """Every command prints tables with as many rows, of as many cells, as there should be."""
    write_model(tmp_path, PRESETS["opt-125m"])
    bench.main([command, *{"lean": [str(tmp_path)], "stream": ["3", "1"]}.get(command, [])])
    found = []
    for table in capsys.readouterr().out.split("\n**")[1:]:
        head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
        assert {row.count("|") for row in rows} == {head.count("|")}
        found.append(len(rows))
    assert found == tables


def test_methods(tiny, monkeypatch, capsys):
    """A row for each step, with positive figures; without the libraries, relative to our QLoRA."""
    steps = ("forward alone, nf4", "qst", "qlora")
    monkeypatch.setattr(methods, "STEPS", {name: methods.STEPS[name] for name in steps})
    monkeypatch.setitem(methods.STEPS, "qst", "--reduction 2")
    monkeypatch.setattr(methods, "LIBRARIES", ("no_such_library",))
    monkeypatch.setattr(methods, "ROUNDS", 1)
    bench.main(["methods"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.*?) \| ours (\|.*)$", printed, re.M))
    assert set(rows) == set(steps) and "pip install no_such_library" in printed
    for name, row in rows.items():
        cells = row.strip("| ").split(" | ")
        seconds, megabytes, trainable, *ratios = (float(c.replace(",", "")) for c in cells)
        assert seconds > 0 and megabytes > 10
        assert (trainable > 0) == (name != "forward alone, nf4")
        assert ratios == [1, 1] if name == "qlora" else min(ratios) > 0


@pytest.mark.parametrize("name", ["qlora", "lora"])
def test_theirs_is_the_same_step(tiny, name, tmp_path):
    """The libraries' model has our loss on the same weights, and as many trainable parameters."""
    for library in methods.LIBRARIES:
        pytest.importorskip(library)
    write_model(tmp_path, TINY)
    cfg = step.parse_step(methods.STEPS[name])
    ours, theirs = (step.measure(make, cfg, tmp_path) for make in (step.ours, methods.theirs))
    assert ours[2] == pytest.approx(theirs[2], abs=2e-5) and ours[3] == theirs[3]


@pytest.fixture
def runs(tmp_path):
    """Two methods' runs as train.py leaves them; of the first, two learning rates of two seeds."""
    for name, rate, seed, loss in (
        ("qst", 1e-3, 1, 2.5), ("qst", 1e-2, 1, 1.5), ("qst", 1e-2, 2, 1.7),
        ("qlora", 1e-3, 1, 1.0),
    ):
        out = tmp_path / name / f"{rate} {seed}"
        out.mkdir(parents=True)
        result = dict(
            loss_before=3.0, loss_after=loss, exact_match_before=0.0, exact_match_after=0.5,
            step_ms=100.0, peak_memory_bytes=5e8, weights_bytes=2e6, optimizer_bytes=1e6,
            activations_bytes=3e6, trainable_parameters=1000, config=dict(learning_rate=rate),
        )
        (out / "result.json").write_text(json.dumps(result))
        (out / "log.csv").write_text(f"iteration,held_out_loss\n5,\n10,{loss + 1}\n20,{loss}\n")
    return tmp_path


def test_the_best_learning_rate_is_marked(runs, capsys):
    """A line a rate: means over the seeds, the best rate first."""
    learning.print_runs(runs / "qst")
    best, other = capsys.readouterr().out.splitlines()
    assert "| 0.01 * |" in best and "1.600 (1.500-1.700)" in best
    assert "| 0.001 |" in other and "3.000  3.500  2.500" in other


def test_pictures(runs):
    """Three charts of the best rate's runs: what memory is for, the held-out loss in seconds, and
    the score in the order of the peak memory."""
    out = runs / "out"
    bench.main(["pictures", str(runs / "qst"), str(runs / "qlora"), "--out", str(out)])
    names = ("memory", "loss", "score")
    memory, loss, score = ((out / f"{name}.svg").read_text() for name in names)
    assert all(f">{part}</text>" in memory for part in ("qst", "qlora", *learning.PARTS))
    assert memory.count(">6</text>") == 2  # MB in all
    best = next(iter(learning.read_runs(runs / "qst").values()))
    assert learning.curve(best) == [(0, 3), (1, 2.6), (2, pytest.approx(1.6))]
    assert loss.count("<polyline") == 2 and ">seconds of training</text>" in loss
    assert ">qst, 500 MB</text>" in score and score.count(">0.5</text>") == 2


def test_no_curve_is_left_out_of_the_pictures(runs):
    """There are as many pictures as the curves need; without a positive score the loss is drawn."""
    for i in range(8):
        (runs / f"run {i}").symlink_to(runs / "qlora")
    for path in runs.glob("qlora/*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(exact_match_after=0.0)))
    learning.draw(runs.glob("run *"), runs / "out")
    texts = [path.read_text() for path in (runs / "out").glob("loss*.svg")]
    assert sorted(text.count("<polyline") for text in texts) == [2, 6]
    assert "loss, by peak memory" in (runs / "out/score.svg").read_text()


def test_a_run_that_fails_is_reported(tmp_path, monkeypatch, capsys):
    """Its error is one line, no earlier run is taken for it, and without any run it ends."""
    (tmp_path / "result.json").write_text("{}")

    def run(words, **_):
        return subprocess.CompletedProcess(words, *run_forked(words[1], *words[2:]).wait())

    monkeypatch.setattr(learning.subprocess, "run", run)
    learning.learn_once(["--max_iters", "0"], tmp_path)
    assert "--max_iters 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no run"):
        learning.read_runs(tmp_path)


@pytest.mark.parametrize("flags, layers, most", [
    ("", 4, 549), ("--variant fast", 12, 954), ("--optimizer_bits 8", 2, 513),
    ("--variant fast --optimizer_bits 8", 12, 1269), (None, 4, 219),
])
def test_the_kernels_of_a_step(flags, layers, most, monkeypatch):
    """A GPU is given no more kernels than today for a step, or with None for a token."""
    monkeypatch.setattr(kernels, "SHAPE", replace(kernels.SHAPE, n_layer=layers))
    counted = kernels.of_a_token(True) if flags is None else kernels.of_a_step(flags)
    assert 0.95 * most < counted.parts.total() <= most, counted.parts
