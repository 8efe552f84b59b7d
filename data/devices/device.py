"""Which device and dtype to compute with, and how many bytes a model, a step and a run take."""

import os
import resource
import sys
import weakref

import torch

from data import InputError
from data.formats.fields import shown


def device_of(module):
    return next(tensor.device for tensor in (*module.buffers(), *module.parameters()))


def to_device(tensor, device):
    """Copy a tensor; from a CPU to a GPU without a wait, which takes pinned memory."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pick_device(name):
    """A flag's value -> a torch device; "auto" is a GPU where there is one, and of processes that
    torchrun has started each takes its own."""
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or number and (kind != "cuda" or not number.isdecimal()):
        known = "auto, cuda, cuda:1, mps or cpu"
        raise InputError(f"--device {shown(name)} is unknown: choose {known}.")
    here = dict(cuda=gpus, mps=int(mps), cpu=1)[kind]
    if int(number or 0) >= here:
        raise InputError(f"--device {name}: torch sees {here} such GPUs here; try --device cpu.")
    if kind == "cuda":
        name = f"cuda:{number or int(os.environ.get('LOCAL_RANK', 0)) % gpus}"
        start_cuda(name)
    return torch.device(name)


def start_cuda(gpu):
    """Start CUDA, and refuse an NVIDIA GPU that this torch cannot use."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 cuDNN plans each new length anew
    try:
        torch.ones(1, device=gpu)  # computed by a kernel, which torch may not have for this GPU
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        do = "update its driver, or for an older GPU or driver install torch from"
        do += " https://download.pytorch.org/whl/cu126, or give --device cpu"
        raise InputError(f"torch {torch.__version__} cannot use {gpu} ({reason}): {do}.") from None


def pick_dtype(name, device):
    """A flag's value -> a dtype; "auto": bf16 on NVIDIA, fp16 on cards without it, else fp32."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        there = device.type == "cuda" and torch.cuda.is_available()  # the account has none
        old = there and torch.cuda.get_device_capability(device) < (8, 0)
        name = "fp16" if old else "bf16" if device.type in ("cuda", "meta") else "fp32"
    if name not in names:
        raise InputError(f"--dtype {shown(name)} is unknown: choose auto, {', '.join(names)}.")
    if device.type == "mps" and name == "bf16":
        raise InputError("--dtype bf16 is not for an Apple GPU here: give fp16 or fp32.")
    return names[name]


def show_bytes(n):
    """1.2 GB, 3.4 MB, ... (powers of ten)"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def peak_memory(device):
    """Peak bytes: torch's allocations on a GPU, the resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_bytes(module):
    """Bytes of all weights of a module, each storage once, parameters and buffers alike."""
    return sum({id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


def loss_and_kept(model, idx, targets):
    """The loss, and the bytes that forward stores for backward: each storage once, without the
    model's own weights."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = weakref.WeakValueDictionary()  # a chunk of logits is gone before the end

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss_of(model.hidden(idx), targets)
    return loss, sum(storage.nbytes() for key, storage in kept.items() if key not in own)
