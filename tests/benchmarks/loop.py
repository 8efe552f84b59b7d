"""What the loop of train.py costs beside the steps themselves."""

import tempfile
import time

import train
from benchmarks.common import alone
from train import TrainConfig

PARTS = "train_step", "mean_loss"  # what is not the loop: the model's own time


def loop(max_iters=150):
    """On the embedded default: the share of the time from the first step to the end of the last one
    that neither the steps nor the evaluations take: batches, the log, the bar, the kept files."""
    total, steps, evaluations = alone(run, int(max_iters))
    rest = total - steps - evaluations
    print(f"{max_iters} iterations of the embedded default, {total:.2f} s in all")
    print(f"steps {steps:.2f} s, evaluations {evaluations:.2f} s, the loop {rest:.3f} s")
    print(f"the loop takes {rest / steps:.2%} of the steps' time")
    return rest / steps


def run(max_iters):
    """Seconds of the loop, of its steps, and of its evaluations."""
    seconds, ends = dict.fromkeys(PARTS, 0.0), []

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if name == "train_step":
                result[0][0].item()  # the step itself is over
            end = time.perf_counter()
            if ends or name == "train_step":  # the first evaluation is before the loop
                ends.append((start, end))
                seconds[name] += end - start
            return result

        return call

    with tempfile.TemporaryDirectory() as out_dir:
        train.main(TrainConfig(max_iters=1, out_dir=out_dir))  # makes the base
        for name in PARTS:
            setattr(train, name, timed(name, getattr(train, name)))
        train.main(TrainConfig(max_iters=max_iters, out_dir=out_dir))
    return ends[-1][1] - ends[0][0], *seconds.values()
