"""data/run/report.py: what a run counts, keeps the best of, writes down, and goes on from."""

import csv

import pytest
import torch
from helpers import small_base, small_config

from data.run import report
from data.run.charts import line_chart
from data.run.log import TrainingLog, mixing
from model import count_weights
from qst import add_trainable
from side import SideConfig, SideNetwork
from train import TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("meta")  # all but a CPU are not waited for


def log_of(taken, device=CPU, out_dir=None, **changes):
    """A log of as many iterations, of which the step was taken or not, each with its loss i."""
    log, read = TrainingLog(out_dir, TrainConfig(max_iters=len(taken), **changes), device), []
    log.evaluated(9.0)
    with log:
        for i, was in enumerate(taken, 1):
            log.begin()
            read.append(log.stepped(torch.tensor(float(i)), torch.tensor(was), 10, wait=i == 5))
            if i % 2 == 0:
                log.evaluated(5.0 - i)
            if read[-1]:
                log.write(1e-3)
    return log, read


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("taken, failures, skipped", [
    ([True, False, False, True, False, True, True, False], 1, 4), ([True] * 8, 0, 0),
    ([False, False, True, True, True, False, False, False], 3, 5),
])
def test_steps_left_out_are_counted(taken, failures, skipped, device):
    """All of them, and those in a row up to now; also where several are looked at together."""
    log, _ = log_of(taken, device, log_interval=4)
    assert (log.failures, log.skipped) == (failures, skipped)


def test_values_are_waited_for_at_times():
    """On a GPU at every log_interval and where it is asked for; the time is shared out among the
    steps since then. On a CPU always."""
    log, read = log_of([True] * 8, GPU, log_interval=4)
    assert read == [False, False, False, True, True, False, False, True] and log.loss == 8
    assert len(log.step_ms) == 3
    total = sum(steps * each for steps, each in zip((4, 1, 3), log.step_ms))
    assert total == pytest.approx(1000 * log.seconds)
    assert all(log_of([True] * 8, log_interval=4)[1])


def test_ten_steps_in_a_row_without_a_number_are_an_error():
    """Nine are not, and neither are more with a step between them that was taken."""
    for taken, is_error in (([False] * 9, False), ([False] * 10, True),
                            ([False] * 9 + [True] + [False] * 9, False)):
        log, _ = log_of(taken)
        log.evaluated(2.0)
        assert bool(log.error) == is_error


def test_the_best_is_that_of_a_trained_side_network():
    """The lowest held-out loss after a step, and the first of equals; before the first step it is
    only noted."""
    log, best = TrainingLog(None, TrainConfig(), CPU), []
    for log.iteration, loss in enumerate([2.0, 5.0, 3.0, 4.0, 3.0]):
        best.append(log.evaluated(loss))
    assert best == [False, True, True, False, False]
    assert (log.loss_before, log.best_loss, log.best_iteration, log.held_out_loss) == (2, 3, 2, 3)


