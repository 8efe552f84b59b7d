"""One dataclass of settings, one loop, one `main(cfg)`.

    python train.py                                       the built-in example: offline, on a CPU
    python train.py --base FOLDER --data FILE.jsonl       a real LLaMA or OPT, real instructions
    python train.py --base FOLDER --task rte --data GLUE  with --eval_only: score without training
    python train.py --config out/result.json              repeat a run; your flags count more
    python train.py --help                                every setting

A run leaves in --out_dir the best side network, its log, its result and a state for --resume.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch

from data import TASKS, InputError, find_folder, leaf
from data.devices import distributed
from data.devices.device import to_device
from data.formats.files import make_writable_folder, write_json
from data.frozen.hidden import channel_statistics
from data.frozen.sources import first_device, load_base
from data.generate.sampling import check_length
from data.run.optim import learning_rate_at
from data.run.report import (
    compared, conclude, print_sizes, progress, record_errors, sizes, write_result,
)
from data.run.run import Run, refuse_other_processes
from data.run.state import only_run_in, stop_signals
from data.settings import contradictions
from data.settings.flags import (
    SETTINGS_FILE, Parser, check, check_used, parse_settings, refuse_if, run_main, setting,
)
from data.settings.methods import (
    METHODS, PAPER, SIDE_METHODS, VARIANTS, check_quant, of_side, settings_of_run,
)
from data.tasks.examples import iteration_batches, prefetch
from data.tasks.scoring import mean_loss
from data.tokens.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, count_weights, from_pretrained, read_config
from qst import QST, SharedBase, add_trainable, read_side
from side import IN_BASE_METHODS, SideConfig, side_config


@dataclass
class TrainConfig(SideConfig):
    """All settings of a run. None: the default depends on other settings (DEFAULTS, `resolve`)."""

    task: str = setting(None, "default: instruct, or tiny without --base", tuple(TASKS),
        group="most used")
    base: str = setting("", "model folder, or ORG/MODEL of huggingface.co; default: a built-in one",
        group="most used")
    data: str = setting("", "file or folder of the task's data; data/README.md shows the formats")
    variant: str = of_side("paper", "preset: paper, released code, or fast", tuple(VARIANTS))
    max_iters: int = setting(None, "number of iterations (optimizer steps)", at_least=1)
    learning_rate: float = setting(None, "peak learning rate; fast: 5e-3", above=0, below=1000)
    batch_size: int = setting(None, "sequences per batch and process", at_least=1)
    out_dir: str = setting(None, "folder for the run's files; default: out, or out-eval")
    resume: bool = setting(False, "continue the run in --out_dir, or start it if there is none")
    eval_only: bool = setting(False, "only evaluate --side, or the base, on all of --data")
    instructions: str = setting("", "instruction file of --task mmlu", group="task and data")
    sequence_len: int = setting(None, "maximum tokens; longer sequences are truncated", at_least=1)
    max_examples: int = setting(0, "use at most this many examples; 0: all", at_least=0)
    held_out: float = setting(0.1, "fraction of the examples to hold out", above=0, below=1)
    data_seed: int = setting(None, "seed of the examples' split and order; default: --seed",
        at_least=0, below=2**63)
    head: str = setting(None, "frozen LM head, or a new classifier for GLUE; default: classifier "
        "for GLUE, lm with --shots", ("lm", "classifier"))
    quant: str = setting(None, "storage of the base: nf4, fp4, none; for peqa int4, int3, or "
        "int4-64 in groups of 64; default: by the method, or that of --side", group="model")
    dtype: str = setting("auto", "fp32, bf16 or fp16; auto: bf16 on NVIDIA (T4: fp16), else fp32")
    device: str = setting("auto", "cpu, cuda, cuda:1 or mps; auto: a GPU if there is one")
    devices: str = setting("", "several devices for the base's layers, in order: cuda:0,cuda:1")
    side: str = setting("", "side checkpoint to start from, or to evaluate", group="side network")
    reduction: int = of_side(None, "how many times narrower the side network is", at_least=1)
    sweep: str = setting("", "train one side network for each combination of settings, with one "
        'forward pass of the base: "learning_rate=1e-3,3e-3 seed=1,2"')
    optimizer: str = setting(None, "adamw, or muon for matrices and AdamW for the rest; default: "
        "adamw, with --variant fast muon", ("adamw", "muon"), group="training")
    epochs: int = setting(None, "passes over the examples; sets --max_iters", at_least=1)
    gradient_accumulation_steps: int = setting(1, "batches per iteration", at_least=1)
    alpha_lr_factor: float = setting(25.0, "alpha's rate over the others'", above=0, below=1e6)
    lr_schedule: str = setting(None, "schedule after the warm-up", ("constant", "linear", "cosine"))
    warmup_iters: int = setting(20, "iterations in which the learning rate rises", at_least=0)
    weight_decay: float = setting(0.0, "weight decay of matrices", at_least=0, below=1000)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", above=0, below=1)
    beta2: float = setting(0.999, "AdamW's decay of the second moment", above=0, below=1)
    grad_clip: float = setting(1.0, "maximum norm of the gradient; 0: no clipping", at_least=0)
    seed: int = setting(1337, "seed of the new weights", at_least=0, below=2**63)
    compile: bool = setting(False, "torch.compile the model: slow start, faster, more memory")
    checkpoint: bool = setting(None, "recompute activations in backward: the side network's (qst, "
        "lst; default with --base) or the base's (other methods)", group="memory")
    h_f_bits: int = of_side(None, "bits of the hidden states stored for backward", (16, 8, 4))
    chunk_loss: bool = setting(True, "compute the logits of at most 512 tokens at a time")
    optimizer_bits: int = setting(32, "bits of the optimizer's moments", (32, 8))
    stream: bool = of_side(False, "keep the 4-bit layers on disk or in host memory until needed")
    cache_hidden: str = setting("", "folder that caches the base's hidden states for later epochs")
    cache_limit_gb: float = setting(50.0, "maximum size of --cache_hidden in GB", above=0)
    eval_interval: int = setting(50, "iterations between evaluations", at_least=1,
        group="evaluation")
    eval_examples: int = setting(200, "maximum number of held-out examples", at_least=1)
    score_examples: int = setting(0, "maximum number of test examples; 0: all", at_least=0)
    log_interval: int = setting(10, "iterations between lines of log.csv", at_least=1,
        group="output")

    def __post_init__(self):
        """Keep None, unlike SideConfig: `resolve` fills it in when it has seen all settings."""


DEFAULTS = {  # setting: (for a real base, for it on GLUE, for the built-in example)
    "reduction": (16, 16, 4),
    "sequence_len": (384, 512, 128),
    "batch_size": (4, 16, 32),
    "max_iters": (1000, 1000, 150),
    "learning_rate": (2e-4, 2e-4, 1e-2),
    "lr_schedule": ("constant", "linear", "linear"),
    "h_f_bits": (8, 8, 16),
}


def resolve(cfg):
    """Fill in the settings that depend on others, and refuse those that contradict each other.

    A flag counts most, then --side, then --variant, then the defaults of the task and the method.
    """
    check(cfg)
    if cfg.side:
        cfg = settings_of_side(cfg)
    else:
        check_used(cfg, METHODS)
    task = cfg.task or ("instruct" if cfg.base else "tiny")
    cfg = with_defaults(cfg, settings_of_run(cfg.variant, task))
    on_glue = TASKS[task] == "tasks.glue"
    contradictions.refuse(cfg, task, on_glue)
    column = 2 if task == "tiny" else 1 if on_glue else 0
    defaults = {name: row[column] for name, row in DEFAULTS.items()}
    if cfg.method == "lst":
        defaults["reduction"] = 8
    classifier = on_glue and (cfg.n_labels if cfg.side else not (cfg.eval_only or cfg.shots))
    defaults |= dict(
        task=task, optimizer="adamw", data_seed=cfg.seed,
        out_dir="out-eval" if cfg.eval_only else "out",
        head="classifier" if classifier else "lm", quant=METHODS[cfg.method][0],
        checkpoint=bool(cfg.base) and cfg.method in SIDE_METHODS,
    )
    cfg = with_defaults(cfg, defaults)
    if not cfg.eval_only:  # a base may be evaluated in any form
        check_quant(cfg.method, cfg.quant)
    return replace(cfg, **vars(side_config(cfg)))  # SideConfig fills in what is still None


def with_defaults(cfg, defaults):
    """The settings, with defaults in place of None."""
    missing = {name: value for name, value in defaults.items() if getattr(cfg, name) is None}
    return replace(cfg, **missing)


def settings_of_side(cfg):
    """Take the side network's settings from its checkpoint; refuse a flag with another value."""
    side, trained_on = read_side(cfg.side)
    if cfg.method not in (side.method, "qst"):
        raise InputError(f"--side {cfg.side} has --method {side.method}, not {cfg.method}.")
    own = vars(side) | dict(task=cfg.task, variant="paper")
    for f in fields(cfg):
        fixed = f.name in own and f.name not in ("method", "preamble")  # the task may be another
        if fixed and getattr(cfg, f.name) not in (f.default, own[f.name]):
            raise InputError(f"--{f.name} is fixed by --side {cfg.side}: remove the flag.")
    return replace(cfg, **own, quant=cfg.quant or trained_on.get("quant"))


