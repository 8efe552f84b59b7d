"""Where the time of a step goes, from a trace of torch's profiler; and the embedded default.

A kernel belongs to the part of the step in which the host has launched it. Between the kernels the
GPU waits for the host: the gaps.
"""

import bisect
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import model as model_py
from account import settings_of_step
from benchmarks.common import ROOT
from benchmarks.gpu_common import target, wait
from benchmarks.gpu_steps import our_model, parse, random_ids
from data.formats.save import save_pretrained
from data.run.run import Run
from data.tasks import tiny
from model import ModelConfig, Transformer
from train import load_tokenizer, make_tiny_base, train_step

PARTS = ("base", "side", "loss", "backward", "step")  # in the trace, the inner one counts
PRODUCTS = ("gemm", "cutlass", "nvjet", "xmma", "gemv", "splitk", "::mm", "::addmm", "::bmm")
LAUNCHES = ("cuda_runtime", "cuda_driver")
GAP = 1.0  # microseconds between two kernels that count as a gap


@contextmanager
def named_parts(model):
    """Name the parts of a step in the trace."""

    def named(name, function):
        def call(*args, **kwargs):
            with record_function(name):
                return function(*args, **kwargs)

        return call

    with patch.object(model_py._ChunkedLoss, "apply", named("loss", model_py._ChunkedLoss.apply)):
        for layer in model.base.layers:
            layer.forward = named("base", layer.forward)
        for name in ("start", "step", "mix"):
            setattr(model.side, name, named("side", getattr(model.side, name)))
        backward = torch.Tensor.backward
        with patch.object(torch.Tensor, "backward", named("backward", backward)):
            yield


def trace(sizes):
    """A step of QST: milliseconds of kernels in each part, their share, and the gaps."""
    cfg = settings_of_step(parse(sizes, sizes.steps[0], "--method qst"))
    model = our_model(sizes, sizes.large, cfg)
    run, idx = Run(model, cfg), random_ids(sizes.large, cfg)

    def step():
        with record_function("step"):
            train_step([run], [(idx, idx, 1.0)], 1)

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (sizes.device.type == "cuda")
    with named_parts(model), tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            step()
        wait(sizes.device)
        start = time.perf_counter()
        step()
        launched = time.perf_counter() - start
        wait(sizes.device)
        seconds = time.perf_counter() - start
        with profile(activities=activities) as profiler:
            step()
            wait(sizes.device)
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    yield dict(what="a step, not traced", ms=1000 * seconds)
    yield dict(what="of it the host's launching", ms=1000 * launched, share=launched / seconds)
    yield from shares(events)


def shares(events):
    """Rows of a trace's events: each kind of kernel, and the gaps between kernels."""
    whole = [e for e in events if e.get("ph") == "X"]
    kernels = [e for e in whole if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = {e["args"]["correlation"]: e["ts"] for e in whole
                if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {})}
    if not kernels:  # on a CPU an operator that calls no other stands for a kernel
        kernels = leaves([e for e in whole if e.get("cat") == "cpu_op"])
    ranges = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"]) for e in whole
        if e.get("cat") == "user_annotation" and e["name"] in PARTS
    )
    found = {}
    for kernel in kernels:
        at = launched.get(kernel.get("args", {}).get("correlation"), kernel["ts"])
        ms, count = found.get(kind := kind_of(kernel["name"], part_at(at, ranges)), (0.0, 0))
        found[kind] = ms + kernel["dur"] / 1000, count + 1
    busy, gaps = busy_and_gaps(kernels)
    span = busy + sum(gaps)
    for kind, (ms, count) in sorted(found.items(), key=lambda item: -item[1][0]):
        yield dict(what=kind, ms=ms, share=1000 * ms / span, kernels=count)
    long = [gap for gap in gaps if gap > GAP]
    yield dict(what="gaps between kernels", ms=sum(gaps) / 1000, share=sum(gaps) / span,
               kernels=len(long))


def part_at(at, ranges):
    """The innermost part that the host was in: ranges are sorted (start, end, name)."""
    for start, end, name in reversed(ranges[: bisect.bisect_right(ranges, (at, float("inf"), ""))]):
        if at <= end:
            return name
    return "outside"


def kind_of(name, part):
    """What a kernel is for."""
    if "dequantize" in name:
        return "dequantizing"
    if part == "base":
        product = any(word in name.lower() for word in PRODUCTS)
        return "products of the base" if product else "the rest of the base"
    names = dict(side="side network, forward", backward="side network, backward", loss="loss",
                 step="the rest of the step")
    return names.get(part, part)


def leaves(events):
    """Those in which no other event lies."""
    events = sorted(events, key=lambda e: (e.get("tid"), e["ts"], -e["dur"]))
    return [
        e for e, after in zip(events, [*events[1:], None])
        if after is None or after["tid"] != e["tid"] or after["ts"] >= e["ts"] + e["dur"]
    ]


def busy_and_gaps(kernels):
    """Microseconds in which some kernel runs, and the lengths of the gaps between."""
    busy, gaps, end = 0.0, [], None
    for kernel in sorted(kernels, key=lambda e: e["ts"]):
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        if end is not None and start > end:
            gaps.append(start - end)
        end = start if end is None else max(end, start)
        busy += max(0.0, stop - end)
        end = max(end, stop)
    return busy, gaps


# --------------------------------------------------------------------------------------
# The embedded default


def make_untrained(folder):
    with tiny.new_base(folder) as unfinished:
        vocab_size = load_tokenizer(unfinished).vocab_size
        save_pretrained(Transformer(ModelConfig(vocab_size, **tiny.BASE)), unfinished)


def default(sizes):
    """`python train.py` as it is, in bf16 and in fp16: its score, and its seconds."""
    small = sizes.device.type == "cpu"
    flags = "--max_iters 2 --eval_examples 4 --batch_size 2" if small else ""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"QST_CACHE": folder} if small else {}
        with patch.dict(os.environ, cache):
            start = time.time()
            # On a CPU a base that has learned nothing, which is made in a moment.
            tiny.base_folder(make_untrained if small else make_tiny_base)
            yield dict(what="the base, once, on the CPU", seconds=time.time() - start)
            for dtype in ("fp32",) if small else ("bf16", "fp16"):
                own = f"--dtype {dtype} --device {sizes.device.type} {flags}".split()
                command = [sys.executable, str(ROOT / "train.py"), *own]
                command += ["--out_dir", f"{folder}/{dtype}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    yield dict(what=dtype, error=done.stderr.strip().rpartition("\n")[2])
                    continue
                result = json.loads(Path(folder, dtype, "result.json").read_text())
                score = result["exact_match_after"]
                row = {name: result[name] for name in ("seconds", "step_ms")}
                exact = target("exact", score, ">= 1")
                yield dict(what=dtype, score=score, targets=[exact]) | row
