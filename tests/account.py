"""The memory account: one real training step, of the real modules, on tensors without memory.

    python tests/account.py --preset llama-2-70b             every method, also recomputing
    python tests/account.py --preset llama-2-70b --savings   each saving of QST, one after the other
    python tests/account.py --base FOLDER --method qlora     one method, on the shape of a folder

All flags of train.py are understood. What autograd keeps is what it would keep on a GPU: attention
is the kernel that a GPU has (`attention_of`), and every storage is added up from the operator that
makes it until it is freed (`Live`).
"""

import contextlib
import sys
import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.charts import bar_chart  # noqa: E402
from data.files import write_json  # noqa: E402
from data.methods import METHODS, SIDE_METHODS  # noqa: E402
from data.optim import make_optimizer  # noqa: E402
from data.report import loss_and_kept, optimizer_bytes  # noqa: E402
from data.settings import Parser, add_flags, pick_dtype, run, setting  # noqa: E402
from data.stream import Stream  # noqa: E402
from model import PRESETS, Transformer, count_weights, model_bytes, read_config  # noqa: E402
from qst import tune  # noqa: E402
from quant import InputError, Quantized4bit, unpack_buffers  # noqa: E402
from train import TrainConfig, prepare, resolve, side_config  # noqa: E402


@dataclass
class AccountConfig(TrainConfig):
    """The settings of a run, and of which runs there is an account."""

    method: str = setting(None, "only this method; default: all of them", tuple(METHODS))
    preset: str = setting("", f"the model's shape, in place of --base: {', '.join(PRESETS)}")
    savings: bool = setting(False, "what each saving saves, one after the other", of=SIDE_METHODS)
    gb_per_s: float = setting(25.0, "of --stream: from the host's memory, or disk", above=0)
    tflops: float = setting(150.0, "of --stream: what the GPU computes, 10^12 a second", above=0)


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


class Live(TorchDispatchMode):
    """Add up the storages that operators make, each until it is freed (`peak` is the most), and
    the floating-point operations."""

    now = peak = flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        storages = lambda *trees: {
            t.untyped_storage()._cdata: t.untyped_storage()
            for t in tree_leaves(trees) if isinstance(t, torch.Tensor)
        }  # fmt: skip
        given = storages(args, kwargs)  # views, and what is written in place, are nothing new
        for key, storage in storages(out).items():
            if key not in given:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def memory_report(cfg, config=None):
    """Account for the memory of one training step, in bytes, without allocating any of it.

    cfg: an `AccountConfig` with a method. Its device is "cpu", or "meta" for attention by the plain
        formula; anything else is a GPU
    config: a `ModelConfig`, in place of --preset or --base

    The real modules are built on the meta device and run one real step there, forward and
    backward. Every position has a target, for all methods alike.
        activations   what forward keeps for backward, each storage once: `activation_bytes`
        gradients     as while they accumulate: they are there from the start to the end
        optimizer     the two moments of AdamW
        transient     the step's peak above the four others: logits, a layer's intermediates, the
                      unpacked weight, and what is recomputed
        total         the sum, and so the peak
        streamed      with --stream, the weights that a batch reads; two layers' are on the device
        unaccumulated with --stream, the peak of a step that makes its gradients, as activations go
    Not in it: the workspaces of kernels, the allocator's fragmentation, CUDA's own half gigabyte.
    """
    config, cfg = config or config_of(cfg), settings_of_step(cfg)
    device = cfg.device if cfg.device in ("cpu", "meta") else "cuda"
    dtype = pick_dtype(cfg.dtype, torch.device(device))
    model = untrained(cfg, config, dtype, "meta")
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = one_step(model, cfg, device)[0].peak if cfg.stream else 0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in parameters)
    live, activations, forward = one_step(model, cfg, device)
    weights, optimizer = model_bytes(model), optimizer_bytes(make_optimizer(model, cfg))
    if cfg.stream and not config.tied:
        weights -= model.base.embed_tokens.weight.nbytes  # it is on the host
    return dict(
        method=cfg.method, checkpoint=cfg.checkpoint, weights_bytes=weights,
        gradients_bytes=gradients, optimizer_bytes=optimizer, activations_bytes=activations,
        transient_bytes=live.peak - activations,
        total_bytes=weights + gradients + optimizer + live.peak,
        trainable_parameters=sum(p.numel() for p in parameters),
        flops_per_token=round(live.flops / cfg.batch_size / cfg.sequence_len),
        forward_flops_per_token=round(forward / cfg.batch_size / cfg.sequence_len),
        streamed_bytes=model.base.stream.nbytes if cfg.stream else 0,
        unaccumulated_bytes=weights + optimizer + first if cfg.stream else 0,
    )  # fmt: skip


def one_step(model, cfg, device):
    """Forward and backward on meta tensors: `Live`, `activation_bytes`, the FLOP of forward."""
    targets = torch.zeros(cfg.batch_size, cfg.sequence_len, dtype=torch.long)
    unpack_buffers.clear()  # so that this step makes one, and it is counted
    with attention_of(device), Live() as live:
        loss, activations = loss_and_kept(model, targets.to("meta"), targets)
        forward = live.flops
        loss.backward()
    return live, activations, forward


def settings_of_step(cfg):
    """Settings as a run with a real base has them; a step needs no base and no data on disk."""
    return resolve(replace(cfg, base=cfg.base or cfg.preset or "shape", data=cfg.data or "any"))


def untrained(cfg, config, dtype, device):
    """A model with random weights: the base, frozen, and what --method trains."""
    with torch.device(device):
        base = Transformer(config).freeze(cfg.quant, dtype, device)
    if cfg.stream:
        stream_from_memory(base, device)
    return prepare(tune(base, side_config(cfg)), cfg)


