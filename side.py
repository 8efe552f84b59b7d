"""What is trained: downsamplers, and the narrow side network that reads the frozen model.

    h_f (B, T, C)   hidden state of the frozen model f        C = n_embd
    h_g (B, T, c)   hidden state of the side network g        c = C / reduction

QST (arXiv 2401.07159 §3.2), with N layers in both networks:

    h_g_0 = downsample_0(h_f_0)                               h_f_0: the embedding
    h_g_i = layer_i((1 - beta_i) * downsample_i(h_f_i) + beta_i * h_g_{i-1})     beta = sigmoid(gamma)
    h     = alpha * h_f_N + (1 - alpha) * upsample(h_g_N)                        to the frozen LM head

Other ways to gate, to mix, to attend and to read h_f are settings of the same `SideNetwork`. Below
it stands what the methods train that QST is compared with: modules inside the base.

Run `python side.py` to see what each downsampler costs on LLaMA-2-7B.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.settings import check, setting
from model import PRESETS, DecoderLayer, LayerNorm, Linear, make_norm
from quant import InputError, Linear4bit, pack_activation, unpack_activation


METHODS = {  # what each method's base may be stored in; the first is the default. int4 stands for int4-64 too
    "qst": ("nf4", "fp4", "none"),
    "lst": ("none", "nf4", "fp4"),
    "qlora": ("nf4", "fp4"),
    "lora": ("none",),
    "adapter": ("none", "nf4", "fp4"),
    "peqa": ("int4", "int3"),
    "full": ("none",),
}
DOWNSAMPLERS = ("linear", "lora", "adapter", "maxpool", "avgpool")
SIDE = ("qst", "lst")  # the methods that train a side network


def check_quant(method, quant):
    if quant.partition("-")[0] not in METHODS[method]:
        kinds = " or ".join(METHODS[method])
        raise InputError(f"--method {method} needs a base with --quant {kinds}, and not {quant}.")


@dataclass
class SideConfig:
    """What is trained. The defaults are the paper's side network; VARIANTS has others."""

    method: str = setting("qst", "QST, or what it is compared with", tuple(METHODS))
    reduction: int = setting(16, "the side network is so many times narrower than the base", of=SIDE, at_least=1)
    rank: int = setting(16, "of the lora and adapter downsamplers, of LoRA and of Adapter", at_least=1)
    downsample: str = setting(None, "from the base's width to the side's; default: adapter, or linear for lst",
        DOWNSAMPLERS, SIDE)  # fmt: skip
    standardize: bool = setting(False, "standardize each channel of what the downsamplers read", of=SIDE)
    downsample_norm: bool = setting(False, "a LayerNorm after each downsampler", of=SIDE)
    share_first: bool = setting(False, "one downsampler for the embedding and layer 1's output", of=SIDE)
    gate: str = setting("scalar", "a number, from 0; a vector, from 0.5; or none: a plain sum",
        ("scalar", "channel", "sum"), SIDE)  # fmt: skip
    mix: str = setting(None, "a scalar, from 1 (the default); a vector; a plain sum; the side network alone (of lst)",
        ("alpha", "released", "residual", "side"), SIDE)  # fmt: skip
    attention: str = setting("own", "or the base's queries and keys, with the side's values", ("own", "borrowed"), SIDE)
    upsample_bias: bool = setting(False, "whether the upsampler has a bias", of=SIDE)
    final_norm: bool = setting(False, "a norm of the side network before it is upsampled", of=SIDE)
    n_labels: int = setting(0, "of a classifier in the LM head's place; train.py has it from the task")
    task: str = setting("", "whose labels a classifier has learned")

    def __post_init__(self):
        if self.method == "lst":  # LST (arXiv 2206.06522) is a side network with these two settings
            self.downsample, self.mix = self.downsample or "linear", self.mix or "side"
        self.downsample, self.mix = self.downsample or "adapter", self.mix or "alpha"
        check(self)


# What the authors' released code builds: SideConfig(**RELEASED). Unlike the paper, it has a gate and
# a mix per channel, norms, a bias and a shared downsampler, and the mix starts at sigmoid(1) = 0.73,
# so that training does not start at the LLM.
# differs from the released code: our mix is trained on a GPU too, and OPT's is not swapped.
RELEASED = dict(
    downsample_norm=True, share_first=True, gate="channel", mix="released", upsample_bias=True,
    final_norm=True,
)  # fmt: skip

# What we found to learn fastest: see "Why QST learns slowly" in the README.
FAST = dict(gate="sum", standardize=True)
VARIANTS = {"paper": {}, "released": RELEASED, "fast": FAST}


