"""The memory and the operations of code on meta tensors, which have a shape and no memory."""

import contextlib
import weakref

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


@contextlib.contextmanager
def attention_of(device):
    """Let attention on meta tensors be what it is on a device, "cuda" or "cpu", or "meta" itself.

    By itself the meta device takes the plain formula, and keeps the (T, T) matrices for backward.
    A fused kernel keeps queries, keys, values, output and one fp32 number a query, and it has a
    meta implementation that can be called by its name. Which one is used follows torch's own rules:
    flash attention where keys and values are equally wide (on CUDA in 16 bits only, and padded to a
    multiple of 8); otherwise on CUDA the memory-efficient one, unless queries share their keys; and
    what is left is the plain formula, on the real device too.
    """
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, is_causal, **other):
        D, causal, same = v.shape[-1], is_causal, q.shape[-1] == v.shape[-1]
        if same and device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)[0]
        if same and device == "cuda" and q.dtype != torch.float32:
            q, k, v = (F.pad(x, (0, -D % 8)) if D % 8 else x for x in (q, k, v))
            return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[0][..., :D]
        if device == "cuda" and q.shape[1] == k.shape[1] and D * q.dtype.itemsize % 16 == 0:
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, None, q.requires_grad or v.requires_grad, is_causal=causal
            )[0]
        return plain(q, k, v, is_causal=causal, **other)

    # Replaced, and not caught by a TorchFunctionMode: backward computes checkpointed layers again
    # where no such mode is on.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


FLOPS = flop_registry | {  # torch's formulas: 2 m k n for a product; attention as if not causal
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def storages(tree):
    """Those of the tensors in a tree of lists and tuples, by their address."""
    if isinstance(tree, torch.Tensor):
        return {tree.untyped_storage()._cdata: tree.untyped_storage()}
    if not isinstance(tree, (list, tuple)):
        return {}
    return {key: storage for branch in tree for key, storage in storages(branch).items()}


class Live(TorchDispatchMode):
    """Add up the storages that operators make, each until it is freed (`peak` is the most), and
    the floating-point operations."""

    now = peak = flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        given = storages((*args, *kwargs.values()))  # views, and what is written in place: not new
        for key, storage in storages(out).items():
            if key not in given:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)
