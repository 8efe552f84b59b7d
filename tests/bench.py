"""Measurements, each in a process of its own; medians of runs side by side.

    python tests/bench.py load          peak memory of `from_pretrained`
    python tests/bench.py quant         speed of quantizing and dequantizing, beside bitsandbytes
    python tests/bench.py tokens        speed of generating from a 4-bit and from an fp32 base
    python tests/bench.py account       the memory account beside the peak memory of real steps
    python tests/bench.py methods       speed and memory of a step of each method, beside those of
                                        transformers, peft and bitsandbytes, where they are installed
    python tests/bench.py lean FOLDER   what each saving of --plan --ladder saves in real steps of a model
    python tests/bench.py paper         the paper's tables of memory, and ours, as Markdown
    python tests/bench.py learn ...     how fast QST's variants and the other methods learn; --only,
                                        --seeds and --learning_rates choose, --out FOLDER keeps the
                                        runs and draws them, all other flags are train.py's
    python tests/bench.py pictures ...  draws runs of train.py, whose folders are given, into --out
    python tests/bench.py probe ...     what a reader of the base's hidden states has before it; all
                                        flags are train.py's, with --head lm
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from data import Task, report  # noqa: E402
from data.chat import load_template  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from model import (  # noqa: E402
    PRESETS, ModelConfig, Transformer, from_pretrained, model_bytes, quantize_folder,
)  # fmt: skip
from data.hub import save_pretrained  # noqa: E402
from quant import quantize_4bit  # noqa: E402
from side import IN_BASE_METHODS as INSIDE  # noqa: E402
from account import AS_WRITTEN, COLUMNS, METHOD_ROWS as ROWS, SAVINGS as LADDER, AccountConfig, memory_report, rows, untrained  # noqa: E402
from train import TrainConfig, make_optimizer, parse_args, resolve as complete  # noqa: E402


def peak():
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function, *args, **environment):
    """Call a function of this file in a fresh process, and return what it prints."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import bench; bench.{function}(*{args!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(done.stderr)
    return [float(word) for word in done.stdout.split()]


def load_once(folder, quant):
    from_pretrained(ROOT / "tests/fixtures/llama_rope3", quant)  # torch has loaded what it needs
    start, before = time.perf_counter(), peak()
    model = from_pretrained(folder, quant, torch.float32)
    print(peak() - before, model_bytes(model), time.perf_counter() - start)


def quantize_once(folder, packed):
    quantize_folder(folder, packed)


def make_model(folder, config):
    """Write a random model of a `ModelConfig`'s fields in fp16, and print its number of weights."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**config)).half()
    save_pretrained(model, folder)
    print(sum(p.numel() for p in model.parameters()))


def load():
    """A LLaMA of 0.7 billion fp16 weights; its largest tensor is the embedding."""
    config = ModelConfig(32000, n_layer=12, n_head=16, n_embd=2048, n_ffn=5632, tied=True)
    with tempfile.TemporaryDirectory() as folder:
        (numel,) = alone("make_model", folder, asdict(config))
        largest = 32000 * 2048 * 2
        print(f"{numel / 1e9:.2f} B weights in fp16, loaded to compute in fp32")
        print(f"the largest tensor of the file, the embedding: {largest / 1e6:.0f} MB")
        print("          model MB   peak growth MB   growth - model   seconds")
        packed = f"{folder}/packed"
        alone("quantize_once", folder, packed)
        for name, source, quant in (
            ("nf4", folder, "nf4"), ("none", folder, "none"), ("mapped", packed, "nf4")
        ):  # fmt: skip
            growth, size, seconds = alone("load_once", source, quant)
            print(
                f"{name:6} {size / 1e6:11.0f} {growth / 1e6:16.0f} {(growth - size) / 1e6:16.0f} {seconds:9.2f}"
            )


def medians(functions, repeats):
    """Seconds of each function, side by side: one call of each in turn, and the medians."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times.values()]


