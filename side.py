"""What is trained: downsamplers, and the narrow side network that reads the frozen model.

    h_f (B, T, C)   hidden state of the frozen model f        C = n_embd
    h_g (B, T, c)   hidden state of the side network g        c = C / reduction

QST (arXiv 2401.07159 §3.2), with N layers in both networks:

    h_g_0 = downsample_0(h_f_0)                               h_f_0: the embedding
    h_g_i = layer_i((1 - beta_i) * downsample_i(h_f_i) + beta_i * h_g_{i-1})
            with beta_i = sigmoid(gamma_i): a beta near 1 keeps h_g
    h     = alpha * h_f_N + (1 - alpha) * upsample(h_g_N)     to the frozen LM head

Other gates, mixes and downsamplers are settings of the same `SideNetwork`. With `every` = k it has
N / k layers, and only every k-th hidden state as input. The second half of this file has what other
methods train inside the base. `python side.py` prints the parameters of each downsampler.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from data import InputError
from data.devices.few_kernels import cast_weights
from data.frozen.hidden import PackedInputFunction
from data.generate.sampling import KVCache
from data.settings.flags import check, run_main, setting
from data.settings.methods import (
    LST, METHODS, PAPER, RELEASED, heads_of_side, layers_per_side, of_side,
)
from model import (
    PRESETS, RECOMPUTE, DecoderLayer, LayerNorm, Linear, make_norm, rotary_table,
)
from quant import Linear4bit

GATES = ("scalar", "channel", "sum")
MIXES = ("alpha", "released", "residual", "side")
DOWNSAMPLERS = ("linear", "lora", "adapter", "maxpool", "avgpool")


@dataclass
class SideConfig:
    """Settings of what is trained. None: the paper's value, or LST's (data/settings/methods.py)."""

    method: str = setting("qst", "QST, or another method", tuple(METHODS), group="side network")
    reduction: int = of_side(16, "how many times narrower the side network is", at_least=1)
    rank: int = setting(16, "rank of LoRA and adapter modules, also in downsamplers", at_least=1)
    every: int = of_side(None, "layers per side layer; 0: six side layers or more", at_least=0)
    heads: int = setting(None, "attention heads; 0: as many as the base", flag=False, at_least=0)
    read_embedding: bool = of_side(None, "start from the embedding; otherwise from zeros")
    downsample: str = of_side(None, "reduction to h_g's width; lst: linear", DOWNSAMPLERS)
    standardize: bool = of_side(None, "standardize each channel of the downsamplers' input")
    downsample_norm: bool = of_side(None, "LayerNorm after each downsampler")
    share_first: bool = of_side(None, "one downsampler for the embedding and layer 1's output")
    gate: str = of_side(None, "one gate per layer, one per channel, or a plain sum", GATES)
    mix: str = of_side(None, "alpha: one number; released: one per channel; residual: base + side; "
        "side: without the base", MIXES)
    upsample_bias: bool = of_side(None, "bias of the upsampler")
    final_norm: bool = of_side(None, "norm before the upsampler")
    layers: int = setting(0, "number of base layers below a classifier; 0: all", at_least=0)
    n_labels: int = setting(0, "labels of a classifier in place of the LM head", flag=False)
    task: str = setting("", "task of the classifier", flag=False)
    shots: int = setting(0, "few-shot examples before each GLUE question", at_least=0,
        group="task and data")
    preamble: str = setting("", "text before each question", flag=False)

    def __post_init__(self):
        for name, value in (PAPER | (LST if self.method == "lst" else {})).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check(self)
        if self.share_first and not self.read_embedding:
            raise InputError("--share_first needs the embedding: leave out --read_embedding false.")


def side_config(cfg):
    return SideConfig(**{f.name: getattr(cfg, f.name) for f in fields(SideConfig)})


def low_rank(n_in, n_out, rank, act=nn.Identity, first=Linear):
    """Make LoRA's low-rank pair (arXiv 2106.09685 §4.1), or with a nonlinearity the bottleneck of
    an adapter: (..., n_in) -> (..., rank) -> (..., n_out)."""
    down, up = first(n_in, rank, bias=False), Linear(rank, n_out, bias=False)
    return nn.Sequential(OrderedDict(down=down, act=act(), up=up))


class PackedInputLinear(Linear):
    """The first matrix of a downsampler, the only module that takes h_f as input. For backward it
    stores h_f in `bits` bits: 4, 8, or 16, which means unchanged."""

    bits = 16

    def forward(self, h_f):
        if self.bits < 16 and torch.is_grad_enabled():
            return PackedInputFunction.apply(h_f, self.weight, self.bits)
        return super().forward(h_f)


def make_downsample(config, n_in, n_out):
    """One of the paper's five downsamplers (QST §3.2, Table 6), from the base's width to the side
    network's. Only its first module takes h_f as input."""
    if config.downsample in ("lora", "adapter"):
        act = nn.SiLU if config.downsample == "adapter" else nn.Identity
        modules = low_rank(n_in, n_out, config.rank, act, PackedInputLinear)
    elif config.downsample == "linear":
        modules = nn.Sequential(OrderedDict(down=PackedInputLinear(n_in, n_out, bias=False)))
    else:  # max or mean of `reduction` neighbouring channels
        pool = nn.MaxPool1d if config.downsample == "maxpool" else nn.AvgPool1d
        modules = nn.Sequential(OrderedDict(pool=pool(config.reduction)))
    if config.downsample_norm:
        modules.add_module("norm", LayerNorm(n_out))
    return modules


