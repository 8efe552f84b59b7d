"""The paper's tables of memory and arithmetic (QST, arXiv 2401.07159), beside the account's."""

from dataclasses import replace

from account import AS_WRITTEN, COLUMNS, METHOD_ROWS, AccountConfig, memory_report, rows
from benchmarks.common import print_row, print_table
from side import IN_BASE_METHODS

# The paper's figures, in GB of 10^9 bytes
FIGURE_1A = {  # LLaMA-2-70B, batch 16, length 384: weights, optimizer, activations, total
    "full": (140, 420, 197, 757), "qlora": (36, 13, 197, 246), "lst": (140, 24, 78, 242),
    "qst": (36, 4, 69, 109),
}
TABLE_1 = {  # batch 16, length 512
    "qlora": {"opt-1.3b": 31.3, "opt-2.7b": 47.0, "opt-6.7b": 63.6},
    "lst": {"opt-1.3b": 20.9, "opt-2.7b": 30.7}, "lora": {"opt-1.3b": 32.9, "opt-2.7b": 50.4},
    "adapter": {"opt-1.3b": 32.5, "opt-2.7b": 49.9},
    "qst": {"opt-1.3b": 17.7, "opt-2.7b": 24.4, "opt-6.7b": 27.5},
}
TABLE_2 = {  # batch 4, length 384
    "qlora": {"llama-2-7b": 15.6, "llama-2-13b": 25.4, "llama-2-70b": 95.5, "opt-1.3b": 6.3,
              "opt-6.7b": 15.5, "opt-66b": 87.5},
    "qst": {"llama-2-7b": 7.3, "llama-2-13b": 12.6, "llama-2-70b": 56.0, "opt-1.3b": 3.2,
            "opt-6.7b": 7.2, "opt-66b": 52.3},
}
TABLE_3 = {  # floating-point operations a token, in units of the paper's own
    "qst": {"llama-2-7b": 4.4, "llama-2-13b": 6.1, "llama-2-70b": 15.3},
    "qlora": {"llama-2-7b": 11.7, "llama-2-13b": 16.0, "llama-2-70b": 38.1},
    "lst": {"llama-2-7b": 11.0, "llama-2-13b": 19.0, "llama-2-70b": 80.7},
}
TABLE_6 = {"linear": 7.8, "lora": 7.3, "adapter": 7.3, "maxpool": 7.3, "avgpool": 7.3}  # 7B


def paper():
    """Print every table in turn."""
    figure_1a()
    totals("Batch 16, length 512 (Table 1)", TABLE_1, 16, 512)
    flops = totals("Batch 4, length 384 (Table 2)", TABLE_2, 4, 384)
    operations(flops)
    downsamplers()
    curve("Batch size: LLaMA-2-7B, length 384 (Fig. 4)", "batch_size", (1, 2, 4, 8, 16, 32))
    curve("Length: LLaMA-2-7B, batch 4 (Fig. 4)", "sequence_len", (128, 256, 384, 512, 1024, 2048))
    curve("Reduction: LLaMA-2-7B, batch 4, length 384 (Fig. 5)", "reduction", (2, 4, 8, 16, 32, 64),
          ["qst"])


def as_written(cfg):
    """(label, settings) of every method as in its paper; inside the base, with checkpoints too."""
    for label, row in rows(replace(cfg, **AS_WRITTEN | dict(checkpoint=None))):
        if row.method in IN_BASE_METHODS or not row.checkpoint:
            yield label, row


def reports(preset, batch_size, sequence_len, methods):
    """{label: two of `memory_report`}: with the attention of a GPU, and with the plain formula,
    whose (T, T) matrices are kept."""
    cfg = AccountConfig(preset=preset, batch_size=batch_size, sequence_len=sequence_len)
    return {
        label: [memory_report(replace(row, device=device)) for device in ("cuda", "meta")]
        for label, row in as_written(cfg) if row.method in methods
    }


def beside(ours, theirs):
    """Three cells: our figure, the paper's, and the ratio."""
    return f"{ours:.1f}", theirs or "-", f"{ours / theirs:.2f}" if theirs else "-"


def figure_1a():
    print_table("LLaMA-2-70B, batch 16, length 384 (Fig. 1a)", "", "weights", "paper",
                "gradients and optimizer", "paper", "activations and transients", "paper", "total",
                "paper", "ours / paper")
    for label, pair in reports("llama-2-70b", 16, 384, METHOD_ROWS).items():
        theirs = FIGURE_1A.get(label, ("-", "-", "-", None))
        for report, how in zip(pair, ("", ", plain attention")):
            gb = {name: report[f"{name}_bytes"] / 1e9 for name in COLUMNS}
            parts = (gb["weights"], gb["gradients"] + gb["optimizer"],
                     gb["activations"] + gb["transient"])
            cells = [cell for part, one in zip(parts, theirs) for cell in (f"{part:.1f}", one)]
            print_row(label + how, *cells, *beside(gb["total"], theirs[3]))


def totals(title, theirs, batch_size, sequence_len):
    """A table of totals, a line a method and preset. Returns {(method, preset): operations}."""
    print_table(
        title, "", "model", "with plain attention, GB", "ours, GB", "paper", "ours / paper"
    )
    flops, methods = {}, ("lora", "lst", *theirs)
    for preset in dict.fromkeys(preset for row in theirs.values() for preset in row):
        for label, pair in reports(preset, batch_size, sequence_len, methods).items():
            gb, plain = (report["total_bytes"] / 1e9 for report in pair)
            print_row(label, preset, f"{plain:.1f}", *beside(gb, theirs.get(label, {}).get(preset)))
            flops[label, preset] = pair[0]["flops_per_token"]
    return flops


def operations(flops):
    """flops: what `totals` returned for Table 2's models"""
    print_table("Floating-point operations a token (Table 3)", "", "model",
                "10^9, forward and backward", "times QST's on 7B", "paper",
                "ours / paper")
    one, their_one = flops["qst", "llama-2-7b"], TABLE_3["qst"]["llama-2-7b"]
    for (method, preset), ours in flops.items():
        if "llama" in preset:
            theirs = TABLE_3.get(method, {}).get(preset)
            ratio = beside(ours / one, theirs and round(theirs / their_one, 2))
            print_row(method, preset, f"{ours / 1e9:.1f}", *ratio)


def downsamplers():
    print_table("Downsamplers: LLaMA-2-7B, batch 4, length 384 (Table 6)", "", "GB", "paper",
                "ours / paper", "trainable")
    for downsample, theirs in TABLE_6.items():
        cfg = AccountConfig(method="qst", preset="llama-2-7b", downsample=downsample, **AS_WRITTEN)
        report = memory_report(cfg)
        cells = beside(report["total_bytes"] / 1e9, theirs)
        print_row(downsample, *cells, f"{report['trainable_parameters']:,}")


def curve(title, name, values, methods=("qlora", "qst")):
    """A line a method: the total, in GB, over a setting; over the reduction, operations too."""
    print_table(title, "", *map(str, values))
    start = AccountConfig(preset="llama-2-7b", batch_size=4, sequence_len=384)
    lines = {}
    for value in values:
        for label, row in as_written(replace(start, **{name: value})):
            if row.method in methods:
                report = memory_report(row)
                lines.setdefault(label, []).append(f"{report['total_bytes'] / 1e9:.1f}")
                if name == "reduction":
                    gflops = f"{report['flops_per_token'] / 1e9:.1f}"
                    lines.setdefault("10^9 operations a token", []).append(gflops)
    for label, cells in lines.items():
        print_row(label, *cells)