# --------------------------------------------------------------------------------------
# Training


def train_step(runs, batches, iteration, models=None):
    """One iteration of all runs: accumulate gradients, clip, step.

    batches: [(idx, targets, share), ...], as `iteration_batches` yields them
    models: a `SharedBase` of the runs' models, if there is one already
    returns for each run the mean loss of a token, and whether the step was taken; see `Run.step`
    """
    models = models or share_base(runs)
    for idx, targets, share in batches:
        states = models.compute(to_device(idx, models.device) if models.compiled else idx)
        losses = (run.loss(states.pop(0), targets, share) for run in runs)
        if models.compiled:  # then all runs have one graph
            torch.autograd.backward(list(losses))
        else:
            for loss in losses:  # a run's graph is freed after its turn
                loss.backward()
    return [run.step(learning_rate_at(iteration - 1, run.cfg)) for run in runs]


def fit(runs, task, cfg):
    """Train the runs together. Each keeps its best side network, and loads it at the end.

    The state for --resume is saved with every evaluation, and when the runs are stopped. A run
    whose saved state is ahead of another's waits for it.
    """
    held_out = task.held_out[: cfg.eval_examples]

    def evaluate(some):
        losses = mean_loss(share_base(some), held_out, cfg.batch_size, "held out") if some else []
        for run, loss in zip(some, losses):
            run.record_evaluation(loss)

    new = [run for run in runs if not (cfg.resume and resume(run, cfg) or "error" in run.result)]
    # An untrained classifier is at chance, and with --cache_hidden the base may not be in memory.
    if new and not task.n_labels and not cfg.cache_hidden:
        for run, scores in zip(new, task.score(share_base(new))):
            run.log.before = scores
    evaluate(new)
    good = [run for run in runs if not run.error]
    start = min((run.log.iteration for run in good), default=cfg.max_iters)
    steps, models, iteration = cfg.gradient_accumulation_steps, share_base(runs, cfg.compile), start
    rows = prefetch(iteration_batches(task.train, cfg.batch_size, steps, cfg.data_seed, start))
    with ExitStack() as files, stop_signals() as stop_requests:
        for run in good:
            run.begin(files)
        for iteration in range(start + 1, cfg.max_iters + 1):
            batches = next(rows)
            active = [run for run in good if run.log.iteration < iteration and not run.error]
            if active and [run.model for run in active] != models.models:
                models = share_base(active, cfg.compile)
            for run in active:
                run.log.begin()
            results = train_step(active, batches, iteration, models) if active else []
            must_evaluate = iteration == cfg.max_iters or iteration % cfg.eval_interval == 0
            # To write and to ask other processes is to wait for the GPU: only at each log_interval.
            read_back = [run.record_step(*result, batches, must_evaluate)
                         for run, result in zip(active, results)]
            if must_evaluate:
                evaluate(active)
            must_stop = any(read_back) and any(distributed.join([bool(stop_requests)]))
            for run in active if any(read_back) else []:
                run.write(save=must_evaluate or must_stop)
            if must_stop or all(run.error for run in good):
                break
    for run in runs:
        with record_errors(run.result, cfg):
            run.end()
    if any(run.interrupted for run in good if not run.error):
        print(f"Stopped after iteration {iteration}: continue with --resume.", flush=True)


