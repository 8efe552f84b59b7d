"""`bench.py gpu`: every part runs on a CPU with tiny shapes, and what fails ends alone."""

import json
import subprocess
from itertools import count
from unittest import mock

import account
import bench
import pytest
import torch
from benchmarks import gpu, gpu_claims, gpu_common, gpu_kernels, gpu_steps, gpu_trace
from benchmarks.gpu_common import Sizes, target
from helpers import run_script

from data import InputError


def run_here(command, **_):
    """subprocess.run of a script, in this process."""
    return subprocess.CompletedProcess(command, 0, run_script(*command[1:]))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """gpu.json of all parts, in this process, where torch is loaded already."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "METHOD_ROWS", ("full", "qlora"))  # two of the seven
        patch.setattr(gpu_trace, "subprocess", mock.Mock(run=run_here))
        bench.main(["gpu", "--small", "--out", str(out), "--only", *gpu.PARTS])
    return json.loads((out / "gpu.json").read_text())


def test_every_part_has_its_rows(report):
    """No part has failed, and each has what its columns say, with seconds and the machine."""
    assert list(report["parts"]) == list(gpu.PARTS)
    for name, part in report["parts"].items():
        assert "error" not in part and part["rows"] and part["machine"]["name"] == "cpu", name
        found = {key for row in part["rows"] for key in row}
        absent = set(gpu.PARTS[name][1].split()) - found - {"theirs_us"}
        assert not absent, name
    rows = {name: [row["what"] for row in part["rows"]] for name, part in report["parts"].items()}
    small = Sizes.small()
    assert rows["kernels"].count("matvec") == 5 * len(small.layers)
    assert len(rows["fits"]) == len(small.claims) and rows["repeats"] == ["on the GPU", "streamed"]
    assert rows["default"] == ["the base, once, on the CPU", "fp32"]
    assert rows["tokens"] == ["16 bits", "4 bits", "4 bits / 16 bits"]
    assert len(rows["steps_7b"]) == 2 * len(rows["steps_70b"]) == 16
    assert {"as written", "h_f in 4 bits", "full", "qlora, checkpoint"} <= set(rows["memory"])
    errors = [
        row["error"] for part in report["parts"].values() for row in part["rows"] if "error" in row
    ]
    assert all(error.startswith("needs ") for error in errors)  # the libraries of theirs


def test_each_figure_stands_beside_its_target(report):
    """Bandwidth, times and memory are judged; the figures of memory are positive."""
    whats = {
        (name, t["what"]) for name, part in report["parts"].items()
        for row in part["rows"] for t in row.get("targets", ())
    }
    assert {
        ("kernels", "of a copy"), ("tokens", "tokens/s, 4 bits / 16 bits"), ("default", "exact"),
        ("steps_7b", "time / forward alone, 16 bits"), ("memory", "account / peak"),
        ("fits", "runs"), ("repeats", "steps that differ"),
    } <= whats
    for row in report["parts"]["repeats"]["rows"]:
        assert row["gradients"] > 20 and row["different"] == 0
    for row in report["parts"]["memory"]["rows"]:
        assert row["account_GB"] > 0 and row["peak_GB"] > 0 and row["ms"] > 0
    assert target("time", 1.35, "<= 1.35")["reached"] and not target("x", 1.0, "< 1")["reached"]
    assert gpu.verdict(target("time", 1.5, "<= 1.35")) == "time 1.5 (<= 1.35: MISSED)"


def test_a_part_that_fails(monkeypatch, tmp_path, capsys):
    """Its rows so far and its error are written, and the next part goes on."""

    def broken(sizes):
        yield dict(what="first", targets=[target("time", 2.0, "<= 1")])
        raise RuntimeError("no more of it\nat all")

    monkeypatch.setitem(gpu.PARTS, "kernels", (broken, "what", 1))
    monkeypatch.setitem(gpu.PARTS, "tokens", (lambda sizes: iter([dict(what="next")]), "what", 1))
    bench.main(["gpu", "--small", "--out", str(tmp_path), "--only", "kernels", "tokens"])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [row["what"] for row in parts["kernels"]["rows"]] == ["first"]
    assert parts["kernels"]["error"].startswith("RuntimeError: no more of it")
    assert parts["tokens"]["rows"] == [dict(what="next")]
    printed = capsys.readouterr().out
    assert "kernels has failed: RuntimeError: no more of it" in printed
    assert "| kernels | 0 of 1 | time 2 (<= 1: MISSED); RuntimeError: no more of it |" in printed


def test_a_row_without_memory():
    """What does not fit is a row with a reason, and not the end of its part."""

    def too_large(sizes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    figures = gpu_steps.attempt(too_large, Sizes.small())
    assert figures == dict(error="out of memory: CUDA out of memory. Tried to allocate 2 GiB.")
    config = Sizes.small().large
    found = dict(gpu_steps.compared({"qst": dict(ms=1.0), "theirs qlora": figures}, "large"))
    assert found == {} and config.n_layer == 2


def test_each_part_has_a_process_and_its_time(monkeypatch, tmp_path):
    """A process that dies, or takes too long, is told in gpu.json, and the others run."""
    calls = []

    def run(command, timeout):
        name = command[command.index("--only") + 1]
        calls.append((name, "--small" in command))
        if name == "tokens":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -9 if name == "kernels" else 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    bench.main(["gpu", "--small", "--out", str(tmp_path)])
    assert calls == [(name, True) for name in gpu.PARTS]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["kernels"]["error"] == "ended with -9"
    assert parts["tokens"]["error"].startswith("ended with cut off after")
    assert sum(seconds for *_, seconds in gpu.PARTS.values()) <= 17 * 60
    calls.clear()
    bench.main(["gpu", "--small", "--out", str(tmp_path), "--minutes", "0"])
    assert not calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
def test_without_a_gpu():
    """It says what to do."""
    with pytest.raises(InputError, match="--small runs the same code on a CPU"):
        bench.main(["gpu"])


def event(cat, name, ts, dur, **args):
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, tid=1, args=args)


def test_a_trace_of_a_gpu():
    """A kernel belongs to the part in which it was launched, whenever it runs; gaps are counted."""
    events = [
        event("user_annotation", "step", 0, 100), event("user_annotation", "base", 5, 20),
        event("user_annotation", "side", 30, 10), event("user_annotation", "backward", 50, 20),
        event("cuda_driver", "cuLaunchKernelEx", 6, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 8, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 32, 1, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 55, 1, correlation=4),
        event("cuda_runtime", "cudaMemcpyAsync", 90, 1, correlation=5),
        event("kernel", "dequantize_kernel", 100, 10, correlation=1),
        event("kernel", "nvjet_tst_128x256", 110, 30, correlation=2),
        event("kernel", "nvjet_tst_64x8", 145, 5, correlation=3),
        event("kernel", "elementwise", 150.5, 9.5, correlation=4),
        event("gpu_memcpy", "Memcpy HtoD", 170, 10, correlation=5),
        dict(ph="i", name="an instant"),
    ]
    rows = {row["what"]: row for row in gpu_trace.shares(events)}
    ms = {what: round(1000 * row["ms"], 3) for what, row in rows.items()}
    assert ms == {
        "products of the base": 30, "dequantizing": 10, "the rest of the step": 10,
        "side network, backward": 9.5, "side network, forward": 5, "gaps between kernels": 15.5,
    }
    assert rows["gaps between kernels"]["kernels"] == 2  # longer than a microsecond
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_random_weights_are_as_large_as_real_ones():
    """Made in the form in which they are kept, with a standard deviation near 0.02; a base of one
    layer has as many layers and the bytes of one."""
    sizes = Sizes.small()
    q = gpu_common.random_quantized((64, 256), sizes.device)
    assert 0.01 < q.dequantize().std() < 0.04
    for quant in ("nf4", "int4", "int3", "none"):
        base = gpu_common.random_base(sizes.large, quant, torch.float32, sizes.device)
        idx = torch.randint(100, (2, 8))
        assert 4 < base.loss(idx, idx) < 9
    one = gpu_common.random_base(sizes.large, "none", torch.float32, sizes.device, one_layer=True)
    assert len(one.layers) == 2 and one.layers[0] is one.layers[1]


def test_beside_bitsandbytes(monkeypatch):
    """With bitsandbytes there is a row for all shapes: its time by ours, and Unsloth's 1.15."""
    monkeypatch.setattr(gpu_kernels, "theirs", lambda weights, *_: [weights[0].dequantize])
    monkeypatch.setattr(gpu_kernels, "per_call", lambda functions, _: len(functions))
    *_, last = gpu_kernels.kernels(Sizes.small())
    (found,) = last["targets"]
    assert last["what"] == "Unsloth's challenge A" and last["us"] == 2 * last["theirs_us"]
    assert found["figure"] == 0.5 and found["bound"] == ">= 1.15" and not found["reached"]


