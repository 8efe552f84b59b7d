"""What a run of train.py measures, prints and draws: before it, while it runs, and at its end."""

import csv
import os
import resource
import shlex
import statistics
import sys
import time
import weakref

import torch
from tqdm import tqdm

from data import tiny
from data.charts import line_chart
from quant import ABSMAX_BLOCK_SIZE, Linear4bit

SCORES = ("exact_match", "accuracy", "f1", "matthews", "pearson", "spearman")
TRAINED = {
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


# --------------------------------------------------------------------------------------
# Memory


def peak_memory(device):
    """Bytes: what torch allocated at most on a GPU, or the largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def activation_bytes(model, idx, targets):
    """Bytes that a forward pass keeps for the backward pass, each storage counted once.

    The model's own weights are not counted, nor what it makes and drops again.
    """
    return loss_and_kept(model, idx, targets)[1]


def loss_and_kept(model, idx, targets):
    """The loss, and its `activation_bytes`."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = weakref.WeakValueDictionary()  # a chunk of logits is gone before the end

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(idx, targets)
    return loss, sum(storage.nbytes() for storage in kept.values())


def optimizer_bytes(parameters, bits):
    """Bytes of AdamW's two moments; in 8 bits each block has its scale in fp32."""
    if bits == 32:
        return 2 * sum(p.nbytes for p in parameters)
    return 2 * sum(p.numel() + 4 * -(-p.numel() // ABSMAX_BLOCK_SIZE) for p in parameters)


# --------------------------------------------------------------------------------------
# A run


def introduce(folder, model, cfg, batch, result):
    """Print what a reader wants to know before the run."""
    config, layers = model.config, [m for m in model.modules() if isinstance(m, Linear4bit)]
    bits = ""
    if layers:
        nbytes = sum(layer.weight.nbytes for layer in layers)
        numel = sum(layer.in_features * layer.out_features for layer in layers)
        bits = f", {numel:,} of them at {8 * nbytes / numel:.3f} bits ({cfg.quant})"
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    side = "a side network {reduction} times narrower, {downsample} downsamplers"
    what = TRAINED.get(cfg.method, side).format(**vars(model.side.config))
    steps, (B, T) = cfg.gradient_accumulation_steps, batch.shape
    memory = ", ".join(
        f"{name} {show_bytes(result[f'{name}_bytes'])}"
        for name in ("weights", "optimizer", "activations")
    )
    print(f"base        {folder}: {config.family}, {config.n_layer} layers of {config.n_embd}")
    print(f"frozen      {total - trainable:,} weights{bits}")
    print(f"trainable   {trainable:,} ({100 * trainable / total:.2f} %): {what}")
    print(f"iteration   {steps} x {B} sequences of at most {T} tokens")
    print(f"memory      {memory} of such a batch")


class TrainingLog:
    """log.csv, loss.svg, the progress bar, and the speed of the steps of a run."""

    COLUMNS = "iteration", "loss", "held_out_loss", "learning_rate", "tokens_per_second", "step_ms"

    def __init__(self, out_dir, cfg, held_out_loss, device):
        self.out_dir, self.cfg, self.device = out_dir, cfg, device
        self.held_out_loss, self.held_out_iteration = held_out_loss, 0
        self.iteration, self.tokens, self.step_ms = 0, 0, []
        self.curves = {"training": [], "held out": [(0, held_out_loss)]}
        self.bar = progress(range(1, cfg.max_iters + 1), cfg.method)

    def __enter__(self):
        self.file = open(self.out_dir / "log.csv", "w", newline="", buffering=1)
        self.csv = csv.writer(self.file)
        self.csv.writerow(self.COLUMNS)
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.bar.close()
        self.file.close()
        if self.curves["training"]:
            line_chart(self.out_dir / "loss.svg", "Loss of an answer's token", "iteration", self.curves)

    def iterations(self):
        """Count from 1, with a progress bar, and time each iteration until `stepped`."""
        for iteration in self.bar:
            self.start = time.perf_counter()
            yield iteration

    def stepped(self, loss, tokens):
        """An iteration is done."""
        self.step_ms.append(1000 * (time.perf_counter() - self.start))
        self.iteration, self.loss, self.tokens = len(self.step_ms), loss, self.tokens + tokens

    def evaluated(self, held_out_loss):
        self.held_out_loss, self.held_out_iteration = held_out_loss, self.iteration
        self.curves["held out"].append((self.iteration, held_out_loss))

    def write(self, learning_rate):
        """Show the iteration, and write a line if one is due."""
        new = self.held_out_iteration == self.iteration
        rate = self.speed()["tokens_per_second"]
        if new or self.iteration % self.cfg.log_interval == 0:
            self.curves["training"].append((self.iteration, self.loss))
            self.csv.writerow([
                self.iteration, f"{self.loss:.5f}", f"{self.held_out_loss:.5f}" if new else "",
                f"{learning_rate:.3e}", f"{rate:.0f}", f"{self.step_ms[-1]:.1f}",
            ])  # fmt: skip
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, held out {self.held_out_loss:.3f}, {rate:.0f} tokens/s, "
            f"peak {show_bytes(peak_memory(self.device))}", refresh=False
        )  # fmt: skip

    def speed(self):
        """The mean rate of all steps, and the median time of one."""
        if not self.step_ms:
            return dict(tokens_per_second=0.0, step_ms=0.0)
        rate = 1000 * self.tokens / sum(self.step_ms)
        return dict(tokens_per_second=rate, step_ms=statistics.median(self.step_ms))


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
