"""One dataclass of settings, one loop, one `main(cfg)`.

    python train.py                                       the embedded default: offline, on a CPU
    python train.py --base FOLDER --data FILE.jsonl       a real LLaMA or OPT, real instructions
    python train.py --base FOLDER --task rte --data GLUE  and with --eval_only, its score as it is
    python train.py --plan --preset llama-2-70b           what a step needs, by method; no weights
    python train.py --help                                every setting

A run leaves in --out_dir: side.safetensors and side.json (the side network that was best on the
held-out examples), last/ (the same of the last iteration), log.csv and result.json.
"""

import contextlib
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
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm

from data import batches, chat, collate, glue, instruct, mean_loss, mmlu, text, tiny
from data.tokenizer import load_tokenizer
from model import (
    PRESETS, ModelConfig, Transformer, check_length, count_weights, from_pretrained,
    model_bytes, read_config, save_pretrained, write_json,
)  # fmt: skip
from qst import QST, Parser, pick_device, pick_dtype, read_side, run, tune
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, PACKED, InputError, code_books, dequantize_blockwise,
    drop_scratch, quantize_blockwise,
)  # fmt: skip
from side import INSIDE, QUANTS, VARIANTS, SideConfig, check_quant, prune, setting

CACHE = Path(os.path.relpath(Path(__file__).parent / "data" / "cache"))   # the embedded default's base, git-ignored


TASKS = {
    "tiny": tiny.load, "instruct": instruct.load, "text": text.load, "mmlu": mmlu.load,
    **dict.fromkeys(glue.FORMS, glue.load),
}  # fmt: skip
PARTS = ("alpha", "gamma", "downsample", "layers", "norm", "upsample", "classifier")


@dataclass
class TrainConfig(SideConfig):
    """All settings of a run: those of the side network, and these. Each is a flag.

    None means that it depends: see DEFAULTS.
    """

    reduction: int = setting(None, "the side network is this many times narrower than the base")
    variant: str = setting("paper", f"of the side network: {', '.join(VARIANTS)}; flags that are not the paper's go before it")
    base: str = setting("", "folder of a LLaMA or OPT model; empty: the embedded default")
    task: str = setting(None, f"{', '.join(TASKS)}; by default instruct, or tiny without --base")
    data: str = setting("", "the task's file or folder: see the --help of data/instruct.py, data/glue.py "
        "and data/mmlu.py; of text, a .txt file")  # fmt: skip
    instructions: str = setting("", "what --task mmlu trains on, .json or .jsonl; --data is its test")
    side: str = setting("", "a side checkpoint to start from, or to evaluate")
    plan: bool = setting(False, "only tell the memory of a step, by method, on --base or --preset")
    ladder: bool = setting(False, "of --plan: what each saving saves, one after the other")
    preset: str = setting("", f"of --plan: {', '.join(PRESETS)}")
    eval_only: bool = setting(False, "only evaluate --side, or the base; on all of --data")
    head: str = setting(None, "lm, or classifier, trained in its place (GLUE; its default)")
    out_dir: str = setting(None, "where the run leaves its files (out, or out-eval)")
    init: str = setting("random", "or pruned: the side network's layers start as the base's, pruned")
    checkpoint: bool = setting(None, "backward computes each rung of the side network again (qst, lst; "
        "the default with --base), or each layer of the base (the others)")  # fmt: skip
    h_f_bits: int = setting(None, "bits in which backward keeps the base's hidden states: 16, 8 or 4")
    chunk_loss: bool = setting(True, "never hold the logits of more than 128 tokens")
    optimizer_bits: int = setting(32, "of AdamW's two moments: 32, or 8 in blocks of 256")
    side_dtype: str = setting("fp32", "of the weights that learn: fp32, or bf16, rounded at random "
        "(with --optimizer_bits 8)")  # fmt: skip
    quant: str = setting(None, "nf4, fp4 or none: how the base's linear layers are stored; by default "
        "what the method needs, or --side was trained on")  # fmt: skip
    peqa_bits: int = setting(4, "bits of a weight, 4 or 3, for --method peqa")
    group_size: int = setting(0, "weights that share a scale, for --method peqa; 0: a whole channel")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    dtype: str = setting("auto", "fp32, bf16 or fp16 to compute in; auto: fp32 on a CPU, else bf16")
    sequence_len: int = setting(None, "longest sequence, in tokens; what is longer is cut off")
    max_examples: int = setting(0, "use only so many examples of the data; 0: all")
    held_out: float = setting(0.1, "fraction of the examples to hold out")
    batch_size: int = setting(None, "sequences in a batch")
    gradient_accumulation_steps: int = setting(1, "batches whose mean gradient makes a step")
    max_iters: int = setting(None, "iterations, that is, steps of the optimizer")
    learning_rate: float = setting(None, "of AdamW")
    lr_factors: str = setting("alpha=25", "what parts multiply it by, as in alpha=25,gamma=5")
    lr_schedule: str = setting(None, "constant, linear or cosine, after the warm-up")
    warmup_iters: int = setting(20, "iterations in which the learning rate rises from 0")
    weight_decay: float = setting(0.0, "of AdamW, on matrices only")
    beta1: float = setting(0.9, "of AdamW")
    beta2: float = setting(0.999, "of AdamW")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: do not clip")
    eval_interval: int = setting(50, "iterations between evaluations on held-out examples")
    eval_examples: int = setting(200, "held-out examples in an evaluation, at most")
    score_examples: int = setting(0, "examples of a test set to score, at most; 0: all")
    log_interval: int = setting(10, "iterations between lines of log.csv")
    compile: bool = setting(False, "torch.compile the model (slow to start, faster to run)")
    threads: int = setting(0, "CPU threads; 0: as many as torch chooses")
    seed: int = setting(1337, "of the weights, the split and the order of the examples")

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