def resume(run, cfg):
    with record_errors(run.result, cfg):
        return leaf("resume").load(run)


def share_base(runs, compiled=False):
    return SharedBase([run.model for run in runs], compiled)


# --------------------------------------------------------------------------------------
# A run: base, task, model


def make_tiny_base(folder):
    """Train a LLaMA of a million weights on the stories of data/tasks/tiny.py, on the CPU."""
    tiny = leaf("tiny")
    cfg = TrainConfig(**tiny.BASE_RUN)
    with tiny.new_base(folder) as unfinished:
        tokenizer = load_tokenizer(unfinished)
        ids = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        torch.manual_seed(cfg.seed)
        model = Transformer(ModelConfig(tokenizer.vocab_size, **tiny.BASE, **ids))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.04)
        rows = iteration_batches(tiny.pretraining_examples(tokenizer), cfg.batch_size, 1, cfg.seed)
        run = Run(model, cfg)
        bar = progress(range(1, cfg.max_iters + 1), "base model, once")
        for iteration in bar:
            ((loss, _),) = train_step([run], next(rows), iteration)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        leaf("save").save_pretrained(model, unfinished)


def load_task(cfg, tokenizer, config):
    """Read the data: a `Task`."""
    task = leaf(cfg.task).load(cfg, tokenizer)
    check_length(config, cfg.sequence_len, "lower --sequence_len")
    for note in [*task.notes, *task.marked(tokenizer)]:
        print(note)
    if not cfg.eval_only and not (task.train and task.held_out):
        raise InputError(
            f"{cfg.data or 'The data'} leaves {len(task.train)} examples to train on and "
            f"{len(task.held_out)} held out: give more, or raise --sequence_len or --max_examples."
        )
    return task


