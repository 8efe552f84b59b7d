"""What several side networks on one forward pass cost, beside one: `train.py --sweep`."""

import resource
import shlex
import tempfile
import time

import train
from benchmarks.common import FREED, alone, print_row, print_table

SWEEPS = {1: "gate=scalar", 2: "gate=scalar,sum", 4: "gate=scalar,sum seed=1,2",
          8: "gate=scalar,sum learning_rate=3e-4,1e-3,3e-3,1e-2"}


def sweep(flags):
    """Whole runs of train.py with these flags, each in a process of its own, once for the time, of
    the processor and without loading, and once for the memory, where what is freed goes back to the
    system, which takes time."""
    print_table("A sweep", "side networks", "processor, s", "of one", "peak, MB", "MB for one more")
    one = None
    for n, words in SWEEPS.items():
        seconds, _ = alone(run_once, flags, words)
        # One arena for all threads: glibc has one for each, which keep what is freed.
        _, peak = alone(run_once, flags, words, MALLOC_ARENA_MAX="1", **FREED)
        one = one or (seconds, peak)
        more = f"{(peak - one[1]) / (n - 1) / 1e6:,.0f}" if n > 1 else ""
        print_row(n, f"{seconds:,.1f}", f"{seconds / one[0]:.2f}", f"{peak / 1e6:,.0f}", more)


def run_once(flags, words):
    """Processor seconds and the peak of a sweep."""
    run, start = train.train, []

    def timed(*args):
        start.append(time.process_time())
        run(*args)
        start.append(time.process_time())

    train.train = timed
    with tempfile.TemporaryDirectory() as out_dir:
        train.main(train.parse_args([*shlex.split(flags), "--sweep", words, "--out_dir", out_dir]))
    return start[1] - start[0], 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
