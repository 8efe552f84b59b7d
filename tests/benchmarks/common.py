"""What benchmarks share: a function alone in a process, medians, memory, Markdown tables."""

import ctypes
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from data.formats.save import save_pretrained
from data.tasks import text
from data.tasks.scoring import mean_loss
from model import Transformer
from qst import SharedBase

ROOT = Path(__file__).parents[2]
# Environment in which what is larger than 64 kB goes back to the system when it is freed, so that
# the peak is of what lives, and not of what the allocator keeps.
FREED = dict(
    MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000"
)


def alone(function, *args, **environment):
    """Call a function in a fresh process with some environment variables, and return its result."""
    with patch.dict(os.environ, environment):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *args).result()


def medians(functions, repeats):
    """Seconds of each function, side by side: one call of each in turn, and the medians."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def forget_peak():
    """Let this process's peak begin anew, and return the bytes that it has now (Linux only)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name):
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def write_model(folder, config):
    """Write a random model of a shape in fp16, and return its number of weights."""
    torch.manual_seed(0)
    model = Transformer(config).half()
    save_pretrained(model, folder)
    return sum(p.numel() for p in model.parameters())


def perplexity(model, windows):
    """The perplexity of the windows of a text, as `text.read` returns them."""
    return text.perplexity(mean_loss(SharedBase([model]), windows, 2)[0])


def print_table(title, *columns):
    """Print the head of a Markdown table."""
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