BOUNDS = [
    ("batch_size max_iters sequence_len eval_interval log_interval eval_examples rank reduction "
     "gradient_accumulation_steps", lambda n: n >= 1, "be at least 1"),
    ("max_examples score_examples warmup_iters grad_clip weight_decay threads seed",
     lambda n: n >= 0, "not be negative"),
    ("held_out beta1 beta2", lambda n: 0 < n < 1, "lie between 0 and 1"),
    ("learning_rate", lambda n: 0 < n < math.inf, "be positive"),
]  # fmt: skip


def complete(cfg):
    """Fill in what depends, and refuse what makes no sense."""
    if cfg.preset and not cfg.plan:
        raise InputError("--preset is for --plan: to train, give --base, the folder of a model.")
    if cfg.plan and cfg.side:
        raise InputError("--plan is of a new side network: leave out --side.")
    if cfg.preset and cfg.base:
        raise InputError("--preset and --base both tell the model's shape: give one.")
    if cfg.base and not cfg.data and not cfg.plan:
        raise InputError("--base needs --data: a .json or .jsonl file of instructions, or see --task.")
    if cfg.data and not cfg.base:
        raise InputError("--data needs --base: the folder of a LLaMA or OPT model.")
    if cfg.n_labels and not cfg.side:
        raise InputError("--n_labels is not yours to set: --task and --head tell it.")
    real = bool(cfg.base or cfg.plan)
    task = cfg.task or ("instruct" if real else "tiny")
    if task not in TASKS or real != (task != "tiny"):
        raise InputError(f"--task {task} is not for this: choose {', '.join(TASKS)}; all but tiny need --base.")
    column = 2 if task == "tiny" else 1 if task in glue.FORMS else 0
    depends = {name: row[column] for name, row in DEFAULTS.items()}
    if cfg.method == "lst":
        depends["reduction"] = 8
    cfg = complete_method(cfg)
    depends |= dict(task=task, out_dir="out-eval" if cfg.eval_only else "out", head="lm")
    depends["checkpoint"] = real and cfg.method not in INSIDE
    if task in glue.FORMS:  # a side checkpoint knows; the base has no classifier
        classifier = cfg.n_labels if cfg.side else not cfg.eval_only
        depends["head"] = "classifier" if classifier else "lm"
    cfg = replace(cfg, **{k: v for k, v in depends.items() if getattr(cfg, k) is None})
    if cfg.eval_only and not cfg.side and cfg.head == "classifier":
        raise InputError("--head classifier: the base has none; give --head lm, or --side.")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise InputError(f"--{name} {getattr(cfg, name)} is unknown: choose {', '.join(map(str, choices))}.")
    usual = SideConfig()
    of_variant = {k: v for k, v in VARIANTS[cfg.variant].items() if getattr(cfg, k) == getattr(usual, k)}
    cfg = replace(cfg, **of_variant)
    for names, good, told in BOUNDS:
        for name in names.split():
            if not good(getattr(cfg, name)):
                raise InputError(f"--{name} {getattr(cfg, name)} must {told}.")
    if cfg.threads > (os.cpu_count() or 1):
        raise InputError(f"--threads {cfg.threads} is more than this machine's {os.cpu_count()}.")
    read_factors(cfg.lr_factors)
    return cfg


