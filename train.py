"""One dataclass of settings, one loop, one `main(cfg)`.

    python train.py                                       the embedded default: offline, on a CPU
    python train.py --base FOLDER --data FILE.jsonl       a real LLaMA or OPT, real instructions
    python train.py --base FOLDER --task rte --data GLUE  and with --eval_only, its score as it is
    python train.py --help                                every setting

A run leaves in --out_dir: side.safetensors and side.json (the side network that was best on the
held-out examples), last/ (the same of the last iteration), log.csv, loss.svg and result.json.
"""

import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from data import batches, chat, check_length, collate, glue, instruct, mean_loss, mmlu, text, tiny
from data.files import make_writable_folder, write_json
from data.hub import save_pretrained
from data.report import (
    TrainingLog, activation_bytes, conclude, introduce, optimizer_bytes, peak_memory, progress,
)  # fmt: skip
from data.settings import (
    Parser, add_flags, check, check_used, pick_device, pick_dtype, refuse_if, run, setting,
)  # fmt: skip
from data.tokenizer import load_tokenizer
from model import (
    ModelConfig, Transformer, count_weights, from_pretrained, model_bytes, read_config,
)  # fmt: skip
from qst import QST, read_side, tune
from quant import (
    ABSMAX_BLOCK_SIZE, DYNAMIC_CODEBOOK, InputError, codebooks_on, dequantize_blockwise,
    quantize_blockwise,
)  # fmt: skip
from side import (
    IN_BASE_METHODS, METHODS, SIDE_METHODS, VARIANTS, SideConfig, check_quant, of_side,
)  # fmt: skip

