"""Which levels weights take, and how large the errors of four bits are: printed, and drawn.

    python tests/lectures/four_bits.py [--out_dir out]
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]  # tests/, and above

from data.formats.files import make_writable_folder  # noqa: E402
from data.frozen.integers import quantize_kind  # noqa: E402
from data.run.charts import line_chart  # noqa: E402
from data.settings.flags import Parser, run_main  # noqa: E402
from quant import BLOCK_SIZE, CODEBOOKS, nearest, quantize_4bit  # noqa: E402
from benchmarks.charts import histogram  # noqa: E402

BLOCK_SIZES = [2**i for i in range(4, 13)]  # 16 to 4096


def show(out_dir="out"):
    """Print code books, errors and bits, and draw them as out_dir/levels.svg and block_size.svg."""
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    make_writable_folder(out_dir, "The folder")
    levels(weight[:256], out_dir)
    kinds(weight)
    block_sizes(weight[:1024], out_dir)


def levels(weight, out_dir):
    """How many of the weights take each level, in a terminal and as a picture."""
    values = (blocks := weight.reshape(-1, BLOCK_SIZE)) / blocks.abs().amax(dim=1, keepdim=True)
    print(f"Normal weights over the largest of their block of {BLOCK_SIZE}: which level is nearest")
    columns = []
    for kind, codebook in CODEBOOKS.items():
        order = codebook.argsort()
        share = nearest(values.view(-1), codebook).bincount(minlength=16)[order] / values.numel()
        columns.append([
            f"{kind} {level:8.4f} {part:6.1%} {'#' * round(100 * part):26}"
            for level, part in zip(codebook[order].tolist(), share.tolist())
        ])
    for row in zip(*columns):
        print("  ".join(row).rstrip())
    marks = {kind.upper(): codebook.tolist() for kind, codebook in CODEBOOKS.items()}
    title = f"Weights over the largest of their block of {BLOCK_SIZE}, and the 16 levels"
    histogram(Path(out_dir) / "levels.svg", title, values.histc(80, -1, 1).tolist(), marks)


def kinds(weight):
    """The error and the bits of each kind of quantization."""
    rows = {kind: quantize_4bit(weight, kind, double_quant=False) for kind in CODEBOOKS}
    rows |= {f"{kind}, double quantization": quantize_4bit(weight, kind) for kind in CODEBOOKS}
    rows |= {kind: quantize_kind(weight, kind) for kind in ("int4", "int4-64", "int3-64")}
    print("\n2048 x 2048 weights, N(0, 1)       mean |error|   bits per weight")
    for label, q in rows.items():
        error = (q.dequantize() - weight).abs().mean()
        print(f"{label:34} {error:.5f}        {8 * q.nbytes / weight.numel():.3f}")


def block_sizes(weight, out_dir):
    """The error at each block size; also where one weight in 1,000 is ten times as large."""
    far = weight.clone()
    far.view(-1)[::1000] *= 10
    curves = {"NF4": ("nf4", weight), "FP4": ("fp4", weight), "NF4 with outliers": ("nf4", far)}
    lines = {
        name: [(i, error(values, CODEBOOKS[kind], size)) for i, size in enumerate(BLOCK_SIZES)]
        for name, (kind, values) in curves.items()
    }
    row = lambda name, cells, form: print(f"{name:20}" + "".join(f"{x:{form}}" for x in cells))
    print("\nThe same with other blocks, each with a scale in fp32; the outliers are one weight in"
          " 1,000, ten times as large")
    row("weights in a block", BLOCK_SIZES, "8")
    row("bits per weight", [4 + 32 / size for size in BLOCK_SIZES], "8.3f")
    for name, line in lines.items():
        row(name, [y for _, y in line], "8.4f")
    title, ticks = "Mean |error| of a weight of N(0, 1)", dict(enumerate(map(str, BLOCK_SIZES)))
    line_chart(Path(out_dir) / "block_size.svg", title, "weights in a block", lines, ticks)
    print(f"\nDrawn in {Path(out_dir) / 'levels.svg'} and {Path(out_dir) / 'block_size.svg'}.")


def error(weight, codebook, block_size):
    """The mean error of a weight, with fp32 scales."""
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    index = nearest((blocks / absmax).view(-1), codebook).long()
    return (codebook[index].view_as(blocks) * absmax - blocks).abs().mean().item()


def main():
    parser = Parser(description="Four bits, printed and drawn.")
    parser.add_argument("--out_dir", default="out", help="where the two pictures go")
    show(parser.parse_args().out_dir)


if __name__ == "__main__":
    run_main(main)