def complete_method(cfg):
    """Fill in how the base is stored, and refuse what the method has no use for."""
    if cfg.side:
        side, base = read_side(cfg.side)
        if cfg.method not in (side.method, SideConfig().method):
            raise InputError(f"--side {cfg.side} is of --method {side.method}, and not {cfg.method}.")
        told = vars(side) | dict(
            method=cfg.method, task=cfg.task, variant="paper", peqa_bits=4, group_size=0
        )  # fmt: skip
        for name in changed(cfg):
            if getattr(cfg, name) != told.get(name, getattr(cfg, name)):
                raise InputError(f"--{name}: --side {cfg.side} has its own; leave it out.")
        own = dict(method=side.method, quant=cfg.quant or base.get("quant"))
        cfg = replace(cfg, **told | own)  # what is used, and so what result.json tells
    elif not cfg.plan:  # which goes through the methods, and gives each what it has a use for
        refuse_useless(cfg)
    if cfg.peqa_bits not in (3, 4) or cfg.group_size < 0:
        told = f"--peqa_bits {cfg.peqa_bits} --group_size {cfg.group_size}"
        raise InputError(f"{told}: choose 3 or 4, and 0 or more.")
    default = QUANTS[cfg.method][0]
    if cfg.method == "peqa":
        default = f"int{cfg.peqa_bits}" + f"-{cfg.group_size}" * (cfg.group_size > 0)
    cfg = replace(cfg, quant=cfg.quant or default)
    if not cfg.eval_only:  # a base may be evaluated in any form
        check_quant(cfg.method, cfg.quant)
    if cfg.side_dtype == "bf16" and cfg.optimizer_bits != 8:
        raise InputError("--side_dtype bf16 needs --optimizer_bits 8.")
    if cfg.side_dtype == "bf16" and cfg.dtype == "fp16":
        raise InputError("--side_dtype bf16 cannot learn in --dtype fp16: give bf16 or fp32.")
    if cfg.ladder and (not cfg.plan or cfg.method in INSIDE):
        raise InputError("--ladder goes with --plan, and with --method qst or lst.")
    has_layers = cfg.side or cfg.eval_only or cfg.method in INSIDE
    if cfg.init not in ("random", "pruned") or cfg.init == "pruned" and has_layers:
        raise InputError(f"--init {cfg.init}: choose random, or pruned for a new side network (qst, lst).")
    if cfg.method == "full" and cfg.dtype == "fp16":
        raise InputError("--method full cannot learn in --dtype fp16: give bf16 or fp32.")
    return replace(cfg, **vars(side_config(cfg)))


def changed(cfg):
    """Names of the settings that are not the defaults."""
    return [f.name for f in fields(TrainConfig) if getattr(cfg, f.name) != f.default]


def refuse_useless(cfg):
    """Refuse settings of one method beside another, which would leave them unread."""
    of_side = {f.name for f in fields(SideConfig)} - {"method", "rank", "n_labels", "task"}
    of_side |= {"variant", "h_f_bits", "side_dtype"}
    for name in changed(cfg):
        if name in of_side and cfg.method in INSIDE:
            raise InputError(f"--{name} is of a side network, and --method {cfg.method} has none.")
        if name in ("peqa_bits", "group_size") and (cfg.method != "peqa" or cfg.quant):
            raise InputError(f"--{name} is of --method peqa, whose --quant it makes.")


def read_factors(text):
    """"alpha=25,gamma=5" -> {"alpha": 25.0, "gamma": 5.0}"""
    try:
        factors = dict(part.split("=") for part in text.split(",") if part)
        factors = {name.strip(): float(factor) for name, factor in factors.items()}
    except ValueError:
        raise InputError(f"--lr_factors {text} is not of the form alpha=25,gamma=5.") from None
    if wrong := [name for name, factor in factors.items() if name not in PARTS or not factor > 0]:
        raise InputError(f"--lr_factors {text}: {wrong[0]} is not one of {', '.join(PARTS)}, or not positive.")
    return factors


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
    """AdamW, in groups of one learning rate each; only matrices decay.

    differs from the paper: alpha has a larger learning rate. The side network's gradient has the
    factor 1 - alpha, 0 at the start, so that it learns only as fast as alpha moves.
    """
    factors, groups = read_factors(cfg.lr_factors), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((f for part, f in factors.items() if part in name.split(".")), 1.0)
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