def quant_once(threads):
    """Print, for each size: ours and bitsandbytes', dequantizing and quantizing, in seconds."""
    torch.set_num_threads(threads)
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    for shape in SHAPES:
        weight = torch.randn(shape)
        ours, buffer = quantize_4bit(weight), torch.empty(shape)
        read, make = {"ours": lambda: ours.dequantize(out=buffer)}, {"ours": lambda: quantize_4bit(weight)}
        if bnb:
            codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            read["theirs"] = lambda: bnb.dequantize_4bit(codes, state)
            make["theirs"] = lambda: bnb.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
        print(*(medians(read, 21) + ([] if bnb else [0])), *(medians(make, 7) + ([] if bnb else [0])))


SHAPES = ((768, 768), (2816, 1024), (4096, 4096))


def quant():
    """Million weights a second, double-quantized NF4 and fp32, beside bitsandbytes where it is."""
    print("million weights/s          dequantize              quantize")
    print("threads  shape           ours  theirs  ratio    ours  theirs  ratio")
    for threads in (1, 2):
        figures = iter(alone("quant_once", threads))
        for shape in SHAPES:
            row = [next(figures) for _ in range(4)]
            rate = [shape[0] * shape[1] / 1e6 / s if s else float("nan") for s in row]
            print(
                f"{threads:7}  {f'{shape[0]} x {shape[1]}':12} {rate[0]:7.0f} {rate[1]:7.0f} {rate[0] / rate[1]:6.2f} "
                f"{rate[2]:7.0f} {rate[3]:7.0f} {rate[2] / rate[3]:6.2f}"
            )


def tokens_once(threads, folder):
    """Print milliseconds per token of the fp32 and of the 4-bit base."""
    torch.set_num_threads(threads)
    models = {quant: from_pretrained(folder, quant, torch.float32) for quant in ("none", "nf4")}
    idx = torch.arange(5, 13).unsqueeze(0)
    runs = {name: lambda model=model: model.generate(idx, 16) for name, model in models.items()}
    print(*(1000 * seconds / 16 for seconds in medians(runs, 7)))


def tokens():
    """Milliseconds per generated token, one prompt; a random LLaMA of the shape of SmolLM2-135M."""
    with tempfile.TemporaryDirectory() as folder:
        alone("make_model", folder, asdict(PRESETS["smollm2-135m"]))
        print("ms per token   fp32   4 bits   ratio")
        for threads in (1, 2):
            plain, packed = alone("tokens_once", threads, folder)
            print(f"{threads} threads {plain:10.1f} {packed:8.1f} {packed / plain:7.2f}")


# A training step

MODEL = ModelConfig(32000, n_layer=12, n_head=12, n_embd=768, n_ffn=2048)  # a LLaMA, in fp32
STEP = "--plan --device cpu --batch_size 4 --sequence_len 256"
# What is larger than 64 kB goes back to the system when it is freed, so that the peak is of what
# lives and not of what the allocator keeps.
FREED = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000")


def costs(model, loss_of, cfg):
    """Bytes by which the process grows in two steps (or forward passes, if nothing learns), the
    processor's seconds for the second, and the loss of the first.

    loss_of: function of ids (B, T), each of which is its own target
    """
    learns = any(p.requires_grad for p in model.parameters())
    optimizer = make_optimizer(model, cfg) if learns else None
    torch.manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (cfg.batch_size, cfg.sequence_len))

    def propagate(idx):
        with torch.set_grad_enabled(learns):
            loss = loss_of(idx)
        if learns:
            loss.backward()
        return loss.item()

    propagate(idx[:1, :16])  # torch has loaded what it needs
    model.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = lambda name: next(
        1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)
    )
    before = status("VmRSS")
    losses = []
    for _ in range(2):  # the second accumulates, beside the optimizer's moments
        start = time.process_time()
        losses.append(propagate(idx))
        if learns:
            optimizer.step()
    return status("VmHWM") - before, time.process_time() - start, losses[0]