def test_a_card_of_so_many_gigabytes(monkeypatch):
    """Torch gets what a card has beside CUDA's half gigabyte, and then all of it again; a step that
    needs more is a missed target."""
    fractions, cuda = [], torch.device("cuda", 0)
    whole = mock.Mock(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    name = "set_per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, name, lambda part, device: fractions.append(part))
    with pytest.raises(torch.OutOfMemoryError), gpu_claims.card_of(8, cuda):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert fractions == [7.5 / 80, 1.0]
    with pytest.raises(ValueError, match="less than 96 GB"), gpu_claims.card_of(96, cuda):
        pass
    monkeypatch.setattr(gpu_claims, "card_of", mock.Mock(side_effect=torch.OutOfMemoryError("no")))
    row, *_ = gpu_claims.fits(Sizes.small())
    assert row["error"] == "out of memory: no" and not row["targets"][0]["reached"]


def test_gradients_that_differ_are_seen(monkeypatch):
    """Twenty steps of a base that changes a little each time."""

    times = count()

    def changing(*args, distinct, **options):
        base = gpu_common.random_base(*args, "nf4", **options)
        base.norm.register_forward_hook(lambda norm, x, y: y * (1 + next(times) / 100))
        return base

    monkeypatch.setattr(gpu_claims, "streamed_base", changing)
    sizes = Sizes.small()
    rows = list(gpu_claims.repeats(sizes))
    assert [row.get("steps") for row in rows] == [0, 19], rows
    assert not rows[1]["targets"][0]["reached"]


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float16"), ((9, 0), "bfloat16")])
def test_the_sizes_of_a_gpu(capability, dtype, monkeypatch):
    """A T4 measures fp16, and each claim is one that the account of its flags can be made of."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    sizes = Sizes.full()
    assert sizes.dtype == getattr(torch, dtype)
    for gigabytes, config, tokens, flags in sizes.claims:
        cfg = gpu_steps.parse(sizes, tokens, flags)
        assert (cfg.batch_size, cfg.sequence_len) == tokens and 8 <= gigabytes <= 48
        assert config.n_layer >= 32 and cfg.method in ("qst", "qlora")