CHOICES = dict(
    lr_schedule=tuple(SCHEDULES), head=("lm", "classifier"), variant=tuple(VARIANTS),
    h_f_bits=(16, 8, 4), optimizer_bits=(32, 8), side_dtype=("fp32", "bf16"),
)  # fmt: skip


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


# --------------------------------------------------------------------------------------
# The memory account: one real training step, of the real modules, on tensors without memory


aten = torch.ops.aten


@contextlib.contextmanager
def attention_of(device):
    """Let attention on meta tensors be what it is on a device, "cuda" or "cpu", or "meta" itself.

    By itself the meta device takes the plain formula, and keeps the (T, T) matrices for backward.
    A fused kernel keeps queries, keys, values, output and one fp32 number a query, and it has a
    meta implementation that can be called by its name. Which one is used follows torch's own rules:
    flash attention where keys and values are equally wide (on CUDA in 16 bits only, and padded to a
    multiple of 8); otherwise on CUDA the memory-efficient one, unless queries share their keys; and
    what is left is the plain formula, on the real device too.
    """
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, is_causal, **other):
        D, causal, same = v.shape[-1], is_causal, q.shape[-1] == v.shape[-1]
        if same and device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)[0]
        if same and device == "cuda" and q.dtype != torch.float32:
            q, k, v = (F.pad(x, (0, -D % 8)) if D % 8 else x for x in (q, k, v))
            return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[0][..., :D]
        if device == "cuda" and q.shape[1] == k.shape[1] and D * q.dtype.itemsize % 16 == 0:
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, None, q.requires_grad or v.requires_grad, is_causal=causal
            )[0]
        return plain(q, k, v, is_causal=causal, **other)

    # Replaced, and not caught by a TorchFunctionMode: backward computes checkpointed layers again
    # where no such mode is on.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


FLOPS = flop_registry | {  # torch's formulas: 2 m k n for a product; attention as if not causal
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Live(TorchDispatchMode):
    """Add up the storages that operators make, each until it is freed (`peak` is the most), and
    the floating-point operations."""

    now = peak = flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        storages = lambda *trees: {
            t.untyped_storage()._cdata: t.untyped_storage()
            for t in tree_leaves(trees) if isinstance(t, torch.Tensor)
        }  # fmt: skip
        given = storages(args, kwargs)  # views, and what is written in place, are nothing new
        for key, storage in storages(out).items():
            if key not in given:
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, nbytes):
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def memory_report(cfg, config=None):
    """Account for the memory of one training step, in bytes, without allocating any of it.

    cfg: a `TrainConfig`: --preset, --method, --quant, --batch_size, --dtype, ... Its device is "cpu",
        or "meta" for attention by the plain formula; anything else is a GPU
    config: a `ModelConfig`, in place of --preset or --base

    The real modules are built on the meta device and run one real step there, forward and
    backward. Every position has a target, for all methods alike.
        activations   what forward keeps for backward, each storage once: `activation_bytes`
        gradients     as while they accumulate: they are there from the start to the end
        optimizer     the two moments of AdamW
        transient     the step's peak above the four others: logits, a layer's intermediates, the
                      unpacked weight, and what is recomputed
        total         the sum, and so the peak
    Not in it: the workspaces of kernels, the allocator's fragmentation, CUDA's own half gigabyte.
    """
    cfg = complete(replace(cfg, plan=True))
    device = cfg.device if cfg.device in ("cpu", "meta") else "cuda"
    dtype = pick_dtype(cfg.dtype, torch.device(device))
    model = untrained(cfg, config or config_of(cfg), dtype, "meta")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in parameters)
    targets = torch.zeros(cfg.batch_size, cfg.sequence_len, dtype=torch.long)
    drop_scratch()  # so that this step makes it, and it is counted
    with attention_of(device), Live() as live:
        loss, activations = loss_and_kept(model, targets.to("meta"), targets)
        loss.backward()
    drop_scratch()
    weights, optimizer = model_bytes(model), optimizer_bytes(parameters, cfg.optimizer_bits)
    return dict(
        method=cfg.method, checkpoint=cfg.checkpoint, weights_bytes=weights,
        gradients_bytes=gradients, optimizer_bytes=optimizer, activations_bytes=activations,
        transient_bytes=live.peak - activations,
        total_bytes=weights + gradients + optimizer + live.peak,
        trainable_parameters=sum(p.numel() for p in parameters),
        flops_per_token=round(live.flops / targets.numel()),
    )  # fmt: skip