PLAIN = "--checkpoint false --h_f_bits 16 --chunk_loss false"
LEAN = "--h_f_bits 4 --optimizer_bits 8"
ACCOUNTS = {  # name: flags of train.py
    "qst": "", "qst, as written": PLAIN, "qst, 4 bits": LEAN,
    "qst, as written, linear": f"{PLAIN} --downsample linear",
    "qst, released": "--variant released", "qst, borrowed": "--attention borrowed",
    "lst": "--method lst", "lora": "--method lora", "qlora": "--method qlora",
    "qlora, checkpoint": "--method qlora --checkpoint", "adapter": "--method adapter",
    "peqa": "--method peqa", "full": "--method full",
}  # fmt: skip


def account_once(flags):
    """Print how much a process grows by training, and the account's total without the weights."""
    cfg = parse_args([*STEP.split(), *flags.split()])
    report, cfg = memory_report(cfg, MODEL), complete(cfg)
    model = untrained(cfg, MODEL, torch.float32, "cpu")
    grown = costs(model, lambda idx: model.loss(idx, idx), cfg)[0]
    print(grown, report["total_bytes"] - report["weights_bytes"])


def account():
    """Peak resident memory above the model: a LLaMA of 12 layers x 768 in fp32, 4 x 256 tokens."""
    print("| | measured, MB | account, MB | account / measured |\n|---|---|---|---|")
    for name, flags in ACCOUNTS.items():
        grown, told = alone("account_once", flags, **FREED)
        print(f"| {name} | {grown / 1e6:,.0f} | {told / 1e6:,.0f} | {told / grown:.3f} |", flush=True)


STEPS = {  # name: flags of train.py
    "forward alone, nf4": "--method qlora --eval_only", "qst": "", "qst, as written": PLAIN,
    "qst, 4 bits": LEAN, "lst": "--method lst",
    "qlora": "--method qlora", "qlora, checkpoint": "--method qlora --checkpoint",
    "lora": "--method lora", "lora, checkpoint": "--method lora --checkpoint",
    "adapter": "--method adapter", "peqa": "--method peqa", "full": "--method full",
}  # fmt: skip
THEIRS = ("forward alone, nf4", "qlora", "qlora, checkpoint", "lora", "full")
LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate")


def ours(cfg, folder):
    """A model, and its loss as a function of the ids."""
    base = from_pretrained(folder, cfg.quant, torch.float32)
    model = train.make_model(cfg, base, Task([], []))
    return model, lambda idx: model.loss(idx, idx)


