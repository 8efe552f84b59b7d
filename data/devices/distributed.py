"""Several processes, started by torchrun, that train one side network.

Each process holds the whole frozen base and computes its part of every batch. The gradients are
summed once an iteration, in one piece. With one process every function returns its input.

We do not use DistributedDataParallel: it sends the frozen base's buffers around, and it divides by
the number of processes, where we give every token the same weight.
"""

import atexit
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from data import InputError
from data.formats.fields import shown

PATIENCE = 30  # minutes, with a process that loads, or that makes the built-in base
# These may be others on another machine; what a run reads is compared later.
MAY_DIFFER = "base data instructions side out_dir cache_hidden device devices".split()


def start(device, cfg):
    """Join torchrun's processes, if any, all with the same settings. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with others_alive():
            distributed.init_process_group(backend, timeout=timedelta(minutes=PATIENCE))
        if backend == "gloo":  # whose threads may abort an exit that does not end them
            atexit.register(distributed.destroy_process_group)
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")
    seen = lambda name, value: "given" if value and name in MAY_DIFFER else value
    refuse_different({f"--{name}": seen(name, value) for name, value in vars(cfg).items()})


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def size():
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def others_alive():
    """End with a sentence if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rpartition("] ")[2][:80]
        ended = f"has ended, or is silent for {PATIENCE} minutes ({reason}): read its message"
        raise InputError(f"Another process of this run {ended}, and then --resume.") from None


def refuse_different(about):
    """End all processes with one sentence if they differ. about: {what: its value}"""
    first, *others = join([about])
    for number, other in enumerate(others, 1):
        for what, value in first.items():
            if other[what] != value:
                found = f"{shown(other[what])} in process {number}, and {shown(value)} in process 0"
                raise InputError(f"{what} is {found}: give all processes the same.")


def sum_(tensors):
    """Replace tensors, all on one device, by their sums over all processes."""
    if size() > 1:
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        with others_alive():
            distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def split(items):
    """This process's part of a list."""
    return items[rank() :: size()]


def join(items):
    """Undo `split`: collect what all processes have computed."""
    if size() == 1:
        return items
    parts = [None] * size()
    with others_alive():
        distributed.all_gather_object(parts, items)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def in_turn(make):
    """Call a function in the first process, and then in the others, which find what it made."""
    made = make() if rank() == 0 else None
    join([None])  # the others wait here
    return make() if rank() else made
