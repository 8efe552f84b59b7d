"""Put the fourteen pieces where the project's own code is, while a `with` statement runs.

The project replaces no function at run time. Here it is the purpose: its tests and its training
run on a student's code, and nobody has to copy a file.
"""

import sys
from collections import Counter, OrderedDict
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

import quant
import side
import train
from data.run import muon
from data.run.optim import learning_rate_at
from model import LanguageModel, token_loss
from quant import CODEBOOKS, DYNAMIC_CODEBOOK, NF4_CODEBOOK, Linear4bit, Quantized, Quantized4bit
from side import SideNetwork

PIECES = (
    "nf4_codebook", "quantize_blocks", "pack_codes", "double_quantize", "dequantize",
    "FrozenLinear", "low_rank", "pooling", "gate", "side_step", "mix", "answer_loss",
    "training_step", "newton_schulz",
)


def unwritten(function):
    """Whether a piece of mine.py still raises NotImplementedError."""
    parts = [function.forward, function.backward] if isinstance(function, type) else [function]
    codes = [part.__code__ for part in parts if hasattr(part, "__code__")]
    return any("NotImplementedError" in code.co_names for code in codes)


def counted(pieces):
    """The same pieces, and a `Counter` of the calls of each."""
    calls = Counter()

    def count(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    own = {name: count(name, getattr(pieces, name)) for name in PIECES if name != "FrozenLinear"}
    own["FrozenLinear"] = SimpleNamespace(apply=count("FrozenLinear", pieces.FrozenLinear.apply))
    return SimpleNamespace(**own), calls


@contextmanager
def plugged(pieces):
    """pieces: an object with the functions of PIECES"""
    attributes = quantization(pieces) + side_network(pieces)
    levels = pieces.nf4_codebook()
    globals_ = [("NF4_CODEBOOK", NF4_CODEBOOK, levels), *functions(pieces)]
    with ExitStack() as stack:
        for owner, name, new in attributes:
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(patch.dict(CODEBOOKS, nf4=levels))
        for name, old, new in globals_:
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(name) is old and module is not THIS:
                    stack.enter_context(patch.object(module, name, new))
        quant.byte_table.cache_clear()  # it holds levels
        stack.callback(quant.byte_table.cache_clear)
        yield


THIS = sys.modules[__name__]


def functions(pieces):
    """The functions and constants of modules: (name, the project's, the new one)."""
    in_blocks, in_4_bits = quant.quantize_blockwise, quant.quantize_4bit
    one_step, orthogonalize = train.train_step, muon.orthogonalize

    def quantize_blockwise(values, codebook, block_size):
        if values.is_meta:
            return in_blocks(values, codebook, block_size)
        values = values.reshape(-1).float()
        codes, absmax = pieces.quantize_blocks(values, codebook, block_size)
        return (pieces.pack_codes(codes) if len(codebook) == 16 else codes), absmax

    def quantize_4bit(weight, kind="nf4", double_quant=True, name="the weight"):
        if weight.is_meta:
            return in_4_bits(weight, kind, double_quant, name)
        q = in_4_bits(weight, kind, False, name)  # by the function above
        if not double_quant:
            return q
        scales = pieces.double_quantize(q.absmax, DYNAMIC_CODEBOOK, pieces.quantize_blocks)
        return Quantized4bit(q.codes, *scales, weight.shape, kind)

    def loss_of_tokens(logits, targets, reduction="mean"):
        if targets.is_floating_point() or reduction != "mean":
            return token_loss(logits, targets, reduction)
        return pieces.answer_loss(logits, targets.to(logits.device))

    def train_step(runs, batches, iteration, models=None):
        ((run,), models) = runs, models or train.share_base(runs)
        loss_of = lambda idx, targets: run.model.loss_of(models.compute(idx)[0], targets)
        run.learning_rate = rate = learning_rate_at(iteration - 1, run.cfg)
        args = run.optimizer, batches, rate, run.cfg.grad_clip
        loss = pieces.training_step(loss_of, *args)
        return [(loss, torch.isfinite(loss))]

    def of_matrices(matrices, steps=5):
        return torch.stack([pieces.newton_schulz(matrix, steps) for matrix in matrices])

    return [
        ("quantize_blockwise", in_blocks, quantize_blockwise),
        ("quantize_4bit", in_4_bits, quantize_4bit), ("token_loss", token_loss, loss_of_tokens),
        ("train_step", one_step, train_step), ("orthogonalize", orthogonalize, of_matrices),
    ]


def quantization(pieces):
    """The methods of quantized tensors and layers: (class, name, the new method)."""
    of_layer = Linear4bit.forward

    def fill(q, out):
        scales = q.absmax, q.nested_absmax, q.offset
        n = out.numel()
        out.copy_(pieces.dequantize(q.codes, *scales, CODEBOOKS[q.kind], DYNAMIC_CODEBOOK, n))

    def forward(layer, x):
        if layer.weight.scales is not None:  # integers, whose scales are trained
            return of_layer(layer, x)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return pieces.FrozenLinear.apply(x, layer.weight, bias)

    return [
        (Quantized4bit, "fill", fill), (Quantized4bit, "product", Quantized.product),
        (Linear4bit, "forward", forward),
    ]


def side_network(pieces):
    """The methods of the side network, and its loss: (class or module, name, the new one)."""
    make, start_of, step_of, mix_of = (
        side.make_downsample, SideNetwork.start, SideNetwork.step, SideNetwork.mix,
    )

    class Downsample(nn.Sequential):
        """The project's modules, called by the student's function."""

        def forward(self, h_f):
            if "up" in self._modules:
                weights = self.down.weight.to(h_f.dtype), self.up.weight.to(h_f.dtype)
                z = pieces.low_rank(h_f, *weights, self.act)
            elif "pool" in self._modules:
                kind = "maxpool" if isinstance(self.pool, nn.MaxPool1d) else "avgpool"
                z = pieces.pooling(h_f, self.reduction, kind)
            else:
                z = self.down(h_f)
            return self.norm(z) if "norm" in self._modules else z

    def make_downsample(config, n_in, n_out):
        new = Downsample(OrderedDict(make(config, n_in, n_out).named_children()))
        new.reduction = config.reduction
        return new

    def start(g, h_f):
        if not g.config.read_embedding or not isinstance(g.downsample[0], Downsample):
            return start_of(g, h_f)
        return g.downsample[0](g.standardized(0, h_f))

    def step(g, i, h_f, h_g, mask=None, rope=None, caches=None):
        if g.gamma is None:
            return step_of(g, i, h_f, h_g, mask, rope, caches)
        cache = caches and caches[i - 1]
        layers = [lambda x, layer=layer: layer(x, mask, rope, cache) for layer in g.layers]
        downsample = [None] * (1 - g.n_first) + list(g.downsample)
        gamma = g.gamma.to(h_f.dtype)
        h_f = g.standardized(i, h_f)
        return pieces.side_step(i, h_f, h_g, downsample, pieces.gate, gamma, layers)

    def mix(g, h_f, h_g):
        if g.config.mix != "alpha":
            return mix_of(g, h_f, h_g)
        return pieces.mix(h_f, g.norm(h_g), g.alpha, g.upsample)

    def loss_of(model, h, targets):
        if targets.is_floating_point():
            return token_loss(model.head(h), targets)
        return pieces.answer_loss(model.head(h), targets.to(h.device))

    return [
        (side, "make_downsample", make_downsample), (SideNetwork, "start", start),
        (SideNetwork, "step", step), (SideNetwork, "mix", mix),
        (LanguageModel, "loss_of", loss_of),
    ]