def theirs(cfg, folder):
    """The same, as one puts it together of the libraries: transformers, peft, bitsandbytes."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    quant = four_bits if cfg.quant == "nf4" else None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quant)
    if cfg.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.eval_only:
        model.requires_grad_(False)
    elif cfg.method != "full":
        lora = LoraConfig(r=cfg.rank, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, lora)
    model.train()
    return model, lambda idx: model(idx, labels=idx, shift_labels=idx, use_cache=False).loss


def step_once(whose, flags, folder):
    """Print what `costs` returns, and the trainable parameters."""
    cfg = complete(parse_args([*STEP.split(), *flags.split()]))
    model, loss_of = globals()[whose](cfg, folder)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(*costs(model, loss_of, cfg), trainable)


def methods(rounds=3):
    """A step of 4 x 256 tokens, each with a target: a LLaMA of 12 layers x 768 in fp32.

    Memory is `account`'s, measured once. Seconds are the processor's, of one thread: those of a
    clock where there is no other work, and not much more where there is. Each process has its turn
    in every round, and the median is told.
    """
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    steps = [(name, "ours") for name in STEPS]
    steps += [(name, "theirs") for name in THEIRS if not absent]
    figures = {step: [] for step in steps}
    with tempfile.TemporaryDirectory() as folder:
        alone("make_model", folder, asdict(MODEL))
        for name, whose in tqdm(steps * (1 + rounds)):
            how = {} if figures[name, whose] else FREED
            row = alone("step_once", whose, STEPS[name], folder, OMP_NUM_THREADS="1", **how)
            figures[name, whose].append(row)
    seconds = {step: statistics.median(row[1] for row in turns[1:]) for step, turns in figures.items()}
    memory = {step: turns[0][0] for step, turns in figures.items()}
    one = ("qlora", "ours" if absent else "theirs")
    table("A training step", "method", "whose", "s", "MB above the model", "trainable",
          f"s / qlora, {one[1]}", f"MB / qlora, {one[1]}")  # fmt: skip
    for step, turns in figures.items():
        print(
            f"| {' | '.join(step)} | {seconds[step]:.2f} | {memory[step] / 1e6:,.0f} | {turns[0][3]:,.0f} "
            f"| {seconds[step] / seconds[one]:.2f} | {memory[step] / memory[one]:.2f} |"
        )
    if absent:
        print(f"\nTheirs are left out: pip install {' '.join(absent)}.")


def lean(folder):
    """What each saving of LADDER saves, and what it costs: 8 x 512 tokens in fp32."""
    table("A step of QST", "", "MB above the model", "of the first", "s", "of the first", "loss")
    flags, first = "--batch_size 8 --sequence_len 512", None
    for name, saving in (LADDER | {"as written": AS_WRITTEN}).items():
        flags += "".join(f" --{key} {value}" for key, value in saving.items())
        memory, seconds, loss, _ = alone("step_once", "ours", flags, folder, OMP_NUM_THREADS="1", **FREED)
        first = first or (memory, seconds)
        print(
            f"| {name} | {memory / 1e6:,.0f} | {memory / first[0]:.2f} | {seconds:.1f} "
            f"| {seconds / first[1]:.2f} | {loss:.5f} |", flush=True
        )  # fmt: skip


# What the paper tells, in GB (QST, arXiv 2401.07159)

FIGURE_1A = {  # LLaMA-2-70B, batch 16, length 384: weights, optimizer, activations, total
    "full": (140, 420, 197, 757), "qlora": (36, 13, 197, 246), "lst": (140, 24, 78, 242),
    "qst": (36, 4, 69, 109),
}  # fmt: skip
TABLE_1 = {  # batch 16, length 512
    "qlora": {"opt-1.3b": 31.3, "opt-2.7b": 47.0, "opt-6.7b": 63.6},
    "lst": {"opt-1.3b": 20.9, "opt-2.7b": 30.7}, "lora": {"opt-1.3b": 32.9, "opt-2.7b": 50.4},
    "adapter": {"opt-1.3b": 32.5, "opt-2.7b": 49.9},
    "qst": {"opt-1.3b": 17.7, "opt-2.7b": 24.4, "opt-6.7b": 27.5},
}  # fmt: skip
TABLE_2 = {  # batch 4, length 384
    "qlora": {"llama-2-7b": 15.6, "llama-2-13b": 25.4, "llama-2-70b": 95.5, "opt-1.3b": 6.3,
              "opt-6.7b": 15.5, "opt-66b": 87.5},
    "qst": {"llama-2-7b": 7.3, "llama-2-13b": 12.6, "llama-2-70b": 56.0, "opt-1.3b": 3.2,
            "opt-6.7b": 7.2, "opt-66b": 52.3},
}  # fmt: skip
TABLE_3 = {  # floating-point operations a token, in units of the paper's own
    "qst": {"llama-2-7b": 4.4, "llama-2-13b": 6.1, "llama-2-70b": 15.3},
    "qlora": {"llama-2-7b": 11.7, "llama-2-13b": 16.0, "llama-2-70b": 38.1},
    "lst": {"llama-2-7b": 11.0, "llama-2-13b": 19.0, "llama-2-70b": 80.7},
}  # fmt: skip
TABLE_6 = {"linear": 7.8, "lora": 7.3, "adapter": 7.3, "maxpool": 7.3, "avgpool": 7.3}  # 7B


def as_written(cfg):
    """(label, settings) of every method as in its paper: of ours in `rows`, without the savings."""
    for label, row in rows(replace(cfg, **AS_WRITTEN)):
        if row.method in INSIDE or not row.checkpoint:
            yield label, row


def reports(preset, batch_size, sequence_len, methods):
    """{label: two of `memory_report`}: with the attention of a GPU, and with the plain formula, whose
    (T, T) matrices are kept."""
    cfg = TrainConfig(preset=preset, batch_size=batch_size, sequence_len=sequence_len)
    return {
        label: [memory_report(replace(row, device=device)) for device in ("cuda", "meta")]
        for label, row in as_written(cfg) if row.method in methods
    }  # fmt: skip


def beside(ours, theirs):
    """The paper's figure and ours, with the ratio."""
    return f"{ours:.1f} | {theirs or '-'} | {f'{ours / theirs:.2f}' if theirs else '-'}"