def test_lines_and_curves(tmp_path):
    """A line where one is due, with a held-out loss where it is of this iteration; the curves have
    the same points; tokens per second are those of the steps' own time."""
    log, _ = log_of([True] * 8, out_dir=tmp_path, log_interval=3)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [int(row["iteration"]) for row in rows] == [3, 5, 6]
    assert [float(row["held_out_loss"] or 0) for row in rows] == [0, 0, -1]
    assert [float(row["loss"]) for row in rows] == [3, 5, 6]
    assert log.curves == {
        "training": [(3, 3), (5, 5), (6, 6)],
        "held out": [(0, 9), (2, 3), (4, 1), (6, -1), (8, -3)], "alpha": [], "gate": [],
    }
    assert log.speed()["tokens_per_second"] == pytest.approx(80 / log.seconds)
    assert (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("settings, columns", [
    ({}, ("1.00000", "0.50000")), (dict(mix="released"), ("0.73106", "0.50000")),
    (dict(gate="channel"), ("1.00000", "0.62246")), (dict(mix="side", gate="sum"), ("", "")),
])
def test_alpha_and_the_mean_gate_are_logged(settings, columns, tmp_path):
    """Each a column and a curve, empty where a side network has none; mix.svg draws what there is,
    and loss.svg the loss of the start as a line by its name."""
    side = SideNetwork(small_config(), SideConfig(reduction=4, **settings))
    log = TrainingLog(tmp_path, TrainConfig(max_iters=2, log_interval=1, side="mine"), CPU)
    log.evaluated(9.0)
    with log:
        for _ in range(2):
            log.begin()
            log.stepped(torch.tensor(1.0), torch.tensor(True), 10, wait=True)
            log.write(1e-3, side)
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [(row["alpha"], row["gate"]) for row in rows] == [columns] * 2
    assert [len(log.curves[name]) for name in ("alpha", "gate")] == [2 * bool(x) for x in columns]
    assert (tmp_path / "mix.svg").exists() == any(columns)
    assert ">mine</text>" in (tmp_path / "loss.svg").read_text()
    assert mixing(torch.nn.Linear(2, 2)) == [None, None]  # what other methods train


def test_a_log_goes_on_with_all_that_it_has_counted():
    """Nothing of what a run has counted begins anew."""
    log, _ = log_of([True, False, True, True, True, False], log_interval=2)
    log.stepped(torch.tensor(1.0), torch.tensor(True), 5, wait=True, cached=True)
    log.failures, log.before = 3, {"accuracy": 0.5}
    again = TrainingLog(None, log.cfg, CPU)
    fresh = dict(vars(again))
    vars(again).update(log.state())
    for name in set(fresh) - {"out_dir", "cfg", "device", "shown", "unread"}:
        assert getattr(again, name) == getattr(log, name) != fresh[name], name


@pytest.mark.parametrize("low, top", [(-2.8e6, 0.8), (0.0, 1e30), (-3.0, 0.0), (-1e30, 1e30)])
def test_a_chart_of_any_numbers(low, top, tmp_path):
    """A run that diverges has an alpha of minus millions: it is drawn as soon, with a few lines."""
    line_chart(tmp_path / "x.svg", "x", "y", {"a": [(1, low), (2, top), (3, float("nan"))]})
    drawn = (tmp_path / "x.svg").read_text()
    assert 3 <= drawn.count("<line ") <= 13 and "nan" not in drawn


@pytest.mark.parametrize("task, example", [("instruct", "Why?"), ("sst2", "")])
def test_a_command_to_ask_it(task, example, capsys):
    """Where what was trained answers questions; a label is scored with --eval_only."""
    cfg = TrainConfig(task=task, head="lm", out_dir="out")
    report.conclude("base", cfg, dict(best_iteration=1, peak_memory_bytes=1, seconds=1.0),
                    example)
    assert ("Ask it yourself" in capsys.readouterr().out) == bool(example)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings, trained", [
    (dict(method="full"), lambda n, head: n),
    (dict(method="full", n_labels=2), lambda n, head: n - head + 2 * 32),
    (dict(reduction=1, downsample="linear", rank=32), None),
])
def test_frozen_weights_are_those_that_are_not_trained(settings, trained, tied):
    """Of full finetuning the head that a classifier replaces, unless it is the embedding; of a side
    network all of the base, also where the side network is the larger one."""
    base = small_base("none", tied=tied)
    n, head = count_weights(base.config), 0 if tied else base.lm_head.weight.numel()
    model = add_trainable(base, SideConfig(**settings))
    found = report.sizes(model, n)
    if trained:
        assert found["trainable_parameters"] == trained(n, head)
        assert found["total_parameters"] == n + 2 * 32 * ("n_labels" in settings)
    else:
        assert found["trainable_parameters"] > n
        assert found["total_parameters"] == n + found["trainable_parameters"]


@pytest.mark.parametrize("loss, learned", [(1.9, True), (2.0, False), (2.1, False)])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_has_not_learned(loss, learned, interrupted, capsys):
    """It is said where the loss is not below that of the start, and the run has come to its end."""
    result = dict(loss_before=2.0, loss_after=loss, interrupted=interrupted, best_iteration=1)
    cfg = TrainConfig(head="lm", out_dir="out")
    report.conclude("base", cfg, result | dict(peak_memory_bytes=1, seconds=1.0), "")
    printed = capsys.readouterr().out
    assert f"held-out loss   2.000 base, {loss:.3f} QST" in printed
    assert ("It has not learned" in printed) == (not learned and not interrupted)