def make_model(cfg, base, task, measure=channel_statistics):
    """The base with a new side network, or with that of --side; or only the base.

    measure: see `QST.calibrate`
    """
    if cfg.eval_only and not cfg.side:
        return base
    if cfg.side:
        model = load_model_of_side(cfg, base, task)
    else:
        new = dict(n_labels=task.n_labels, task=cfg.task if task.n_labels else "")
        model = add_trainable(base, replace(side_config(cfg), **new))
        model.calibrate(tuple(tuple(ids) for ids, _ in task.train[:64]), measure)
    return prepare(model, cfg)


def prepare(model, cfg):
    """Set what backward keeps, and put each part where it runs; returns the model."""
    if cfg.devices:
        leaf("placement").follow(model)
    model.chunk_loss = cfg.chunk_loss
    if cfg.method in IN_BASE_METHODS:
        model.base.checkpoint = cfg.checkpoint
    else:
        model.side.save_memory(cfg.checkpoint, cfg.h_f_bits)
    return model


def load_model_of_side(cfg, base, task):
    model = QST.from_side(base, cfg.side)
    model.side.config = side = replace(model.side.config, preamble=cfg.preamble)
    refuse_if(
        # Both halves of MNLI have the same labels; older side checkpoints do not name their task.
        (side.task and side.task.removesuffix("-mm") != cfg.task.removesuffix("-mm"),
         f"--side {cfg.side} is a classifier for --task {side.task}, and not {cfg.task}"),
        (side.n_labels != task.n_labels,
         f"--side {cfg.side} has {side.n_labels} labels, and --task {cfg.task} {task.n_labels}"),
    )
    return model


