"""bench.py compare: which runs it makes, in which order, and the table of them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import compare
from helpers import ROOT, TEST_DATA, needs_test_data, refused

from data.formats.files import locked
from data.frozen.hidden_cache import of_files


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The jobs that are made, and a call that makes them. A run's loss is known."""
    jobs = []
    loss = {("qlora", 1e-3): 2.0, ("qlora", 5e-4): 2.1, ("fast", 3e-3): 2.5, ("fast", 1e-3): 2.4}

    def run(args, task, method, iterations, cells):
        jobs.append((task, method, iterations, cells))
        row = lambda rate, seed: dict(
            task=task, method=method, base="hash", learning_rate=rate, seed=seed,
            iterations=iterations, loss=loss.get((method, rate), 3.0) + seed / 100,
            score=0.5, commit="abc",
            step_s=dict(qlora=4.0, fast=1.0)[method] if args.time else "",
            peak_mb=dict(qlora=400, fast=100)[method] if args.time else "")
        return [row(*cell) for cell in cells]

    tasks = dict(dolly=(10, "", 0), sst2=(20, "", 2), rte=(20, "", 2))
    monkeypatch.setattr(compare, "TASKS", tasks)
    methods = dict(fast=("", (1e-3, 3e-3), ("dolly", "sst2", "rte")),
                   qlora=("", (5e-4, 1e-3), ("dolly", "sst2")))
    monkeypatch.setattr(compare, "METHODS", methods)
    monkeypatch.setattr(compare, "run", run)
    base_of = lambda args, method: "hash" if args.base == "b" else "other"
    monkeypatch.setattr(compare, "base_of", base_of)
    words = ["--runs", str(tmp_path / "runs.csv"), "--base", "b", "--dolly", "d", "--glue", "g"]
    return jobs, lambda *more: compare.compare(*words, *more)


def test_rates_then_seeds_then_equal_time(calls, capsys):
    made, call = calls
    call("--time")
    assert len(made) == 3 * 6  # each task and method three times, in turn
    assert [job[:2] for job in made[:6]] == [job[:2] for job in made[6:12]]
    assert all(job[2:] == (5, [(1e-3, 0)]) for job in made)
    made.clear()
    call("--only", "dolly", "fast", "qlora")
    assert made == [
        ("dolly", "fast", 10, [(1e-3, 1), (3e-3, 1)]),  # side networks share a pass of the base
        ("dolly", "qlora", 10, [(5e-4, 1)]), ("dolly", "qlora", 10, [(1e-3, 1)]),
        ("dolly", "fast", 10, [(1e-3, 2), (1e-3, 3)]),
        ("dolly", "qlora", 10, [(1e-3, 2)]), ("dolly", "qlora", 10, [(1e-3, 3)]),
        ("dolly", "fast", 40, [(1e-3, 1), (1e-3, 2), (1e-3, 3)]),
    ]
    made.clear()
    capsys.readouterr()
    call("--only", "dolly", "fast", "qlora")
    assert not made  # nothing is missing
    table = capsys.readouterr().out
    assert ("| method | 0.0005 | 0.001 | 0.003 |\n|---|---|---|---|\n"
            "| fast |  | **2.410** | 2.510 |\n| qlora | 2.110 | **2.010** |  |\n") in table
    assert ("| fast | 2.410, 2.420, 2.430 | 50.0, 50.0, 50.0 | 40 | 2.410, 2.420, 2.430 | "
            "50.0, 50.0, 50.0 | 1 (0.25) | 100 (0.25) |") in table
    assert "| qlora | 2.010, 2.020, 2.030 | 50.0, 50.0, 50.0 |  |  |  | 4 (1.00) |" in table
    assert table.count("| fast |  |  |  |  |  | 1 (0.25) |") == 2  # not run: an empty cell


def test_methods_in_the_base_have_the_rate_of_sst2(calls):
    made, call = calls
    call("--only", "sst2", "rte", "qlora")
    assert [job for job in made if job[0] == "rte"] == [
        ("rte", "qlora", 20, [(1e-3, seed)]) for seed in (1, 2, 3)]
    made.clear()
    call("--minutes", "0")
    assert not made


def test_the_table_of_some_rates(calls, capsys, tmp_path):
    """The best so far is shown; three seeds wait for the others."""
    made, call = calls
    call("--only", "dolly", "qlora")
    lines = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:2]))  # of 5e-4
    capsys.readouterr()
    call("--minutes", "0")
    assert "| qlora | **2.110** |\n" in (table := capsys.readouterr().out)
    assert "| qlora | 2.110 | 50.0 |" in table
    made.clear()
    call("--only", "dolly", "qlora")
    assert made[0] == ("dolly", "qlora", 10, [(1e-3, 1)])


def test_the_page_has_the_tables(capsys):
    """COMPARISON.md ends with what the command prints."""
    compare.compare()
    page = (ROOT / "tests/COMPARISON.md").read_text()
    assert "| fast | 2.476" in (tables := capsys.readouterr().out)
    assert page.endswith(tables)


