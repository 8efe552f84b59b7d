"""What a run of train.py measures and prints before and after training."""

import platform
import shlex
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError
from data.devices import distributed
from data.devices.device import loss_and_kept, model_bytes, peak_memory, show_bytes
from data.formats.files import write_json
from data.run.optim import optimizer_bytes
from data.tasks.examples import collate
from quant import Linear4bit

SCORES = ("exact_match", "accuracy", "f1", "matthews", "pearson", "spearman")


def progress(iterations, desc, **more):
    """A progress bar; if the output is no terminal, a line every 15 seconds."""
    return tqdm(iterations, desc, unit="it", mininterval=0.1 if sys.stderr.isatty() else 15, **more)


def provenance():
    """The versions, the commit of the code, and the command line."""
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    with suppress(OSError):  # no git here
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    return dict(versions=versions, commit=commit, command=shlex.join(sys.argv))


def sizes(model, n_weights):
    """Numbers of parameters, with the `n_weights` of the base, and the bytes of all weights."""
    trainable = sum(p.numel() for p in model.parameters())
    full = hasattr(model, "side") and model.side.config.method == "full"  # trains the base itself
    frozen = sum(buffer.numel() for buffer in model.buffers()) if full else n_weights
    counts = dict(trainable_parameters=trainable, total_parameters=frozen + trainable)
    return counts | dict(weights_bytes=model_bytes(model))


def print_sizes(folder, runs, examples):
    """Measure each run's memory in a step with the longest examples; print the first run's."""
    model, cfg, result = runs[0].model, runs[0].cfg, runs[0].result
    longest = sorted(examples, key=lambda example: len(example[0]))[-cfg.batch_size :]
    idx, targets = collate(longest)
    for run in runs:
        kept = loss_and_kept(run.model, idx, targets)[1]  # the graph is freed
        run.result |= dict(optimizer_bytes=optimizer_bytes(run.optimizer), activations_bytes=kept)
    config, layers = model.config, [m for m in model.modules() if isinstance(m, Linear4bit)]
    nbytes = sum(layer.weight.nbytes for layer in layers)
    numel = sum(layer.in_features * layer.out_features for layer in layers)
    bits = f", {numel:,} of them at {8 * nbytes / numel:.3f} bits ({cfg.quant})" if layers else ""
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    parts = "weights", "optimizer", "activations"
    memory = ", ".join(f"{name} {show_bytes(result[f'{name}_bytes'])}" for name in parts)
    print(f"base        {folder}: {config.family}, {config.n_layer} layers of {config.n_embd}")
    print(f"frozen      {total - trainable:,} weights{bits}")
    print(f"trainable   {trainable:,} ({100 * trainable / total:.2f} %) by {cfg.method}")
    steps = cfg.gradient_accumulation_steps
    print(f"iteration   {steps} x {len(idx)} sequences of at most {idx.shape[1]} tokens")
    print(f"memory      {memory} of such a batch")


@contextmanager
def record_errors(result, cfg):
    """In a sweep, put an error into a run's result, so that the other runs continue."""
    try:
        yield
    except InputError as error:
        if not cfg.sweep:
            raise
        result["error"] = str(error)


def start_name(cfg):
    """The name of a run's start: --side, the base, or an untrained network."""
    return cfg.side or ("base" if cfg.head == "lm" and cfg.method != "lst" else "untrained")


def compared(before, after, name):
    """The scores before and after training, as result.json has them."""
    old, new = (score.pop("samples", []) for score in (before, after))
    old = old or [sample | {"answer": None} for sample in new]  # no base to ask
    samples = [one | {name: other["answer"]} for one, other in zip(old, new)]
    found = dict(examples=after.pop("examples"), samples=samples)
    before.pop("examples", None)
    for end, score in ("_before", before), ("_after", after):
        found |= {metric + end: value for metric, value in score.items()}
    return found


def write_result(cfg, result, device, seconds):
    """Write result.json, unless an error has ended the run."""
    result |= provenance() | dict(config=asdict(cfg), seconds=seconds)
    result["peak_memory_bytes"] = peak_memory(device)
    if device.type == "cuda":  # with what torch keeps for later: nearly what nvidia-smi shows
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    if distributed.rank() == 0 and "error" not in result:
        write_json(Path(cfg.out_dir) / "result.json", result)


def conclude(folder, cfg, result, example):
    """Print the results, and the next command. example: a question to ask"""
    tuned = cfg.method.upper()
    who = {start_name(cfg): "_before", tuned: "_after"}
    if cfg.eval_only:
        who = {tuned if cfg.side else "base": ""}

    def line(title, name, form, more=""):
        values = [(result.get(name + end), one) for one, end in who.items()]
        if found := [f"{value:{form}} {one}" for value, one in values if value is not None]:
            print(f"{title:15} {', '.join(found)}{more}")

    print()
    line("loss" if cfg.eval_only else "held-out loss", "loss", ".3f")
    line("perplexity", "perplexity", ".3f")
    after = result.get("loss_after")
    if after is not None and not result["interrupted"] and after >= result["loss_before"]:
        print("It has not learned: train longer, or with another --learning_rate.")
    end = list(who.values())[-1]
    constant = {"accuracy": result.get("majority_class" + end), "matthews": 0.0}
    for name in SCORES:
        rival, more = constant.get(name), f"{result.get('examples', 0):,} examples"
        if rival is not None:
            more += f"; always the most frequent class: {rival:.1%}"
        line(name.replace("_", " "), name, ".1%", f" ({more})")
    for part, accuracy in result.get("accuracy_by_category" + end, {}).items():
        print(f"   {part:12} {accuracy:.1%}")
    for sample in result.get("samples", ()):
        print(f"\n{sample['prompt'].strip()}\n   expected  {sample['expected']}")
        for one in who:
            if (answer := sample.get(one, sample["answer"])) is not None:  # not all were asked
                print(f"   {one:10}{answer}")
    peak = show_bytes(result["peak_memory_bytes"])
    figures = Path(cfg.out_dir) / "result.json"
    print(f"\n{result['seconds']:.0f} s in all, peak memory {peak}; all figures are in {figures}.")
    if not cfg.eval_only and example:
        side = Path(cfg.out_dir) / ("" if result["best_iteration"] else "last")
        script = Path(__file__).parents[2] / "qst.py"  # the current folder may be gone by now
        print(f"Ask it yourself:\npython {script} --base {shlex.quote(cfg.base or str(folder))} "
              f"--side {shlex.quote(str(side))} --prompt {shlex.quote(example)}")
