"""A model that is larger than the memory: `--stream` under a hard limit, and what it costs."""

import copy
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from account import memory_report, parse_args, settings_of_step
from benchmarks.common import (
    FREED, alone, forget_peak, medians, print_row, print_table, resident,
)
from data.formats import bnb, save
from data.formats.files import write_json
from data.formats.safetensors import write_safetensors
from data.run.optim import make_optimizer
from data.tasks.examples import Task
from model import ModelConfig, Transformer, from_pretrained
from quant import Linear4bit, Quantized4bit
from train import make_model

# 192 layers of the size of TinyLlama's, and few words: 5.09 GB of 4-bit weights.
LARGE = ModelConfig(4000, n_layer=192, n_head=16, n_embd=2048, n_ffn=5632)
SMALL = ModelConfig(100, n_layer=2, n_head=1, n_embd=128, n_ffn=128)
FLAGS = "--method qst --device cpu --dtype fp32 --stream --batch_size 1 --sequence_len 64"
FLAGS += " --reduction 64 --optimizer_bits 8"
ONE_ARENA = FREED | dict(MALLOC_ARENA_MAX="1")  # else each thread reserves 64 MB of addresses


def stream(layers=LARGE.n_layer, steps=2):
    """Train a model whose 4-bit weights are four times a hard limit on the process's addresses; and
    time a step of one of an eighth of the layers beside one that is mapped as a whole."""
    config, steps = replace(LARGE, n_layer=int(layers)), int(steps)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        nbytes = alone(write_random, folder, config)
        limit = nbytes // 4
        print_table(
            f"{nbytes / 1e9:.2f} GB of 4-bit weights, RLIMIT_AS {limit / 1e9:.2f} GB", "limit",
            "resident at the start, MB", "peak growth, MB", "account, MB", "s of each step",
            "losses",
        )
        for name, most in (("with", limit), ("without", None)):
            start, grown, seconds, losses = alone(limited, folder, most, steps, **ONE_ARENA)
            expected = f"{account(config) / 1e6:,.0f}"
            times = (", ".join(f"{x:.{n}f}" for x in row) for n, row in ((1, seconds), (6, losses)))
            print_row(name, f"{start / 1e6:,.0f}", f"{grown / 1e6:,.0f}", expected, *times)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        alone(write_random, folder, replace(config, n_layer=-(-config.n_layer // 8)))
        found = alone(beside, folder, 5)
        print_table("Seconds of a step, side by side", "mapped whole", "streamed", "ratio")
        print_row(*(f"{s:.2f}" for s in found.values()), f"{found[True] / found[False]:.3f}")


def write_random(folder, config):
    """Write a LLaMA of random 4-bit weights, one layer after the other, each into a file of its
    own; returns the bytes of the layers' weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config).freeze("nf4", torch.float32, "meta")
    nbytes, where = 0, {}

    def write(shard, modules):
        tensors, packed = {}, 0
        for path, module in modules:
            if isinstance(module, Quantized4bit):
                weight = drawn(module)
                tensors |= bnb.weight_fields(f"model.{path}", weight, "float32")
                packed += weight.nbytes
            elif hasattr(module, "weight") and not isinstance(module, Linear4bit):
                name = path if path == "lm_head" else f"model.{path}"
                normal = 0.02 * torch.randn(module.weight.shape)
                tensors[f"{name}.weight"] = 1 + normal if "norm" in path else normal
        write_safetensors(Path(folder) / shard, tensors)
        where.update(dict.fromkeys(tensors, shard))
        return packed

    for i, layer in enumerate(model.layers):
        named = [(f"layers.{i}.{path}", module) for path, module in layer.named_modules()]
        nbytes += write(f"model-{i}.safetensors", named)
    rest = [(path, m) for path, m in model.named_modules() if not path.startswith("layers")]
    write("model-rest.safetensors", rest)
    write_json(Path(folder) / "model.safetensors.index.json", dict(weight_map=where))
    about = save.to_theirs(config) | dict(torch_dtype="float32")
    about["quantization_config"] = bnb.settings("nf4", "float32")
    write_json(Path(folder) / "config.json", about)
    return nbytes


def drawn(weight):
    """A `Quantized4bit` of the same sizes with random codes, and scales of some 0.04."""
    random = copy.deepcopy(weight).to_empty(device="cpu")
    random.codes.random_(0, 256)
    random.absmax.random_(0, 256)
    random.nested_absmax.fill_(0.01)
    random.offset.fill_(0.04)
    return random


def limited(folder, most, steps):
    """Steps of a streamed model in a process that may not have more than `most` bytes of addresses:
    what it had at the start, its growth, and of each step the seconds and the loss."""
    with tempfile.TemporaryDirectory() as small:  # torch has loaded what it needs
        write_random(small, SMALL)
        trainer(small, stream=True)()
    if most is not None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    start, run = forget_peak(), trainer(folder, stream=True)
    seconds, losses = zip(*(timed(run) for _ in range(steps)))
    return start, resident("VmHWM") - start, seconds, losses


def beside(folder, steps):
    """Seconds of a step, without and with --stream."""
    return medians({stream: trainer(folder, stream) for stream in (False, True)}, steps)


def trainer(folder, stream):
    """A function that takes one training step of a folder's model, and returns the loss."""
    cfg = settings_of_step(parse_args(FLAGS.split()))
    base = from_pretrained(folder, cfg.quant, torch.float32, stream=stream)
    torch.manual_seed(0)
    model = make_model(cfg, base, Task([], []))
    optimizer = make_optimizer(model, cfg)
    shape = cfg.batch_size, cfg.sequence_len
    idx = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def step():
        loss = model.loss(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def account(config):
    """What the account says of such a step, and the embedding, which is in memory here too."""
    report = memory_report(parse_args(FLAGS.split()), config)
    return report["unaccumulated_bytes"] + 4 * config.vocab_size * config.n_embd
