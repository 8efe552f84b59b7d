"""The project's own code in the form of mine.py's pieces, for the tests. It has spoilers: read it
after you have built your own.

Everything is bound when this module is loaded, before `plug.py` puts anything in its place.
"""

from types import SimpleNamespace

import torch
from test_optimizer import run_of

from data.run.muon import orthogonalize
from model import token_loss
from quant import (
    CODEBOOKS, NF4_CODEBOOK, _FrozenLinear, plain_dequantize, quantize_4bit, quantize_blockwise,
)
from side import SideConfig, SideNetwork, make_downsample
from side import low_rank as low_rank_pair
from train import TrainConfig, train_step

of_network, mix_of_network = SideNetwork.step, SideNetwork.mix
quantized, packed_blocks, loss_of_tokens, pool = (
    quantize_4bit, quantize_blockwise, token_loss, make_downsample,
)
dequantized, frozen, one_step, orthogonal = (
    plain_dequantize, _FrozenLinear, train_step, orthogonalize,
)
LEVELS = NF4_CODEBOOK


def nf4_codebook():
    return LEVELS.clone()


def quantize_blocks(values, codebook, block_size):
    """With a 17th level that no value reaches, the project does not pack."""
    if len(codebook) == 16:
        codebook = torch.cat([codebook, torch.tensor([2.0])])
    return packed_blocks(values, codebook, block_size)


def pack_codes(codes):
    """The project packs while it quantizes: here values that are levels already, in one block."""
    values = torch.cat([LEVELS[codes.long()], torch.zeros(len(codes) % 2), torch.ones(2)])
    return packed_blocks(values, LEVELS, len(values))[0][: -(-len(codes) // 2)]


def double_quantize(absmax, codebook, quantize):
    """Of weights that have these scales."""
    q = quantized(absmax.repeat_interleave(64))
    return q.absmax, q.nested_absmax, q.offset


def dequantize(codes, absmax, nested_absmax, offset, codebook, dynamic, n):
    kind = "fp4" if torch.equal(codebook, CODEBOOKS["fp4"]) else "nf4"
    out = torch.empty(n)
    dequantized(codes, absmax, nested_absmax, offset, kind, out)
    return out


FrozenLinear = SimpleNamespace(apply=lambda x, weight, bias: frozen.apply(x, None, weight, bias))


def low_rank(h_f, down, up, activation):
    with torch.device("meta"):
        pair = low_rank_pair(down.shape[1], len(up), len(down), lambda: Called(activation))
    weights = {"down.weight": down, "up.weight": up}
    return torch.func.functional_call(pair, weights, h_f)


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = (function,)  # a tuple: a module would be registered

    def forward(self, x):
        return self.function[0](x)


def pooling(h_f, reduction, kind):
    config, C = SideConfig(reduction=reduction, downsample=kind), h_f.shape[-1]
    return pool(config, C, C // reduction)(h_f)


def side_network(gamma, downsample=(), layers=()):
    """An object with the parts of a `SideNetwork` that its step reads."""
    layers = [lambda x, *args, layer=layer: layer(x) for layer in layers]
    side = SimpleNamespace(
        downsample=[[reads] for reads in downsample], gamma=gamma, layers=layers, n_first=1,
        beta=None, checkpoint=False, standardized=lambda i, h_f: h_f,
    )
    side._gate_and_layer = SideNetwork._gate_and_layer.__get__(side)
    return side


def gate(z, h_g, gamma):
    """A step whose downsampler and whose layer do nothing."""
    nothing = lambda x: x
    side = side_network(gamma.unsqueeze(0), [None, nothing], [nothing])
    return of_network(side, 1, z, h_g)


def side_step(i, h_f, h_g, downsample, gate, gamma, layers):
    """A step whose own gate is closed, with the given one in front of it."""
    gated = lambda h_f: gate(downsample[i](h_f), h_g, gamma[i - 1])
    side = side_network(torch.full_like(gamma, -torch.inf), [gated] * len(downsample), layers)
    return of_network(side, i, h_f, h_g)


def mix(h_f, h_g, alpha, upsample):
    config = SimpleNamespace(mix="alpha")
    side = SimpleNamespace(alpha=alpha, upsample=upsample, norm=lambda x: x, config=config)
    return mix_of_network(side, h_f, h_g)


def answer_loss(logits, targets):
    return loss_of_tokens(logits, targets)


def training_step(loss_of, optimizer, batches, learning_rate, grad_clip):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    cfg = TrainConfig(grad_clip=grad_clip)
    models, run = run_of(loss_of, optimizer, scaler, cfg, learning_rate)
    ((loss, _),) = one_step([run], batches, 1, models)
    return loss


def newton_schulz(matrix, steps=5):
    return orthogonal(matrix.unsqueeze(0), steps).squeeze(0)
