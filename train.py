"""One dataclass of settings, one loop, one `main(cfg)`.

    python train.py                                       the embedded default: offline, on a CPU
    python train.py --base FOLDER --data FILE.jsonl       a real LLaMA or OPT, real instructions
    python train.py --base FOLDER --task rte --data GLUE  and with --eval_only, its score as it is
    python train.py --plan --preset llama-2-70b           what a step needs, by method; no weights
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
import shutil
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from data import batches, chat, check_length, collate, glue, instruct, mean_loss, mmlu, text, tiny
from data.files import write_json
from data.report import conclude, introduce, progress, show_bytes
from data.settings import Parser, check, parse_flags, refuse, run, setting
from data.tokenizer import load_tokenizer
from model import (
    PRESETS, ModelConfig, Transformer, count_weights, from_pretrained, model_bytes, read_config,
    save_pretrained,
)  # fmt: skip
from qst import QST, pick_device, pick_dtype, read_side, tune
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, InputError, code_books, dequantize_blockwise,
    quantize_blockwise,
)  # fmt: skip
from side import INSIDE, METHODS, SIDE, VARIANTS, SideConfig, check_quant, prune

CACHE = Path(os.path.relpath(Path(__file__).parent / "data" / "cache"))   # the embedded default's base, git-ignored


TASKS = {
    "tiny": tiny.load, "instruct": instruct.load, "text": text.load, "mmlu": mmlu.load,
    **dict.fromkeys(glue.FORMS, glue.load),
}  # fmt: skip
SCHEDULES = {  # the part of the learning rate that is left after a part of the iterations
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass
class TrainConfig(SideConfig):
    """All settings of a run: those of the side network, and these. Each is a flag.

    None means that it depends: see DEFAULTS and `complete`.
    """

    reduction: int = setting(None, "the side network is so many times narrower than the base", of=SIDE, at_least=1)
    variant: str = setting("paper", "of the side network; flags that are not the paper's go before it", tuple(VARIANTS), SIDE)
    base: str = setting("", "folder of a LLaMA or OPT model; empty: the embedded default")
    task: str = setting(None, "default: instruct, or tiny without --base", tuple(TASKS))
    data: str = setting("", "the task's file or folder: see the --help of data/instruct.py, data/glue.py "
        "and data/mmlu.py; of text, a .txt file")  # fmt: skip
    instructions: str = setting("", "what --task mmlu trains on, .json or .jsonl; --data is its test")
    side: str = setting("", "a side checkpoint to start from, or to evaluate")
    plan: bool = setting(False, "only tell the memory of a step, by method, on --base or --preset")
    ladder: bool = setting(False, "of --plan: what each saving saves, one after the other", of=SIDE)
    preset: str = setting("", f"of --plan: {', '.join(PRESETS)}")
    eval_only: bool = setting(False, "only evaluate --side, or the base; on all of --data")
    head: str = setting(None, "the classifier, GLUE's default, is trained in the LM head's place", ("lm", "classifier"))
    out_dir: str = setting(None, "where the run leaves its files; default: out, or out-eval")
    init: str = setting("random", "pruned: the side network's layers start as the base's, pruned", ("random", "pruned"), SIDE)
    checkpoint: bool = setting(None, "backward computes each rung of the side network again (qst, lst; "
        "the default with --base), or each layer of the base (the others)")  # fmt: skip
    h_f_bits: int = setting(None, "bits in which backward keeps the base's hidden states", (16, 8, 4), SIDE)
    chunk_loss: bool = setting(True, "never hold the logits of more than 128 tokens")
    optimizer_bits: int = setting(32, "of AdamW's two moments, 8 in blocks of 256", (32, 8))
    side_dtype: str = setting("fp32", "of the weights that learn; bf16 is rounded at random and needs "
        "--optimizer_bits 8", ("fp32", "bf16"), SIDE)  # fmt: skip
    quant: str = setting(None, "how the base's linear layers are stored: nf4, fp4, none, or for peqa int4, "
        "int3, int4-64 (groups of 64), ...; default: what the method needs, or --side was trained on")  # fmt: skip
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    dtype: str = setting("auto", "fp32, bf16 or fp16 to compute in; auto: fp32 on a CPU, else bf16")
    sequence_len: int = setting(None, "longest sequence, in tokens; what is longer is cut off", at_least=1)
    max_examples: int = setting(0, "use only so many examples of the data; 0: all", at_least=0)
    held_out: float = setting(0.1, "fraction of the examples to hold out", above=0, below=1)
    batch_size: int = setting(None, "sequences in a batch", at_least=1)
    gradient_accumulation_steps: int = setting(1, "batches whose mean gradient makes a step", at_least=1)
    max_iters: int = setting(None, "iterations, that is, steps of the optimizer", at_least=1)
    learning_rate: float = setting(None, "of AdamW", above=0, below=math.inf)
    alpha_lr_factor: float = setting(25.0, "alpha learns so many times faster", above=0)
    lr_schedule: str = setting(None, "of the learning rate after the warm-up", tuple(SCHEDULES))
    warmup_iters: int = setting(20, "iterations in which the learning rate rises from 0", at_least=0)
    weight_decay: float = setting(0.0, "of AdamW, on matrices only", at_least=0)
    beta1: float = setting(0.9, "of AdamW", above=0, below=1)
    beta2: float = setting(0.999, "of AdamW", above=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: do not clip", at_least=0)
    eval_interval: int = setting(50, "iterations between evaluations on held-out examples", at_least=1)
    eval_examples: int = setting(200, "held-out examples in an evaluation, at most", at_least=1)
    score_examples: int = setting(0, "examples of a test set to score, at most; 0: all", at_least=0)
    log_interval: int = setting(10, "iterations between lines of log.csv", at_least=1)
    compile: bool = setting(False, "torch.compile the model (slow to start, faster to run)")
    threads: int = setting(0, "CPU threads; 0: as many as torch chooses", at_least=0)
    seed: int = setting(1337, "of the weights, the split and the order of the examples", at_least=0)

    def __post_init__(self):
        """What depends on the method stays None until `complete`: --plan goes through the methods."""


DEFAULTS = {  # setting: (for a real base, for it on GLUE, for the embedded default)
    "reduction": (16, 16, 4),
    "sequence_len": (384, 512, 128),
    "batch_size": (4, 16, 32),
    "max_iters": (1000, 1000, 150),
    "learning_rate": (2e-4, 2e-4, 1e-2),
    "lr_schedule": ("constant", "linear", "linear"),
    "h_f_bits": (8, 8, 16),
}


def complete(cfg):
    """Fill in what depends on other settings, and refuse what contradicts them."""
    check(cfg)
    real = bool(cfg.base or cfg.plan)
    task = cfg.task or ("instruct" if real else "tiny")
    refuse(
        (cfg.preset and not cfg.plan, "--preset is for --plan: to train, give --base, the folder of a model"),
        (cfg.plan and cfg.side, "--plan is of a new side network: leave out --side"),
        (cfg.preset and cfg.base, "--preset and --base both tell the model's shape: give one"),
        (cfg.base and not cfg.data and not cfg.plan, "--base needs --data: see --task"),
        (cfg.data and not cfg.base, "--data needs --base: the folder of a LLaMA or OPT model"),
        (cfg.n_labels and not cfg.side, "--n_labels is not yours to set: --task and --head tell it"),
        (real != (task != "tiny"), f"--task {task} is not for this: all but tiny need --base, and tiny has its own"),
        (cfg.ladder and not cfg.plan, "--ladder goes with --plan"),
        (cfg.init == "pruned" and (cfg.side or cfg.eval_only), "--init pruned is for a new side network"),
        (cfg.side_dtype == "bf16" and cfg.optimizer_bits != 8, "--side_dtype bf16 needs --optimizer_bits 8"),
        (cfg.dtype == "fp16" and (cfg.side_dtype == "bf16" or cfg.method == "full"),
         "what is in 16 bits cannot learn in --dtype fp16: give bf16 or fp32"),
        (cfg.threads > (os.cpu_count() or 1), f"--threads {cfg.threads} is more than this machine's {os.cpu_count()}"),
    )  # fmt: skip
    changed = [f for f in fields(cfg) if getattr(cfg, f.name) != f.default]
    if cfg.side:
        cfg = as_trained(cfg, changed)
    elif not cfg.plan:  # which goes through the methods, and gives each what it has a use for
        refuse(*[
            (cfg.method not in (f.metadata["of"] or METHODS),
             f"--{f.name} is of --method {' and '.join(f.metadata['of'] or ())}, and not of {cfg.method}")
            for f in changed
        ])  # fmt: skip
    column = 2 if task == "tiny" else 1 if task in glue.FORMS else 0
    depends = {name: row[column] for name, row in DEFAULTS.items()}
    depends |= dict(reduction=8) if cfg.method == "lst" else {}
    # A side checkpoint knows its head; the base has no classifier.
    classifier = task in glue.FORMS and (cfg.n_labels if cfg.side else not cfg.eval_only)
    depends |= dict(
        task=task, out_dir="out-eval" if cfg.eval_only else "out", head="classifier" if classifier else "lm",
        checkpoint=real and cfg.method in SIDE, quant=METHODS[cfg.method][0],
    )  # fmt: skip
    usual = SideConfig()
    variant = {k: v for k, v in VARIANTS[cfg.variant].items() if getattr(cfg, k) == getattr(usual, k)}
    cfg = replace(cfg, **{k: v for k, v in depends.items() if getattr(cfg, k) is None} | variant)
    refuse((cfg.eval_only and not cfg.side and cfg.head == "classifier",
            "--head classifier: the base has none; give --head lm, or --side"))  # fmt: skip
    if not cfg.eval_only:  # a base may be evaluated in any form
        check_quant(cfg.method, cfg.quant)
    return replace(cfg, **vars(side_config(cfg)))


def as_trained(cfg, changed):
    """The settings with which --side was trained, which the others must not contradict."""
    side, base = read_side(cfg.side)
    if cfg.method not in (side.method, "qst"):
        raise InputError(f"--side {cfg.side} is of --method {side.method}, and not {cfg.method}.")
    own = vars(side) | dict(method=cfg.method, task=cfg.task, variant="paper")
    for f in changed:
        if getattr(cfg, f.name) != own.get(f.name, getattr(cfg, f.name)):
            raise InputError(f"--{f.name}: --side {cfg.side} has its own; leave it out.")
    return replace(cfg, **own | dict(method=side.method, quant=cfg.quant or base.get("quant")))


def side_config(cfg):
    return SideConfig(**{f.name: getattr(cfg, f.name) for f in fields(SideConfig)})


# --------------------------------------------------------------------------------------
# Optimization


def learning_rate_at(iteration, cfg):
    """The learning rate of iteration 0, 1, ...: a linear warm-up, and then the schedule."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    left = max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.learning_rate * SCHEDULES[cfg.lr_schedule]((iteration - cfg.warmup_iters) / left)


