"""The kernels that a GPU is given for one training step, and for one generated token.

A GPU computes a narrow side network faster than Python starts its kernels (5 to 10 us each), so
their number decides. They are counted without a GPU: the real step runs on meta tensors, and each
operator that computes something is a kernel. What a GPU fuses is counted as it does it.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from account import parse_args, settings_of_step, untrained
from benchmarks.common import print_row, print_table
from benchmarks.live import attention_of
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data.run.run import Run
from model import PRESETS
from quant import chunk_size, quantize_blockwise, unpack_buffers
from train import share_base, train_step

SHAPE = PRESETS["llama-2-7b"]
STEP = "--batch_size 4 --sequence_len 384"
STEPS = {
    "qst": "", "qst, --checkpoint false": "--checkpoint false", "fast": "--variant fast",
    "qst, --optimizer_bits 8": "--optimizer_bits 8",
    "fast, --optimizer_bits 8": "--variant fast --optimizer_bits 8",
}
NO_KERNEL = {  # they make no tensor, or one without values
    "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit",
    "_reshape_alias", "_unsafe_view", "alias", "detach", "empty",
    "empty_like", "empty_permuted", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
    "set_",
}
PARTS = {  # functions on the stack -> the part of the step; the first one counts
    ("Tensor.backward", "SideNetwork._gate_and_layer"): "recomputed",
    ("Tensor.backward",): "backward", ("clip_grad_norm_",): "clipping",
    ("GradScaler.step",): "optimizer", ("_ChunkedLoss.forward",): "loss",
    ("Transformer.states",): "base", ("forward", "SideNetwork.start"): "side",
    ("forward", "SideNetwork.step"): "side", ("forward", "SideNetwork.mix"): "side",
    (): "other",
}


def part_now():
    """The part of the step that runs: looked up in the stack, which is also that of backward."""
    frame, names = sys._getframe(1), set()
    while frame := frame.f_back:
        names.add(frame.f_code.co_qualname)
    return next(part for functions, part in PARTS.items() if names.issuperset(functions))


class Kernels(TorchDispatchMode):
    """Count the kernels: `parts` {part: number} and `names` {(part, operator): number}."""

    def __init__(self):
        super().__init__()
        self.parts, self.names = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            part, n = part_now(), launches(name, args)
            self.parts[part] += n
            self.names[part, name] += n
        return func(*args, **kwargs or {})


def launches(name, args):
    """Kernels of an operator. One over lists of tensors is started for as many at a time as torch's
    multi_tensor_apply passes: of 1 to 5 lists, and 320 chunks of 65,536 elements; `cat` for 128."""
    if name == "cat":
        return -(-len(args[0]) // 128)
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg]
    lists = [some for some in lists if isinstance(some[0], torch.Tensor)]
    if not name.startswith(("_foreach", "_fused_adam")) or not lists:
        return 1
    at_a_time = (110, 64, 48, 36, 30)[min(len(lists), 5) - 1]
    chunks = sum(-(-tensor.numel() // 65536) for tensor in lists[0])
    n = max(-(-len(lists[0]) // at_a_time), -(-chunks // 320))
    return n + (name == "_foreach_norm")  # which ends with one that adds up


def quantize_on_a_gpu(values, *args):
    """`quantize_blockwise` starts nine kernels for each 2^21 values, and none on meta tensors."""
    for part in values.view(-1).split(chunk_size(values.device) // 32) * 9:
        part.abs()
    return quantize_blockwise(values, *args)


def as_on_a_gpu():
    """On a GPU the attention, RMSNorm and AdamW are fused, and no meta tensor has a value to ask
    for. `layer_norm` stands for `rms_norm`: one kernel each way."""
    norm = lambda x, shape, weight=None, eps=1e-5: F.layer_norm(x, shape, weight, None, eps)
    files = ExitStack()
    files.enter_context(attention_of("cuda"))
    for name, stand_in in {
        "torch.nn.functional.rms_norm": norm,
        "data.run.adamw8bit.quantize_blockwise": quantize_on_a_gpu,
        "torch.optim.adam._device_dtype_check_for_fused": lambda *args, **kwargs: None,
        "torch.nn.utils.clip_grad._has_foreach_support": lambda *args: True,
    }.items():
        files.enter_context(patch(name, stand_in))
    return files


def make_model(flags):
    cfg = settings_of_step(parse_args(f"--method qst {STEP} {flags}".split()))
    return cfg, untrained(cfg, SHAPE, torch.bfloat16, "meta")


def of_a_step(flags):
    """The `Kernels` of a step after the first, which makes the optimizer's moments."""
    cfg, model = make_model(flags)
    run, targets = Run(model, cfg), torch.zeros(cfg.batch_size, cfg.sequence_len, dtype=torch.long)
    for group in run.optimizer.param_groups if cfg.optimizer_bits == 32 else ():
        group["fused"], group["foreach"] = True, False
    models, batches, counted = share_base([run]), [(targets.to("meta"), targets, 1.0)], Kernels()
    with as_on_a_gpu():
        train_step([run], batches, 1, models)
        with counted:
            train_step([run], batches, 2, models)
    unpack_buffers.clear()
    return counted


@torch.no_grad()
def of_a_token(beside):
    """The `Kernels` of one more token of one prompt. beside: whether there is a side network"""
    _, model = make_model("")
    model, counted = model if beside else model.base, Kernels()
    idx, cache = torch.zeros(1, 8, dtype=torch.long, device="meta"), model.new_cache(32)
    with as_on_a_gpu():
        model.hidden(idx, cache=cache)
        with counted:
            model.head(model.hidden(idx[:, :1], cache=cache)[:, -1])
    unpack_buffers.clear()
    return counted


def kernels(detail=""):
    """Print both tables. detail: "all" for each operator's kernels, too"""
    parts = ("base", "side", "loss", "backward", "recomputed", "clipping", "optimizer", "other")
    counts = {name: of_a_step(flags) for name, flags in STEPS.items()}
    print_table("Kernels of a step of LLaMA-2-7B, 4 x 384", "step", *parts, "all")
    for name, counted in counts.items():
        print_row(name, *(counted.parts[part] for part in parts), counted.parts.total())
    print_table("Kernels of a generated token of LLaMA-2-7B", "model", "kernels")
    counts |= {"base": of_a_token(False), "base and side network": of_a_token(True)}
    for name in ("base", "base and side network"):
        print_row(name, counts[name].parts.total())
    for name, counted in counts.items() if detail else ():
        print_table(name, "part", "operator", "kernels")
        for (part, operator), n in counted.names.most_common():
            print_row(part, operator, n)
