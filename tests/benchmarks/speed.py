"""How fast, and in how much memory, a base is loaded, quantized, and generates."""

import tempfile
import time

import torch

from benchmarks.common import (
    ROOT, alone, forget_peak, medians, print_row, print_table, resident, write_model,
)
from data.devices.device import model_bytes
from model import PRESETS, ModelConfig, from_pretrained, quantize_folder
from quant import quantize_4bit

# A LLaMA of 0.7 billion weights; its largest tensor is the embedding.
LARGE = ModelConfig(32000, n_layer=12, n_head=16, n_embd=2048, n_ffn=5632, tied=True)
SHAPES = ((768, 768), (2816, 1024), (4096, 4096))


def load():
    """Peak memory of `from_pretrained`, which is the model and the file's largest tensor."""
    with tempfile.TemporaryDirectory() as folder:
        numel = alone(write_model, folder, LARGE)
        packed = f"{folder}/packed"
        alone(quantize_folder, folder, packed)
        largest = LARGE.vocab_size * LARGE.n_embd * 2 / 1e6
        print_table(
            f"Loading {numel / 1e9:.2f} B weights in fp16, the largest tensor {largest:.0f} MB",
            "quant", "model, MB", "peak growth, MB", "growth - model, MB", "seconds",
        )
        for name, source, quant in (
            ("nf4", folder, "nf4"), ("none", folder, "none"), ("nf4, from 4 bits", packed, "nf4")
        ):
            grown, size, seconds = alone(load_once, source, quant)
            sizes = (f"{nbytes / 1e6:.0f}" for nbytes in (size, grown, grown - size))
            print_row(name, *sizes, f"{seconds:.2f}")


def load_once(folder, quant):
    """Bytes by which the process grows at most, the model's bytes, and seconds."""
    from_pretrained(ROOT / "tests/fixtures/llama_rope3", quant)  # torch has loaded what it needs
    before, start = forget_peak(), time.perf_counter()
    model = from_pretrained(folder, quant, torch.float32)
    return resident("VmHWM") - before, model_bytes(model), time.perf_counter() - start


def quant():
    """Million weights a second, double-quantized NF4 and fp32, beside bitsandbytes where it is."""
    print_table("Million weights a second", "threads", "shape", "dequantize", "bitsandbytes",
                "ratio", "quantize", "bitsandbytes", "ratio")
    for threads in (1, 2):
        for shape in SHAPES:
            cells = []
            for seconds in alone(quantize_once, threads, shape):
                rate = {who: shape[0] * shape[1] / 1e6 / s for who, s in seconds.items()}
                theirs = rate.get("bitsandbytes", float("nan"))
                cells += [f"{rate['ours']:.0f}", f"{theirs:.0f}", f"{rate['ours'] / theirs:.2f}"]
            print_row(threads, f"{shape[0]} x {shape[1]}", *cells)


def quantize_once(threads, shape):
    """Seconds of dequantizing and of quantizing: two of {who: seconds}."""
    torch.set_num_threads(threads)
    weight, buffer = torch.randn(shape), torch.empty(shape)
    packed = quantize_4bit(weight)
    read = {"ours": lambda: packed.dequantize(out=buffer)}
    write = {"ours": lambda: quantize_4bit(weight)}
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return medians(read, 21), medians(write, 7)
    options = dict(quant_type="nf4", compress_statistics=True)
    codes, state = bnb.quantize_4bit(weight, **options)
    read["bitsandbytes"] = lambda: bnb.dequantize_4bit(codes, state)
    write["bitsandbytes"] = lambda: bnb.quantize_4bit(weight, **options)
    return medians(read, 21), medians(write, 7)


def tokens():
    """Milliseconds per generated token, one prompt; a random LLaMA of the shape of SmolLM2-135M."""
    print_table("Milliseconds per token", "threads", "fp32", "4 bits", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        alone(write_model, folder, PRESETS["smollm2-135m"])
        for threads in (1, 2):
            ms = {q: 1000 * s / 16 for q, s in alone(generate_once, threads, folder).items()}
            ratio = f"{ms['nf4'] / ms['none']:.2f}"
            print_row(threads, f"{ms['none']:.1f}", f"{ms['nf4']:.1f}", ratio)


def generate_once(threads, folder):
    """Seconds of 16 tokens from the fp32 and from the 4-bit base."""
    torch.set_num_threads(threads)
    models = {quant: from_pretrained(folder, quant, torch.float32) for quant in ("none", "nf4")}
    idx = torch.arange(5, 13).unsqueeze(0)
    runs = {name: lambda model=model: model.generate(idx, 16) for name, model in models.items()}
    return medians(runs, 7)
