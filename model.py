"""The frozen LLM: one `DecoderLayer` for LLaMA and OPT, the safetensors reader, `from_pretrained`.

Reading order: the config, the layer, the model, generation with a cache, and then how the weights
get in: the file format, and a loader that quantizes one tensor at a time.

    B, T  batch and length        C = n_embd        V = vocab_size        D = head_dim

Module attributes carry the names of Hugging Face's checkpoints (`q_proj`, `input_layernorm`, ...),
LLaMA's where the two families differ, so that loading is one strict pass; the few other names of
OPT are in `OPT_NAMES`. The same `DecoderLayer`, narrower, makes the side network in side.py.

Run `python model.py` to see what some of them weigh in 16 and in 4 bits, and `python model.py
quantize IN OUT` to write a folder in 4 bits.
"""

import json
import math
import mmap
import os
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quant import (
    ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, DYNAMIC_CODEBOOK, InputError, Linear4bit,
    Quantized4bit, frozen_linear, parse_int,
)  # fmt: skip


@dataclass
class ModelConfig:
    """The shape of a LLaMA or OPT model; 0 means "as usual", and is filled in."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_ffn: int
    n_kv_head: int = 0  # 0: n_head, that is, no grouped-query attention
    head_dim: int = 0  # 0: n_embd / n_head
    max_positions: int = 2048  # the longest sequence
    family: str = "llama"  # llama: RMSNorm, rotary, gated MLP; opt: LayerNorm, learned, plain MLP
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True  # False: norms after attention and MLP, as in OPT-350m alone
    final_norm: bool = True
    embed_dim: int = 0  # 0: n_embd; OPT-350m embeds in 512 and projects to 1024
    tied: bool = False  # the LM head is the embedding
    bos_id: int | None = None
    eos_id: int | list | None = None

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.embed_dim = self.embed_dim or self.n_embd


def _llama(n_layer, n_head, n_embd, n_ffn, vocab_size=32000, max_positions=4096, **other):
    return ModelConfig(
        vocab_size, n_layer, n_head, n_embd, n_ffn, max_positions=max_positions,
        bos_id=1, eos_id=2, **other
    )  # fmt: skip


def _opt(n_layer, n_head, n_embd, **other):
    return ModelConfig(
        50272, n_layer, n_head, n_embd, 4 * n_embd, family="opt", attention_bias=True,
        mlp_bias=True, tied=True, bos_id=2, eos_id=2, **other
    )  # fmt: skip


PRESETS = {
    "smollm2-135m": _llama(30, 9, 576, 1536, 49152, 8192, n_kv_head=3, tied=True, rope_theta=1e5),
    "tinyllama-1.1b": _llama(22, 32, 2048, 5632, max_positions=2048, n_kv_head=4),
    "llama-2-7b": _llama(32, 32, 4096, 11008),
    "llama-2-13b": _llama(40, 40, 5120, 13824),
    "llama-2-70b": _llama(80, 64, 8192, 28672, n_kv_head=8),
    "llama-3-8b": _llama(32, 32, 4096, 14336, 128256, 8192, n_kv_head=8, rope_theta=5e5),
    "opt-125m": _opt(12, 12, 768),
    "opt-350m": _opt(24, 16, 1024, embed_dim=512, pre_norm=False, final_norm=False),
    "opt-1.3b": _opt(24, 32, 2048),
    "opt-2.7b": _opt(32, 32, 2560),
    "opt-6.7b": _opt(32, 32, 4096),
    "opt-13b": _opt(40, 40, 5120),
    "opt-30b": _opt(48, 56, 7168),
    "opt-66b": _opt(64, 72, 9216),
}

# --------------------------------------------------------------------------------------
# A layer


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype, whatever its weights are stored in: the
    side network's master weights stay in fp32 while it computes in bf16."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def make_norm(config):
    return (RMSNorm if config.family == "llama" else LayerNorm)(config.n_embd, eps=config.norm_eps)


def rotary_frequencies(config, device):
    """Radians per position of each pair of channels, fp32 (D / 2,) (RoFormer, arXiv 2104.09864)."""
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inv_freq = 1.0 / (config.rope_theta ** (pairs / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # "llama3": slow frequencies, which turn less than low_freq_factor times within the original
    # context, are slowed down by the factor; fast ones stay; in between, a linear blend.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


def rotary_table(config, positions, dtype):
    """Cosines and sines to rotate queries and keys by; None for a model with learned positions.

    positions: (B or 1, T)
    returns two of (B or 1, 1, T, D), the second half of the channels repeating the first
    """
    if config.family == "opt":
        return None
    angles = positions.unsqueeze(-1).float() * rotary_frequencies(config, positions.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    """Turn each pair of channels (j, j + D/2) by its position's angle: x (B, heads, T, D)."""
    if rope is None:
        return x
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention, grouped where there are fewer keys and values than queries.

    borrows: it has values of its own alone, and looks where another attention looks
    """

    def __init__(self, config, borrows=False):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        C, D, bias = config.n_embd, config.head_dim, config.attention_bias
        self.q_proj = None if borrows else Linear(C, self.n_head * D, bias=bias)
        self.k_proj = None if borrows else Linear(C, self.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, self.n_kv_head * D, bias=bias)
        self.o_proj = Linear(self.n_head * D, C, bias=bias)

    def forward(self, x, mask, rope, cache, look):
        B, T, _ = x.shape
        heads = lambda x, n: x.view(B, T, n, -1).transpose(1, 2)  # (B, n, T, D)
        v = heads(self.v_proj(x), self.n_kv_head)
        if self.q_proj is None:
            q, k = look
            v = v if cache is None else cache.append(v)[0]
        else:
            q = rotate(heads(self.q_proj(x), self.n_head), rope)
            k = rotate(heads(self.k_proj(x), self.n_kv_head), rope)
            if cache is not None:
                k, v = cache.append(k, v)
            if look is not None:
                look[:] = q, k
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and bool(T > 1),
            enable_gqa=self.n_kv_head != self.n_head,
        )  # fmt: skip
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """LLaMA: down(silu(gate(x)) * up(x)). OPT: down(relu(up(x)))."""

    def __init__(self, config):
        super().__init__()
        C, n_ffn, bias = config.n_embd, config.n_ffn, config.mlp_bias
        self.gate_proj = Linear(C, n_ffn, bias=bias) if config.family == "llama" else None
        self.up_proj = Linear(C, n_ffn, bias=bias)
        self.down_proj = Linear(n_ffn, C, bias=bias)

    def forward(self, x):
        inplace = not torch.is_grad_enabled()  # two arrays of (B, T, n_ffn) and not three
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x), inplace))
        gate = F.silu(self.gate_proj(x), inplace)
        return self.down_proj(gate.mul_(self.up_proj(x)) if inplace else gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each with a norm and a residual.

    x: (B, T, C)
    mask: bool (B, 1, T, S), True where a query may look, or None for plain causal attention
    rope: what `rotary_table` returned
    cache: this layer's `KVCache`, or None
    look: a list for queries and keys (B, heads, T or S, D): the attention leaves its own there, or,
        if it borrows, takes those that another left
    """

    def __init__(self, config, borrows=False):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, borrows)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, rope=None, cache=None, look=None):
        if self.pre_norm:
            x = x + self.self_attn(self.input_layernorm(x), mask, rope, cache, look)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.input_layernorm(x + self.self_attn(x, mask, rope, cache, look))
        return self.post_attention_layernorm(x + self.mlp(x))