TASKS = {
    "tiny": tiny.load, "instruct": instruct.load, "text": text.load, "mmlu": mmlu.load,
    **dict.fromkeys(glue.FORMS, glue.load),
}  # fmt: skip
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class TrainConfig(SideConfig):
    """All settings of a run: those of the side network, and these. Each is a flag.

    None means that the default depends on other settings: see DEFAULTS and `resolve`.
    """

    reduction: int = of_side(None, "how many times narrower the side network is", at_least=1)
    variant: str = of_side("paper", "settings of the side network by name", tuple(VARIANTS))
    base: str = setting("", "folder of a LLaMA or OPT model; empty: the embedded default")
    task: str = setting(None, "default: instruct, or tiny without --base", tuple(TASKS))
    data: str = setting("", "the task's file or folder: see data/instruct.py --help, data/glue.py "
        "--help and data/mmlu.py --help; for text, a .txt file")  # fmt: skip
    instructions: str = setting("", "what --task mmlu trains on; --data is its test")
    side: str = setting("", "a side checkpoint to start from, or to evaluate")
    eval_only: bool = setting(False, "only evaluate --side, or the base, on all of --data")
    head: str = setting(None, "what answers; default: classifier for GLUE", ("lm", "classifier"))
    out_dir: str = setting(None, "where the run leaves its files; default: out, or out-eval")
    checkpoint: bool = setting(None, "recompute the side network's steps in backward (qst, lst: "
        "default with --base), or the base's layers (other methods)")  # fmt: skip
    h_f_bits: int = of_side(None, "bits of h_f that backward keeps", (16, 8, 4))
    chunk_loss: bool = setting(True, "never hold the logits of more than 128 tokens")
    optimizer_bits: int = setting(32, "of AdamW's two moments; 8: in blocks of 256", (32, 8))
    quant: str = setting(None, "how the base is stored: nf4, fp4, none; for peqa int4, int3, int4-64 "
        "(groups of 64), ...; default: by the method, or as --side was trained")  # fmt: skip
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    dtype: str = setting("auto", "fp32, bf16 or fp16 to compute in; auto: fp32 on a CPU, else bf16")
    sequence_len: int = setting(None, "tokens of the longest sequence; the rest is cut", at_least=1)
    max_examples: int = setting(0, "use only so many examples of the data; 0: all", at_least=0)
    held_out: float = setting(0.1, "fraction of the examples to hold out", above=0, below=1)
    batch_size: int = setting(None, "sequences in a batch", at_least=1)
    gradient_accumulation_steps: int = setting(1, "batches of an iteration", at_least=1)
    max_iters: int = setting(None, "iterations, that is, steps of the optimizer", at_least=1)
    learning_rate: float = setting(None, "of AdamW", above=0, below=math.inf)
    alpha_lr_factor: float = setting(25.0, "alpha learns so many times faster", above=0)
    lr_schedule: str = setting(None, "of the learning rate, after the warm-up", SCHEDULES)
    warmup_iters: int = setting(20, "iterations in which the rate rises from 0", at_least=0)
    weight_decay: float = setting(0.0, "of AdamW, on matrices only", at_least=0)
    beta1: float = setting(0.9, "of AdamW", above=0, below=1)
    beta2: float = setting(0.999, "of AdamW", above=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: do not clip", at_least=0)
    eval_interval: int = setting(50, "iterations between held-out evaluations", at_least=1)
    eval_examples: int = setting(200, "held-out examples of an evaluation, at most", at_least=1)
    score_examples: int = setting(0, "examples of a test set to score; 0: all", at_least=0)
    log_interval: int = setting(10, "iterations between lines of log.csv", at_least=1)
    compile: bool = setting(False, "torch.compile the model (slow to start, faster to run)")
    threads: int = setting(0, "CPU threads; 0: as many as torch chooses", at_least=0)
    seed: int = setting(1337, "of the weights, the split and the order of examples", at_least=0)

    def __post_init__(self):
        """What depends on other settings stays None until `resolve`."""


DEFAULTS = {  # setting: (for a real base, for it on GLUE, for the embedded default)
    "reduction": (16, 16, 4),
    "sequence_len": (384, 512, 128),
    "batch_size": (4, 16, 32),
    "max_iters": (1000, 1000, 150),
    "learning_rate": (2e-4, 2e-4, 1e-2),
    "lr_schedule": ("constant", "linear", "linear"),
    "h_f_bits": (8, 8, 16),
}


def resolve(cfg):
    """Fill in the settings that depend on others, and refuse those that contradict each other."""
    check(cfg)
    if cfg.side:
        cfg = settings_of_side(cfg)
    else:
        check_used(cfg, METHODS)
    task = cfg.task or ("instruct" if cfg.base else "tiny")
    on_glue, cores = task in glue.FORMS, os.cpu_count() or 1
    no_classifier = cfg.eval_only and not cfg.side
    refuse_if(
        (cfg.base and not cfg.data, "--base needs --data: see --task"),
        (cfg.data and not cfg.base, "--data needs --base: the folder of a LLaMA or OPT model"),
        (bool(cfg.base) == (task == "tiny"),
         f"--task {task} is not for this: all but tiny need --base, and tiny has its own"),
        (cfg.dtype == "fp16" and cfg.method == "full",
         "weights in 16 bits cannot learn in --dtype fp16: give bf16 or fp32"),
        (cfg.threads > cores, f"--threads {cfg.threads} is more than this machine's {cores}"),
        (cfg.head == "classifier" and no_classifier,
         "--head classifier: the base has none; give --head lm, or --side"),
    )  # fmt: skip
    column = 2 if task == "tiny" else 1 if on_glue else 0
    defaults = {name: row[column] for name, row in DEFAULTS.items()}
    if cfg.method == "lst":
        defaults["reduction"] = 8
    classifier = on_glue and (cfg.n_labels if cfg.side else not cfg.eval_only)
    defaults |= dict(
        task=task, out_dir="out-eval" if cfg.eval_only else "out",
        head="classifier" if classifier else "lm", quant=METHODS[cfg.method][0],
        checkpoint=bool(cfg.base) and cfg.method in SIDE_METHODS,
    )  # fmt: skip
    paper = SideConfig()
    variant = VARIANTS[cfg.variant].items()
    variant = {k: v for k, v in variant if getattr(cfg, k) == getattr(paper, k)}
    missing = {k: v for k, v in defaults.items() if getattr(cfg, k) is None}
    cfg = replace(cfg, **missing | variant)
    if not cfg.eval_only:  # a base may be evaluated in any form
        check_quant(cfg.method, cfg.quant)
    return replace(cfg, **vars(side_config(cfg)))


def settings_of_side(cfg):
    """The settings with those of --side, which flags must not contradict."""
    side, base = read_side(cfg.side)
    if cfg.method not in (side.method, "qst"):
        raise InputError(f"--side {cfg.side} is of --method {side.method}, and not {cfg.method}.")
    own = vars(side) | dict(method=side.method, task=cfg.task, variant="paper")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.name != "method" and value not in (f.default, own.get(f.name, value)):
            raise InputError(f"--{f.name}: --side {cfg.side} has its own; leave it out.")
    return replace(cfg, **own, quant=cfg.quant or base.get("quant"))


def side_config(cfg):
    return SideConfig(**{f.name: getattr(cfg, f.name) for f in fields(SideConfig)})


# --------------------------------------------------------------------------------------
# Optimization


def learning_rate_at(iteration, cfg):
    """The learning rate of iteration 0, 1, ...: a linear warm-up, and then the schedule."""
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    done = (iteration - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    factors = dict(constant=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2)
    return cfg.learning_rate * factors[cfg.lr_schedule]


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


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that keeps its two moments in 8 bits (arXiv 2110.02861 §2).

    In blocks of 256, with the code book of the absmax values in quant.py. Of the second moment it
    keeps the root, which is as large as the first moment and needs half as many decades; and never
    0, so that nothing is divided by 0.
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
        _, codebook, _ = codebooks_on("nf4", grad.device)
        moments = []
        for name in ("mean", "root"):
            if t == 1:
                moments.append(torch.zeros_like(grad))
                continue
            codes, absmax = state[name], state[f"{name}_absmax"]
            moments.append(dequantize_blockwise(codes, codebook, absmax, ABSMAX_BLOCK_SIZE))
        mean, root = moments
        mean.lerp_(grad, 1 - betas[0])
        root.square_().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1]).sqrt_()
        for name, moment in (("mean", mean), ("root", root)):
            codes, absmax = quantize_blockwise(moment, DYNAMIC_CODEBOOK, ABSMAX_BLOCK_SIZE)
            state[name], state[f"{name}_absmax"] = codes, absmax
        smallest = DYNAMIC_CODEBOOK.tolist().index(0.0) + 1
        state["root"].clamp_(min=smallest)
        root.div_(math.sqrt(1 - betas[1] ** t)).add_(eps)
        step = mean.div_(root).mul_(lr / (1 - betas[0] ** t)).view_as(parameter)
        parameter.copy_(parameter.float() * (1 - lr * weight_decay) - step)


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
# A run