# --------------------------------------------------------------------------------------
# The side network


def side_model_config(config, reduction, heads):
    """The base's `ModelConfig` -> the side network's: narrower. heads: see `heads_of_side`"""
    C, pair = config.n_embd, 1 if config.family == "opt" else 2  # rotary: pairs of channels
    fitting = [r for r in range(1, config.n_ffn + 1) if C % (pair * r) == 0]
    if reduction not in fitting:
        message = f"--reduction {reduction} does not divide n_embd = {C} into a multiple of {pair}"
        raise InputError(f"{message}: choose one of {', '.join(map(str, fitting))}.")
    c = C // reduction
    heads = heads_of_side(heads, config.n_head, c, pair)
    group = config.n_head // config.n_kv_head  # heads that share keys and values
    return replace(
        config, n_embd=c, embed_dim=c, n_ffn=config.n_ffn // reduction, n_head=heads,
        n_kv_head=heads // math.gcd(heads, group), head_dim=c // heads,
    )


class SideNetwork(nn.Module):
    """The side network g. Its modules are named like the symbols at the top of this file.

    n_layer: number of its layers, N / every; checkpoint: whether backward recomputes them
    """

    checkpoint = False
    beta = None  # of all layers, if `cast` has computed them
    cast = cast_weights

    def __init__(self, base_config, config):
        super().__init__()
        self.every = layers_per_side(config.every, base_config.n_layer)
        self.model_config = side_model_config(base_config, config.reduction, config.heads)
        heads = self.model_config.n_head
        self.config = config = replace(config, every=self.every, heads=heads)
        self.n_layer = n = base_config.n_layer // self.every
        C, c = base_config.n_embd, self.model_config.n_embd
        # downsample[0] is for h_g_0, unless that is shared or absent; then come the side layers'.
        self.n_first = int(config.read_embedding and not config.share_first)
        downsamplers = (make_downsample(config, C, c) for _ in range(self.n_first + n))
        self.downsample = nn.ModuleList(downsamplers)
        for name in ("mean", "scale"):  # per channel of h_f, set by `QST.calibrate`
            self.register_buffer(name, torch.zeros(n + 1, C) if config.standardize else None)
        self.gamma = self.alpha = None
        if config.gate != "sum":
            scalar = config.gate == "scalar"
            self.gamma = nn.Parameter(torch.zeros(n) if scalar else torch.full((n, c), 0.5))
        self.layers = nn.ModuleList(DecoderLayer(self.model_config) for _ in range(n))
        self.norm = make_norm(self.model_config) if config.final_norm else nn.Identity()
        self.upsample = Linear(c, C, bias=config.upsample_bias)
        if config.mix == "residual":
            nn.init.zeros_(self.upsample.weight)
        elif config.mix != "side":
            self.alpha = nn.Parameter(torch.ones(() if config.mix == "alpha" else C))

    def save_memory(self, checkpoint, h_f_bits):
        """Set what backward stores: h_f in 16 (unchanged), 8 or 4 bits, and layers or not."""
        self.checkpoint = checkpoint
        for module in self.modules():
            if isinstance(module, PackedInputLinear):
                module.bits = h_f_bits

    def standardized(self, i, h_f):
        """h_f_i; with --standardize, its channels have mean 0 and variance 1."""
        if self.mean is None:
            return h_f
        mean, scale = self.mean[i].to(h_f.device), self.scale[i].to(h_f.device)
        return ((h_f - mean) * scale).to(h_f.dtype)

    def new_cache(self, max_len):
        return [KVCache(max_len) for _ in self.layers]

    def rotary_table(self, positions, dtype):
        return rotary_table(self.model_config, positions, dtype)

    def start(self, h_f):
        """h_g_0 from h_f_0, the embedding."""
        if not self.config.read_embedding:
            return h_f.new_zeros(*h_f.shape[:-1], self.model_config.n_embd)
        reads_h_f, rest = self.downsample[0][0], self.downsample[0][1:]
        return rest(reads_h_f(self.standardized(0, h_f)).contiguous())

    def step(self, i, h_f, h_g, mask=None, rope=None, caches=None):
        """h_f_i, h_g_{i-1} -> h_g_i, for i = 1, ..., n_layer, as the paper counts. h_f_i is the
        output of the base's layer i * every. mask, rope: see `DecoderLayer`; caches: to generate
        """
        reads_h_f, *rest = self.downsample[self.n_first + i - 1]
        z = reads_h_f(self.standardized(i, h_f)).contiguous()  # a view would keep all of h_f
        beta = None if self.gamma is None else (self.beta or torch.sigmoid(self.gamma))[i - 1]
        args = i, rest, beta, z, h_g, mask, rope, caches and caches[i - 1]
        if self.checkpoint and torch.is_grad_enabled():
            return recomputed(self._gate_and_layer, *args, **RECOMPUTE)
        return self._gate_and_layer(*args)

    def _gate_and_layer(self, i, rest, beta, z, h_g, mask, rope, cache):
        """The rest of a step, in which every tensor is as narrow as the side network."""
        for module in rest:
            z = module(z)
        h_g = h_g.to(z.device)  # the layer before may stand on another device
        mixed = z + h_g if beta is None else torch.lerp(z, h_g, beta.to(z))
        return self.layers[i - 1](mixed, mask, rope, cache)

    def mix(self, h_f, h_g):
        """The hidden state for the LM head: (B, T, C).

        With alpha = 1 this is h_f, bit for bit: training starts at the LLM (QST §3.2). LST starts
        far from it. At alpha = 1 the side network's gradient is 0, so the first step trains only
        alpha. The residual mix starts at the LLM too, because its upsampler starts at 0.
        """
        up = self.upsample(self.norm(h_g))
        if self.alpha is None:
            return up if self.config.mix == "side" else h_f + up
        alpha = self.alpha if self.config.mix == "alpha" else torch.sigmoid(self.alpha)
        # In fp32: an alpha just below 1 rounds to 1 in bf16. A scalar becomes a vector before the
        # cast, because its gradient, one sum over all channels, could overflow in fp16.
        weight = (1 - alpha).expand(h_f.shape[-1]).to(h_f)
        return h_f + weight * (up - h_f)  # so that both weights add up to 1 in any dtype


