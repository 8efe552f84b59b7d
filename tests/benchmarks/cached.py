"""What an iteration costs with less of the base: --cache_hidden, and a prefix that is read once."""

import math
import shlex
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import train
from benchmarks.common import alone, print_row, print_table
from data.frozen import prefix_cache

FORMS = {
    "adapter, 16 bits": "--h_f_bits 16", "adapter, 8 bits": "--h_f_bits 8",
    "adapter, 4 bits": "--h_f_bits 4", "linear, 8 bits": "--downsample linear --h_f_bits 8",
    "avgpool": "--downsample avgpool",
}


def cached(flags):
    """Processor seconds of an iteration: without a cache, while it is written, and from it; and of
    all iterations of a run three times as long with a cache, beside those of one without."""
    columns = "alone, s", "writing", "from the cache", "alone / cached", "3 runs / 1", "MB on disk"
    print_table("An iteration", "", *columns, "held out")
    for name, more in FORMS.items():
        folder = tempfile.mkdtemp()
        rows, words = [], shlex.split(f"{flags} {more}")
        for with_cache in ((), ("--cache_hidden", folder), ("--cache_hidden", folder)):
            rows.append(alone(run_once, [*words, *with_cache]))
        size = sum(512 * path.stat().st_blocks for path in Path(folder).iterdir())
        shutil.rmtree(folder)
        n = 3 * train.parse_args(words).max_iters
        three = alone(run_once, [*words, "--cache_hidden", folder, "--max_iters", str(n)])[1]
        shutil.rmtree(folder)
        seconds, sums, losses = zip(*rows)
        print_row(
            name, *(f"{s:.3f}" for s in seconds), f"{seconds[0] / seconds[2]:.1f}",
            f"{three / sums[0]:.2f}", f"{size / 1e6:,.0f}", " ".join(f"{x:.4f}" for x in losses),
        )


def prefix(*flags):
    """Processor seconds of an iteration whose examples begin alike: with what they begin with read
    in every one of them, and once."""
    print_table("An iteration", "round", "every time, s", "once, s", "ratio", "held out")
    for i in range(1, 4):
        (before, _, loss), (after, _, same) = alone(run_whole, flags), alone(run_once, flags)
        losses = f"{loss:.6f} {same:.6f}"
        print_row(i, f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}", losses)


def run_whole(words):
    prefix_cache.SHORTEST_PREFIX = math.inf
    return run_once(words)


def run_once(words):
    """The median of an iteration's processor seconds, their sum, and the held-out loss."""
    step, seconds = train.train_step, []

    def timed(*args):
        start = time.process_time()
        result = step(*args)
        result[0][0].item()
        seconds.append(time.process_time() - start)
        return result

    train.train_step = timed
    with tempfile.TemporaryDirectory() as out_dir:
        cfg = train.parse_args([*words, "--out_dir", out_dir])
        train.load_task = without_score(train.load_task)
        result = train.main(cfg)
    return statistics.median(seconds), sum(seconds), result["loss_after"]


def without_score(load_task):
    """Load a task whose score, which needs the base, is not asked."""

    def load(*args):
        task = load_task(*args)
        task.score = lambda beside: [{} for _ in beside.models]
        return task

    return load