def train_tiny_base(tokenizer):
    """Train a LLaMA of a million weights on the stories of data/tiny.py, on the CPU."""
    cfg = TrainConfig(**tiny.BASE_RUN)
    torch.manual_seed(cfg.seed)
    config = ModelConfig(
        tokenizer.vocab_size, **tiny.BASE, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.04)
    shuffled = batches(tiny.pretraining_examples(tokenizer), cfg.batch_size, cfg.seed)
    optimizer, device = make_optimizer(model, cfg), torch.device("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    bar = progress(range(cfg.max_iters), "base model, once")
    for i in bar:
        loss, _ = train_step(model.loss, optimizer, scaler, shuffled, device, i, cfg)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return model


def load_task(cfg, tokenizer, template, config):
    """Read the data: `data.Task`."""
    check_length(config, cfg.sequence_len, "lower --sequence_len")
    task = TASKS[cfg.task](cfg, tokenizer, template)
    for note in task.notes:
        print(note)
    if not cfg.eval_only and not (task.train and task.held_out):
        raise InputError(
            f"{cfg.data or 'The data'} leaves {len(task.train)} examples to train on and "
            f"{len(task.held_out)} held out: give more data, or raise --sequence_len or "
            "--max_examples."
        )
    return task


def make_model(cfg, base, task):
    """The base with a new side network, or with that of --side; or the base alone."""
    if cfg.eval_only and not cfg.side:
        return base
    if not cfg.side:
        new = dict(n_labels=task.n_labels, task=cfg.task if task.n_labels else "")
        model = tune(base, replace(side_config(cfg), **new))
        model.calibrate([ids for ids, _ in task.train[:64]])
        return save_memory(model, cfg)
    model = QST.from_side(base, cfg.side)
    labels, learned = model.side.config.n_labels, model.side.config.task
    refuse_if(
        (labels != task.n_labels,
         f"--side {cfg.side} has {labels} labels, and --task {cfg.task} {task.n_labels}"),
        # Both halves of MNLI have the same labels; older side checkpoints do not name their task.
        (learned and learned.removesuffix("-mm") != cfg.task.removesuffix("-mm"),
         f"--side {cfg.side} is a classifier for --task {learned}, and not {cfg.task}"),
    )  # fmt: skip
    return save_memory(model, cfg)


def save_memory(model, cfg):
    """Set what backward keeps, and in how many bits, and return the model."""
    model.chunk_loss = cfg.chunk_loss
    if cfg.method in IN_BASE_METHODS:
        model.base.checkpoint = cfg.checkpoint
    else:
        model.side.save_memory(cfg.checkpoint, cfg.h_f_bits)
    return model


def fit(model, optimizer, task, cfg, result):
    """Train; keep the best side network in out_dir, and load it at the end; fill in `result`."""
    device, out_dir = model.device, Path(cfg.out_dir)
    loss_of = torch.compile(model.loss, dynamic=True) if cfg.compile else model.loss
    half = model.base.embed_tokens.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    shuffled = batches(task.train, cfg.batch_size, cfg.seed)
    held_out = task.held_out[: cfg.eval_examples]
    loss_before = mean_loss(model, held_out, cfg.batch_size)
    best, best_iteration, interrupted = math.inf, 0, False

    def evaluate():
        """Evaluate on the held-out examples, and keep the side network if it is the best so far."""
        nonlocal best, best_iteration
        loss = mean_loss(model, held_out, cfg.batch_size)
        if loss < best:
            best, best_iteration = loss, log.iteration
            model.save_side(out_dir)
        log.evaluated(loss)

    with TrainingLog(out_dir, cfg, loss_before, device) as log:
        try:
            for iteration in log.iterations():
                loss, tokens = train_step(
                    loss_of, optimizer, scaler, shuffled, device, iteration - 1, cfg
                )
                log.stepped(loss, tokens)
                if not math.isfinite(loss):
                    kept = f"{out_dir} holds that of iteration {best_iteration}"
                    raise InputError(
                        f"The loss is {loss} at iteration {iteration}: lower --learning_rate, or "
                        f"try --dtype bf16 or fp32. "
                        f"{kept if best_iteration else 'No side network is kept'}."
                    )
                if iteration == cfg.max_iters or iteration % cfg.eval_interval == 0:
                    evaluate()
                log.write(learning_rate_at(iteration - 1, cfg))
        except KeyboardInterrupt:
            interrupted = True
        model.save_side(out_dir / "last")
        if interrupted:
            log.close()
            message = f"Interrupted. The side network as it is now: {out_dir / 'last'}"
            print(message, flush=True)
        if log.held_out_iteration < log.iteration or not log.iteration:
            evaluate()
    model.load_side(out_dir)
    result |= log.speed() | dict(
        loss_before=loss_before, loss_after=best, loss_last=log.held_out_loss,
        best_iteration=best_iteration, iterations=log.iteration, interrupted=interrupted,
        peak_memory_bytes=peak_memory(device),
    )  # fmt: skip


def train(model, task, folder, cfg, result):
    """Score, train and score again; fill in `result`."""
    optimizer = make_optimizer(model, cfg)
    longest = sorted(task.train, key=lambda example: len(example[0]))[-cfg.batch_size :]
    idx, targets = collate(longest)
    result |= dict(
        optimizer_bytes=optimizer_bytes([*model.parameters()], cfg.optimizer_bits),
        activations_bytes=activation_bytes(model, idx.to(model.device), targets),
    )
    introduce(folder, model, cfg, idx, result)
    before = task.score(model) if not task.n_labels else {}  # an untrained classifier is at chance
    fit(model, optimizer, task, cfg, result)
    if result["interrupted"]:
        return
    after = task.score(model)
    samples = [score.pop("samples", []) for score in (before, after)]
    result["examples"] = after.pop("examples", len(task.held_out[: cfg.eval_examples]))
    result["samples"] = [{**b, cfg.method.upper(): a["answer"]} for b, a in zip(*samples)]
    result |= {f"{name}_before": value for name, value in before.items() if name != "examples"}
    result |= {f"{name}_after": value for name, value in after.items()}


def main(cfg):
    """Side-tune a frozen 4-bit base, or evaluate; return what result.json holds (data/README.md).

    cfg: a `TrainConfig`
    """
    started, cfg = time.time(), resolve(cfg)
    make_writable_folder(cfg.out_dir, "--out_dir")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    folder = Path(cfg.base) if cfg.base else tiny.base_folder(train_tiny_base, save_pretrained)
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
    result |= dict(
        peak_memory_bytes=peak_memory(device), seconds=time.time() - started, config=asdict(cfg)
    )
    write_json(Path(cfg.out_dir) / "result.json", result)
    conclude(folder, cfg, result)
    return result


def parse_args(argv=None):
    parser = Parser("train.py", description="Finetune a frozen 4-bit model through a side network.")
    shown = {name: "{}, on GLUE {}, embedded {}".format(*row) for name, row in DEFAULTS.items()}
    add_flags(parser, TrainConfig, shown)
    return TrainConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run(lambda: main(parse_args()))