# --------------------------------------------------------------------------------------
# What other methods train, inside the base


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank pair beside it, times `scaling` = 16 / rank."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, self.scaling = linear, 16 / rank  # LoRA's own alpha is 16 here
        self.pair = low_rank(linear.in_features, linear.out_features, rank)

    def forward(self, x):
        return self.linear(x) + self.scaling * self.pair(x)

    @property
    def bias(self):
        return self.linear.bias


class WithAdapter(nn.Module):
    """A frozen part of a layer, then a bottleneck with a residual connection."""

    def __init__(self, part, width, rank):
        super().__init__()
        self.part, self.pair = part, low_rank(width, width, rank, nn.SiLU)

    def forward(self, *args):
        y = self.part(*args)
        return y + self.pair(y)


class InsertedModules(nn.Module):
    """Low-rank pairs in every layer: LoRA's beside every linear layer (arXiv 2106.09685 §4.1; on a
    4-bit base it is QLoRA), adapters behind the attention and the MLP (arXiv 1902.00751 §2.1).

    differs from the paper: adapters have no biases, and the base's norms stay frozen.
    """

    def __init__(self, base, config):
        super().__init__()
        self.config, self.layers = config, nn.ModuleList()
        for layer in base.layers:
            if config.method == "adapter":
                C, parts = base.config.n_embd, {"self_attn": layer.self_attn, "mlp": layer.mlp}
                new = {path: WithAdapter(part, C, config.rank) for path, part in parts.items()}
            else:
                kinds, modules = (Linear, Linear4bit), layer.named_modules()
                new = {n: LoRALinear(m, config.rank) for n, m in modules if isinstance(m, kinds)}
            for path, module in new.items():
                nn.init.zeros_(module.pair.up.weight)
                layer.set_submodule(path, module)
            pairs = {path.split(".")[-1]: module.pair for path, module in new.items()}
            self.layers.append(nn.ModuleDict(pairs))


class Unfrozen(nn.Module):
    """Tensors of the base itself that are trained: in full finetuning all, in PEQA (arXiv
    2305.14152 §3) the scales of its integer layers."""

    def __init__(self, base, config):
        super().__init__()
        self.config, self.weights = config, nn.ParameterDict()
        parameters = {}  # {id of a buffer: its Parameter}, so that a tied head stays tied
        for path, module in base.named_modules():
            unused = path == "lm_head" and config.n_labels and not base.config.tied
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name == "scales" or config.method == "full" and not unused:
                    if id(buffer) not in parameters:
                        parameters[id(buffer)] = nn.Parameter(buffer)
                        key = f"{path}.{name}".replace(".", "/")  # a ParameterDict takes no dots
                        self.weights[key] = parameters[id(buffer)]
                    delattr(module, name)
                    module.register_parameter(name, parameters[id(buffer)])


IN_BASE_METHODS = dict.fromkeys(["qlora", "lora", "adapter"], InsertedModules)
IN_BASE_METHODS |= dict.fromkeys(["peqa", "full"], Unfrozen)


def main():
    print("A side network for LLaMA-2-7B (4096 -> 256 channels)        trainable parameters")
    rows = {f"{kind} downsampler": dict(downsample=kind) for kind in DOWNSAMPLERS}
    for name, settings in (rows | {"as released (adapter)": RELEASED}).items():
        with torch.device("meta"):
            side = SideNetwork(PRESETS["llama-2-7b"], SideConfig(**settings))
        print(f"{name:55} {sum(p.numel() for p in side.parameters()):>14,}")


if __name__ == "__main__":
    run_main(main)
