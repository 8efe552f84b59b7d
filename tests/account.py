"""The memory account: one real training step, of the real modules, on tensors without memory.

    python tests/account.py                                  every method, also recomputing
    python tests/account.py --preset llama-2-70b --savings   each saving of QST, one after the other
    python tests/account.py --base FOLDER --method qlora     one method, on the shape of a folder
    python tests/account.py --preset llama-3-8b --fit 24     which batch and length fit into 24 GB

Without --preset and --base it is of the embedded default, on a CPU, as train.py runs it.

All flags of train.py are understood. What autograd keeps is what it would keep on a GPU: attention
is the kernel that a GPU has (`attention_of`), and every storage is added up from the operator that
makes it until it is freed (`Live`).
"""

import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from benchmarks.live import Live, attention_of

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import IGNORE_INDEX, InputError, find_folder  # noqa: E402
from data.devices.device import loss_and_kept, model_bytes, pick_dtype  # noqa: E402
from data.devices.stream import Stream  # noqa: E402
from data.formats.config_json import first_layers  # noqa: E402
from data.formats.files import write_json  # noqa: E402
from data.frozen.hidden import pack_hidden  # noqa: E402
from benchmarks.charts import bar_chart  # noqa: E402
from benchmarks.fit import print_fits  # noqa: E402
from data.run.optim import make_optimizer, optimizer_bytes  # noqa: E402
from data.run.sweep import settings_of_runs  # noqa: E402
from data.settings.flags import Parser, parse_settings, run_main, setting  # noqa: E402
from data.settings.methods import METHODS, SIDE_METHODS  # noqa: E402
from data.tasks import tiny  # noqa: E402
from model import PRESETS, ModelConfig, Transformer, count_weights, read_config  # noqa: E402
from qst import add_trainable  # noqa: E402
from quant import Quantized4bit, unpack_buffers  # noqa: E402
from train import TrainConfig, prepare, resolve, side_config  # noqa: E402


@dataclass
class AccountConfig(TrainConfig):
    """The settings of a run, and of which runs there is an account."""

    method: str = setting(None, "only this method; default: all of them", tuple(METHODS))
    preset: str = setting("", f"the model's shape, in place of --base: {', '.join(PRESETS)}")
    savings: bool = setting(False, "what each saving saves, one after the other", of=SIDE_METHODS)
    fit: float = setting(0.0, "GB of a GPU: the largest batch and length that fit", at_least=0)
    gb_per_s: float = setting(25.0, "of --stream: from the host's memory, or disk", above=0)
    tflops: float = setting(150.0, "of --stream: what the GPU computes, 10^12 a second", above=0)


