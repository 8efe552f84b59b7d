"""Bytes: of a model, of what backward keeps, and the most that a device has held."""

import sys
import weakref

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def show_bytes(n):
    """1.2 GB, 3.4 MB, ... (powers of ten)"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def peak_memory(device):
    """Bytes: what torch allocated at most on a GPU, or the largest resident size on a CPU; 0 where
    neither is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_bytes(module):
    """Bytes of all weights of a module, each storage once, parameters and buffers alike."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({id(t): t.nbytes for t in tensors}.values())


def activation_bytes(model, idx, targets):
    """Bytes that a forward pass keeps for the backward pass, each storage counted once.

    The model's own weights are not counted, nor what it makes and drops again.
    """
    return loss_and_kept(model, idx, targets)[1]


def loss_and_kept(model, idx, targets):
    """The loss, and its `activation_bytes`."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = weakref.WeakValueDictionary()  # a chunk of logits is gone before the end

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(idx, targets)
    return loss, sum(storage.nbytes() for storage in kept.values())
