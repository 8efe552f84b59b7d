"""One dataclass of settings, one loop, one `main(cfg)`.

    python train.py                                       the embedded default: offline, on a CPU
    python train.py --base FOLDER --data FILE.jsonl       a real LLaMA or OPT, real instructions
    python train.py --help                                every setting

A run leaves in --out_dir: side.safetensors and side.json (the side network that was best on the
held-out examples), last/ (the same of the last iteration), log.csv and result.json.
"""

import csv
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import chat, instruct, tiny
from data.tokenizer import load_tokenizer
from model import (
    IGNORE_INDEX, ModelConfig, Transformer, check_length, count_weights, from_pretrained,
    model_bytes, pad_left, read_config, save_pretrained, token_loss, write_json,
)  # fmt: skip
from qst import QST, Parser, pick_device, pick_dtype, run
from quant import InputError, Linear4bit
from side import SideConfig, setting

CACHE = Path(os.path.relpath(Path(__file__).parent / "data" / "cache"))   # the embedded default's base, git-ignored


@dataclass
class TrainConfig(SideConfig):
    """All settings of a run: those of the side network, and these. Each is a flag.

    None means that it depends: see DEFAULTS for a real model and for the embedded one.
    """

    reduction: int = setting(None, "the side network is this many times narrower than the base")
    base: str = setting("", "folder of a LLaMA or OPT model; empty: the embedded default")
    data: str = setting("", "instructions, .json or .jsonl; empty: the embedded default's")
    out_dir: str = setting("out", "where the run leaves its files")
    quant: str = setting("nf4", "nf4, fp4 or none: how the base's linear layers are stored")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    dtype: str = setting("auto", "fp32, bf16 or fp16 to compute in; auto: fp32 on a CPU, else bf16")
    sequence_len: int = setting(None, "longest sequence, in tokens; what is longer is cut off")
    max_examples: int = setting(0, "use only so many examples of the data; 0: all")
    held_out: float = setting(0.1, "fraction of the examples to hold out")
    batch_size: int = setting(None, "sequences in a batch")
    gradient_accumulation_steps: int = setting(1, "batches whose mean gradient makes a step")
    max_iters: int = setting(None, "iterations, that is, steps of the optimizer")
    learning_rate: float = setting(None, "of AdamW, for all but alpha")
    alpha_lr_factor: float = setting(25.0, "alpha's learning rate is this many times larger")
    lr_schedule: str = setting(None, "constant, linear or cosine, after the warm-up")
    warmup_iters: int = setting(20, "iterations in which the learning rate rises from 0")
    weight_decay: float = setting(0.0, "of AdamW, on matrices only")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.999, "of AdamW")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: do not clip")
    eval_interval: int = setting(50, "iterations between evaluations on held-out examples")
    eval_examples: int = setting(200, "held-out examples in an evaluation, at most")
    log_interval: int = setting(10, "iterations between lines of log.csv")
    compile: bool = setting(False, "torch.compile the model (slow to start, faster to run)")
    threads: int = setting(0, "CPU threads; 0: as many as torch chooses")
    seed: int = setting(1337, "of the weights, the split and the order of the examples")


DEFAULTS = {  # setting: (for a real base, for the embedded default)
    "reduction": (16, 4),
    "sequence_len": (384, 128),
    "batch_size": (4, 32),
    "max_iters": (1000, 250),
    "learning_rate": (2e-4, 3e-3),
    "lr_schedule": ("constant", "linear"),
}