def memory_report(cfg, config=None, live=None):
    """Account for the memory of one training step, in bytes, without allocating any of it.

    cfg: an `AccountConfig` with a method. Its device is "cpu", or "meta" for attention by the plain
        formula; anything else is a GPU
    config: a `ModelConfig`, in place of --preset or --base; live: a `Live` that is to watch

    The real modules are built on the meta device and run one real step there, forward and
    backward. Every position has a target, for all methods alike; of a classifier, the last one.
        activations   what forward keeps for backward, each storage once: `loss_and_kept`
        gradients     as while they accumulate: they are there from the start to the end
        optimizer     its moments
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
    first = Live()
    if cfg.stream:
        one_step(model, cfg, device, first)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in parameters)
    live = live or Live()
    activations, forward = one_step(model, cfg, device, live)
    weights, optimizer = model_bytes(model), optimizer_bytes(make_optimizer(model, cfg))
    if cfg.stream and not config.tied:
        weights -= model.base.embed_tokens.weight.nbytes  # it is on the host
    return dict(
        method=cfg.method, checkpoint=cfg.checkpoint, weights_bytes=weights,
        learning_bytes=model_bytes(model.side), h_f_bits=cfg.h_f_bits,
        h_f_bytes=bytes_of_h_f(model, cfg, dtype),
        gradients_bytes=gradients, optimizer_bytes=optimizer, activations_bytes=activations,
        transient_bytes=live.peak - activations,
        total_bytes=weights + gradients + optimizer + live.peak,
        trainable_parameters=sum(p.numel() for p in parameters),
        flops_per_token=round(live.flops / cfg.batch_size / cfg.sequence_len),
        forward_flops_per_token=round(forward / cfg.batch_size / cfg.sequence_len),
        streamed_bytes=model.base.stream.nbytes if cfg.stream else 0,
        unaccumulated_bytes=weights + optimizer + first.peak if cfg.stream else 0,
    )


def one_step(model, cfg, device, live):
    """Forward and backward on meta tensors: `loss_and_kept`, and the FLOP of forward.
    live: a `Live`, which counts the rest"""
    targets = torch.zeros(cfg.batch_size, cfg.sequence_len, dtype=torch.long)
    targets[:, : -1 if cfg.head == "classifier" else 0] = IGNORE_INDEX
    unpack_buffers.clear()  # so that this step makes one, and it is counted
    with attention_of(device), live:
        loss, activations = loss_and_kept(model, targets.to("meta"), targets)
        forward = live.flops
        loss.backward()
    unpack_buffers.clear()
    return activations, forward


def bytes_of_h_f(model, cfg, dtype):
    """What is kept of the activations because downsamplers read h_f as it is; side networks beside
    one base keep it together."""
    side = model.side
    if cfg.method not in SIDE_METHODS or side.mean is not None or "pool" in side.config.downsample:
        return 0
    shape = cfg.batch_size, cfg.sequence_len, model.config.n_embd
    kept = pack_hidden(torch.empty(shape, dtype=dtype, device="meta"), cfg.h_f_bits)
    return (len(side.layers) + side.config.read_embedding) * sum(t.nbytes for t in kept)


def settings_of_step(cfg):
    """Settings as a run with a real base has them, or the embedded default; a step needs no base
    and no data on disk."""
    if cfg.task == "tiny":
        return resolve(replace(cfg, device="cpu" if cfg.device == "auto" else cfg.device))
    return resolve(replace(cfg, base=cfg.base or cfg.preset or "shape", data=cfg.data or "any"))


def untrained(cfg, config, dtype, device):
    """A model with random weights: the base, frozen, and what --method trains."""
    with torch.device(device):
        base = Transformer(config).freeze(cfg.quant, dtype, device)
    if cfg.stream:
        stream_from_memory(base, device)
    side = replace(side_config(cfg), n_labels=2 * (cfg.head == "classifier"))
    return prepare(add_trainable(base, side), cfg)


def stream_from_memory(base, device):
    """Let the weights of a base's layers be streamed from where they are."""
    weights = {n: m for n, m in base.named_modules() if isinstance(m, Quantized4bit)}
    sources = {name: lambda weight=weight: weight for name, weight in weights.items()}
    Stream(base, sources, torch.device(device))


def config_of(cfg):
    """The shape of --preset, or of the model in --base, or of the embedded default's."""
    if cfg.preset and cfg.base:
        raise InputError("--preset and --base both tell the model's shape: give one.")
    if cfg.side:
        raise InputError("The account is of a new side network: leave out --side.")
    if cfg.base:
        return read_config(find_folder(cfg.base, weights=False), cfg.layers)
    if not cfg.preset:
        return ModelConfig(tiny.VOCAB_SIZE, **tiny.BASE)
    if cfg.preset not in PRESETS:
        raise InputError(f"--preset {cfg.preset} is unknown: choose {', '.join(PRESETS)}.")
    return first_layers(PRESETS[cfg.preset], cfg.layers)


def about(cfg):
    """The settings, which are the embedded default's if they name no shape, and its name."""
    if name := cfg.base or cfg.preset:
        return cfg, name
    length = cfg.sequence_len or tiny.LONGEST
    return replace(cfg, task="tiny", sequence_len=length), "the embedded default"


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
}