def stream_from_memory(base, device):
    """Let the weights of a base's layers be streamed from where they are."""
    weights = {n: m for n, m in base.named_modules() if isinstance(m, Quantized4bit)}
    sources = {name: lambda weight=weight: weight for name, weight in weights.items()}
    Stream(base, sources, torch.device(device))


def config_of(cfg):
    """The shape of --preset, or of the model in --base."""
    if cfg.preset and cfg.base:
        raise InputError("--preset and --base both tell the model's shape: give one.")
    if cfg.side:
        raise InputError("The account is of a new side network: leave out --side.")
    if cfg.base:
        return read_config(cfg.base)
    if cfg.preset not in PRESETS:
        wrong = f"--preset {cfg.preset} is unknown" if cfg.preset else "Give --base, or --preset"
        raise InputError(f"{wrong}: choose {', '.join(PRESETS)}.")
    return PRESETS[cfg.preset]


# --------------------------------------------------------------------------------------
# The command

METHOD_ROWS = ("full", "adapter", "lora", "qlora", "peqa", "lst", "qst")
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GB that GPUs have
COLUMNS = ("weights", "gradients", "optimizer", "activations", "transient", "total")

# What --savings switches on, one after the other, from QST as it is written in the paper.
AS_WRITTEN = dict(checkpoint=False, h_f_bits=16, chunk_loss=False, optimizer_bits=32)
SAVINGS = {
    "as written": {}, "steps recomputed": dict(checkpoint=True), "h_f in 8 bits": dict(h_f_bits=8),
    "loss in chunks": dict(chunk_loss=True), "AdamW in 8 bits": dict(optimizer_bits=8),
    "h_f in 4 bits": dict(h_f_bits=4),
}  # fmt: skip


def rows(cfg):
    """Yield a label and settings: each method, with and without recomputing; or each saving."""
    if cfg.savings:
        cfg = replace(cfg, method=cfg.method or "qst", **AS_WRITTEN)
        for name, saving in SAVINGS.items():
            cfg = replace(cfg, **saving)
            yield name, cfg
        return
    for method in [cfg.method] if cfg.method else METHOD_ROWS:
        readers = {f.name: f.metadata["of"] or METHODS for f in fields(cfg)}
        unread = {f.name: f.default for f in fields(cfg) if method not in readers[f.name]}
        own = cfg if cfg.method else replace(cfg, quant=None, **unread)
        for checkpoint in (False, True) if cfg.checkpoint is None else (cfg.checkpoint,):
            label = method + ", checkpoint" * checkpoint
            yield label, replace(own, method=method, checkpoint=checkpoint)


def transfer(report, cfg):
    """What streaming costs: a sentence. While layer i computes forward, the next one comes."""
    moved, flops = report["streamed_bytes"], report["forward_flops_per_token"]
    reads, speed = moved / cfg.gb_per_s / 1e9, cfg.tflops * 1e12
    computes = flops * cfg.batch_size * cfg.sequence_len / speed
    return (
        f"  A batch reads {moved / 1e9:.2f} GB: {reads:.2f} s at {cfg.gb_per_s:g} GB/s; forward "
        f"computes {computes:.2f} s at {cfg.tflops:g} TFLOP/s.\n"
        f"  Streaming is free from {reads * speed / flops:,.0f} tokens (batch x length) on. Where "
        f"gradients do not accumulate,\n  they come as activations go: a total of "
        f"{report['unaccumulated_bytes'] / 1e9:.2f} GB."
    )


def main(cfg):
    """Print the account of a step, and leave it in out_dir: plan.json, a list of reports, and a
    picture.

    cfg: an `AccountConfig`
    """
    config, out_dir = config_of(cfg), Path(cfg.out_dir or "out")
    cfg = replace(cfg, method=cfg.method or "qst") if cfg.stream else cfg
    step = settings_of_step(replace(cfg, method=cfg.method or "qst"))
    unit, power = ("GB", 9) if count_weights(config) > 1e9 else ("MB", 6)
    tokens = f"{step.batch_size} x {step.sequence_len} tokens"
    head = (
        f"A training step of {cfg.base or cfg.preset}, {tokens}, each with a target.\n"
        f"In {unit} of 10^{power} bytes; * where a GPU of so many GB has room for it.\n\n"
        f"{'method':20}{''.join(f'{name:>12}' for name in COLUMNS)}      trainable  GFLOPs/token  "
        + "".join(f"{card:>3}" for card in CARDS)
    )
    reports, bars = [], {}
    for label, settings in rows(cfg):
        row = dict(label=label) | memory_report(settings, config)
        numbers = {name: row[f"{name}_bytes"] / 10**power for name in COLUMNS}
        cells = "".join(f"{number:12.2f}" for number in numbers.values())
        cells += f"{row['trainable_parameters']:>15,}{row['flops_per_token'] / 1e9:14.1f}  "
        fits = "".join("  *" if row["total_bytes"] <= card * 1e9 else "  -" for card in CARDS)
        lines = [head] * (not reports) + [f"{label:20}{cells}{fits}"]
        print(*lines, *[transfer(row, step)] * cfg.stream, sep="\n", flush=True)
        reports.append(row)
        bars[label] = {name: numbers[name] for name in COLUMNS[:-1]}
    write_json(out_dir / "plan.json", reports)
    title = f"{unit} of a step of {cfg.base or cfg.preset}, {tokens}"
    bar_chart(out_dir / "memory.svg", title, bars)
    return reports


def parse_args(argv=None):
    parser = Parser("account.py", description="The memory of a training step, without running it.")
    add_flags(parser, AccountConfig)
    return AccountConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run(lambda: main(parse_args()))
