"""What is trained: downsamplers, and the narrow side network that reads the frozen model.

    h_f (B, T, C)   hidden state of the frozen model f        C = n_embd
    h_g (B, T, c)   hidden state of the side network g        c = C / reduction

QST (arXiv 2401.07159 §3.2), with N layers in both networks:

    h_g_0 = downsample_0(h_f_0)                               h_f_0: the embedding
    h_g_i = layer_i((1 - beta_i) * downsample_i(h_f_i) + beta_i * h_g_{i-1})     beta = sigmoid(gamma)
    h     = alpha * h_f_N + (1 - alpha) * upsample(h_g_N)                        to the frozen LM head

Run `python side.py` to see what each downsampler costs on LLaMA-2-7B.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from model import PRESETS, DecoderLayer, LayerNorm, Linear, make_norm
from quant import InputError, Linear4bit


def setting(default, help):
    """A field of a dataclass of settings, with the text for `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class SideConfig:
    """The side network's architecture. The defaults are the paper's; RELEASED has the other."""

    method: str = setting("qst", "qst; or, to compare with, lora: low-rank branches in the base")
    reduction: int = setting(16, "the side network is this many times narrower than the base")
    rank: int = setting(16, "of the lora and adapter downsamplers, and of LoRA")
    downsample: str = setting("adapter", "linear, lora, adapter, maxpool or avgpool")
    standardize: bool = setting(False, "standardize each channel of what the downsamplers read")
    downsample_norm: bool = setting(False, "a LayerNorm after each downsampler")
    share_first: bool = setting(False, "one downsampler for the embedding and layer 1's output")
    gate: str = setting("scalar", "scalar: gamma, from 0; channel: a vector, from 0.5; sum: no gate")
    mix: str = setting("alpha", "alpha: a scalar, from 1; released: a vector; residual: a plain sum")
    attention: str = setting("own", "own, or borrowed: the base's queries and keys, the side's values")
    upsample_bias: bool = setting(False, "whether the upsampler has a bias")
    final_norm: bool = setting(False, "a norm of the side network before it is upsampled")
    n_labels: int = setting(0, "of a classifier in the LM head's place; train.py has it from the task")

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"--{name} {getattr(self, name)} is unknown: choose {', '.join(choices)}."
                )


CHOICES = {
    "method": ("qst", "lora"),
    "downsample": ("linear", "lora", "adapter", "maxpool", "avgpool"),
    "gate": ("scalar", "channel", "sum"),
    "mix": ("alpha", "released", "residual"),
    "attention": ("own", "borrowed"),
}

# What the authors' released code builds: SideConfig(**RELEASED). Unlike the paper, it has a gate and
# a mix per channel, norms, a bias and a shared downsampler, and the mix starts at sigmoid(1) = 0.73,
# so that training does not start at the LLM.
# differs from the released code: our mix is trained on a GPU too, and OPT's is not swapped.
RELEASED = dict(
    downsample_norm=True, share_first=True, gate="channel", mix="released", upsample_bias=True,
    final_norm=True,
)  # fmt: skip

# What we found to learn fastest: see "Why QST learns slowly" in the README.
FAST = dict(gate="sum", attention="borrowed", standardize=True)
VARIANTS = {"paper": {}, "released": RELEASED, "fast": FAST}


class LowRank(nn.Module):
    """Two factors with a narrow waist, and perhaps a nonlinearity between: (..., n_in) -> (..., n_out).

    The low-rank pair of LoRA (arXiv 2106.09685 §4.1), or with SiLU the bottleneck of Adapter.
    """

    def __init__(self, n_in, n_out, rank, nonlinear=False):
        super().__init__()
        self.down = Linear(n_in, rank, bias=False)
        self.up = Linear(rank, n_out, bias=False)
        self.nonlinear = nonlinear

    def forward(self, x):
        x = self.down(x)
        return self.up(F.silu(x) if self.nonlinear else x)


class Pool(nn.Module):
    """Of each `reduction` neighbouring channels, the largest or the mean: no parameters."""

    def __init__(self, reduction, kind):
        super().__init__()
        self.reduction, self.kind = reduction, kind

    def forward(self, x):
        groups = x.unflatten(-1, (-1, self.reduction))  # (..., c, reduction)
        return groups.amax(dim=-1) if self.kind == "maxpool" else groups.mean(dim=-1)


def make_downsample(config, n_in, n_out):
    """One of the paper's five ways from the base's width to the side's (QST §3.2, Table 6)."""
    if config.downsample == "linear":
        module = Linear(n_in, n_out, bias=False)
    elif config.downsample in ("lora", "adapter"):
        module = LowRank(n_in, n_out, config.rank, nonlinear=config.downsample == "adapter")
    else:
        module = Pool(config.reduction, config.downsample)
    return nn.Sequential(module, LayerNorm(n_out)) if config.downsample_norm else module


def narrow(config, reduction):
    """The side network's `ModelConfig`: as many layers and heads, every width divided."""
    fits = lambda r: (
        config.n_embd % (r * config.n_head) == 0
        and (config.family == "opt" or config.n_embd // r // config.n_head % 2 == 0)
        and config.n_ffn >= r
    )
    if not fits(reduction):
        good = [str(r) for r in range(1, config.n_embd + 1) if fits(r)]
        even = "" if config.family == "opt" else ", an even number each (rotary pairs)"
        raise InputError(
            f"--reduction {reduction} does not divide n_embd = {config.n_embd} into "
            f"{config.n_head} heads{even}: choose one of {', '.join(good)}."
        )
    C = config.n_embd // reduction
    return replace(
        config, n_embd=C, embed_dim=C, n_ffn=config.n_ffn // reduction, head_dim=C // config.n_head
    )


def make_classifier(base_config, config):
    """What is trained in the LM head's place where a task has labels; otherwise None."""
    return Linear(base_config.n_embd, config.n_labels, bias=False) if config.n_labels else None


class SideNetwork(nn.Module):
    """The network that learns; its modules' names are those of the symbols above."""

    def __init__(self, base_config, config):
        super().__init__()
        self.config, self.narrow = config, narrow(base_config, config.reduction)
        N, C, c = base_config.n_layer, base_config.n_embd, self.narrow.n_embd
        self.downsample = nn.ModuleList(
            make_downsample(config, C, c) for _ in range(N + (not config.share_first))
        )
        self.gamma = None
        for name in ("mean", "scale"):  # of the channels of h_f_0 ... h_f_N: see QST.calibrate
            self.register_buffer(name, torch.zeros(N + 1, C) if config.standardize else None)
        if config.gate != "sum":
            channel = config.gate == "channel"
            self.gamma = nn.Parameter(torch.full((N, c), 0.5) if channel else torch.zeros(N))
        borrows = config.attention == "borrowed"
        self.layers = nn.ModuleList(DecoderLayer(self.narrow, borrows) for _ in range(N))
        self.norm = make_norm(self.narrow) if config.final_norm else nn.Identity()
        self.upsample = Linear(c, C, bias=config.upsample_bias)
        self.alpha, self.classifier = None, make_classifier(base_config, config)
        if config.mix == "residual":
            nn.init.zeros_(self.upsample.weight)
        else:
            self.alpha = nn.Parameter(torch.ones(() if config.mix == "alpha" else C))

    def start(self, h_f):
        """h_g_0 from the embedding."""
        return self.downsample[0](self.standardized(0, h_f))

    def standardized(self, i, h_f):
        """h_f_i with channels of mean 0 and variance 1, if that is asked for."""
        if self.mean is None:
            return h_f
        return ((h_f - self.mean[i]) * self.scale[i]).to(h_f.dtype)

    def rung(self, i, h_f, h_g, *context):
        """h_g after layer i = 0 ... N-1, from h_f after the same layer and h_g before it.

        context: mask, rotary table, cache and look, as for `DecoderLayer`
        """
        h_f = self.standardized(i + 1, h_f)
        down = self.downsample[i if self.config.share_first else i + 1](h_f)
        if self.gamma is None:
            return self.layers[i](down + h_g, *context)
        beta = torch.sigmoid(self.gamma[i])
        mixed = (1 - beta).to(down.dtype) * down + beta.to(down.dtype) * h_g
        return self.layers[i](mixed, *context)

    def mix(self, h_f, h_g):
        """The hidden state for the LM head: (B, T, C).

        With alpha = 1 this is h_f, bit for bit: training starts at the LLM (QST §3.2; LST, which
        predicts from the side network alone, starts far away). The factor of the upsampled state
        is then 0, and so is every gradient of the side network but alpha's own, until alpha has
        moved: the first step trains alpha alone. The plain sum, with an upsampler that starts at 0,
        starts at the LLM too, and its gradient waits for nobody.
        """
        up = self.upsample(self.norm(h_g))
        if self.alpha is None:
            return h_f + up
        alpha = self.alpha if self.config.mix == "alpha" else torch.sigmoid(self.alpha)
        # 1 - alpha in fp32: in bf16, an alpha just below 1 is 1.
        return alpha.to(h_f.dtype) * h_f + (1 - alpha).to(h_f.dtype) * up


# --------------------------------------------------------------------------------------
# What other methods train


class Branched(nn.Module):
    """A frozen linear layer with a low-rank branch beside it, weighted by 16 / rank."""

    def __init__(self, linear, branch):
        super().__init__()
        self.linear, self.branch = linear, branch

    def forward(self, x):
        return self.linear(x) + 16 / len(self.branch.down.weight) * self.branch(x)


class Branches(nn.Module):
    """LoRA (arXiv 2106.09685 §4.1): a low-rank branch, from 0, for every linear layer of the base.

    On a base of 4 bits it is QLoRA (arXiv 2305.14314 §3).
    """

    def __init__(self, base, config):
        super().__init__()
        self.config, self.classifier = config, make_classifier(base.config, config)
        self.layers = nn.ModuleList()
        for layer in base.layers:
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, (Linear, Linear4bit))}
            branches = {n: LowRank(m.in_features, m.out_features, config.rank) for n, m in linears.items()}
            for name, branch in branches.items():
                nn.init.zeros_(branch.up.weight)
                layer.set_submodule(name, Branched(linears[name], branch))
            self.layers.append(nn.ModuleDict({n.split(".")[-1]: b for n, b in branches.items()}))


def main():
    base = PRESETS["llama-2-7b"]
    print("A side network for LLaMA-2-7B (4096 -> 256 channels)        trainable parameters")
    rows = [(f"{kind} downsampler", dict(downsample=kind)) for kind in CHOICES["downsample"]]
    for name, fields in [*rows, ("as released (adapter)", RELEASED)]:
        with torch.device("meta"):
            side = SideNetwork(base, SideConfig(**fields))
        print(f"{name:55} {sum(p.numel() for p in side.parameters()):>14,}")


if __name__ == "__main__":
    main()
