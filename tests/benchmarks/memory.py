"""The memory of real steps: beside the account's, and what each saving of QST saves."""

import torch

from account import memory_report, rows, settings_of_step, untrained
from benchmarks import step
from benchmarks.common import FREED, alone, print_row, print_table
from benchmarks.step import costs, measure, ours, parse_step

ACCOUNTS = {  # name: flags of train.py
    "qst": "", "qst, as written": step.AS_WRITTEN, "qst, 4 bits": step.FEW_BITS,
    "qst, as written, linear": f"{step.AS_WRITTEN} --downsample linear",
    "qst, released": "--variant released", "lst": "--method lst", "lora": "--method lora",
    "qlora": "--method qlora", "qlora, checkpoint": "--method qlora --checkpoint",
    "adapter": "--method adapter", "peqa": "--method peqa", "full": "--method full",
}

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
