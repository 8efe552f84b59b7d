"""The largest batch and the longest sequence that fit into a GPU: `tests/account.py --fit GB`.

A total of the account is that of the step's largest moment. So it is linear in the number of
layers from two on, and convex in the number of tokens. Two short models stand for a deep one, and
few numbers of tokens have to be tried.
"""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

from data import InputError
from data.formats.files import write_json
from data.settings.methods import SIDE_METHODS, layers_per_side
from model import CHUNK
from train import resolve

# What a process takes on a GPU beside the account: the CUDA context, 0.3 to 0.5 GB, workspaces of
# cuBLAS, 8 to 32 MB, and what the allocator holds in fragments. Not measured yet.
ALLOWANCE = 1e9
FIRST = 2048  # tokens of the second batch that is tried
FAR = 1 << 16  # tokens from which no chunk of logits is as large as what a layer makes
ROWS = ("full, checkpoint", "lora, checkpoint", "qlora", "qlora, checkpoint", "qst, checkpoint")
OF_QST = {
    "qst, all savings": dict(h_f_bits=4, optimizer_bits=8), "qst, fast": dict(variant="fast"),
    "fast, all savings": dict(variant="fast", h_f_bits=4, optimizer_bits=8),
}


def resolved(cfg):
    return resolve(replace(cfg, base="shape", data="any"))


def chosen(rows, cfg):
    """Yield labels and settings: those of --method or --savings, or ROWS and OF_QST."""
    for label, settings in rows:
        if cfg.method or cfg.savings or label in ROWS:
            yield label, settings
    if not (cfg.method or cfg.savings):
        for label, changes in OF_QST.items():
            yield label, replace(settings, **changes)  # rows end with QST, recomputing


def total_of(cfg, config, report):
    """The account's total, as a function of the batch and the length.

    report: `memory_report`. Two models stand for a deep one, with the layers of two and of three
        side layers; with those of one, some moments of the step are missing
    """
    every = 1
    if cfg.method in SIDE_METHODS:
        every = layers_per_side(resolved(cfg).every, config.n_layer)
        cfg = replace(cfg, every=every)
    cfg = replace(cfg, layers=0)  # `config` has no others

    @cache
    def total(batch, length):
        step = replace(cfg, batch_size=batch, sequence_len=length)
        count = config.n_layer // every
        depths = (2, 3) if count > 3 else (count,)
        shapes = [replace(config, n_layer=every * n) for n in depths]
        two, *three = (report(step, shape)["total_bytes"] for shape in shapes)
        return two + (three[0] - two) * (count - 2) if three else two

    return total


def largest(total, room, most, tokens, tries):
    """The largest n, from 1 to `most`, with total(n) <= room; 0 if there is none.

    total: bytes, which increase, and are convex from a chunk of the loss on: then nothing fits
        above where a line through two that fit meets the room. Where three are on a line and have
        FAR tokens, the rest is, too, and is not tried.
    tokens: how many n = 1 has; tries: the first n to try, then it is doubled
    """
    low, bytes_of_low, slope, high, bytes_of_high = 1, total(1), 0.0, 0, 0
    if bytes_of_low > room:
        return 0
    tries = list(tries)
    while low < most:
        convex = low * tokens >= CHUNK
        if not high:
            n = tries.pop(0) if tries else 2 * low
        elif convex:
            n = low + int((room - bytes_of_low) * (high - low) / (bytes_of_high - bytes_of_low))
        else:
            n = (low + high) // 2
        n = min(max(n, low + 1), most)
        needed = total(n)
        if needed > room:
            high, bytes_of_high, most = n, needed, n - 1
            continue
        before, slope = slope, (needed - bytes_of_low) / (n - low)
        low, bytes_of_low = n, needed
        if convex and slope:
            most = min(most, low + int((room - needed) / slope))
            if low * tokens >= FAR and math.isclose(slope, before, rel_tol=1e-5):
                return most
    return low


def print_fits(cfg, config, name, rows, report):
    """Print a line for each row, and leave them in out_dir: fit.json.

    cfg: an `AccountConfig` with --fit; rows: its labels and settings; report: `memory_report`
    returns a list of dicts: label, batch, length; 0 where none fits
    """
    if cfg.task == "tiny":
        raise InputError("--fit is for a model's shape: give --preset or --base.")
    if cfg.sweep or cfg.stream:
        raise InputError("--fit counts neither --sweep nor --stream: leave it out.")
    room, found = cfg.fit * 1e9 - ALLOWANCE, []
    for label, settings in chosen(rows, cfg):
        length = resolved(settings).sequence_len
        total = total_of(settings, config, report)
        needed = total(1, length)  # before the head: it refuses a length that the model has not
        if not found:
            print(
                f"What fits into {cfg.fit:g} GB with {name}: {ALLOWANCE / 1e9:g} GB of them are "
                f"for CUDA, its workspaces and fragments;\nthe rest is the account's. GB are "
                f"10^9 bytes.\n\n{'method':20}{f'largest batch, {length} tokens':>28}"
                f"{'longest sequence, batch 1':>28}"
            )
        few = max(2, FIRST // length)
        batch = largest(lambda n: total(n, length), room, 1 << 20, length, [few])
        near = batch * length, (batch + 1) * length  # the total depends on tokens nearly alone
        longest = largest(lambda n: total(1, n), room, config.max_positions, 1, near)
        cells = f"{batch or '-':>28}{longest or '-':>28}"
        if not longest:
            cells = f"  does not fit: 1 x {length} tokens need {(needed + ALLOWANCE) / 1e9:.1f} GB"
        print(f"{label:20}{cells}", flush=True)
        found.append(dict(label=label, batch=batch, length=longest))
    write_json(Path(cfg.out_dir or "out") / "fit.json", found)
    return found
