"""What the measurements on a GPU share: sizes, random weights in 4 bits, clocks, targets."""

import gc
import math
import operator
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.common import forget_peak, resident
from model import PRESETS, ModelConfig, Transformer
from quant import quantize_4bit, unpack_buffers


@dataclass
class Sizes:
    """What is measured: on a GPU, or with tiny shapes on a CPU.

    layers: shapes of weights; large, huge, billion: `ModelConfig`s; steps: batches x lengths;
    claims: (GB of a card, `ModelConfig`, batch x length, flags) that the pages say fit together
    """

    device: torch.device
    dtype: torch.dtype
    layers: tuple
    large: ModelConfig
    huge: ModelConfig
    billion: ModelConfig
    steps: tuple
    claims: tuple
    copy_bytes: int
    new_tokens: int

    @classmethod
    def full(cls):
        """LLaMA-2's layers, of 7B and of 70B."""
        layers = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 8192), (8192, 8192),
                  (28672, 8192), (8192, 28672))
        names = ("llama-2-7b", "llama-2-70b", "tinyllama-1.1b")
        llama, qwen, short, long = PRESETS["llama-3-8b"], PRESETS["qwen3-32b"], (4, 384), (16, 384)
        claims = (
            (8, llama, short, "--method qst"), (15, llama, long, "--method qst"),
            (15, PRESETS["llama-2-70b"], long, "--method qst --stream"),
            (24, llama, short, "--method qlora --checkpoint false"),
            (24, qwen, short, "--method qst"), (48, PRESETS["llama-2-70b"], long, "--method qst"),
        )
        # GPUs before sm_80 compute bf16 slowly, and train.py takes fp16 there.
        bf16 = torch.cuda.get_device_capability(0) >= (8, 0)
        return cls(
            torch.device("cuda", 0), torch.bfloat16 if bf16 else torch.float16, layers,
            *map(PRESETS.get, names), steps=(short, long), claims=claims, copy_bytes=1 << 30,
            new_tokens=64,
        )

    @classmethod
    def small(cls):
        # bitsandbytes 0.50.2 dequantizes fewer than 64 x 64 weights wrongly on a CPU.
        shape = dict(vocab_size=512, n_layer=2, n_head=2, n_embd=64, n_ffn=128)
        grouped = ModelConfig(**shape | dict(n_head=4, n_embd=128, n_kv_head=2))
        return cls(
            torch.device("cpu"), torch.float32, ((64, 128), (128, 64)), ModelConfig(**shape),
            grouped, ModelConfig(**shape), steps=((1, 16), (2, 16)),
            claims=((8, grouped, (1, 16), "--method qst"),
                    (15, grouped, (2, 16), "--method qst --stream")),
            copy_bytes=1 << 16, new_tokens=3,
        )

    @property
    def flags(self):
        """Of train.py, for every step."""
        return ["--device", self.device.type]


def target(what, figure, bound):
    """A figure beside what it should be, such as "<= 1.35"."""
    sign, limit = bound.split()
    compare = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}[sign]
    return dict(what=what, figure=figure, bound=bound, reached=compare(figure, float(limit)))


# --------------------------------------------------------------------------------------
# Random weights


def random_quantized(shape, device):
    """A weight in 4 bits, without one in 16 bits before it."""
    meta = quantize_4bit(torch.empty(shape, device="meta"))
    return fill(meta.to_empty(device=device))


def random_base(config, quant, dtype, device, one_layer=False):
    """A frozen base with random weights, made in the form in which they are kept.

    one_layer: all layers are one and the same, which costs the time of many and the memory of one
    """
    with torch.device("meta"):
        base = Transformer(config).freeze(quant, dtype, "meta")
    if one_layer:
        for i in range(1, len(base.layers)):
            base.layers[i] = base.layers[0]
    return fill(base.to_empty(device=device)).eval()


@torch.no_grad()
def fill(module):
    """Random codes, and scales for which a weight is about as large as in a new model."""
    for name, buffer in module.named_buffers():
        last = name.rpartition(".")[2]
        if last == "zeros":
            buffer.fill_(8)
        elif buffer.dtype == torch.uint8:
            buffer.random_(0, 256)
        elif last in ("offset", "absmax", "nested_absmax", "scales"):  # absmax 0.03 +- 0.01
            buffer.fill_({"nested_absmax": 0.01, "scales": 0.004}.get(last, 0.03))
        elif "norm" in name:
            buffer.fill_(last == "weight")
        else:
            buffer.normal_(std=0.02)
    return module


# --------------------------------------------------------------------------------------
# Clocks


def forget(device):
    """Give back what earlier measurements left in memory."""
    unpack_buffers.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(function, device, seconds=3.0, most=15):
    """Median seconds of a call: of CUDA events on a GPU, which is not waited for in between.

    seconds: about how long to measure: three calls at least, or one of those that take as long
    """
    function()
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    once = time.perf_counter() - start
    if device.type != "cuda":  # which only tries the code
        return once
    calls = 1 if once > seconds else max(3, min(most, int(seconds / (once + 1e-9))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    wait(device)
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:]))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_graph(function, device):
    """A function that runs the same kernels without Python between them: a CUDA graph."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, and libraries have their workspaces
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copies(nbytes, device):
    """How many copies to use in turn, so that none is still in the GPU's L2 cache (H100: 50 MB)."""
    return max(2, math.ceil(3e8 / nbytes)) if device.type == "cuda" else 2


def peak_of(function, device):
    """Peak bytes while a function runs: on a GPU what torch allocated, with the model and all; on a
    CPU by how much the process grows, which is only to run the code."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    before = forget_peak()
    function()
    return max(1, resident("VmHWM") - before)


def workspace_bytes(device, dtype):
    """What a first product leaves allocated: cuBLAS's workspaces, which the account leaves out."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    a = torch.ones(64, 64, dtype=dtype, device=device)
    torch.nn.functional.linear(a, a, a[0])
    a @ a
    del a
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before
