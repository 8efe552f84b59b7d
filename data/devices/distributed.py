"""Several processes that train one side network, started by torchrun: who computes what, and sums.

Each process holds the whole frozen base and computes its part of every batch. What travels is the
gradient of what is trained, once an iteration, in one piece. A run of one process needs nothing of
it: its rank is 0, its size 1, and every function returns what it was given.

Why not DistributedDataParallel: it wraps a module's forward, sends the frozen base's buffers
around, and divides by the number of processes where we weigh every token the same.
"""

import os
import sys
from contextlib import contextmanager

import torch
from torch import distributed

from data import InputError


def start(device):
    """Join the processes that torchrun has started, if it has; only the first prints then."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def size():
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def others_alive():
    """A process that ends takes the others with it, each with a sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:80]
        raise InputError(
            f"Another process of this run has ended ({reason}): see what it says, and go on with "
            "--resume."
        ) from None


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
    """Undo `split`, when each process has computed something of its part."""
    if size() == 1:
        return items
    parts = [None] * size()
    with others_alive():
        distributed.all_gather_object(parts, items)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def first_makes(make):
    """Call a function in the first process before the others call it and find what it has made."""
    made = make() if rank() == 0 else None
    join([None])  # the others wait here
    return make() if rank() else made