def table(title, *columns):
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def paper():
    """Every table in turn; GB are 10^9 bytes."""
    table("LLaMA-2-70B, batch 16, length 384 (Fig. 1a)", "", "weights", "paper", "gradients and optimizer",
          "paper", "activations and transients", "paper", "total", "paper", "ours / paper")  # fmt: skip
    for label, pair in reports("llama-2-70b", 16, 384, ROWS).items():
        theirs = FIGURE_1A.get(label)
        for r, how in zip(pair, ("", ", plain attention")):
            weights, gradients, optimizer, activations, transient, total = (
                r[f"{name}_bytes"] / 1e9 for name in COLUMNS
            )
            parts = (weights, gradients + optimizer, activations + transient)
            cells = " | ".join(f"{a:.1f} | {b}" for a, b in zip(parts, theirs or "---"))
            print(f"| {label}{how} | {cells} | {beside(total, theirs and theirs[3])} |", flush=True)
    grid("Batch 16, length 512 (Table 1)", TABLE_1, 16, 512)
    flops = grid("Batch 4, length 384 (Table 2)", TABLE_2, 4, 384)
    relative(flops)
    table("Downsamplers: LLaMA-2-7B, batch 4, length 384 (Table 6)", "", "GB", "paper", "ours / paper", "trainable")
    for downsample, theirs in TABLE_6.items():
        r = memory_report(TrainConfig(preset="llama-2-7b", downsample=downsample, **AS_WRITTEN))
        print(f"| {downsample} | {beside(r['total_bytes'] / 1e9, theirs)} | {r['trainable_parameters']:,} |")
    curve("Batch size: LLaMA-2-7B, length 384 (Fig. 4)", "batch_size", (1, 2, 4, 8, 16, 32))
    curve("Length: LLaMA-2-7B, batch 4 (Fig. 4)", "sequence_len", (128, 256, 384, 512, 1024, 2048))
    curve("Reduction: LLaMA-2-7B, batch 4, length 384 (Fig. 5)", "reduction", (2, 4, 8, 16, 32, 64), ["qst"])


def grid(title, theirs, batch_size, sequence_len):
    """A table of totals, a line a method and preset. Returns {(method, preset): operations}."""
    table(title, "", "model", "with plain attention, GB", "ours, GB", "paper", "ours / paper")
    flops = {}
    for preset in {preset: None for row in theirs.values() for preset in row}:
        for label, (r, plain) in reports(preset, batch_size, sequence_len, ("lora", "lst", *theirs)).items():
            told = theirs.get(label, {}).get(preset)
            cells = f"{plain['total_bytes'] / 1e9:.1f} | {beside(r['total_bytes'] / 1e9, told)}"
            print(f"| {label} | {preset} | {cells} |", flush=True)
            flops[label, preset] = r["flops_per_token"]
    return flops


