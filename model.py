"""The frozen LLM: one `DecoderLayer` for all families, and `from_pretrained`.

Read it from top to bottom: the config, the layer, the model with its loss, and how the weights are
loaded, one tensor at a time, and quantized. The side network in side.py has the same layers.

    B, T  batch and length        C = n_embd        V = vocab_size        D = head_dim

Modules have the names of Hugging Face's checkpoints (`q_proj`, `input_layernorm`, ...). Where
families differ, they have LLaMA's; data/formats/hub.py has OPT's.

    python model.py                    the size of some models in 16 and in 4 bits
    python model.py quantize IN OUT    write a folder in 4 bits; see --help
"""

import math
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from data import IGNORE_INDEX, InputError, find_folder, leaf
from data.devices.device import model_bytes, pick_device, to_device
from data.devices.few_kernels import is_cast, product
from data.formats import config_json, files, hub
from data.formats.safetensors import check_values
from data.generate import sampling
from data.generate.sampling import KVCache
from data.settings.flags import Parser, refuse_if, run_main
from data.settings.methods import check_kind
from data.tokens.tokenizer import copy_tokenizer
from quant import Linear4bit, Quantized, quantize_4bit


@dataclass
class ModelConfig:
    """The shape of a model like LLaMA or OPT; 0 stands for the usual value."""

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
    attention_bias: bool | str = False  # "qkv": not of the output, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each head's queries and keys: Qwen3
    no_rope: tuple | list = ()  # numbers of the layers without positions, from 1: SmolLM3
    mlp_bias: bool = False
    pre_norm: bool = True  # False: norms after attention and MLP, as only in OPT-350m
    final_norm: bool = True
    embed_dim: int = 0  # 0: n_embd; OPT-350m embeds in 512 and projects to 1024
    tied: bool = False  # the LM head is the embedding
    bos_id: int | None = None
    eos_id: int | list | None = None

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.embed_dim = self.embed_dim or self.n_embd


PRESETS = {name: ModelConfig(**shape) for name, shape in config_json.PRESETS.items()}


# --------------------------------------------------------------------------------------
# A layer


class Linear(nn.Linear):
    """A linear layer that computes in its input's dtype: the side network's weights stay in fp32
    while it computes in bf16."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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
    if (scaling := config.rope_scaling) is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # "llama3": divide slow frequencies, with fewer than low_freq_factor turns in the original
    # context, by the factor; keep fast ones; blend in between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * inv_freq + (1 - blend) * inv_freq / scaling["factor"]


def rotary_table(config, positions, dtype):
    """Cosines and sines that rotate queries and keys; None for a model with learned positions.

    positions: (B or 1, T)
    returns two of (B or 1, 1, T, D); both halves of the channels are equal, but the sines' signs
    """
    if config.family == "opt":
        return None
    angles = positions.unsqueeze(-1).float() * rotary_frequencies(config, positions.device)
    angles = torch.cat([-angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    """Rotate each pair of channels (j, j + D/2) by its position's angle: x (B, heads, T, D)."""
    if rope is None:
        return x
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin)


class Attention(nn.Module):
    """Causal self-attention; keys and values may have fewer heads than queries."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        C, D, bias = config.n_embd, config.head_dim, bool(config.attention_bias)
        self.q_proj = Linear(C, self.n_head * D, bias=bias)
        self.k_proj = Linear(C, self.n_kv_head * D, bias=bias)
        self.v_proj = Linear(C, self.n_kv_head * D, bias=bias)
        self.o_proj = Linear(self.n_head * D, C, bias=config.attention_bias is True)
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x, mask, rope, cache):
        B, T, _ = x.shape
        H, G = self.n_head, self.n_kv_head
        if is_cast(self.q_proj):
            qkv = product(x, self.q_proj, self.k_proj, self.v_proj).view(B, T, H + 2 * G, -1)
            qk, v = qkv.split([H + G, G], dim=2)
        else:
            qk = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1).view(B, T, H + G, -1)
            v = self.v_proj(x).view(B, T, G, -1)
        qk, v = qk.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], dim=1)
        heads = rotate(qk, rope).split([H, G], dim=1)  # torch.compile takes them for whole tensors
        q, k = (y.contiguous() if torch.compiler.is_compiling() else y for y in heads)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.n_kv_head != self.n_head,
            is_causal=True if mask is None and T > 1 else False,  # a bool for torch.compile
        )
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
        # Without a graph, overwrite: two arrays of (B, T, n_ffn) instead of three.
        inplace = not torch.is_grad_enabled()
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x), inplace))
        if is_cast(self.up_proj):
            gate, up = product(x, self.gate_proj, self.up_proj).chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        gate = F.silu(self.gate_proj(x), inplace)
        return self.down_proj(gate.mul_(self.up_proj(x)) if inplace else gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each with a norm and a residual.

    x: (B, T, C)
    mask: bool (B or 1, 1, T, S), S = past + T, True where a query may attend; None: causal; or
        `causal_lower_right`, torch's causal mask when the cache holds earlier tokens
    rope: what `rotary_table` returned
    cache: this layer's `KVCache`, or None
    """

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, rope=None, cache=None):
        if self.pre_norm:
            x = x + self.self_attn(self.input_layernorm(x), mask, rope, cache)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.input_layernorm(x + self.self_attn(x, mask, rope, cache))
        return self.post_attention_layernorm(x + self.mlp(x))