def test_mistakes(calls, capsys, tmp_path):
    """Runs of another base are not mixed with these, and what is missing is named at once."""
    made, call = calls
    call("--only", "dolly", "qlora")
    made.clear()
    other_base = "--base", "c", "--only", "dolly", "qlora"
    refused(call, *other_base, named="has runs of another base")
    runs = [str(tmp_path / name) for name in ("runs.csv", "more.csv")]
    call("--runs", *runs, *other_base)  # counted as made, and shown
    call("--runs", *runs, "--base", "c", "--only", "dolly", "fast")
    assert {job[1] for job in made} == {"fast"} and len(compare.read(Path(runs[1]))) == 4
    assert "| fast | 2.410', 2.420', 2.430' |" in capsys.readouterr().out  # of the second base
    made.clear()
    refused(call, "--dolly", "", named="--dolly is missing")
    refused(call, "--glue", "", named="--glue is missing")
    for words, named in ((["--minutes", "nan"], "--minutes nan: give 0 or more"),
                         (["--runs", f"{tmp_path}/runs.csv/x.csv"], "runs.csv cannot be written"),
                         (["--runs", f"{tmp_path}/none.csv", runs[0]], "none.csv is missing"),
                         (["--runs", runs[0], runs[0]], "are the same run"),
                         (["--runs", str(tmp_path)], "is a folder")):
        refused(call, *words, named=named)
    with pytest.raises(SystemExit, match="invalid choice: 'qlorra'"):
        call("--only", "qlorra")
    whole = Path(runs[0]).read_text()
    for damaged, named in ((whole[:-9], "its last line is cut off"),
                           (whole.replace("0.001", "fast", 1), "line 3 is not a run"),
                           (whole.replace("dolly", "doly", 1), "line 2 is not a run"),
                           (whole.replace(",abc", "", 1), "line 2 is not a run"),
                           (whole.replace("task,", ""), "line 1 must be task,method")):
        Path(runs[0]).write_text(damaged)
        refused(call, named=named)
    Path(runs[0]).write_text(whole)
    with locked(tmp_path, "no"):
        refused(call, named="Another call writes to")
    assert not made


def test_what_is_no_result(monkeypatch, tmp_path):
    """A loss that is no number is infinite; a run that ends in another way is none."""
    said = SimpleNamespace(stderr="error: The loss is not a number at iteration 3.", stdout="abc")
    monkeypatch.setattr(compare.subprocess, "run", lambda *args, **more: said)
    monkeypatch.setattr(compare, "base_of", lambda *args: "hash")
    args = SimpleNamespace(base="b", dolly="d", time=False)
    row, = compare.run(args, "dolly", "qlora", 10, [(1e-3, 1)])
    assert row["loss"] == math.inf
    said.stderr = "error: d is missing."
    refused(compare.run, args, "dolly", "qlora", 10, [(1e-3, 1)], named="d is missing")

    def stopped(words, **more):
        (Path(words[-1]) / "result.json").write_text('{"interrupted": true, "loss_after": 2.0}')
        return said

    said.stderr = "Stopped after iteration 4: continue with --resume."
    runs = [lambda *args, **more: said, stopped]  # of git, and of train.py
    monkeypatch.setattr(compare.subprocess, "run", lambda *args, **more: runs.pop(0)(*args, **more))
    refused(compare.run, args, "dolly", "qlora", 10, [(1e-3, 1)], named="Stopped after")


@needs_test_data
def test_real_runs(monkeypatch, tmp_path):
    """Through train.py: two side networks, and a wrong flag, which ends the call."""
    rows = [dict(instruction=f"Say {i}", output="a dog") for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    runs = tmp_path / "runs.csv"
    flags = "--sequence_len 64 --batch_size 2 --eval_examples 4 --eval_interval 1"
    monkeypatch.setattr(compare, "TASKS", dict(dolly=(3, flags, 0)))
    monkeypatch.setattr(compare, "SEEDS", (1,))
    methods = dict(fast=("--variant fast", (1e-3, 1e-2), ("dolly",)),
                   paper=("--every 7", (1e-3,), ("dolly",)))
    monkeypatch.setattr(compare, "METHODS", methods)
    base = str(TEST_DATA / "models/stories260K")
    words = ["--runs", str(runs), "--base", base, "--dolly", str(tmp_path / "data.json")]
    refused(compare.compare, *words, named="--every 7 does not divide 5 layers")
    found = compare.read(runs)
    assert [(row["method"], row["learning_rate"], row["seed"]) for row in found] == [
        ("fast", 1e-3, 1), ("fast", 1e-2, 1)]
    losses = [row["loss"] for row in found]
    assert losses[0] != losses[1] and all(5 < loss < 12 for loss in losses)
    assert not any(row["score"] for row in found)
    assert {row["base"] for row in found} == {of_files(TEST_DATA / "models/stories260K")[:12]}