def relative(flops):
    table("Floating-point operations a token (Table 3)", "", "model", "10^9, forward and backward",
          "times QST's on 7B", "paper", "ours / paper")  # fmt: skip
    one = flops["qst", "llama-2-7b"]
    for (method, preset), ours in flops.items():
        theirs = TABLE_3.get(method, {}).get(preset)
        ratio = beside(ours / one, theirs and round(theirs / TABLE_3["qst"]["llama-2-7b"], 2))
        if "llama" in preset:
            print(f"| {method} | {preset} | {ours / 1e9:.1f} | {ratio} |")


def curve(title, name, values, methods=("qlora", "qst")):
    """A line a method: the total, in GB, over a setting."""
    table(title, "", *map(str, values))
    start = TrainConfig(preset="llama-2-7b", batch_size=4, sequence_len=384)
    lines = {}
    for value in values:
        for label, row in as_written(replace(start, **{name: value})):
            if row.method in methods:
                r = memory_report(row)
                lines.setdefault(label, []).append(f"{r['total_bytes'] / 1e9:.1f}")
                if name == "reduction":
                    lines.setdefault("10^9 operations a token", []).append(f"{r['flops_per_token'] / 1e9:.1f}")
    for who, cells in lines.items():
        print(f"| {who} | {' | '.join(cells)} |", flush=True)


# How fast it learns

RUNS = {  # as flags of train.py
    "qst": "", "alpha x 1": "--alpha_lr_factor 1", "released": "--variant released",
    "residual": "--mix residual", "sum": "--gate sum", "borrowed": "--attention borrowed",
    "standardize": "--standardize", "fast": "--variant fast",
    # On the embedded default, 1e-2 is the best of several rates for all but the last two.
    "lst": "--method lst", "qlora": "--method qlora", "lora": "--method lora",
    "adapter": "--method adapter", "peqa": "--method peqa --learning_rate 3e-3",
    "full": "--method full --learning_rate 3e-3",
}  # fmt: skip
SCORES = [f"{name}_{when}" for name in report.SCORES for when in ("before", "after")]


def learn(only, seeds, rates, out, flags):
    """Held-out loss at each evaluation, and the score: mean (smallest to largest) over the seeds.

    rates: learning rates to try; the one of the lowest held-out loss is marked, and drawn
    out: a folder that keeps the runs; what an earlier call left there for other rates counts too
    """
    table("Held-out loss and score", "", "learning rate", "trainable", "step, ms", "peak, MB", "held-out loss", "score")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(out or scratch, name) for name in only]
        for folder in folders:
            for rate in rates or [""]:
                words = RUNS[folder.name].split() + flags + ["--learning_rate", rate] * bool(rate)
                for seed in seeds:
                    learn_once([*words, "--seed", seed], folder / f"{rate} {seed}".strip())
            tell(folder)
        if out:
            pictures(folders, out)


def learn_once(flags, out):
    """A run of train.py. One that fails, as where it diverges, is told and left out."""
    (out / "result.json").unlink(missing_ok=True)
    words = [sys.executable, str(ROOT / "train.py"), *flags, "--out_dir", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"{out}: {done.stderr.splitlines()[-1]}", file=sys.stderr)