class KVCache:
    """One layer's keys and values of the tokens so far, in buffers made once for `max_len`."""

    def __init__(self, max_len):
        self.max_len, self.length = max_len, 0

    def append(self, *new):
        """Add tensors of (B, heads, T, D), each its own D, and return all so far of each."""
        if self.length == 0:
            shape = lambda t: (*t.shape[:2], self.max_len, t.shape[3])
            self.buffers = [t.new_empty(shape(t)) for t in new]
        start, self.length = self.length, self.length + new[0].shape[2]
        for buffer, t in zip(self.buffers, new):
            buffer[:, :, start : self.length] = t
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def repeated(self, B, T):
        """Of a cache of one row, a copy for B rows, with room for T tokens more."""
        copy = KVCache(self.length + T)
        copy.append(*(t[:, :, : self.length].expand(B, -1, -1, -1) for t in self.buffers))
        return copy


# --------------------------------------------------------------------------------------
# The model


def positions_and_mask(idx, keep=None, past=0):
    """Where each token stands, and what it may look at.

    idx: (B, T) ids, of which `past` others went before
    keep: (B, past + T) 1 for a token and 0 for padding, on either side; None: no padding
    returns positions (B or 1, T), and a mask for `DecoderLayer`
    """
    T, device = idx.shape[1], idx.device
    positions = torch.arange(past, past + T, device=device).unsqueeze(0)
    if keep is None and (past == 0 or T == 1):
        return positions, None
    query = torch.arange(past, past + T, device=device).unsqueeze(1)
    key = torch.arange(past + T, device=device)
    mask = (key <= query).expand(1, 1, T, past + T)
    if keep is not None:
        positions = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        # Padding may look at itself: nobody reads what it sees, but a row with nothing is NaN.
        mask = mask & keep.bool()[:, None, None, :] | (key == query)
    return positions, mask


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """Choose the next token of every row: logits (B, V) -> ids (B,).

    temperature: 0 takes the most likely
    top_k: only the k most likely ones; 0: all
    top_p: only the fewest whose probabilities add up to it (arXiv 1904.09751)
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(dim=-1)
        out = p.cumsum(dim=-1) - p >= top_p  # the ones before it suffice
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def pad_left(prompts, pad_id=0, device=None):
    """Stack prompts of unequal length: list of lists of ids -> idx (B, T) and keep (B, T)."""
    T = max(map(len, prompts))
    idx = torch.tensor([[pad_id] * (T - len(p)) + list(p) for p in prompts], device=device)
    keep = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=device)
    return idx, keep


class Generator:
    """Loss and generation, for any model with `hidden`, `head`, `head_learns`, `new_cache`, `config`.

    chunk_loss: whether the loss of a frozen head is computed from some of the logits at a time
    """

    chunk_loss = True

    @property
    def device(self):
        return next(chain(self.buffers(), self.parameters())).device

    def loss(self, idx, targets):
        """Mean loss of (B, T): only the tokens that have a target reach the head.

        targets on the CPU, whatever idx is on, save a GPU from being waited for.
        """
        at = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        targets, at = targets.flatten()[at].to(idx.device), at.to(idx.device)
        logits, rows, whole = self.to_logits(*(h.flatten(0, 1)[at] for h in self.states(idx)))
        if self.head_learns or not self.chunk_loss:
            return token_loss(logits(*rows, *whole), targets)
        tensors = [*rows, *whole]
        if not torch.is_grad_enabled():  # which the function below cannot see
            tensors = [t.detach() for t in tensors]
        return _ChunkedLoss.apply(logits, targets, len(rows), *tensors)

    def states(self, idx):
        """What the logits are made of: tensors (B, T, ...)."""
        return (self.hidden(idx),)

    def to_logits(self, h):
        """How n states become logits (n, V): a function, the tensors (n, ...) whose rows it may be
        given a few at a time, and the tensors that it needs whole."""
        return self.head, (h,), ()

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos_id=None, keep=None,
        seed=None,
    ):  # fmt: skip
        """Yield the next token of every row, (B,), until each has ended or there are enough.

        idx: (B, T) prompts; keep: (B, T), 0 where unequal prompts were padded on the left
        temperature, top_k, top_p: see `sample`; eos_id: one id or several
        A row that has ended goes on with its end token.
        """
        check_length(self.config, idx.shape[1], "shorten the prompt")
        check_length(self.config, idx.shape[1] + max_new_tokens - 1, "lower max_new_tokens")
        if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise InputError(
                f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k} and "
                f"top_p {top_p} must be at least 1, at least 0, at least 0, and in (0, 1]."
            )
        cache = self.new_cache(idx.shape[1] + max_new_tokens)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
        ends = torch.tensor(ends, dtype=idx.dtype, device=idx.device)
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self.head(self.hidden(idx, keep, cache)[:, -1])
            token = sample(logits, temperature, top_k, top_p, generator)
            if len(ends):
                token = torch.where(ended, ends[0], token)
                ended |= torch.isin(token, ends)
            yield token
            if len(ends) and ended.all():
                return
            idx = token.unsqueeze(1)
            keep = None if keep is None else F.pad(keep, (0, 1), value=1)

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """The prompts and what `stream` adds to them: (B, T + new)."""
        new = [token.unsqueeze(1) for token in self.stream(idx, max_new_tokens, *args, **kwargs)]
        return torch.cat([idx, *new], dim=1)


def check_length(config, length, advice):
    if length > config.max_positions:
        raise InputError(
            f"A sequence of {length} tokens is longer than the model's {config.max_positions} "
            f"positions: {advice}."
        )


IGNORE_INDEX = -100  # the target of a token that is not in the loss
CHUNK = 128  # positions whose logits are held at a time


def token_loss(logits, targets, reduction="mean"):
    """Mean cross-entropy, in fp32: logits (..., V), targets (...), the ids that follow.

    With targets in fp32, ratings, it is the mean squared error of logits (..., 1).
    """
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    if targets.is_floating_point():
        on = targets != IGNORE_INDEX
        return F.mse_loss(logits.squeeze(-1)[on], targets[on], reduction=reduction)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


class _ChunkedLoss(torch.autograd.Function):
    """`token_loss(logits(*tensors), targets)` of a frozen head, without all of the logits at once.

    The first `split` tensors, (m, ...), are given to `logits` CHUNK rows at a time, the others whole.
    Gradients are formed chunk by chunk in forward, while a chunk's logits are there: nothing is
    computed twice. They are those of the sum, so that they do not vanish in 16 bits.
    """

    @staticmethod
    def forward(ctx, logits, targets, split, *tensors):
        learn = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        kind = lambda i: None if i < split else torch.float32  # where many chunks add up
        grads = {i: torch.zeros_like(tensors[i], dtype=kind(i)) for i in learn}
        total = torch.zeros((), device=targets.device)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            parts = [(t[rows] if i < split else t).detach() for i, t in enumerate(tensors)]
            learning = [parts[i].requires_grad_() for i in learn]
            with torch.set_grad_enabled(bool(learn)):
                loss = token_loss(logits(*parts), targets[rows], "sum")
            for i, grad in zip(learn, torch.autograd.grad(loss, learning) if learn else ()):
                grads[i][rows if i < split else ...] += grad
            total += loss.detach()
        ctx.n = len(targets)
        ctx.save_for_backward(*(grads.get(i) for i in range(len(tensors))))
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad):
        scaled = (g if g is None else g.mul_(grad / ctx.n) for g in ctx.saved_tensors)
        return None, None, None, *scaled


class Transformer(Generator, nn.Module):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    checkpoint = False  # whether backward computes a layer's activations again from its input

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_positions = self.project_in = self.project_out = self.norm = None
        if config.family == "opt":  # OPT counts positions from 2
            self.embed_positions = nn.Embedding(config.max_positions + 2, C)
        if config.embed_dim != C:
            self.project_in = Linear(config.embed_dim, C, bias=False)
            self.project_out = Linear(C, config.embed_dim, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layer))
        if config.final_norm:
            self.norm = make_norm(config)
        self.lm_head = Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, idx, positions):
        """The first hidden state: (B, T) -> (B, T, C)."""
        check_length(self.config, positions.shape[1], "shorten it (--sequence_len)")
        x = self.embed_tokens(idx)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + 2)
        return x

    def final(self, x):
        """The final norm, where there is one: what the LM head is meant to read."""
        return x if self.norm is None else self.norm(x)

    def head(self, x):
        """(..., C) -> logits (..., V)."""
        return self.lm_head(x if self.project_out is None else self.project_out(x))

    @property
    def head_learns(self):
        return self.lm_head.weight.requires_grad

    def new_cache(self, max_len):
        return [KVCache(max_len) for _ in self.layers]

    def hidden(self, idx, keep=None, cache=None):
        """The state that the LM head reads, (B, T, C); see `positions_and_mask` for `keep`."""
        cache = cache or [None] * len(self.layers)
        past = cache[0].length if cache[0] else 0
        positions, mask = positions_and_mask(idx, keep, past)
        x = self.embed(idx, positions)
        rope = rotary_table(self.config, positions, x.dtype)
        for layer, layer_cache in zip(self.layers, cache):
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, rope, use_reentrant=False)
            else:
                x = layer(x, mask, rope, layer_cache)
        return self.final(x)

    def forward(self, idx, keep=None, cache=None):
        return self.head(self.hidden(idx, keep, cache))

    def freeze(self, quant="nf4", dtype=torch.bfloat16, device="cpu", read=None):
        """Turn every weight into a buffer, the linear layers' (all but the LM head) into 4 bits.

        One tensor is in memory beside the 4-bit model at any time.
        quant: "nf4", "fp4", "none", or integers as "int4" or, of groups of 64 weights, "int3-64"
        read: function of (name, shape) that gives the tensor, or a `Quantized4bit` to be taken as
        it is; default: the weights of this model
        """
        if quant not in ("nf4", "fp4", "none") and not parse_int(quant):
            raise InputError(
                f"--quant {quant} is unknown: choose nf4, fp4 or none, or int4, int3, int4-64, ..."
            )
        own = dict(self.named_parameters())
        read = read or (lambda name, shape: own.pop(name).detach())
        for path, module in list(self.named_modules()):
            if module is self.lm_head and self.config.tied:
                continue
            names = {a: f"{path}.{a}" for a, _ in module.named_parameters(recurse=False)}
            for attribute, name in names.items():
                tensor = read(name, getattr(module, attribute).shape).to(device)
                if attribute == "weight" and isinstance(module, Linear):
                    packs = quant != "none" and module is not self.lm_head
                    if packs or isinstance(tensor, Quantized4bit):
                        module.weight = None
                        module = frozen_linear(tensor, quant, module.bias, name)
                        self.set_submodule(path, module)
                        continue
                delattr(module, attribute)
                module.register_buffer(attribute, tensor.to(dtype))
        if self.config.tied:
            del self.lm_head.weight
            self.lm_head.register_buffer("weight", self.embed_tokens.weight)
        return self.eval()


# --------------------------------------------------------------------------------------
# Safetensors: 8 bytes of header length (little endian), a JSON header that gives each tensor's
# dtype, shape and place, and then nothing but the tensors' bytes.

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8
}  # fmt: skip


def read_safetensors(path):
    """Check a file's header and return {name: function that reads the tensor}.

    The tensor is a view of a memory map of its own: its pages are freed when it goes.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing.")
    size = path.stat().st_size
    bad = lambda why: InputError(f"{path} is damaged or not a safetensors file: {why}.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise bad("the header is longer than the file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise bad("the header is not JSON") from None
    if not isinstance(header, dict):
        raise bad("the header is not a table")
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numel = math.prod(shape)
            natural = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise bad(f"the entry of {name} is not as it should be") from None
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {kind}; {', '.join(DTYPES)} can be read.")
        if not natural or end - begin != numel * DTYPES[kind].itemsize:
            raise bad(f"{name}, {kind} {shape}, does not fit its offsets {begin} to {end}")
        entries[name] = (DTYPES[kind], shape, begin, end)
    place = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != place:
            raise bad(f"{name} starts at {begin} and not at {place}, where the one before it ends")
        place = end
    if place != size - 8 - length:
        raise bad(f"its tensors take {place} bytes and the file has {size - 8 - length}")
    reader = lambda dtype, shape, begin, end: lambda: _map_tensor(
        path, dtype, shape, 8 + length + begin
    )
    return {name: reader(*entry) for name, entry in entries.items()}


def _map_tensor(path, dtype, shape, offset):
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    nbytes = math.prod(shape) * dtype.itemsize
    with open(path, "rb") as file:
        view = mmap.mmap(
            file.fileno(), offset - start + nbytes, access=mmap.ACCESS_COPY, offset=start
        )
    raw = torch.frombuffer(view, dtype=torch.uint8, offset=offset - start)
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def write_atomically(path, write):
    """Call `write(file)` on a temporary file and rename it: a path never holds half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise InputError(f"{path} could not be written ({error.strerror}); nothing was lost.") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} of any mix of the dtypes above, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]
        }  # fmt: skip
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")

    write_atomically(path, write)


def read_json(path, optional=False):
    """Read a file that holds one JSON object; {} if it is optional and not there."""
    if optional and not Path(path).exists():
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: give a folder in Hugging Face's layout.") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def open_checkpoint(folder):
    """Find a folder's weights and return {name: function that reads the tensor}."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return _open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map", {})
            tensors = {}
            for shard in sorted(set(weight_map.values())):
                if Path(shard).name != shard or shard in ("", ".", ".."):
                    raise InputError(f"{index} names a file outside its folder: {shard!r}.")
                if not (folder / shard).exists():
                    raise InputError(f"{folder / shard} is missing, and {index} names it.")
                tensors |= _open_file(folder / shard)
            differ = sorted(set(tensors) ^ set(weight_map))
            if differ:
                raise InputError(f"{index} and its files disagree about {some(differ)}.")
            return tensors
    raise InputError(
        f"{folder} has no weights: model.safetensors, pytorch_model.bin or an index of either."
    )


def _open_file(path):
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a file of plain tensors ({reason}).") from None
    return {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def some(names):
    """A few of a list of names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --------------------------------------------------------------------------------------
# From a folder to a model

# Our module names (LLaMA's) -> OPT's
OPT_NAMES = {
    "self_attn.o_proj.": "self_attn.out_proj.",
    "input_layernorm.": "self_attn_layer_norm.",
    "post_attention_layernorm.": "final_layer_norm.",
    "mlp.up_proj.": "fc1.",
    "mlp.down_proj.": "fc2.",
}


def checkpoint_name(config, name):
    """Our name of a weight -> the Hugging Face checkpoint's, less the leading "model."."""
    if config.family == "llama" or name.startswith("lm_head."):
        return name
    if name.startswith("norm."):
        return "decoder.final_layer_norm." + name.removeprefix("norm.")
    for ours, theirs in OPT_NAMES.items():
        name = name.replace(ours, theirs)
    return "decoder." + name


def read_config(folder):
    """Read config.json; whatever this file cannot compute exactly is refused by its name."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give one in Hugging Face's layout.")
    path = Path(folder) / "config.json"
    c = read_json(path)

    def need(field, *allowed):
        value = c.get(field, allowed[0])
        if value not in allowed:
            shown = " or ".join(str(a) for a in allowed if a is not None)
            raise InputError(f"{path}: {field} is {value!r}; only {shown} is supported.")
        return value

    family = need("model_type", None, "llama", "mistral", "opt")
    if family is None:
        raise InputError(f"{path} has no model_type; llama, mistral and opt are supported.")
    method = (c.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or (c.get("quantization_config") or {}).get("load_in_8bit"):
        raise InputError(
            f"{path}: quantization_config is of {method}; only bitsandbytes' 4 bits are supported."
        )
    try:
        common = dict(
            vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"],
            n_head=c["num_attention_heads"], bos_id=c.get("bos_token_id"), eos_id=c.get("eos_token_id"),
        )  # fmt: skip
        if family == "opt":
            need("activation_function", "relu")
            need("layer_norm_elementwise_affine", True)
            pre_norm, bias = c.get("do_layer_norm_before", True), c.get("enable_bias", True)
            return ModelConfig(
                **common, family="opt", n_ffn=c["ffn_dim"], pre_norm=pre_norm,
                final_norm=pre_norm and not c.get("_remove_final_layer_norm", False),
                embed_dim=c.get("word_embed_proj_dim") or 0, attention_bias=bias, mlp_bias=bias,
                max_positions=c["max_position_embeddings"], tied=c.get("tie_word_embeddings", True),
            )  # fmt: skip
        need("hidden_act", "silu")
        need("partial_rotary_factor", 1.0, None)
        # Within the window, sliding attention is plain attention: so we only go that far.
        window = c.get("sliding_window") or c["max_position_embeddings"]
        return ModelConfig(
            **common, n_ffn=c["intermediate_size"], n_kv_head=c.get("num_key_value_heads") or 0,
            head_dim=c.get("head_dim") or 0, norm_eps=c["rms_norm_eps"],
            max_positions=min(c["max_position_embeddings"], window),
            attention_bias=bool(c.get("attention_bias")), mlp_bias=bool(c.get("mlp_bias")),
            tied=c.get("tie_word_embeddings", False), **_rope_config(c, path),
        )  # fmt: skip
    except KeyError as error:
        raise InputError(f"{path} lacks the field {error}.") from None


def _rope_config(c, path):
    """Both spellings: rope_theta and rope_scaling, or one rope_parameters for the two."""
    scaling = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or c.get("rope_theta") or 10000.0
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"{path}: rope_scaling's type is {kind!r}; only default, linear or llama3 is supported."
        )
    if kind == "llama3":
        for field in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            scaling[field]  # a KeyError is reported as a missing field
    return dict(rope_theta=float(theta), rope_scaling=None if kind == "default" else scaling)


def from_pretrained(folder, quant="nf4", dtype=torch.bfloat16, device="cpu"):
    """Load a LLaMA or OPT folder, quantizing tensor by tensor, and freeze it.

    quant: "nf4" or "fp4", always double-quantized, integers as "int4" or "int3-64", or "none"
    dtype: of everything that is not quantized, and so of what the model computes in
    Peak memory is the 4-bit model and the largest tensor. Every tensor of the model must be in
    the folder, and every tensor of the folder in the model, or the names are told. A folder that
    bitsandbytes has quantized is taken as it is, straight from the memory map.
    """
    config = read_config(folder)
    tensors = {n.removeprefix("model."): read for n, read in open_checkpoint(folder).items()}
    is_part = lambda name: name.rpartition(".weight.")[2].startswith(BNB_PARTS)
    parts = {name: tensors.pop(name) for name in list(tensors) if is_part(name)}
    with torch.device("meta"):
        model = Transformer(config)

    expected = {checkpoint_name(config, name) for name, _ in model.named_parameters()}
    surplus = {"lm_head.weight"} if config.tied else set()  # some folders store the tied head too
    found = {n for n in tensors if not n.endswith("rotary_emb.inv_freq")} - surplus
    if missing := sorted(expected - found):
        raise InputError(f"{folder} lacks {some(missing)}: is its config.json another model's?")
    if left := sorted(found - expected):
        raise InputError(f"{folder} has {some(left)}, which this architecture does not use.")

    def read(name, shape):
        theirs = checkpoint_name(config, name)
        tensor = tensors[theirs]()
        if any(part.startswith(theirs + ".") for part in parts):
            tensor = read_bnb(folder, theirs, tensor, parts, quant)
        elif not tensor.is_floating_point():
            raise InputError(f"{folder}: {name} is of type {tensor.dtype}, and no scales are with it.")
        if tensor.shape != shape:
            raise InputError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, and config.json says {tuple(shape)}."
            )
        return tensor

    return model.freeze("none" if parts else quant, dtype, device, read)


# --------------------------------------------------------------------------------------
# The 4-bit format of bitsandbytes: beside each weight (codes, (n / 2, 1)) its scales and a small
# JSON text, as bytes, with what else one must know

BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")


def read_bnb(folder, name, codes, parts, quant):
    """Put one weight together from its parts, {name: function that reads it}."""
    mine = {n.removeprefix(name + "."): r for n, r in parts.items() if n.startswith(name + ".")}
    refuse = lambda why: InputError(f"{folder}: {name} {why}.")
    states = [n for n in mine if n.startswith(BNB_PARTS[-1])]
    if len(states) != 1 or not {"absmax", "quant_map"} <= set(mine):
        raise refuse("lacks one of its quant_state, absmax and quant_map")
    kind = states[0].removeprefix(BNB_PARTS[-1])
    if kind != quant:
        raise refuse(f"is already quantized to {kind}: give --quant {kind}")
    try:
        state = json.loads(bytes(mine[states[0]]().tolist()))
        shape, block_size = torch.Size(state["shape"]), state["blocksize"]
        nested = [state["nested_blocksize"], state["nested_offset"]] if "nested_absmax" in mine else None
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"has a quant_state that cannot be read ({error})") from None
    if block_size != BLOCK_SIZE or nested and nested[0] != ABSMAX_BLOCK_SIZE:
        raise refuse("has other block sizes than 64 and 256")
    absmax = mine["absmax"]()
    blocks, n = -(-shape.numel() // BLOCK_SIZE), shape.numel()
    fits = codes.dtype == torch.uint8 and codes.numel() == -(-n // 2) and absmax.shape == (blocks,)
    books = [(mine["quant_map"](), CODEBOOKS[kind])]
    offset = nested_absmax = None
    if nested:
        nested_absmax, offset = mine["nested_absmax"](), torch.tensor(float(nested[1]))
        fits = fits and nested_absmax.shape == (-(-blocks // ABSMAX_BLOCK_SIZE),)
        books.append((mine["nested_quant_map"](), DYNAMIC_CODEBOOK))
    if not fits or absmax.dtype != (torch.uint8 if nested else torch.float32):
        raise refuse(f"has codes or scales that do not fit its shape {tuple(shape)}")
    if not all(torch.equal(theirs, ours) for theirs, ours in books):
        raise refuse("has another code book than ours")
    return Quantized4bit(codes.view(-1), absmax, nested_absmax, offset, shape, kind)


def bnb_parts(name, weight, dtype):
    """The tensors that bitsandbytes stores for a `Quantized4bit`: {name: tensor}."""
    state = dict(quant_type=weight.kind, blocksize=BLOCK_SIZE, dtype=dtype, shape=list(weight.shape))
    parts = {"": weight.codes.view(-1, 1), ".absmax": weight.absmax}
    parts[".quant_map"] = CODEBOOKS[weight.kind].clone()
    if weight.nested_absmax is not None:
        state |= dict(nested_blocksize=ABSMAX_BLOCK_SIZE, nested_dtype="float32")
        state |= dict(nested_offset=weight.offset.item())
        parts[".nested_absmax"] = weight.nested_absmax
        parts[".nested_quant_map"] = DYNAMIC_CODEBOOK.clone()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts[f".quant_state.bitsandbytes__{weight.kind}"] = text
    return {name + suffix: tensor for suffix, tensor in parts.items()}


def quantize_folder(source, target, quant="nf4"):
    """Write a folder's model in the 4-bit format of bitsandbytes, which transformers reads too."""
    source, target = Path(source), Path(target)
    settings = read_json(source / "config.json")
    kind = settings.get("torch_dtype") or settings.get("dtype") or "bfloat16"
    model = from_pretrained(source, quant, getattr(torch, kind))
    skip = {"lm_head.weight"} if model.config.tied else set()
    tensors = {}
    for path, module in model.named_modules():
        stored = lambda attribute: "model." * (path != "lm_head") + checkpoint_name(
            model.config, f"{path}.{attribute}"
        )
        if isinstance(module, Linear4bit):
            tensors |= bnb_parts(stored("weight"), module.quantized, kind)
            own = {"bias": module.bias} if module.bias is not None else {}
        else:
            own = dict(module.named_buffers(recurse=False))
        tensors |= {stored(a): t for a, t in own.items() if f"{path}.{a}" not in skip}
    settings["quantization_config"] = dict(
        quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
        bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="uint8",
        bnb_4bit_compute_dtype=kind, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    write_safetensors(target / "model.safetensors", tensors)
    copy_tokenizer(source, target)
    write_json(target / "config.json", settings)


def copy_tokenizer(source, target):
    """Copy a folder's tokenizer, and what else is neither weights nor config.json."""
    for path in Path(source).iterdir():
        kept = path.suffix in (".json", ".model", ".txt", ".jinja") and path.name != "config.json"
        if kept and "index" not in path.name:
            write_atomically(Path(target) / path.name, lambda file: file.write(path.read_bytes()))


def save_pretrained(model, folder):
    """Write an unquantized model as a Hugging Face folder, in the dtype of its weights."""
    c = model.config
    skip = {"lm_head.weight"} if c.tied else set()
    tensors = {
        ("" if name.startswith("lm_head.") else "model.") + checkpoint_name(c, name): tensor
        for name, tensor in model.state_dict().items()
        if name not in skip
    }
    write_safetensors(Path(folder) / "model.safetensors", tensors)
    config = dict(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tied, bos_token_id=c.bos_id, eos_token_id=c.eos_id,
        torch_dtype=str(next(iter(tensors.values())).dtype)[6:],
    )  # fmt: skip
    if c.family == "opt":
        config |= dict(
            architectures=["OPTForCausalLM"], model_type="opt", activation_function="relu",
            ffn_dim=c.n_ffn, word_embed_proj_dim=c.embed_dim, enable_bias=c.mlp_bias,
            do_layer_norm_before=c.pre_norm, _remove_final_layer_norm=c.pre_norm and not c.final_norm,
        )  # fmt: skip
    else:
        config |= dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
            intermediate_size=c.n_ffn, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_scaling=c.rope_scaling,
            attention_bias=c.attention_bias, mlp_bias=c.mlp_bias,
        )  # fmt: skip
    write_json(Path(folder) / "config.json", config)


def model_bytes(module):
    """Bytes of all weights of a module, each storage once, parameters and buffers alike."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({id(t): t.nbytes for t in tensors}.values())


def count_weights(config):
    """Number of weights of a model, as its authors count them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def main(argv):
    if argv:
        if len(argv) != 3 or argv[0] != "quantize":
            sys.exit("error: it is `python model.py`, or `python model.py quantize IN OUT`")
        try:
            return quantize_folder(*argv[1:])
        except InputError as error:
            sys.exit(f"error: {error}")
    print("preset             weights   16-bit GB   4-bit GB (linear layers; the rest in bf16)")
    for name in ("smollm2-135m", "llama-2-7b", "llama-2-70b", "opt-1.3b", "opt-6.7b"):
        config = PRESETS[name]
        with torch.device("meta"):
            model = Transformer(config)
        plain = sum(p.numel() for p in model.parameters())
        packed = model_bytes(model.freeze("nf4", torch.bfloat16, "meta"))
        print(f"{name:15} {plain / 1e9:8.3f} B {2 * plain / 1e9:10.2f} {packed / 1e9:10.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
