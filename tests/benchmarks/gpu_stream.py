"""A training step whose layers come from pinned memory, beside one that has them on the GPU.

All layers come from one and the same in the host's memory, which takes the time of many.
"""

import copy

import torch

from account import memory_report, settings_of_step
from benchmarks.gpu_common import fill, target, workspace_bytes
from benchmarks.gpu_steps import attempt, costs, our_step, parse
from data.devices.stream import Stream
from model import Transformer
from qst import add_trainable
from quant import Quantized4bit
from train import prepare, side_config

COLUMNS = "model tokens what ms tokens_per_s peak_GB account_GB"


def streamed(sizes):
    """7B with its layers on the GPU and streamed; 70B streamed, with all savings and by default."""
    workspace, tokens = workspace_bytes(sizes.device, sizes.dtype), sizes.steps[-1]
    ms = {}
    for config, what, flags in (
        (sizes.large, "on the GPU", ""), (sizes.large, "streamed", "--stream"),
        (sizes.huge, "streamed", "--stream"),
        (sizes.huge, "streamed, all savings", "--stream --h_f_bits 4 --optimizer_bits 8"),
    ):
        cfg = parse(sizes, tokens, f"--method qst {flags}")
        step = streamed_step if cfg.stream else our_step
        figures = attempt(step, sizes, config, cfg, memory_report(cfg, config), workspace)
        model = f"{config.n_layer} x {config.n_embd}"
        ms[model, what] = figures.get("ms")
        beside = ms.get((model, "on the GPU"))
        if cfg.stream and beside and figures.get("ms"):
            slower = target("time / on the GPU", figures["ms"] / beside, "<= 1.1")
            figures["targets"] = [*figures["targets"], slower]
        yield dict(model=model, tokens="{} x {}".format(*tokens), what=what) | figures


def streamed_step(sizes, config, cfg, report, workspace, seconds=3.0):
    """A step beside the account, both where gradients accumulate."""
    cfg = settings_of_step(cfg)
    base = streamed_base(config, sizes.dtype, sizes.device)
    model = prepare(add_trainable(base, side_config(cfg)), cfg)
    figures = costs(sizes, model, model.loss, config, cfg, seconds)
    ratio = report["total_bytes"] / 1e9 / max(1e-9, figures["peak_GB"] - workspace / 1e9)
    beside = [target("account / peak", ratio, bound) for bound in (">= 0.97", "<= 1.03")]
    return figures | dict(account_GB=report["total_bytes"] / 1e9, targets=beside)


def streamed_base(config, dtype, device, distinct=False):
    """A frozen base with random weights: one layer's in the host's memory, the rest as it runs.

    distinct: whether each layer has weights of its own
    """
    with torch.device("meta"):
        base = Transformer(config).freeze("nf4", dtype, "meta")
    sources = {}
    for i in range(config.n_layer):
        if distinct or i == 0:
            weights = pinned_layer(base.layers[0], device)
        for name, weight in weights.items():
            sources[f"layers.{i}.{name}"] = lambda weight=weight: weight
    for path, module in base.named_modules():
        if not isinstance(module, Quantized4bit):
            place = "cpu" if path == "embed_tokens" and not config.tied else device
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty_like(buffer, device=place))
    Stream(base, sources, device)
    return fill(base).eval()


def pinned_layer(layer, device):
    """The random quantized weights of a layer on meta: {name: one in the host's memory}."""
    layer = fill(copy.deepcopy(layer).to_empty(device="cpu"))
    weights = {n: m for n, m in layer.named_modules() if isinstance(m, Quantized4bit)}
    if device.type == "cuda":
        weights = {n: m._apply(torch.Tensor.pin_memory) for n, m in weights.items()}
    return weights
