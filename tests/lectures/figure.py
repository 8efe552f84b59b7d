"""The picture of FIGURE.md, drawn from the page's own tables, and the ratios that it is about.

    python tests/lectures/figure.py                                from the page, at once
    python tests/lectures/figure.py --preset llama-2-70b --batch_size 16   compute a model's column

The second command runs account.py's arithmetic for every bar, with the flags that the page has. It
prints the numbers that belong into the page, takes a minute for 70B, and draws nothing.
"""

import re
import shlex
import sys
from pathlib import Path

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]  # tests/, and above

from account import memory_report, parse_args  # noqa: E402
from data.run.charts import COLOURS, TOP, WIDTH, label, write_svg  # noqa: E402
from data.settings.flags import run_main  # noqa: E402

PAGE = Path(__file__).parent / "FIGURE.md"
MODELS = {  # column: title
    "7B": "LLaMA-2-7B, 4 x 384 tokens", "8B": "LLaMA-3-8B, 4 x 384 tokens",
    "70B": "LLaMA-2-70B, 16 x 384 tokens",
}
COUNTED = "QLoRA, checkpoint, streamed"  # no code streams it, so it has no flags
ON_DEVICE, STREAMED = "base on the device", "base on the device, streamed"
READ_ONCE, READ_TWICE = "read per batch, QST: once", "read per batch, QLoRA: twice"
NAMES = "base on the device, GB", "all else, GB", "the paper's total, GB", "GFLOPs per token"


def read_page(text=None):
    """{first cell: [other cells]} of every table row of the page."""
    rows = re.findall(r"^\| ([^|]+?) \| (.+) \|$", text or PAGE.read_text(), re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def page_of(model, rows):
    """The page's numbers of one column: {row: (GB, GFLOPs per token)}; None where a cell is empty.
    Rows about the base have no arithmetic."""
    at, number = list(MODELS).index(model), lambda cell: float(cell) if cell else None
    bars = {name: cells for name, cells in rows.items() if len(cells) == 7 and name != "bar"}
    column = {name: (number(c[at]), number(c[at + 3])) for name, c in bars.items()}
    for name in (ON_DEVICE, STREAMED, READ_ONCE, READ_TWICE):
        column[name] = number(rows[name][at]), None
    return column


def compute(words, flags, config=None):
    """Run the account of every bar. Returns {row: (bytes, FLOPs per token)}, as `page_of`.

    words: flags of the shape; flags: {bar: flags of account.py}; config: a `ModelConfig`, in place
        of a shape that they name
    """
    report = lambda more: memory_report(parse_args([*words, *shlex.split(more)]), config)
    reports = {name: report(more) for name, more in flags.items()}
    whole, streamed = reports["QST"], reports["QST, streamed"]
    less = whole["weights_bytes"] - streamed["weights_bytes"]  # of the base, so equal for QLoRA
    bars = {name: (r["total_bytes"], r["flops_per_token"]) for name, r in reports.items()}
    total, flops = bars["QLoRA, checkpoint"]
    base = whole["weights_bytes"] - whole["learning_bytes"]
    moved = streamed["streamed_bytes"]
    return bars | {
        COUNTED: (total - less, flops), ON_DEVICE: (base, None), STREAMED: (base - less, None),
        READ_ONCE: (moved, None), READ_TWICE: (2 * moved, None),
    }


def flags_of(rows):
    """{bar: flags of account.py} of the bars that the account computes."""
    return {name: c[6].strip("`") for name, c in rows.items() if len(c) == 7 and c[6][:1] == "`"}


def ratios(column):
    """What QST saves against QLoRA without and with checkpointing: {bar: (memory, FLOPs)}."""
    qst = column["QST"]
    return {
        name: (column[name][0] / qst[0], column[name][1] / qst[1])
        for name in ("QLoRA", "QLoRA, checkpoint")
    }


def draw(path, columns):
    """Draw each model's bars on its own scale: memory on the left, arithmetic on the right.
    columns: {model: `page_of`}"""
    shapes, y, left, row = [], TOP, 220, 22
    wide, middle, narrow = 226, 516, 130  # of memory's bars, where arithmetic begins, of its bars

    def bar(x, width, colour):
        size = f'width="{width:.1f}" height="{row - 6}"'
        shapes.append(f'<rect x="{x:.1f}" y="{y}" {size} fill="{colour}"/>')

    for model, column in columns.items():
        bars = {n: pair for n, pair in column.items() if n not in (READ_ONCE, READ_TWICE)}
        base = {False: bars.pop(ON_DEVICE)[0], True: bars.pop(STREAMED)[0]}
        bars = {name: pair for name, pair in bars.items() if pair[0] is not None}
        most_gb = max(gb for gb, _ in bars.values())
        most_flops = max(flops or 0 for _, flops in bars.values())
        shapes.append(f'<g font-weight="bold">{label(16, y + 14, MODELS[model])}</g>')
        y += row
        for name, (gb, flops) in bars.items():
            width = gb / most_gb * wide
            floor = 0 if flops is None else base["streamed" in name] / most_gb * wide
            bar(left, width, COLOURS[1 if flops else 2])
            bar(left, floor, COLOURS[0])
            shapes.append(label(left - 8, y + 13, name, "end"))
            note = ", a count, no code" * (name == COUNTED)
            shapes.append(label(left + width + 6, y + 13, f"{gb:g}{note}"))
            if flops:
                bar(middle, flops / most_flops * narrow, COLOURS[3])
                end = middle + flops / most_flops * narrow
                shapes.append(label(end + 6, y + 13, f"{flops:g}"))
            y += row
        y += 12
    assert middle + narrow < WIDTH - 40
    write_svg(path, "A training step: memory, and arithmetic", NAMES, shapes, y)


def main(words):
    """Compute one model if `words` name it; otherwise print the page's ratios and draw them."""
    cfg, rows = parse_args(words), read_page()
    if cfg.preset or cfg.base:
        print(f"{cfg.preset or cfg.base}: GB, GFLOPs per token")
        for name, (nbytes, flops) in compute(words, flags_of(rows)).items():
            work = f"{flops / 1e9:10.1f}" if flops else ""
            print(f"{name:32}{nbytes / 1e9:10.2f}{work}", flush=True)
        return
    columns = {model: page_of(model, rows) for model in MODELS}
    print(f"{'as many times as QST':32}{'memory':>10}{'arithmetic':>14}")
    for model, column in columns.items():
        for name, (memory, work) in ratios(column).items():
            print(f"{model + ', ' + name:32}{memory:10.2f}{work:14.2f}")
    path = Path(cfg.out_dir or "out") / "figure.svg"
    draw(path, columns)
    print(f"\nDrawn in {path}.")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