def complete(cfg):
    """Fill in what depends, and refuse what makes no sense."""
    column = 0 if cfg.base else 1
    cfg = replace(
        cfg, **{k: row[column] for k, row in DEFAULTS.items() if getattr(cfg, k) is None}
    )
    if cfg.base and not cfg.data:
        raise InputError("--base needs --data: a .json or .jsonl file of instructions.")
    if cfg.data and not cfg.base:
        raise InputError("--data needs --base: the folder of a LLaMA or OPT model.")
    if cfg.lr_schedule not in SCHEDULES:
        raise InputError(f"--lr_schedule {cfg.lr_schedule} is unknown: choose {', '.join(SCHEDULES)}.")
    for name in (
        "batch_size", "max_iters", "sequence_len", "eval_interval", "log_interval", "eval_examples",
        "gradient_accumulation_steps", "rank", "reduction",
    ):  # fmt: skip
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name} {getattr(cfg, name)} must be at least 1.")
    for name in ("max_examples", "warmup_iters", "grad_clip", "weight_decay", "threads", "seed"):
        if getattr(cfg, name) < 0:
            raise InputError(f"--{name} {getattr(cfg, name)} must not be negative.")
    for name in ("held_out", "beta1", "beta2"):
        if not 0 < getattr(cfg, name) < 1:
            raise InputError(f"--{name} {getattr(cfg, name)} must lie between 0 and 1.")
    for name in ("learning_rate", "alpha_lr_factor"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise InputError(f"--{name} {getattr(cfg, name)} must be positive.")
    if cfg.threads > (os.cpu_count() or 1):
        raise InputError(f"--threads {cfg.threads} is more than this machine's {os.cpu_count()}.")
    return cfg


# --------------------------------------------------------------------------------------
# Optimization

SCHEDULES = {  # the part of the learning rate that is left after a part of the iterations
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def learning_rate_at(iteration, cfg):
    """The learning rate of iteration 0, 1, ...: a linear warm-up, and then the schedule."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    left = max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.learning_rate * SCHEDULES[cfg.lr_schedule]((iteration - cfg.warmup_iters) / left)


def make_optimizer(model, cfg):
    """AdamW in three groups: matrices, which decay; the rest, which does not; and alpha.

    differs from the paper: alpha has a larger learning rate. The side network's gradient has the
    factor 1 - alpha, 0 at the start, so that it learns only as fast as alpha moves.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    alpha = [parameters.pop(n) for n in list(parameters) if n.endswith("alpha")]
    matrix = lambda name, p: p.dim() == 2 and name.endswith("weight")
    groups = [
        {"params": [p for n, p in parameters.items() if matrix(n, p)], "factor": 1.0,
         "weight_decay": cfg.weight_decay},
        {"params": [p for n, p in parameters.items() if not matrix(n, p)], "factor": 1.0},
        {"params": alpha, "factor": cfg.alpha_lr_factor},
    ]  # fmt: skip
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=cfg.learning_rate, weight_decay=0.0,
        betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip


def train_step(model, optimizer, scaler, batches, device, iteration, cfg):
    """One iteration: accumulate gradients, clip, step. Returns the mean loss and the tokens."""
    total, tokens = 0.0, 0
    for _ in range(cfg.gradient_accumulation_steps):
        idx, targets = (t.to(device, non_blocking=True) for t in next(batches))
        _, loss = model(idx, targets)
        loss = loss / cfg.gradient_accumulation_steps
        scaler.scale(loss).backward()
        total, tokens = total + loss.detach(), tokens + idx.numel()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(iteration, cfg) * group["factor"]
    if cfg.grad_clip:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), tokens


@torch.no_grad()
def evaluate(model, examples, batch_size, device):
    """Mean loss per answer token over all examples."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        idx, targets = (t.to(device) for t in instruct.collate(examples[start : start + batch_size]))
        n = (targets != IGNORE_INDEX).sum().item()
        total += model(idx, targets)[1].item() * n
        count += n
    return total / count


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
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, loss = model(idx, targets)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


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
# The embedded default's base

TINY_BASE = dict(n_layer=5, n_head=4, n_embd=128, n_ffn=344, max_positions=256, tied=True)
TINY_RUN = dict(max_iters=400, batch_size=32, learning_rate=3e-3, lr_schedule="linear", seed=0)


def tiny_base():
    """Return the folder of the embedded default's base model; make it if it is not there yet."""
    recipe = Path(tiny.__file__).read_bytes() + json.dumps([TINY_BASE, TINY_RUN]).encode()
    folder = CACHE / f"tiny-{hashlib.sha256(recipe).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        tiny.train_tokenizer(unfinished / "tokenizer.model")
        save_pretrained(train_tiny_base(load_tokenizer(unfinished)), unfinished)
        os.rename(unfinished, folder)
    except OSError as error:
        raise InputError(f"{unfinished} could not be written ({error.strerror}).") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def train_tiny_base(tokenizer):
    """Train a LLaMA of a million weights on the stories of data/tiny.py, on the CPU."""
    cfg = TrainConfig(**TINY_RUN, beta2=0.99, weight_decay=0.1, warmup_iters=30)
    torch.manual_seed(cfg.seed)
    config = ModelConfig(
        tokenizer.vocab_size, **TINY_BASE, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.04)
    records = tiny.pretraining(4000, cfg.seed)
    plain, conversations = chat.ChatTemplate(), map(instruct.conversation, records)
    examples = [instruct.encode(one, tokenizer, plain, 256) for one in conversations]
    # A base learns from all of the text, not from the answers alone.
    examples = [(ids, ids[1:] + targets[-1:]) for ids, targets in examples]
    batches = instruct.batches(examples, cfg.batch_size, cfg.seed)
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with_loss = lambda idx, targets: (None, token_loss(model(idx), targets))
    bar = progress(range(cfg.max_iters), "base model, once")
    for iteration in bar:
        loss, _ = train_step(
            with_loss, optimizer, scaler, batches, torch.device("cpu"), iteration, cfg
        )
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return model


# --------------------------------------------------------------------------------------
# A run


def load_examples(cfg, tokenizer, template, config):
    """Read, encode and split the data: (train, held out), each of (conversation, ids, targets)."""
    check_length(config, cfg.sequence_len, "lower --sequence_len")
    if cfg.data:
        data = instruct.read_instructions(cfg.data, template.check)
    else:
        data = list(map(instruct.conversation, tiny.task(2200, cfg.seed)))
    halves = []
    names = ("training", "held-out")
    for name, half in zip(names, instruct.split(data, cfg.held_out, cfg.seed, cfg.max_examples)):
        pairs = [(one, instruct.encode(one, tokenizer, template, cfg.sequence_len)) for one in half]
        halves.append([(one, *pair) for one, pair in pairs if pair])
        if lost := len(half) - len(halves[-1]):
            print(f"{lost} {name} examples left out: the prompt alone fills {cfg.sequence_len} tokens")
    if not all(halves):
        raise InputError(
            f"{cfg.data or 'The data'} leaves {len(halves[0])} examples to train on and {len(halves[1])} held "
            f"out: give more data, or raise --sequence_len or --max_examples."
        )
    return halves


def pairs(examples):
    return [(ids, targets) for _, ids, targets in examples]


def answers(model, tokenizer, template, examples, device):
    """Greedy answers, of at most 64 tokens, to the last question of each example."""
    prompts = [instruct.encode_prompt(one, tokenizer, template) for one, *_ in examples]
    idx, keep = pad_left(prompts, device=device)
    room = min(64, model.config.max_positions - idx.shape[1])
    out = model.generate(idx, room, eos_id=template.end_ids(tokenizer), keep=keep)
    return [tokenizer.decode(row[idx.shape[1] :].tolist()).strip() for row in out]


def fit(model, optimizer, train, held_out, device, cfg, result):
    """Train the side network; keep the best one in out_dir; fill in `result`."""
    step_model = torch.compile(model, dynamic=True) if cfg.compile else model
    half = model.base.embed_tokens.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    batches = instruct.batches(pairs(train), cfg.batch_size, cfg.seed)
    held_out = pairs(held_out)[: cfg.eval_examples]
    out_dir = Path(cfg.out_dir)
    best, best_iteration, step_ms, seen, evaluated = math.inf, 0, [], 0, 0
    loss_before = held_out_loss = evaluate(model, held_out, cfg.batch_size, device)

    def look():
        """Evaluate, and keep the side network if it is the best so far."""
        nonlocal best, best_iteration, held_out_loss, evaluated
        held_out_loss, evaluated = evaluate(model, held_out, cfg.batch_size, device), len(step_ms)
        if held_out_loss < best:
            best, best_iteration = held_out_loss, evaluated
            model.save_side(out_dir)

    bar = progress(range(1, cfg.max_iters + 1), "side network")
    with open(out_dir / "log.csv", "w", newline="", buffering=1) as file:
        log = csv.writer(file)
        log.writerow(
            ["iteration", "loss", "held_out_loss", "learning_rate", "tokens_per_second", "step_ms"]
        )
        try:
            for iteration in bar:
                start = time.perf_counter()
                loss, tokens = train_step(
                    step_model, optimizer, scaler, batches, device, iteration - 1, cfg
                )
                step_ms.append(1000 * (time.perf_counter() - start))
                seen += tokens
                if not math.isfinite(loss):
                    kept = f"{out_dir} holds that of iteration {best_iteration}"
                    raise InputError(
                        f"The loss is {loss} at iteration {iteration}: lower --learning_rate, or try "
                        f"--dtype bf16 or fp32. {kept if best_iteration else 'No side network is kept'}."
                    )
                if iteration == cfg.max_iters or iteration % cfg.eval_interval == 0:
                    look()
                rate = 1000 * seen / sum(step_ms)
                if evaluated == iteration or iteration % cfg.log_interval == 0:
                    log.writerow(
                        [iteration, f"{loss:.5f}", f"{held_out_loss:.5f}" * (evaluated == iteration),
                         f"{learning_rate_at(iteration - 1, cfg):.3e}", f"{rate:.0f}",
                         f"{step_ms[-1]:.1f}"]
                    )  # fmt: skip
                bar.set_postfix_str(
                    f"loss {loss:.3f}, held out {held_out_loss:.3f}, {rate:.0f} tokens/s, "
                    f"peak {show_bytes(peak_memory(device))}", refresh=False
                )  # fmt: skip
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
            bar.close()
    model.save_side(out_dir / "last")
    if interrupted:
        print(f"Interrupted. The side network as it is now: {out_dir / 'last'}", flush=True)
    if evaluated < len(step_ms) or not step_ms:
        look()
    loss_last = held_out_loss
    model.load_side(out_dir)
    result |= dict(
        loss_before=loss_before, loss_after=best, loss_last=loss_last,
        best_iteration=best_iteration, iterations=len(step_ms), interrupted=interrupted,
        tokens_per_second=1000 * seen / sum(step_ms) if seen else 0.0,
        step_ms=statistics.median(step_ms) if seen else 0.0, peak_memory_bytes=peak_memory(device),
    )  # fmt: skip


def introduce(folder, model, cfg, batch, result):
    """Print what a reader wants to know before the run."""
    config, layers = model.config, [m for m in model.modules() if isinstance(m, Linear4bit)]
    bits = ""
    if layers:
        nbytes = sum(layer.quantized.nbytes for layer in layers)
        numel = sum(layer.in_features * layer.out_features for layer in layers)
        bits = f", {numel:,} of them at {8 * nbytes / numel:.3f} bits ({cfg.quant})"
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    steps = cfg.gradient_accumulation_steps
    print(
        f"base        {folder}: {config.family}, {config.n_layer} layers of {config.n_embd}\n"
        f"frozen      {total - trainable:,} weights{bits}\n"
        f"trainable   {trainable:,} ({100 * trainable / total:.2f} %): a side network "
        f"{cfg.reduction} times narrower, {cfg.downsample} downsamplers\n"
        f"iteration   at most {batch.numel() * steps:,} tokens: {len(batch)} sequences"
        f"{f' x {steps} batches' if steps > 1 else ''}\n"
        f"memory      weights {show_bytes(result['weights_bytes'])}, "
        f"optimizer {show_bytes(result['optimizer_bytes'])}, "
        f"activations {show_bytes(result['activations_bytes'])} of such a batch"
    )


def conclude(folder, cfg, result):
    """Print what the run has shown, and what to do next."""
    print(f"\nheld-out loss   {result['loss_before']:.3f} before, {result['loss_after']:.3f} after")
    if result["loss_after"] >= result["loss_before"]:
        print("It has not learned: train longer, or with another --learning_rate.")
    if "exact_match_after" in result:
        before, after = result["exact_match_before"], result["exact_match_after"]
        print(f"exact match     {before:.1%} base, {after:.1%} QST (held-out questions)")
    for sample in result.get("samples", ()):
        print(
            f"\n{sample['prompt'].strip()}\n   expected  {sample['expected']}\n"
            f"   base      {sample['before']}\n   QST       {sample['after']}"
        )
    prompt = "YOUR QUESTION" if cfg.data else tiny.EXAMPLE
    script = os.path.relpath(Path(__file__).parent / "qst.py")
    quant = "" if cfg.quant == "nf4" else f" --quant {cfg.quant}"
    print(
        f"\n{result['iterations']} iterations, {result['seconds']:.0f} s in all, "
        f"peak memory {show_bytes(result['peak_memory_bytes'])}. Ask it yourself:\n"
        f"python {script} --base {shlex.quote(str(folder))} --side {shlex.quote(cfg.out_dir)}{quant} "
        f"--prompt {shlex.quote(prompt)}"
    )


def main(cfg):
    """Side-tune a frozen 4-bit base, and return what result.json holds (see the README).

    cfg: a `TrainConfig`
    """
    started = time.time()
    cfg = complete(cfg)
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        (Path(cfg.out_dir) / "log.csv").open("a").close()
    except OSError as error:
        raise InputError(f"--out_dir {cfg.out_dir} cannot be written to ({error.strerror}).") from None
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    folder = Path(cfg.base) if cfg.base else tiny_base()
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    template = chat.load_template(folder)
    train, held_out = load_examples(cfg, tokenizer, template, config)
    base = from_pretrained(folder, cfg.quant, dtype, device)
    torch.manual_seed(cfg.seed)
    model = QST(base, SideConfig(**{f.name: getattr(cfg, f.name) for f in fields(SideConfig)}))
    optimizer = make_optimizer(model, cfg)

    trainable = sum(p.numel() for p in model.parameters())
    longest = sorted(pairs(train), key=lambda pair: len(pair[0]))[-cfg.batch_size :]
    idx, targets = (t.to(device) for t in instruct.collate(longest))
    result = dict(
        trainable_parameters=trainable,
        total_parameters=count_weights(config) + trainable,
        weights_bytes=model_bytes(model),
        optimizer_bytes=2 * 4 * trainable,  # AdamW's two moments, in fp32
        activations_bytes=activation_bytes(model, idx, targets),
    )
    introduce(folder, model, cfg, idx, result)

    asked = held_out[: 2 if cfg.data else cfg.eval_examples]
    before = answers(model, tokenizer, template, asked, device)
    fit(model, optimizer, train, held_out, device, cfg, result)
    if not result["interrupted"]:
        after = answers(model, tokenizer, template, asked, device)
        expected = [one[-1]["content"].strip() for one, *_ in asked]
        if not cfg.data:
            match = lambda texts: sum(map(str.__eq__, texts, expected)) / len(asked)
            result |= dict(exact_match_before=match(before), exact_match_after=match(after))
        result["samples"] = [
            dict(prompt=instruct.prompt_text(one), expected=e, before=b, after=a)
            for (one, *_), e, b, a in list(zip(asked, expected, before, after))[:2]
        ]
    result |= dict(seconds=time.time() - started, config=asdict(cfg))
    write_json(Path(cfg.out_dir) / "result.json", result)
    conclude(folder, cfg, result)
    return result


# --------------------------------------------------------------------------------------
# The command line


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError


def parse_args(argv=None):
    """Flags, one a field of `TrainConfig`, -> a TrainConfig."""
    parser = Parser("train.py", description="Finetune a frozen 4-bit model through a side network.")
    for f in fields(TrainConfig):
        real, embedded = DEFAULTS.get(f.name, (f.default, f.default))
        default = f"{real}, or {embedded} for the embedded default" if real != embedded else real
        kind = dict(type=true_or_false, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        parser.add_argument(
            f"--{f.name}", default=f.default, **kind,
            help=f"{f.metadata['help']} (default: {default!s})".replace("%", "%%"),
        )  # fmt: skip
    return TrainConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run(lambda: main(parse_args()))
