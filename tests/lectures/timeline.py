"""The live bytes through one training step, of full finetuning, QLoRA and QST, both with and
without recomputing, as one picture: timeline.svg in --out_dir.

    python tests/lectures/timeline.py
    python tests/lectures/timeline.py --preset llama-2-70b --batch_size 16 --sequence_len 384

It is account.py's arithmetic, and takes its flags; the time that passes is counted in the
floating-point operations of the step.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]  # tests/, and above

from account import (  # noqa: E402
    Live, about, config_of, memory_report, parse_args, settings_of_step,
)
from data.run.charts import line_chart  # noqa: E402
from data.settings.flags import run_main  # noqa: E402
from data.settings.methods import METHODS  # noqa: E402
from model import count_weights  # noqa: E402

STEPS = {  # label: settings
    "full finetuning": dict(method="full", checkpoint=False),
    "QLoRA": dict(method="qlora", checkpoint=False),
    "QLoRA, checkpoint": dict(method="qlora", checkpoint=True),
    "QST": dict(method="qst", checkpoint=False, h_f_bits=16),
    "QST, checkpoint": dict(method="qst", checkpoint=True, h_f_bits=8),
}
SLICES = 120  # of the picture's width, of which each shows its largest value


class Timeline(Live):
    """Also notes how many bytes there were after each operation: [(operations, bytes), ...]."""

    def __init__(self):
        super().__init__()
        self.points = [(0, 0)]

    def add(self, nbytes):
        super().add(nbytes)
        self.points.append((self.flops, self.now))


def thinned(points, slices=SLICES):
    """At most the smallest and the largest of each slice, in their order."""
    width, kept = max(x for x, _ in points) / slices, {}
    for point in points:
        low, high = kept.get(key := int(point[0] / width), (point, point))
        kept[key] = min(low, point, key=lambda p: p[1]), max(high, point, key=lambda p: p[1])
    return [point for key in sorted(kept) for point in sorted(set(kept[key]))]


def main(cfg):
    """Print each step's bytes before it and at its peak, and draw them. cfg: an `AccountConfig`"""
    config, (cfg, name) = config_of(cfg), about(cfg)
    unit, power = ("GB", 9) if count_weights(config) > 1e9 else ("MB", 6)
    lines, unread = {}, lambda method: {
        f.name: f.default for f in fields(cfg) if method not in (f.metadata["of"] or METHODS)
    }
    step = settings_of_step(replace(cfg, method="qst"))
    tokens = f"{step.batch_size} x {step.sequence_len} tokens"
    print(f"A training step of {name}, {tokens}, in {unit} of 10^{power} bytes")
    work = f"{unit[0]}FLOPs/token"
    print(f"{'':20}{'before and after':>18}{'peak':>10}{work:>15}")
    for label, settings in STEPS.items():
        live, own = Timeline(), unread(settings["method"])
        if settings["method"] != "qst":
            own["quant"] = None
        report = memory_report(replace(cfg, **own | settings), config, live)
        always = report["total_bytes"] - live.peak
        scale = 10**power * step.batch_size * step.sequence_len
        points = thinned(live.points)
        lines[label] = [(flops / scale, (always + now) / 10**power) for flops, now in points]
        numbers = always, report["total_bytes"], report["flops_per_token"]
        numbers = [number / 10**power for number in numbers]
        print("{:20}{:18.1f}{:10.1f}{:15.1f}".format(label, *numbers), flush=True)
    path = Path(cfg.out_dir or "out") / "timeline.svg"
    line_chart(path, f"{unit} through a step of {name}, {tokens}", f"{work} so far", lines)
    print(f"\nDrawn in {path}.")


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