def train(settings, base, task, folder, cfg):
    """Score, train and score again; return the result of each run. settings: of each run"""
    results, runs, measure = [{} for _ in settings], [], cache(channel_statistics)
    for own, result in zip(settings, results):
        with record_errors(result, cfg):
            torch.manual_seed(own.seed)
            make_writable_folder(own.out_dir, "--out_dir")
            model = make_model(own, base, task, measure)
            result |= sizes(model, count_weights(model.config))
            runs.append(Run(model, own).keep_files(task, result, not runs, folder))
    refuse_other_processes(task, base, [run.model for run in runs], cfg.out_dir)
    if not runs:
        return results
    print_sizes(folder, runs, task.train)
    fit(runs, task, cfg)
    ended = [run for run in runs if not run.error and not run.interrupted]
    for run, new in zip(ended, task.score(share_base(ended)) if ended else []):
        new.setdefault("examples", len(task.held_out[: cfg.eval_examples]))
        run.result |= compared(run.log.before, new, run.cfg.method.upper())
    return results


def evaluate(settings, base, task, cfg):
    """Score each --side, or the base. If the scores have no loss, add the held-out loss."""
    models = SharedBase([make_model(own, base, task) for own in settings])
    refuse_other_processes(task, base, models.models, cfg.out_dir)
    results = task.score(models)
    if task.held_out and "loss" not in results[0]:
        losses = mean_loss(models, task.held_out, cfg.batch_size, "loss")
        results = [result | {"loss": loss} for result, loss in zip(results, losses)]
    n_weights = count_weights(base.config)
    return [result | sizes(model, n_weights) for result, model in zip(results, models.models)]


def main(cfg):
    """Train or evaluate as a `TrainConfig` says; return the content of result.json, or for a sweep
    that of sweep.json (data/README.md)."""
    distributed.start(first_device(cfg)[0], cfg)
    started, given, cfg = time.perf_counter(), cfg, resolve(cfg)
    runs = leaf("sweep").settings_of_runs(given, cfg, resolve) if cfg.sweep else {"": cfg}
    settings = list(runs.values())
    cfg = replace(settings[0], sweep=cfg.sweep, out_dir=cfg.out_dir)  # what all runs share
    make_writable_folder(cfg.out_dir, "--out_dir")

    with only_run_in([cfg.out_dir, *(own.out_dir for own in settings)]):
        make = lambda: cfg.base or leaf("tiny").base_folder(make_tiny_base)
        folder = distributed.in_turn(lambda: find_folder(make()))
        config, tokenizer = read_config(folder, cfg.layers), load_tokenizer(folder)
        task = load_task(cfg, tokenizer, config)
        cfg, *settings = map(task.settled, (cfg, *settings))
        base = load_base(from_pretrained, cfg, folder, config, task, settings)
        if cfg.sweep and not cfg.eval_only and not cfg.resume:  # which may still be refused
            write_json(Path(cfg.out_dir) / SETTINGS_FILE, asdict(given))
        results = (evaluate(settings, base, task, cfg) if cfg.eval_only
                   else train(settings, base, task, folder, cfg))
        for own, result in zip(settings, results):
            write_result(own, result, base.device, time.perf_counter() - started)
    if cfg.sweep:
        return leaf("sweep").conclude(given, dict(zip(runs, settings)), dict(zip(runs, results)))
    conclude(folder, cfg, results[0], task.example)
    return results[0]


def parse_args(argv=None):
    what = "Finetune a frozen 4-bit model through a side network."
    parser = Parser("train.py", usage="python train.py [--FLAG VALUE ...]", description=what)
    shown = {name: "{}, on GLUE {}, built-in {}".format(*row) for name, row in DEFAULTS.items()}
    return parse_settings(parser, TrainConfig, argv, PAPER | shown)


if __name__ == "__main__":
    run_main(lambda: main(parse_args()))