# --------------------------------------------------------------------------------------
# The model


def positions_and_mask(x, keep=None, past=0):
    """The position of each token, (B or 1, T), and a mask for `DecoderLayer`.

    x: (B, T, ...), on the device; past: number of tokens in the cache
    keep: (B, past + T) 1 for a token and 0 for padding, on either side; None: no padding
    """
    T, device = x.shape[1], x.device
    positions = torch.arange(past, past + T, device=device).unsqueeze(0)
    if keep is None and (past == 0 or T == 1):  # one new token may see everything
        return positions, None
    if keep is None:  # flash attention knows this mask without its T x (past + T) values
        from torch.nn.attention.bias import causal_lower_right  # loads torch.compile: 1 s
        return positions, causal_lower_right(T, past + T)
    query = torch.arange(past, past + T, device=device).unsqueeze(1)
    key = torch.arange(past + T, device=device)
    positions = (keep.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
    # Padding attends to itself: a row with nothing to attend to would be NaN.
    return positions, (key <= query) & keep.bool()[:, None, None, :] | (key == query)


class LanguageModel(nn.Module):
    """Base class: adds `loss` and `generate` to a subclass that defines `hidden`, `head`,
    `head_is_trainable`, `new_cache` and `config`.

    chunk_loss: whether the loss of a frozen head holds only some of the logits at a time
    """

    chunk_loss = True

    @property
    def device(self):
        layers = getattr(self, "base", self).layers  # an embedding may stay on the host
        return next(chain(layers.buffers(), layers.parameters())).device

    def loss(self, idx, targets):
        """Mean loss of idx, targets (B, T): targets[b, t] follows idx[b, t], or is IGNORE_INDEX."""
        return self.loss_of(self.hidden(idx), targets)

    def loss_of(self, h, targets):
        """Mean loss of what `hidden` returned, (B, T, C): only tokens with a target reach the head.

        targets: on the CPU, wherever h is. `nonzero` of a GPU's tensor would wait for the GPU.
        """
        at = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        targets, at = to_device(targets.flatten()[at], h.device), to_device(at, h.device)
        h = h.flatten(0, 1).index_select(0, at)
        if self.head_is_trainable or not self.chunk_loss:
            return token_loss(self.head(h), targets)
        return _ChunkedLoss.apply(h, targets, self.head, self.config.vocab_size)

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """The prompts with the new tokens of `sampling.stream`: (B, T + new)."""
        new = sampling.stream(self, idx, max_new_tokens, *args, **kwargs)
        return torch.cat([idx, *(token.unsqueeze(1) for token in new)], dim=1)


RECOMPUTE = dict(use_reentrant=False, preserve_rng_state=False)  # a layer has no random numbers
CHUNK, CHUNK_LOGITS = 512, 25_000_000  # the most positions and logits (100 MB in fp32) at a time


def token_loss(logits, targets, reduction="mean"):
    """Mean cross-entropy, in fp32, of logits (..., V) and targets (...), the next ids. If targets
    are floats, ratings, it is the mean squared error of logits (..., 1)."""
    logits, targets = logits.flatten(0, -2).float(), targets.flatten().to(logits.device)
    if targets.is_floating_point():
        on = targets != IGNORE_INDEX
        return F.mse_loss(logits.squeeze(-1)[on], targets[on], reduction=reduction)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


class _ChunkedLoss(torch.autograd.Function):
    """`token_loss(head(h), targets)` of a frozen head, with the logits of one chunk at a time.

    h: (n, C). Forward computes the loss chunk by chunk, and with it the gradient with respect to h,
    because a chunk's logits are freed afterwards. It stores d(sum of losses)/dh, because d(mean)/dh
    can underflow in fp16. Backward multiplies this in place by grad / n, so it can run only once.
    """

    @staticmethod
    def forward(ctx, h, targets, head, vocab_size):
        learns, size = ctx.needs_input_grad[0], min(CHUNK, CHUNK_LOGITS // vocab_size)
        grad, total = torch.empty_like(h) if learns else None, torch.zeros((), device=h.device)
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            with torch.set_grad_enabled(learns):
                part = h[rows].detach().requires_grad_(learns)
                loss = token_loss(head(part), targets[rows], "sum")
            if learns:
                (grad[rows],) = torch.autograd.grad(loss, part)
            total += loss.detach().to(h.device)
        ctx.save_for_backward(grad)
        return total / len(h)

    @staticmethod
    def backward(ctx, grad):
        (grad_of_sum,) = ctx.saved_tensors
        return grad_of_sum.mul_(grad / len(grad_of_sum)), None, None, None


class Transformer(LanguageModel):
    """A decoder-only language model: idx (B, T) -> logits (B, T, V)."""

    checkpoint = False  # whether backward recomputes a layer's activations from its input
    source = None  # an object with a method `states` to use instead: data/frozen/sources.py

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

    def embed(self, idx):
        """The tokens' embeddings, without positions: (B, T), on the host too, -> (B, T, C)."""
        sampling.check_length(self.config, idx.shape[1], "shorten it (--sequence_len)")
        x = self.embed_tokens(to_device(idx, self.embed_tokens.weight.device))
        return x if self.project_in is None else self.project_in(x)

    def final(self, x):
        """Apply the final norm, if the model has one; the LM head reads the result."""
        return x if self.norm is None else self.norm(x)

    def head(self, x):
        """(..., C) -> logits (..., V)."""
        return self.lm_head(x if self.project_out is None else self.project_out(x))

    @property
    def head_is_trainable(self):
        return self.lm_head.weight.requires_grad

    def new_cache(self, max_len):
        return [KVCache(max_len) for _ in self.layers]

    def states(self, idx, keep=None, cache=None, every=1):
        """Yield the hidden states h_f_0, h_f_1, ..., each (B, T, C): the embedding, the output of
        each layer (or of each `every`-th), and at last what the LM head takes as input. A state is
        computed when it is asked for, and not kept. keep: see `positions_and_mask`; cache: of
        `new_cache`, to generate
        """
        cache = cache or [None] * len(self.layers)
        past = cache[0].length if cache[0] else 0
        x = self.embed(idx)
        positions, mask = positions_and_mask(x, keep, past)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + 2)
        table = rotary_table(self.config, positions, x.dtype)
        yield x
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache), 1):
            rope = None if i in self.config.no_rope else table
            if self.checkpoint and torch.is_grad_enabled():
                x = recomputed(layer, x, mask, rope, **RECOMPUTE)
            else:
                x = layer(x, mask, rope, layer_cache)
            if i % every == 0:
                yield x
        x = self.final(x)
        yield x

    def hidden(self, idx, keep=None, cache=None):
        """The last hidden state, which the LM head takes as input: (B, T, C)."""
        for x in (self.source or self).states(idx, keep, cache):
            pass
        return x

    def forward(self, idx, keep=None, cache=None):
        return self.head(self.hidden(idx, keep, cache))

    def freeze(self, quant="nf4", dtype=torch.bfloat16, device="cpu", read=None, where=""):
        """Turn every weight into a buffer; quantize those of the linear layers, except the LM head.

        quant: "nf4", "fp4", "none", or integers: "int4", or "int3-64" in groups of 64 weights
        device: a device, or a function of a weight's name that returns one
        read: function of a weight's name that returns the tensor, or a `Quantized` weight, which
            is used unchanged. It is called for one module at a time. Default: the model's weights
        where: the start of error messages, such as "FOLDER: "
        """
        check_kind(quant)
        weights = dict(self.named_parameters())
        read = read or (lambda name: weights.pop(name).detach())
        device_of = device if callable(device) else lambda name: device
        if self.config.tied:
            del self.lm_head.weight  # it is set below, to the embedding's
        for path, module in list(self.named_modules()):
            tensors = {}
            for name, _ in list(module.named_parameters(recurse=False)):
                full_name = f"{path}.{name}"
                tensor = read(full_name).to(device_of(full_name))
                tensors[name] = check_values(tensor, dtype, where + full_name)
                delattr(module, name)
            weight, linear = tensors.get("weight"), isinstance(module, Linear)
            if quant != "none" and linear and module is not self.lm_head:
                is_integer = quant.startswith("int")  # data/frozen/integers.py
                quantize = leaf("integers").quantize_kind if is_integer else quantize_4bit
                weight = quantize(weight, quant, name=f"{where}{path}.weight")
            if isinstance(weight, Quantized):
                bias = tensors["bias"].to(dtype) if "bias" in tensors else None
                self.set_submodule(path, Linear4bit(weight, bias))
                continue
            for name, tensor in tensors.items():
                module.register_buffer(name, tensor.to(dtype))
        if self.config.tied:
            self.lm_head.register_buffer("weight", self.embed_tokens.weight)
        return self.eval()