def make_optimizer(model, cfg):
    """AdamW, in groups of one learning rate each; only matrices decay.

    differs from the paper: alpha has a larger learning rate. The side network's gradient has the
    factor 1 - alpha, 0 at the start, so that it learns only as fast as alpha moves.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = cfg.alpha_lr_factor if name.endswith("alpha") else 1.0
            decays = parameter.dim() == 2 and name.endswith("weight")
            groups.setdefault((factor, cfg.weight_decay * decays), []).append(parameter)
    groups = [dict(params=p, factor=f, weight_decay=decay) for (f, decay), p in groups.items()]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer_bits == 8:
        return AdamW8bit(groups, cfg.learning_rate, betas)
    fused = parameter.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=fused)


ZERO = DYNAMIC_CODEBOOK.tolist().index(0.0)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its two moments in 8 bits (arXiv 2110.02861 §2).

    In blocks of 256, with the code book of the absmax values in quant.py. Of the second moment it
    keeps the root, which is as large as the first moment and needs half as many decades; and never
    0, so that nothing is divided by 0. Parameters in bf16 are rounded at random, up as often as it
    takes to be right in the mean: an update is often smaller than half of their last digit.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], **group)

    def update(self, parameter, state, lr, betas, eps, weight_decay, **_):
        grad = parameter.grad.float().flatten()
        t = state["step"] = state.get("step", 0) + 1
        _, book = code_books("nf4", grad.device)
        read = lambda name: dequantize_blockwise(state[name], book, state[name + "_absmax"], ABSMAX_BLOCK_SIZE)
        mean, root = (read("mean"), read("root")) if t > 1 else (torch.zeros_like(grad), torch.zeros_like(grad))
        mean.lerp_(grad, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt_()
        for name, moment in dict(mean=mean, root=root).items():
            state[name], state[name + "_absmax"] = quantize_blockwise(moment, DYNAMIC_CODEBOOK, ABSMAX_BLOCK_SIZE)
        state["root"].clamp_(min=ZERO + 1)
        value = parameter.float() * (1 - lr * weight_decay)
        step = mean.div_(root.div_(math.sqrt(1 - betas[1] ** t)).add_(eps)).mul_(lr / (1 - betas[0] ** t))
        value -= step.view_as(value)
        if parameter.dtype == torch.bfloat16:  # the upper 16 bits of fp32
            bits = value.view(torch.int32)
            bits += torch.randint_like(bits, 1 << 16)
            bits &= -1 << 16
        parameter.copy_(value)


def optimizer_bytes(parameters, bits):
    """Bytes of AdamW's two moments."""
    if bits == 32:
        return 2 * sum(p.nbytes for p in parameters)
    return 2 * sum(p.numel() + 4 * -(-p.numel() // ABSMAX_BLOCK_SIZE) for p in parameters)


def train_step(loss_of, optimizer, scaler, batches, device, iteration, cfg):
    """One iteration: accumulate gradients, clip, step. Returns the mean loss and the tokens.

    loss_of: function of (idx, targets), such as `QST.loss`
    """
    total, tokens = 0.0, 0
    for _ in range(cfg.gradient_accumulation_steps):
        idx, targets = next(batches)
        loss = loss_of(idx.to(device), targets) / cfg.gradient_accumulation_steps
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
    shuffled = batches(examples, cfg.batch_size, cfg.seed)
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    bar = progress(range(cfg.max_iters), "base model, once")
    for iteration in bar:
        loss, _ = train_step(
            model.loss, optimizer, scaler, shuffled, torch.device("cpu"), iteration, cfg
        )
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return model


def save_memory(model, cfg):
    """Set what backward keeps, and in how many bits, and return the model."""
    model.chunk_loss = cfg.chunk_loss
    if cfg.method in INSIDE:
        model.base.checkpoint = cfg.checkpoint
        return model
    model.side.save_memory(cfg.checkpoint, cfg.h_f_bits)
    if cfg.side_dtype == "bf16":  # norms, gates and alpha are few, and stay in fp32
        for name, parameter in model.side.named_parameters():
            if parameter.dim() == 2 and name.endswith("weight"):
                parameter.data = parameter.data.bfloat16()
    return model


# --------------------------------------------------------------------------------------
# A run


def load_task(cfg, tokenizer, template, config):
    """Read the data: `data.Task`."""
    check_length(config, cfg.sequence_len, "lower --sequence_len")
    task = TASKS[cfg.task](cfg, tokenizer, template)
    for note in task.notes:
        print(note)
    if not cfg.eval_only and not (task.train and task.held_out):
        raise InputError(
            f"{cfg.data or 'The data'} leaves {len(task.train)} examples to train on and {len(task.held_out)} "
            f"held out: give more data, or raise --sequence_len or --max_examples."
        )
    return task


def make_model(cfg, base, task):
    """The side network on its base: a new one, or the one of --side; or the base alone."""
    if cfg.side:
        model = save_memory(QST.from_side(base, cfg.side), cfg)
        side = model.side.config
        if side.n_labels != task.n_labels:
            raise InputError(f"--side {cfg.side} has {side.n_labels} labels, and --task {cfg.task} {task.n_labels}.")
        # Both halves of MNLI have the same labels; older side checkpoints do not tell their task.
        if side.task and side.task.removesuffix("-mm") != cfg.task.removesuffix("-mm"):
            raise InputError(f"--side {cfg.side} is a classifier for --task {side.task}, and not {cfg.task}.")
        return model
    if cfg.eval_only:
        return base
    labels_of = cfg.task if task.n_labels else ""
    model = tune(base, replace(side_config(cfg), n_labels=task.n_labels, task=labels_of))
    if cfg.init == "pruned":
        prune(base, model.side)
    model.calibrate([ids for ids, _ in task.train[:64]])
    return save_memory(model, cfg)


def fit(model, optimizer, task, cfg, result):
    """Train the side network; keep the best one in out_dir; fill in `result`."""
    device = model.device
    loss_of = torch.compile(model.loss, dynamic=True) if cfg.compile else model.loss
    half = model.base.embed_tokens.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    shuffled = batches(task.train, cfg.batch_size, cfg.seed)
    held_out = task.held_out[: cfg.eval_examples]
    out_dir = Path(cfg.out_dir)
    best, best_iteration, step_ms, seen, evaluated = math.inf, 0, [], 0, 0
    loss_before = held_out_loss = mean_loss(model, held_out, cfg.batch_size)

    def look():
        """Evaluate, and keep the side network if it is the best so far."""
        nonlocal best, best_iteration, held_out_loss, evaluated
        held_out_loss, evaluated = mean_loss(model, held_out, cfg.batch_size), len(step_ms)
        if held_out_loss < best:
            best, best_iteration = held_out_loss, evaluated
            model.save_side(out_dir)

    bar = progress(range(1, cfg.max_iters + 1), cfg.method)
    with open(out_dir / "log.csv", "w", newline="", buffering=1) as file:
        log = csv.writer(file)
        log.writerow(
            ["iteration", "loss", "held_out_loss", "learning_rate", "tokens_per_second", "step_ms"]
        )
        try:
            for iteration in bar:
                start = time.perf_counter()
                loss, tokens = train_step(
                    loss_of, optimizer, scaler, shuffled, device, iteration - 1, cfg
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


def main(cfg):
    """Side-tune a frozen 4-bit base, or evaluate; return what result.json holds (see the README).

    cfg: a `TrainConfig`
    """
    started = time.time()
    given, cfg = cfg, complete(cfg)
    if cfg.plan:
        sys.path.append(str(Path(__file__).parent / "tests"))
        from account import plan  # which imports this file

        return plan(cfg, given)
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.out_dir).close()
    except OSError as error:
        raise InputError(f"--out_dir {cfg.out_dir} cannot be written to ({error.strerror}).") from None
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    folder = Path(cfg.base) if cfg.base else tiny_base()
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    task = load_task(cfg, tokenizer, chat.load_template(folder), config)
    base = from_pretrained(folder, cfg.quant, dtype, device)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, base, task)
    trainable, weights = sum(p.numel() for p in model.parameters()), count_weights(config)
    result = dict(
        trainable_parameters=trainable,
        total_parameters=weights + trainable if cfg.method != "full" else max(weights, trainable),
        weights_bytes=model_bytes(model),
    )
    if cfg.eval_only:
        result |= task.score(model)
        if task.held_out:
            result["loss"] = mean_loss(model, task.held_out, cfg.batch_size, "loss")
    else:
        train(model, task, folder, cfg, result)
    result |= dict(peak_memory_bytes=peak_memory(device), seconds=time.time() - started, config=asdict(cfg))
    write_json(Path(cfg.out_dir) / "result.json", result)
    conclude(folder, cfg, result)
    return result


def train(model, task, folder, cfg, result):
    """Score, train and score again; fill in `result`."""
    optimizer = make_optimizer(model, cfg)
    longest = sorted(task.train, key=lambda pair: len(pair[0]))[-cfg.batch_size :]
    idx, targets = collate(longest)
    result |= dict(
        optimizer_bytes=optimizer_bytes([*model.parameters()], cfg.optimizer_bits),
        activations_bytes=activation_bytes(model, idx.to(model.device), targets),
    )
    introduce(folder, model, cfg, idx, result)
    before = task.score(model) if not task.n_labels else {}  # a classifier is all chance at first
    fit(model, optimizer, task, cfg, result)
    if result["interrupted"]:
        return
    after = task.score(model)
    samples = [s.pop("samples", []) for s in (before, after)]
    result["examples"] = after.pop("examples", len(task.held_out[: cfg.eval_examples]))
    result["samples"] = [{**b, cfg.method.upper(): a["answer"]} for b, a in zip(*samples)]
    result |= {f"{name}_before": value for name, value in before.items() if name != "examples"}
    result |= {f"{name}_after": value for name, value in after.items()}


def parse_args(argv=None):
    parser = Parser("train.py", description="Finetune a frozen 4-bit model through a side network.")
    told = {name: "{}, on GLUE {}, embedded {}".format(*row) for name, row in DEFAULTS.items()}
    return parse_flags(TrainConfig, parser, argv, told)


if __name__ == "__main__":
    run(lambda: main(parse_args()))
