"""All measurements on one GPU with one command, part by part: `python tests/bench.py gpu`.

Each part has a process of its own, so that one that fails takes no other with it. After each row
OUT/gpu.json is written anew, so that a run that is cut off has left what it had. Weights are random
and made in 4 bits on the GPU; nothing is downloaded.
"""

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import gpu_claims, gpu_kernels, gpu_steps, gpu_stream, gpu_trace
from benchmarks.common import ROOT, print_row, print_table
from benchmarks.gpu_common import Sizes
from data import InputError
from data.formats.files import make_writable_folder, write_json
from data.run.report import provenance
from data.settings.flags import Parser

PARTS = {  # name: (a function of the sizes that yields rows, its columns, seconds at most)
    "kernels": (gpu_kernels.kernels, "what shape rows us GB_per_s of_a_copy theirs_us", 90),
    "tokens": (gpu_kernels.tokens, "what ms_per_token tokens_per_s graph_ms", 60),
    "steps_7b": (gpu_steps.steps_7b, gpu_steps.COLUMNS, 120),
    "trace": (gpu_trace.trace, "what ms share kernels", 60),
    "default": (gpu_trace.default, "what score seconds step_ms", 120),
    "steps_70b": (gpu_steps.steps_70b, gpu_steps.COLUMNS, 150),
    "memory": (gpu_steps.memory, gpu_steps.MEMORY_COLUMNS, 90),
    "streamed": (gpu_stream.streamed, gpu_stream.COLUMNS, 90),
    "repeats": (gpu_claims.repeats, "what gradients different steps", 60),
    "fits": (gpu_claims.fits, gpu_claims.COLUMNS, 150),
}
SHOWN = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
         "power.draw", "power.limit", "temperature.gpu")


def gpu(*words):
    """All measurements on one GPU, each beside what it should reach; OUT/gpu.json has them all."""
    parser = Parser("bench.py gpu", description=gpu.__doc__)
    parser.add_argument("--out", default="out-gpu", help="the folder of gpu.json")
    parser.add_argument("--small", action="store_true", help="the same code on a CPU, tiny shapes")
    parser.add_argument("--minutes", type=float, default=8, help="parts are cut off then")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="these parts alone, in this process, and beside "
        "what OUT/gpu.json holds of others"
    )
    args = parser.parse_args(words)
    if not args.small and not torch.cuda.is_available():
        raise InputError("torch sees no GPU here: --small runs the same code on a CPU.")
    out = Path(args.out)
    make_writable_folder(out, "--out")
    if args.only:
        sizes = Sizes.small() if args.small else Sizes.full()
        for name in args.only:
            measure(name, sizes, out)
    else:
        (out / "gpu.json").unlink(missing_ok=True)
        in_processes(args, time.time() + 60 * args.minutes)
    conclude(read(out))


def in_processes(args, end):
    """Each part in a process of its own, until the time is over."""
    for name, (_, _, seconds) in PARTS.items():
        command = [sys.executable, str(ROOT / "tests/bench.py"), "gpu", "--only", name]
        command += ["--out", args.out] + ["--small"] * args.small
        left = min(seconds, end - time.time())
        try:
            code = "no time left"
            if left > 0:
                code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = f"cut off after {left:.0f} s"
        report = read(Path(args.out))
        if code and "error" not in report["parts"].get(name, {}):
            print(f"\n{name}: ended with {code}", flush=True)
            report["parts"].setdefault(name, dict(rows=[]))["error"] = f"ended with {code}"
            write_json(Path(args.out) / "gpu.json", report)


def read(out):
    """What OUT/gpu.json holds so far."""
    path = out / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else dict(parts={})


def measure(name, sizes, out):
    """Measure a part, and write gpu.json after each row; a failure is told and written, too."""
    function, columns, _ = PARTS[name]
    columns = columns.split()
    report, part, started = read(out), dict(rows=[]), time.time()
    report["parts"][name] = part
    report |= provenance()
    print_table(name, *columns, "targets")
    try:
        for row in function(sizes):
            part["rows"].append(row)
            part |= dict(seconds=time.time() - started, machine=machine(sizes.device))
            write_json(out / "gpu.json", report)
            cells = [show(row.get(column, "")) for column in columns]
            print_row(*cells, row.get("error") or "; ".join(map(verdict, row.get("targets", ()))))
    except Exception as error:
        traceback.print_exc()
        part["error"] = f"{type(error).__name__}: {error}"
        print(f"\n{name} has failed: {part['error'].splitlines()[0]}", flush=True)
    part |= dict(seconds=time.time() - started, machine=machine(sizes.device))
    write_json(out / "gpu.json", report)


def show(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value


def verdict(target):
    """A target beside its figure, in words."""
    word = "reached" if target["reached"] else "MISSED"
    return f"{target['what']} {target['figure']:.3g} ({target['bound']}: {word})"


def machine(device):
    """What it ran on: the GPU, its driver and its clocks just now."""
    if device.type != "cuda":
        return dict(name=device.type)
    properties = torch.cuda.get_device_properties(device)
    about = dict(
        name=properties.name, capability=list(torch.cuda.get_device_capability(device)),
        memory_bytes=properties.total_memory, processors=properties.multi_processor_count,
        cuda=torch.version.cuda,
    )
    query = ["nvidia-smi", f"--query-gpu={','.join(SHOWN)}", "--format=csv,noheader"]
    try:  # of the first GPU, if there are several
        shown = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return about
    line = shown.strip().partition("\n")[0]
    return about | dict(zip(SHOWN, map(str.strip, line.split(","))))


def conclude(report):
    """Print every target once more: how many of them were reached, and those that were missed."""
    if any(part.get("machine", {}).get("name") == "cpu" for part in report["parts"].values()):
        print("\nTiny shapes on a CPU: this tries the code, and the figures mean nothing.")
    print_table("Targets", "part", "reached", "missed", "seconds")
    for name, part in report["parts"].items():
        targets = [target for row in part["rows"] for target in row.get("targets", ())]
        missed = [verdict(target) for target in targets if not target["reached"]]
        errors = [part["error"].splitlines()[0]] if part.get("error") else []
        seconds = f"{part.get('seconds', 0):.0f}"
        reached = f"{len(targets) - len(missed)} of {len(targets)}"
        print_row(name, reached, "; ".join(missed + errors) or "-", seconds)