# --------------------------------------------------------------------------------------
# From a folder to a model


def from_pretrained(folder, quant="nf4", dtype=torch.bfloat16, device="cpu", stream=False,
                    layers=0):
    """Load a model's folder, quantize it tensor by tensor, and freeze it.

    quant: see `Transformer.freeze`; nf4 and fp4 are always double-quantized
    dtype: of the weights that are not quantized, and of the computation
    device: one for all, or a function of a weight's name (data/devices/placement.py)
    stream: leave 4-bit layers in the files, read each when needed (data/devices/stream.py)
    layers: end the model after so many, then its final norm; later ones are not read; 0: all
    Peak memory is the 4-bit model and the largest tensor. A 4-bit folder is used unchanged.
    """
    config = read_config(folder, layers)
    tensors = hub.open_files(folder, config)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights, in_4_bits = hub.choose_weights(folder, config, tensors, shapes, quant)
    if stream:
        return leaf("stream").freeze_streamed(model, weights, in_4_bits, dtype, device, folder)
    quant = "none" if in_4_bits else quant  # nothing is left to quantize
    return model.freeze(quant, dtype, device, lambda name: weights[name](), f"{folder}: ")


def read_config(folder, layers=0):
    return config_json.first_layers(ModelConfig(**config_json.read(folder)), layers)


