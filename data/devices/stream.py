"""--stream: a base larger than the device. Its layers stay on disk or in the host's memory.

A step of QST reads each weight of the base once, in order, and backward reads none. So the device
needs two slots, each with room for one layer's 4-bit weights: while layer i computes from one, a
thread fills the other for layer i + 1. A step takes as long as computing or as reading, whichever
is longer. Its loss and gradients are the same, bit for bit.

Norms, biases and the LM head stay on the device. The embedding stays on the host, unless it is
tied to the head: a step reads only some of its rows.
"""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import torch

from data import InputError
from data.devices import distributed
from data.devices.device import show_bytes, to_device
from data.formats.safetensors import check_values
from quant import Linear4bit, Quantized4bit


def freeze_streamed(model, weights, in_4_bits, dtype, device, folder):
    """Freeze a `Transformer`, and let a `Stream` load its layers' weights, which are pinned if they
    are for a GPU and fit. weights, in_4_bits: from `choose_weights`"""
    device = torch.device(device)
    if not in_4_bits:
        do = f"run `python model.py quantize {folder} {folder}-nf4`, and give that folder"
        raise InputError(f"{folder} is not in 4 bits, and --stream reads nothing else: {do}.")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--stream is for a CPU or an NVIDIA GPU, and not for {device.type}.")
    comes = set()  # names of the weights that are streamed

    def read(name):
        tensor = weights[name]()
        if name.startswith("layers.") and isinstance(tensor, Quantized4bit):
            comes.add(name)
            check_values(tensor, dtype, f"{folder}: {name}")
        return tensor

    def place(name):  # "meta": a tensor with a shape and no memory
        on_host = name == "embed_tokens.weight" and not model.config.tied
        return "meta" if name in comes else "cpu" if on_host else device

    model.freeze("none", dtype, place, read, f"{folder}: ")
    stream, where = Stream(model, weights, device), folder
    size = stream.nbytes * distributed.size()
    if stream.copies and size < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        where = "pinned memory"  # which is had in powers of two: hence 0.6
        for linear in chain(*(linears.values() for linears in stream.layers)):
            pinned = linear.source()._apply(torch.Tensor.pin_memory)
            linear.source = lambda pinned=pinned: pinned
    print(f"stream      {show_bytes(stream.nbytes)} a batch from {where}", flush=True)
    return model


class Stream:
    """Loads each layer's weights when the layer computes.

    base: a frozen `Transformer`; of its layers' weights only the shapes are used
    sources: {name: function that returns that weight, a `Quantized4bit` in the host's memory}
    """

    coming = None  # (a layer's number, the slot for it, the future of its copy)

    def __init__(self, base, sources, device):
        self.device, self.thread = device, ThreadPoolExecutor(1)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layers = []  # of each, its linear layers by name
        self.nbytes, shapes = 0, {}  # what a pass reads; a weight of each name
        for i, layer in enumerate(base.layers):
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, Linear4bit)}
            for name, linear in linears.items():
                linear.source = sources[f"layers.{i}.{name}.weight"]
                self.nbytes += linear.weight.nbytes
                if shapes.setdefault(name, linear.weight).nbytes != linear.weight.nbytes:
                    raise InputError("--stream: not all layers are quantized alike.")
            self.layers.append(linears)
            layer.register_forward_pre_hook(partial(self.before, i))
        empty = lambda weight: copy.deepcopy(weight).to_empty(device=device)
        self.slots = [{name: empty(weight) for name, weight in shapes.items()} for _ in range(2)]
        for slot in self.slots:
            for buffer in chain(*(weight.buffers() for weight in slot.values())):
                if self.copies:  # once freed, it is not reused before the last copy
                    buffer.record_stream(self.copies)
        for linears in self.layers:
            put(self.slots[0], linears)
        base.embed_tokens.register_forward_hook(lambda own, ids, rows: to_device(rows, device))
        base.stream = self

    def before(self, i, *args):
        """Before layer i computes, wait for its weights, and start to load the next ones."""
        if self.coming is None or self.coming[0] != i:  # at the start, or after a pass broke off
            self.send_for(i)
        (_, slot, copied), self.coming = self.coming, None
        if event := copied.result():
            torch.cuda.current_stream(self.device).wait_event(event)
        put(slot, self.layers[i])
        self.send_for((i + 1) % len(self.layers))  # after the last, the first one of the next pass

    def send_for(self, i):
        """Let the thread fill the slot that was not filled last. The layer that used it is done. On
        a GPU its kernels may still be queued, and the copies wait for an event behind them."""
        self.slots.reverse()
        done = self.copies and torch.cuda.current_stream(self.device).record_event()
        self.coming = i, self.slots[0], self.thread.submit(self.fill, i, self.slots[0], done)

    @torch.no_grad()
    def fill(self, i, slot, done):
        """Copy layer i's weights into a slot: on a GPU in a CUDA stream of their own, after the
        event `done`. Returns the event behind the copies."""
        with torch.cuda.stream(self.copies):  # None, on a CPU, is no stream
            if done:
                self.copies.wait_event(done)
            for name, linear in self.layers[i].items():
                # What was read from a file may go when `copy_` returns; pinned memory stays.
                for here, there in zip(slot[name].buffers(), linear.source().buffers()):
                    here.copy_(there, non_blocking=there.is_pinned())
            return self.copies and self.copies.record_event()


def put(slot, linears):
    for name, linear in linears.items():
        linear.weight = slot[name]