def low_rank(n_in, n_out, rank, nonlinear=False, first=Linear):
    """Two factors with a narrow waist, and perhaps SiLU between: (..., n_in) -> (..., n_out).

    The low-rank pair of LoRA (arXiv 2106.09685 §4.1), or the bottleneck of Adapter.
    """
    parts = OrderedDict(down=first(n_in, rank, bias=False))
    if nonlinear:
        parts["act"] = nn.SiLU()
    return nn.Sequential(OrderedDict(**parts, up=Linear(rank, n_out, bias=False)))


class _ReaderFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_f, weight, bits):
        ctx.shape, ctx.bits, ctx.dtype = h_f.shape, bits, weight.dtype
        ctx.save_for_backward(*pack_activation(h_f, bits))
        return F.linear(h_f, weight.to(h_f.dtype))

    @staticmethod
    def backward(ctx, grad):
        h_f = unpack_activation(ctx.saved_tensors, ctx.shape, ctx.bits, grad.dtype)
        return None, (grad.flatten(0, -2).T @ h_f.flatten(0, -2)).to(ctx.dtype), None


class Reader(Linear):
    """The first matrix of a downsampler. Its gradient is all that needs h_f in backward, and it may
    keep it in `bits` bits, 8 or 4, for that; 16 stands for "as it is"."""

    bits = 16

    def forward(self, h_f):
        if self.bits < 16 and torch.is_grad_enabled():
            return _ReaderFunction.apply(h_f, self.weight, self.bits)
        return super().forward(h_f)


class Look:
    """Queries and keys, exact when they are taken for the first time, for forward; the second time,
    for backward, what is left of them in `bits` bits."""

    def __init__(self, tensors, bits):
        self.exact, self.bits = tensors, bits
        self.shapes, self.dtype = [t.shape for t in tensors], tensors[0].dtype
        pairs = [pack_activation(t, bits) for t in tensors]
        self.each, self.packed = len(pairs[0]), [t for pair in pairs for t in pair]

    def __iter__(self):
        exact, self.exact = self.exact, None
        parts = [self.packed[: self.each], self.packed[self.each :]]
        left = zip(parts, self.shapes)
        return iter(exact or [unpack_activation(p, s, self.bits, self.dtype) for p, s in left])


class Pool(nn.Module):
    """Of each `reduction` neighbouring channels, the largest or the mean: no parameters."""

    def __init__(self, reduction, kind):
        super().__init__()
        self.reduction, self.kind = reduction, kind

    def forward(self, x):
        groups = x.unflatten(-1, (-1, self.reduction))  # (..., c, reduction)
        return groups.amax(dim=-1) if self.kind == "maxpool" else groups.mean(dim=-1)


def make_downsample(config, n_in, n_out):
    """One of the paper's five ways from the base's width to the side's (QST §3.2, Table 6), as a
    sequence whose first part alone sees h_f."""
    if config.downsample in ("lora", "adapter"):
        parts = low_rank(n_in, n_out, config.rank, config.downsample == "adapter", Reader)
    elif config.downsample == "linear":
        parts = nn.Sequential(OrderedDict(down=Reader(n_in, n_out, bias=False)))
    else:
        parts = nn.Sequential(OrderedDict(pool=Pool(config.reduction, config.downsample)))
    if config.downsample_norm:
        parts.add_module("norm", LayerNorm(n_out))
    return parts


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
    """The network that learns; its modules' names are those of the symbols above.

    checkpoint: whether backward computes each rung again from the few numbers that reach it
    """

    checkpoint, bits = False, 16

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
        elif config.mix != "side":
            self.alpha = nn.Parameter(torch.ones(() if config.mix == "alpha" else C))

    def save_memory(self, checkpoint, bits):
        """Compute rungs again in backward, and keep h_f for it in 16 (as it is), 8 or 4 bits."""
        self.checkpoint, self.bits = checkpoint, bits
        for module in self.modules():
            if isinstance(module, Reader):
                module.bits = bits

    def start(self, h_f):
        """h_g_0 from the embedding."""
        return self.downsample[0](self.standardized(0, h_f))

    def standardized(self, i, h_f):
        """h_f_i with channels of mean 0 and variance 1, if that is asked for."""
        if self.mean is None:
            return h_f
        return ((h_f - self.mean[i]) * self.scale[i]).to(h_f.dtype)

    def rung(self, i, h_f, h_g, mask=None, rope=None, cache=None, look=None):
        """h_g after layer i = 0 ... N-1, from h_f after the same layer and h_g before it.

        look: the queries and keys of the base's layer, if they are borrowed; the rest as for
            `DecoderLayer`
        """
        first, *rest = self.downsample[i if self.config.share_first else i + 1]
        z = first(self.standardized(i + 1, h_f))  # all that backward knows of h_f
        if not (self.checkpoint and torch.is_grad_enabled()):
            return self.climb(i, rest, z, h_g, mask, rope, cache, look)
        look = look and Look(look, self.bits)
        climb = lambda z, h_g, *kept: self.climb(i, rest, z, h_g, mask, rope, cache, look)
        return checkpoint(climb, z, h_g, *(look.packed if look else ()), use_reentrant=False)

    def climb(self, i, rest, z, h_g, *context):
        """The narrow part of a rung, from what the downsampler's first part gave."""
        for part in rest:
            z = part(z)
        if self.gamma is None:
            return self.layers[i](z + h_g, *context)
        beta = torch.sigmoid(self.gamma[i])
        mixed = (1 - beta).to(z.dtype) * z + beta.to(z.dtype) * h_g
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
            return up if self.config.mix == "side" else h_f + up
        alpha = self.alpha if self.config.mix == "alpha" else torch.sigmoid(self.alpha)
        # 1 - alpha in fp32: in bf16, an alpha just below 1 is 1.
        return alpha.to(h_f.dtype) * h_f + (1 - alpha).to(h_f.dtype) * up