def quantize_folder(source, target, quant="nf4", calibrate=None, device="auto"):
    """Write a folder's model in 4 bits, with its tokenizer, into a new folder. calibrate: a file of
    texts (data/frozen/calibrate.py); device: auto is the CPU, but for texts a GPU"""
    if any(Path(target).resolve().glob("*")):  # for example the source itself
        raise InputError(f"{target} is not empty: give a new folder for the 4-bit model.")
    source = find_folder(source)
    if any(".weight." in name for name in hub.find_files(Path(source))):
        raise InputError(f"{source} is in 4 bits already: there is nothing to do.")
    texts = [] if calibrate is None else leaf("calibrate").read_texts(str(calibrate), source)
    device = "cpu" if device == "auto" and not texts else pick_device(device)
    files.make_writable_folder(target, "OUT")  # before minutes of work
    model = from_pretrained(source, quant, config_json.read_dtype(source), device)
    if texts:
        leaf("calibrate").calibrate(model, source, texts)
    leaf("save").save_pretrained(model, target)
    copy_tokenizer(source, target)
    print(f"{target}: {quant}, {model_bytes(model) / 1e9:.3f} GB{', calibrated' * bool(texts)}")


def count_weights(config):
    """Number of weights of a model; a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def main(argv):
    if argv[:1] == ["quantize"]:
        parser = Parser("model.py quantize", description="Write a model's folder in 4 bits (NF4).")
        parser.add_argument("source", help="model folder, or ORG/MODEL of huggingface.co")
        parser.add_argument("target", help="new folder")
        parser.add_argument("--calibrate", help="file with texts to choose codes for; 128 are used")
        parser.add_argument("--device", default="auto", help="auto: the CPU, for --calibrate a GPU")
        return quantize_folder(**vars(parser.parse_args(argv[1:])))
    refuse_if((argv, "Usage: `python model.py`, or `python model.py quantize IN OUT`"))
    print("preset             weights   16-bit GB   4-bit GB (linear layers; the rest in bf16)")
    for name in ("smollm2-135m", "llama-2-7b", "llama-2-70b", "opt-1.3b", "opt-6.7b"):
        weights = count_weights(PRESETS[name])
        with torch.device("meta"):
            packed = model_bytes(Transformer(PRESETS[name]).freeze("nf4", device="meta"))
        print(f"{name:15} {weights / 1e9:8.3f} B {2 * weights / 1e9:10.2f} {packed / 1e9:10.2f}")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), "close other programs; the 4-bit model must fit")