def read_runs(folder):
    """What train.py left in a folder and those below, the best learning rate first:
    {rate: [(result.json, {iteration: held-out loss}), ...]}"""
    runs = {}
    for path in sorted(Path(folder).rglob("result.json")):
        result = json.loads(path.read_text())
        with open(path.with_name("log.csv"), newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
        losses = {int(row["iteration"]): float(row["held_out_loss"]) for row in rows}
        losses = {0: result["loss_before"]} | losses
        runs.setdefault(result["config"]["learning_rate"], []).append((result, losses))
    if not runs:
        sys.exit(f"{folder} holds no run: give the --out_dir of a run of train.py, or a folder of some.")
    return dict(sorted(runs.items(), key=lambda item: mean(item[1], "loss_after")))


def mean(runs, key):
    return statistics.mean(result[key] for result, _ in runs)


def spread(values):
    least = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{least}"


def tell(folder):
    """Print a line a learning rate, the best one first and marked if there are several."""
    tried = read_runs(folder)
    for i, (rate, runs) in enumerate(tried.items()):
        losses = [spread(values) for values in zip(*(losses.values() for _, losses in runs))]
        scores = [f"{key} {spread([r[key] for r, _ in runs])}" for key in SCORES if key in runs[0][0]]
        print(
            f"| {folder.name} | {rate:g}{' *' * (i == 0 < len(tried) - 1)} "
            f"| {runs[0][0]['trainable_parameters']:,} | {mean(runs, 'step_ms'):.0f} "
            f"| {mean(runs, 'peak_memory_bytes') / 1e6:.0f} | {'  '.join(losses)} | {'  '.join(scores)} |",
            flush=True,
        )


PARTS = ("weights", "optimizer", "activations")


def pictures(folders, out):
    """Draw what memory is for, the held-out loss in time, and the score beside the peak memory; of
    each folder the best learning rate's runs. As Mermaid, and as PNGs where matplotlib is."""
    runs = {Path(folder).name: next(iter(read_runs(folder).values())) for folder in folders}
    score = next((key for key in SCORES[1::2] if all(key in r[0][0] for r in runs.values())), "loss_after")
    what = score.removesuffix("_after").replace("_", " ")
    parts = [[mean(r, f"{part}_bytes") / 1e6 for part in PARTS] for r in runs.values()]
    tops = np.cumsum(parts, axis=1).T[::-1]  # the higher bars are drawn first, behind the others
    curves = {}  # name: seconds, losses
    for name, r in runs.items():
        seconds = [i * mean(r, "step_ms") / 1000 for i in r[0][1]]
        curves[name] = seconds, np.mean([list(losses.values()) for _, losses in r], axis=0)
    points = {name: (mean(r, "peak_memory_bytes") / 1e6, mean(r, score)) for name, r in runs.items()}

    mermaid("MB, from below: " + ", ".join(PARTS), json.dumps(list(runs)), "MB", "bar", tops)
    end = min(seconds[-1] for seconds, _ in curves.values())  # no line goes on where it has no points
    grid = np.linspace(0, end, 9)
    lines = [np.interp(grid, *curve) for curve in curves.values()]
    mermaid(f"Held-out loss: {', '.join(runs)}", f'"seconds" 0 --> {end:.1f}', "loss", "line", lines)
    order = sorted(points, key=points.get)
    names = json.dumps([f"{name}, {points[name][0]:.0f} MB" for name in order])
    mermaid(f"{what}, by peak memory", names, what, "bar", [[points[name][1] for name in order]])

    if importlib.util.find_spec("matplotlib") is None:
        print("\nNo PNGs without matplotlib: pip install matplotlib.")
        return
    with picture(out, "memory", xlabel="", ylabel="MB") as axes:
        for part, row in zip(reversed(PARTS), tops):
            axes.bar(list(runs), row, label=part)
    with picture(out, "loss", xlabel="seconds of training", ylabel="held-out loss") as axes:
        for name, curve in curves.items():
            axes.plot(*curve, marker=".", label=name)
    with picture(out, "score", xlabel="peak memory, MB", ylabel=what) as axes:
        for name, point in points.items():
            axes.scatter(*point, label=name)


def mermaid(title, x, y, kind, rows):
    top = max(max(row) for row in rows)
    print(f'\n```mermaid\nxychart-beta\n    title "{title}"\n    x-axis {x}\n    y-axis "{y}" 0 --> {top:.3f}')
    for row in rows:
        print(f"    {kind} [{', '.join(f'{value:.3f}' for value in row)}]")
    print("```")


@contextlib.contextmanager
def picture(out, name, **labels):
    """Axes to draw on, saved as OUT/NAME.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set(**labels)
    axes.legend()
    Path(out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(out, f"{name}.png"), dpi=150)


# What there is to read

@torch.no_grad()
def last_states(base, examples):
    """Hidden states of every layer at the last token, (n, N, C), and the examples' two targets."""
    seen, states = [], []
    for layer in base.layers:
        layer.register_forward_hook(lambda layer, args, h_f: seen.append(h_f[0, -1]))
    for ids, _ in examples:
        base.hidden(torch.tensor([ids]))
        states.append(torch.stack(seen))
        seen.clear()
    targets = torch.tensor([targets[-1] for _, targets in examples])
    return torch.stack(states), (targets == targets.max()).long()


def probe(flags, train_examples=1200, test_examples=400):
    """Per layer: the channels' size, and how well a linear classifier learns in 100 steps of 16
    from the states as they are, and standardized (the best of three learning rates each); and the
    classifier that ridge regression finds from all of the examples."""
    cfg = train.complete(train.parse_args(flags))
    tokenizer, base = load_tokenizer(cfg.base), from_pretrained(cfg.base, cfg.quant, torch.float32)
    task = train.load_task(cfg, tokenizer, load_template(cfg.base), base.config)
    states, y = last_states(base, (task.train + task.held_out)[: train_examples + test_examples])
    print("layer   largest |mean|   median std   100 steps: raw   standardized   ridge")
    for i in range(states.shape[1]):
        x = states[:, i]
        mean, std = x[:64].mean(dim=0), x[:64].std(dim=0) + 1e-3
        z = (x - mean) / std
        best = [max(classify(v, y, train_examples, lr) for lr in (1e-4, 1e-3, 1e-2)) for v in (x, z)]
        ridge = max(regress(z, y, train_examples, weight) for weight in (10, 100, 1e3, 1e4))
        print(f"{i + 1:5} {mean.abs().max():16.1f} {std.median():12.2f} {best[0]:16.3f} {best[1]:14.3f} {ridge:7.3f}")


def classify(x, y, n, learning_rate):
    """Accuracy on x[n:] of a linear classifier after 100 steps of Adam on 16 of x[:n] each."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(x.shape[1], 2)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.Adam(linear.parameters(), learning_rate)
    for _ in range(100):
        rows = torch.randint(n, (16,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(x[rows]), y[rows]).backward()
        optimizer.step()
    return (linear(x[n:]).argmax(dim=1) == y[n:]).float().mean().item()


def regress(x, y, n, weight):
    a, b = x[:n], 2.0 * y[:n] - 1
    w = torch.linalg.solve(a.T @ a + weight * torch.eye(a.shape[1]), a.T @ b)
    return ((x[n:] @ w > 0) == y[n:].bool()).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    plain = ("load", "quant", "tokens", "account", "methods", "paper")
    parser.add_argument("what", choices=[*plain, "lean", "learn", "pictures", "probe"])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="of learn")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"], help="of learn")
    parser.add_argument("--learning_rates", nargs="+", help="of learn: try each; give them with --base")
    parser.add_argument("--out", help="folder of learn's runs, and of the pictures")
    args, flags = parser.parse_known_args()
    if args.what == "learn":
        learn(args.only, args.seeds, args.learning_rates, args.out, flags)
    elif args.what == "lean" and len(flags) == 1:
        lean(*flags)
    elif args.what == "lean":
        parser.error("lean needs the folder of a model")
    elif args.what == "pictures" and flags and args.out:
        pictures(flags, args.out)
    elif args.what == "pictures":
        parser.error("pictures needs folders of runs, and --out")
    elif args.what == "probe":
        probe(flags)
    elif flags:
        parser.error(f"unknown flags: {' '.join(flags)}")
    else:
        globals()[args.what]()