def untrained(cfg, config, dtype, device):
    """A model with random weights: the base, frozen, and what --method trains."""
    with torch.device(device):
        base = Transformer(config)
    return save_memory(tune(base.freeze(cfg.quant, dtype, device), side_config(cfg)), cfg)


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


def config_of(cfg):
    """The shape of --preset, or of the model in --base."""
    if cfg.base:
        return read_config(cfg.base)
    if cfg.preset not in PRESETS:
        wrong = f"--preset {cfg.preset} is unknown" if cfg.preset else "--plan needs --base, or --preset"
        raise InputError(f"{wrong}: choose {', '.join(PRESETS)}.")
    return PRESETS[cfg.preset]


ROWS = ("full", "adapter", "lora", "qlora", "peqa", "lst", "qst")
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GB that GPUs have
COLUMNS = ("weights", "gradients", "optimizer", "activations", "transient", "total")

# What --ladder switches on, one after the other: from QST as it is written in the paper.
AS_WRITTEN = dict(checkpoint=False, h_f_bits=16, chunk_loss=False, optimizer_bits=32, side_dtype="fp32")
LADDER = {
    "as written": {}, "rungs recomputed": dict(checkpoint=True), "h_f in 8 bits": dict(h_f_bits=8),
    "loss in chunks": dict(chunk_loss=True), "AdamW in 8 bits": dict(optimizer_bits=8),
    "side in bf16": dict(side_dtype="bf16"), "h_f in 4 bits": dict(h_f_bits=4),
}  # fmt: skip


def rows(cfg):
    """Yield a label and settings: each method, with and without recomputing; or each saving."""
    if cfg.ladder:
        cfg = replace(cfg, **AS_WRITTEN)
        for name, saving in LADDER.items():
            yield name, (cfg := replace(cfg, **saving))
        return
    for method in ROWS:
        for checkpoint in (False, True):
            label = method + ", checkpoint" * checkpoint
            yield label, replace(cfg, method=method, quant=None, checkpoint=checkpoint)


def plan(cfg, given):
    """Print the account of every method, and leave it in out_dir/plan.json: a list of reports.

    given: the settings before `complete`, so that what depends on the method still does
    """
    config = config_of(cfg)
    unit, power = ("GB", 9) if count_weights(config) > 1e9 else ("MB", 6)
    head = (
        f"A training step of {cfg.base or cfg.preset}, {cfg.batch_size} x {cfg.sequence_len} tokens, each with"
        f" a target.\nIn {unit} of 10^{power} bytes; * where a GPU of so many GB has room for it.\n\n"
        f"{'method':20}{''.join(f'{name:>12}' for name in COLUMNS)}      trainable  GFLOPs/token  "
        + "".join(f"{card:>3}" for card in CARDS)
    )
    reports = []
    for label, settings in rows(given):
        row = dict(label=label) | memory_report(settings, config)
        cells = "".join(f"{row[f'{name}_bytes'] / 10**power:12.2f}" for name in COLUMNS)
        cells += f"{row['trainable_parameters']:>15,}{row['flops_per_token'] / 1e9:14.1f}  "
        fits = "".join("  *" if row["total_bytes"] <= card * 1e9 else "  -" for card in CARDS)
        print(*[head] * (not reports), f"{label:20}{cells}{fits}", sep="\n", flush=True)
        reports.append(row)
    write_json(Path(cfg.out_dir) / "plan.json", reports)
    return reports


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


def side_config(cfg):
    return SideConfig(**{f.name: getattr(cfg, f.name) for f in fields(SideConfig)})


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


