"""The memory of real steps: beside the account's, and what each saving of QST saves."""

from dataclasses import replace

import torch

from account import AccountConfig, memory_report, rows, settings_of_step, untrained
from benchmarks import step
from benchmarks.common import FREED, alone, print_row, print_table
from benchmarks.fit import ALLOWANCE, largest, total_of
from benchmarks.step import costs, measure, ours, parse_step
from model import PRESETS

ACCOUNTS = {  # name: flags of train.py
    "qst": "", "qst, as written": step.AS_WRITTEN, "qst, 4 bits": step.FEW_BITS,
    "qst, as written, linear": f"{step.AS_WRITTEN} --downsample linear",
    "qst, released": "--variant released", "lst": "--method lst", "lora": "--method lora",
    "qlora": "--method qlora", "qlora, checkpoint": "--method qlora --checkpoint",
    "adapter": "--method adapter", "peqa": "--method peqa", "full": "--method full",
}

FITS = ("llama-3.2-1b", "qwen3-4b", "llama-3-8b", "llama-2-70b")
# GB, and whose attention: a T4 has no fused one where queries share their keys, and takes the plain
# formula ("meta").
GPUS = {"8 GB": (8, "cuda"), "12 GB": (12, "cuda"), "T4, 15 GB": (15, "meta"),
        "24 GB": (24, "cuda"), "80 GB": (80, "cuda")}

LEAN = "--savings --batch_size 8 --sequence_len 512"


def account():
    """Peak resident memory above the model: a LLaMA of 12 layers x 768 in fp32, 4 x 256 tokens."""
    print_table("Memory of a step", "", "measured, MB", "account, MB", "account / measured")
    for name, flags in ACCOUNTS.items():
        grown, expected = alone(account_once, flags, **FREED)
        print_row(name, f"{grown / 1e6:,.0f}", f"{expected / 1e6:,.0f}", f"{expected / grown:.3f}")


def account_once(flags):
    """How much a process grows by training, and the account's total without the weights."""
    cfg = parse_step(flags)
    report, cfg = memory_report(cfg, step.MODEL), settings_of_step(cfg)
    model = untrained(cfg, step.MODEL, torch.float32, "cpu")
    grown, *_ = costs(model, lambda idx: model.loss(idx, idx), cfg)
    return grown, report["total_bytes"] - report["weights_bytes"]


def lean(folder):
    """What each saving of `account.py --savings` saves, and costs: 8 x 512 tokens in fp32."""
    columns = "MB above the model", "of the first", "s", "of the first", "loss"
    print_table("A step of QST", "", *columns)
    first = None
    for name, cfg in rows(parse_step(LEAN)):
        memory, seconds, loss, _ = alone(measure, ours, cfg, folder, OMP_NUM_THREADS="1", **FREED)
        first = first or (memory, seconds)
        print_row(
            name, f"{memory / 1e6:,.0f}", f"{memory / first[0]:.2f}", f"{seconds:.1f}",
            f"{seconds / first[1]:.2f}", f"{loss:.5f}",
        )


def fits():
    """The largest batches of 512 tokens that fit: QST's, and QLoRA's, both with --checkpoint."""
    title = f"Largest batch of 512 tokens, QST / QLoRA; {ALLOWANCE / 1e9:g} GB are left for CUDA"
    print_table(title, "", *GPUS)
    for name in FITS:
        pairs = zip(batches("qst", name), batches("qlora", name))
        print_row(name, *(f"{qst or '-'} / {qlora or '-'}" if qst else "-" for qst, qlora in pairs))


def batches(method, name):
    """The largest batch for each of GPUS, 0 where none fits."""
    cfg = AccountConfig(preset=name, method=method, checkpoint=True, sequence_len=512)
    devices = {device for _, device in GPUS.values()}
    totals = {d: total_of(replace(cfg, device=d), PRESETS[name], memory_report) for d in devices}
    return [
        largest(lambda n: totals[device](n, 512), gb * 1e9 - ALLOWANCE, 1 << 20, 512, [4])
        for gb, device in GPUS.values()
    ]