def rows(cfg):
    """Yield a label and settings: each method, with and without recomputing; each saving; or each
    run of a sweep."""
    if cfg.sweep:
        cfg = replace(cfg, method=cfg.method or "qst", base=cfg.base or cfg.preset, data="any")
        yield from settings_of_runs(cfg, resolve(cfg), resolve).items()
        return
    if cfg.savings:
        cfg = replace(cfg, method=cfg.method or "qst", **AS_WRITTEN)
        for name, saving in SAVINGS.items():
            cfg = replace(cfg, **saving)
            yield name, cfg
        return
    for method in [cfg.method] if cfg.method else METHOD_ROWS:
        readers = {f.name: f.metadata["of"] or METHODS for f in fields(cfg)}
        unread = {f.name: f.default for f in fields(cfg) if method not in readers[f.name]}
        if method == "lst":  # which has no mix
            unread |= {f.name: f.default for f in fields(cfg) if f.name in ("mix", "variant")}
        own = cfg if cfg.method else replace(cfg, quant=None, **unread)
        for checkpoint in (False, True) if cfg.checkpoint is None else (cfg.checkpoint,):
            label = method + ", checkpoint" * checkpoint
            yield label, replace(own, method=method, checkpoint=checkpoint)


def together(reports):
    """The account of a sweep: the base, its transient memory and what is kept of h_f in as many
    bits once, all else of every run."""
    total = dict(label="all of them", transient_bytes=max(r["transient_bytes"] for r in reports))
    for name in ("gradients_bytes", "optimizer_bytes", "activations_bytes", "trainable_parameters"):
        total[name] = sum(report[name] for report in reports)
    for bits in {report["h_f_bits"] for report in reports}:
        same = [report["h_f_bytes"] for report in reports if report["h_f_bits"] == bits]
        total["activations_bytes"] -= sum(same) - max(same)
    total["flops_per_token"] = math.nan  # forward is of base and side: not known apart
    base = reports[0]["weights_bytes"] - reports[0]["learning_bytes"]
    total["weights_bytes"] = base + sum(report["learning_bytes"] for report in reports)
    total["total_bytes"] = sum(total[f"{name}_bytes"] for name in COLUMNS[:-1])
    return total


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
    """Print the account of a step, or what fits. Leave plan.json, a list of reports, and a picture.

    cfg: an `AccountConfig`
    """
    config, out_dir, (cfg, name) = config_of(cfg), Path(cfg.out_dir or "out"), about(cfg)
    if cfg.fit:
        return print_fits(cfg, config, name, rows(cfg), memory_report)
    cfg = replace(cfg, method=cfg.method or "qst") if cfg.stream else cfg
    step = settings_of_step(replace(cfg, method=cfg.method or "qst"))
    unit, power = ("GB", 9) if count_weights(config) > 1e9 else ("MB", 6)
    tokens = f"{step.batch_size} x {step.sequence_len} tokens"
    head = (
        f"A training step of {name}, {tokens}, each with a target.\n"
        f"In {unit} of 10^{power} bytes; * where a GPU of so many GB has room for it.\n\n"
        f"{'method':20}{''.join(f'{part:>12}' for part in COLUMNS)}      trainable  "
        f"{unit[0]}FLOPs/token  " + "".join(f"{card:>3}" for card in CARDS)
    )
    reports, bars = [], {}

    def show(row):
        label = row["label"]
        numbers = {part: row[f"{part}_bytes"] / 10**power for part in COLUMNS}
        cells = "".join(f"{number:12.2f}" for number in numbers.values())
        cells += f"{row['trainable_parameters']:>15,}"
        cells += f"{row['flops_per_token'] / 10**power:14.1f}  ".replace("nan", "  -")
        fits = "".join("  *" if row["total_bytes"] <= card * 1e9 else "  -" for card in CARDS)
        lines = [head] * (not reports) + [f"{label:20} {cells[1:]}{fits}"]
        lines += [transfer(row, step)] if row.get("streamed_bytes") else []
        print(*lines, sep="\n", flush=True)
        reports.append(row)
        bars[label] = {part: numbers[part] for part in COLUMNS[:-1]}

    for label, settings in rows(cfg):
        show(dict(label=label) | memory_report(settings, config))
    if cfg.sweep:
        show(together(reports))
    write_json(out_dir / "plan.json", reports)
    bar_chart(out_dir / "memory.svg", f"{unit} of a step of {name}, {tokens}", bars)
    return reports


def parse_args(argv=None):
    parser = Parser("account.py", description="The memory of a training step, without running it.")
    return parse_settings(parser, AccountConfig, argv)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()), "close other programs")