def introduce(folder, model, cfg, batch, result):
    """Print what a reader wants to know before the run."""
    config, layers = model.config, [m for m in model.modules() if isinstance(m, PACKED)]
    bits = ""
    if layers:
        nbytes = sum(layer.quantized.nbytes for layer in layers)
        numel = sum(layer.in_features * layer.out_features for layer in layers)
        bits = f", {numel:,} of them at {8 * nbytes / numel:.3f} bits ({cfg.quant})"
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    tuned = model.side.config
    branches = f"low-rank branches of rank {tuned.rank}"
    what = {
        "lora": branches, "qlora": branches, "adapter": f"bottlenecks of rank {tuned.rank}",
        "peqa": "the scales of the base's integers", "full": "the base itself",
    }.get(
        tuned.method,
        f"a side network {tuned.reduction} times narrower, {tuned.downsample} downsamplers",
    )  # fmt: skip
    steps = cfg.gradient_accumulation_steps
    print(
        f"base        {folder}: {config.family}, {config.n_layer} layers of {config.n_embd}\n"
        f"frozen      {total - trainable:,} weights{bits}\n"
        f"trainable   {trainable:,} ({100 * trainable / total:.2f} %): {what}\n"
        f"iteration   at most {batch.numel() * steps:,} tokens: {len(batch)} sequences"
        f"{f' x {steps} batches' if steps > 1 else ''}\n"
        f"memory      weights {show_bytes(result['weights_bytes'])}, "
        f"optimizer {show_bytes(result['optimizer_bytes'])}, "
        f"activations {show_bytes(result['activations_bytes'])} of such a batch"
    )


def conclude(folder, cfg, result):
    """Print what the run has shown, and what to do next."""
    print()
    tuned = cfg.method.upper()
    start = "base" if cfg.head == "lm" and cfg.method != "lst" else "untrained"
    told = {tuned if cfg.side else "base": ""} if cfg.eval_only else {start: "_before", tuned: "_after"}
    line = lambda name, show: ", ".join(
        f"{show(result[name + end])} {who}" for who, end in told.items() if name + end in result
    )
    if shown := line("loss", "{:.3f}".format):
        print(f"held-out loss   {shown}")
    if shown := line("perplexity", "{:.3f}".format):
        print(f"perplexity      {shown}")
    if not cfg.eval_only and result["loss_after"] >= result["loss_before"]:
        print("It has not learned: train longer, or with another --learning_rate.")
    for name in SCORES:
        if shown := line(name, "{:.1%}".format):
            print(f"{name.replace('_', ' '):15} {shown} ({result['examples']:,} examples)")
    for part, accuracy in result.get("accuracy_by_category_after", result.get("accuracy_by_category", {})).items():
        print(f"   {part:12} {accuracy:.1%}")
    if majority := result.get("majority_class", result.get("majority_class_after")):
        print(f"majority class  {majority:.1%}")
    for sample in result.get("samples", ()):
        print(f"\n{sample['prompt'].strip()}\n   expected  {sample['expected']}")
        for who in told:
            print(f"   {who:10}{sample.get(who, sample['answer'])}")
    print(f"\n{result['seconds']:.0f} s in all, peak memory {show_bytes(result['peak_memory_bytes'])}.")
    if cfg.eval_only or cfg.head == "classifier":
        return
    prompt = tiny.EXAMPLE if cfg.task == "tiny" else "YOUR QUESTION"
    script = os.path.relpath(Path(__file__).parent / "qst.py")
    print(
        f"Ask it yourself:\npython {script} --base {shlex.quote(str(folder))} "
        f"--side {shlex.quote(cfg.out_dir)} --prompt {shlex.quote(prompt)}"
    )


SCORES = ("exact_match", "accuracy", "f1", "matthews", "pearson", "spearman")


def main(cfg):
    """Side-tune a frozen 4-bit base, or evaluate; return what result.json holds (see the README).

    cfg: a `TrainConfig`
    """
    started = time.time()
    given, cfg = cfg, complete(cfg)
    if cfg.plan:
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


# --------------------------------------------------------------------------------------
# The command line


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1  # anything else is a ValueError


def parse_args(argv=None):
    """Flags, one a field of `TrainConfig`, -> a TrainConfig."""
    parser = Parser("train.py", description="Finetune a frozen 4-bit model through a side network.")
    for f in fields(TrainConfig):
        default = f.default
        if f.name in DEFAULTS:
            default = "{}, on GLUE {}, embedded {}".format(*DEFAULTS[f.name])
        kind = dict(type=true_or_false, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        if f.name == "preset":  # alone, it asks what there is
            kind |= dict(nargs="?", const="?")
        parser.add_argument(
            f"--{f.name}", default=f.default, **kind,
            help=f"{f.metadata['help']} (default: {default!s})".replace("%", "%%"),
        )  # fmt: skip
    return TrainConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run(lambda: main(parse_args()))
