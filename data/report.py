"""What a run of train.py prints: before it, while it runs, and at its end."""

import os
import shlex
import sys

from tqdm import tqdm

from data import tiny
from quant import Linear4bit

SCORES = ("exact_match", "accuracy", "f1", "matthews", "pearson", "spearman")
WHAT = {
    "lora": "low-rank branches of rank {rank}", "qlora": "low-rank branches of rank {rank}",
    "adapter": "bottlenecks of rank {rank}", "peqa": "the scales of the base's integers",
    "full": "the base itself",
}  # fmt: skip


def progress(iterations, desc):
    """A progress bar; where it is no terminal, a line now and then."""
    return tqdm(iterations, desc, unit="it", mininterval=0.1 if sys.stderr.isatty() else 15)


def show_bytes(n):
    """1.2 GB, 3.4 MB, ... (powers of ten)"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def introduce(folder, model, cfg, batch, result):
    """Print what a reader wants to know before the run."""
    config, layers, bits = model.config, [m for m in model.modules() if isinstance(m, Linear4bit)], ""
    if layers:
        nbytes = sum(layer.quantized.nbytes for layer in layers)
        numel = sum(layer.in_features * layer.out_features for layer in layers)
        bits = f", {numel:,} of them at {8 * nbytes / numel:.3f} bits ({cfg.quant})"
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    narrow = "a side network {reduction} times narrower, {downsample} downsamplers"
    what = WHAT.get(cfg.method, narrow).format(**vars(model.side.config))
    memory = {name: show_bytes(result[f"{name}_bytes"]) for name in ("weights", "optimizer", "activations")}
    print(f"base        {folder}: {config.family}, {config.n_layer} layers of {config.n_embd}")
    print(f"frozen      {total - trainable:,} weights{bits}")
    print(f"trainable   {trainable:,} ({100 * trainable / total:.2f} %): {what}")
    print(f"iteration   {cfg.gradient_accumulation_steps} x {len(batch)} sequences of at most {batch.shape[1]} tokens")
    print(f"memory      {', '.join(f'{name} {size}' for name, size in memory.items())} of such a batch")


def conclude(folder, cfg, result):
    """Print what the run has shown, and what to do next."""
    tuned = cfg.method.upper()
    start = "base" if cfg.head == "lm" and cfg.method != "lst" else "untrained"
    who = {tuned if cfg.side else "base": ""} if cfg.eval_only else {start: "_before", tuned: "_after"}

    def line(title, name, form, more=""):
        if found := [f"{result[name + end]:{form}} {one}" for one, end in who.items() if name + end in result]:
            print(f"{title:15} {', '.join(found)}{more}")

    print()
    line("held-out loss", "loss", ".3f")
    line("perplexity", "perplexity", ".3f")
    if not cfg.eval_only and result["loss_after"] >= result["loss_before"]:
        print("It has not learned: train longer, or with another --learning_rate.")
    for name in SCORES:
        line(name.replace("_", " "), name, ".1%", f" ({result.get('examples', 0):,} examples)")
    end = list(who.values())[-1]
    for part, accuracy in result.get("accuracy_by_category" + end, {}).items():
        print(f"   {part:12} {accuracy:.1%}")
    if majority := result.get("majority_class" + end):
        print(f"majority class  {majority:.1%}")
    for sample in result.get("samples", ()):
        print(f"\n{sample['prompt'].strip()}\n   expected  {sample['expected']}")
        for one in who:
            print(f"   {one:10}{sample.get(one, sample['answer'])}")
    print(f"\n{result['seconds']:.0f} s in all, peak memory {show_bytes(result['peak_memory_bytes'])}.")
    if not cfg.eval_only and cfg.head == "lm":
        prompt = tiny.EXAMPLE if cfg.task == "tiny" else "YOUR QUESTION"
        script = os.path.relpath(os.path.join(os.path.dirname(__file__), "..", "qst.py"))
        print(f"Ask it yourself:\npython {script} --base {shlex.quote(str(folder))} "
              f"--side {shlex.quote(cfg.out_dir)} --prompt {shlex.quote(prompt)}")  # fmt: skip