# --------------------------------------------------------------------------------------
# A side network that starts as the base, pruned


def full_weight(linear):
    """The weight of a frozen layer in fp32, whatever it is stored in."""
    packed = isinstance(linear, Linear4bit)
    return linear.quantized.dequantize() if packed else linear.weight.detach().float()


@torch.no_grad()
def prune(base, side):
    """Start the side network's layers as the base's, pruned (LST, arXiv 2206.06522 §2.3).

    A channel counts for as much as the magnitudes of all weights that write to it and read it, and
    those that count most are kept, in their order:
    - of the hidden state, the same in all layers, which are joined by it;
    - of the MLP, each layer's own;
    - in each attention head, those of its queries and keys, rotary pairs together, and those of its
      values. Heads that share a key choose together.
    Downsamplers, gates and the upsampler start as usual.

    differs from the paper: magnitudes, where LST has Fisher information, which needs gradients of
    the base; and one choice for the hidden state, where it chooses matrix by matrix.
    """
    c, n_kv, group = side.narrow, base.config.n_kv_head, base.config.n_head // base.config.n_kv_head
    top = lambda score, n: score.topk(n).indices.sort().values
    hidden = top(sum(map(hidden_score, base.layers)), c.n_embd)
    for layer, own in zip(base.layers, side.layers):
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, (Linear, Linear4bit))}
        W = {name.split(".")[-1]: full_weight(m) for name, m in linears.items()}
        heads = lambda name: W[name].abs().sum(1).view(n_kv, -1, base.config.head_dim).sum(1)
        score = heads("q_proj") + heads("k_proj")  # (n_kv, D)
        if base.config.family == "opt":
            looks = top(score, c.head_dim)
        else:
            first = top(score.view(n_kv, 2, -1).sum(1), c.head_dim // 2)
            looks = torch.cat([first, first + base.config.head_dim // 2], dim=1)
        out = W["o_proj"].abs().sum(0).view(n_kv, group, -1).sum(1)
        values = top(heads("v_proj") + out, c.head_dim)
        ffn = sum(W[n].abs().sum(1) for n in ("gate_proj", "up_proj") if n in W)
        ffn = top(ffn + W["down_proj"].abs().sum(0), c.n_ffn)

        def rows(index, repeat=1):
            """Channels (n_kv, d) within heads -> within the rows of all heads, (n,)."""
            index = index.repeat_interleave(repeat, dim=0)
            first = torch.arange(len(index), device=index.device) * base.config.head_dim
            return (first.unsqueeze(1) + index).flatten()

        kept = {
            "q_proj": (rows(looks, group), hidden), "k_proj": (rows(looks), hidden),
            "v_proj": (rows(values), hidden), "o_proj": (hidden, rows(values, group)),
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn),
        }  # fmt: skip
        for path, module in own.named_modules():
            name, source = path.split(".")[-1], layer.get_submodule(path)
            if name in W:
                module.weight.copy_(W[name][kept[name][0]][:, kept[name][1]])
            elif "layernorm" in name:
                module.weight.copy_(source.weight[hidden])
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(source.bias[kept[name][0] if name in W else hidden])


def hidden_score(layer):
    """The magnitudes of a layer's weights that read and write each channel of h_f: (C,)."""
    score = 0
    for name, module in layer.named_modules():
        if isinstance(module, (Linear, Linear4bit)):
            writes = name.endswith(("o_proj", "down_proj"))
            score = score + full_weight(module).abs().sum(1 if writes else 0)
    return score


# --------------------------------------------------------------------------------------
# What other methods train, inside the base


class Branched(nn.Module):
    """A frozen linear layer with a low-rank branch beside it, weighted by 16 / rank."""

    def __init__(self, linear, branch):
        super().__init__()
        self.linear, self.branch = linear, branch
        self.weighted = 16 / len(branch.down.weight)

    def forward(self, x):
        return self.linear(x) + self.weighted * self.branch(x)

    @property
    def weight(self):
        """Both in one, in fp32."""
        branch = self.branch.up.weight.detach().float() @ self.branch.down.weight.detach().float()
        return full_weight(self.linear) + self.weighted * branch

    @property
    def bias(self):
        return self.linear.bias


class Adapted(nn.Module):
    """A frozen part of a layer with a bottleneck behind it, and a residual around that."""

    def __init__(self, part, bottleneck):
        super().__init__()
        self.part, self.bottleneck = part, bottleneck

    def forward(self, *args):
        y = self.part(*args)
        return y + self.bottleneck(y)


class Inserted(nn.Module):
    """Low-rank modules in every layer of the base, which start at 0 and so at the base."""

    def __init__(self, base, config):
        super().__init__()
        self.config, self.classifier = config, make_classifier(base.config, config)
        self.layers = nn.ModuleList(nn.ModuleDict(self.insert(layer)) for layer in base.layers)

    def insert(self, layer):
        """Put the modules in, and return them by a name."""
        found = {}
        for path, module in self.places(layer).items():
            pair = self.make(module, self.config.rank)
            nn.init.zeros_(pair.up.weight)
            layer.set_submodule(path, self.wrapper(module, pair))
            found[path.split(".")[-1]] = pair
        return found


class Branches(Inserted):
    """LoRA (arXiv 2106.09685 §4.1): a low-rank branch for every linear layer of the base.

    On a base of 4 bits it is QLoRA (arXiv 2305.14314 §3).
    """

    wrapper = Branched

    @staticmethod
    def places(layer):
        return {n: m for n, m in layer.named_modules() if isinstance(m, (Linear, Linear4bit))}

    @staticmethod
    def make(linear, rank):
        return low_rank(linear.in_features, linear.out_features, rank)


class Adapters(Inserted):
    """Adapter (arXiv 1902.00751 §2.1): bottlenecks behind the attention and the MLP of each layer.

    differs from the paper: no biases, and the base's norms stay frozen.
    """

    wrapper = Adapted

    @staticmethod
    def places(layer):
        return {"self_attn": layer.self_attn, "mlp": layer.mlp}

    @staticmethod
    def make(part, rank):
        last = part.o_proj if hasattr(part, "o_proj") else part.down_proj
        return low_rank(last.out_features, last.out_features, rank, nonlinear=True)


class Thawed(nn.Module):
    """Tensors of the base itself that learn: in full finetuning all, in PEQA (arXiv 2305.14152 §3)
    the scales of its `QuantizedInt` layers, of which the whole numbers stay as they are."""

    def __init__(self, base, config):
        super().__init__()
        self.config, self.classifier = config, make_classifier(base.config, config)
        made = {}  # by the buffer's id: a tied head stays tied
        for path, module in base.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                replaced = path == "lm_head" and config.n_labels and not base.config.tied
                if config.method == "full" and not replaced or name == "scales":
                    weight = made.setdefault(id(buffer), (f"{path}.{name}", nn.Parameter(buffer)))[1]
                    delattr(module, name)
                    module.register_parameter(name, weight)
        # A ParameterDict takes no dots.
        self.weights = nn.ParameterDict({k.replace(".", "/"): p for k, p in made.values()})


INSIDE = {"qlora": Branches, "lora": Branches, "adapter": Adapters, "peqa": Thawed, "full": Thawed}


def main():
    base = PRESETS["llama-2-7b"]
    print("A side network for LLaMA-2-7B (4096 -> 256 channels)        trainable parameters")
    rows = [(f"{kind} downsampler", dict(downsample=kind)) for kind in DOWNSAMPLERS]
    for name, fields in [*rows, ("as released (adapter)", RELEASED)]:
        with torch.device("meta"):
            side = SideNetwork(base, SideConfig(**fields))
        print(f"{name:55} {sum(p.numel() for p in side.parameters()):>14,}")


if __name__ == "__main__":
    main()
