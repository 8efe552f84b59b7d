"""Combinations of train.py flags that are not allowed, each with its error message."""

import shutil
from pathlib import Path

from data.settings.flags import SETTINGS_FILE, refuse_if
from data.settings.methods import SIDE_METHODS


def refuse(cfg, task, on_glue):
    """Refuse settings before anything is loaded. cfg: as given, None where no flag was given"""
    out_dir = cfg.out_dir or ("out-eval" if cfg.eval_only else "out")
    of_side = f" of --side {cfg.side}" if cfg.side else ""
    beside = cfg.method in SIDE_METHODS  # a side network is trained, and not the base
    refuse_if(
        (cfg.base and not cfg.data,
         "--base needs --data, the task's file or folder: see --data in --help"),
        (cfg.data and not cfg.base, "--data needs --base: a model's folder or its name on the Hub"),
        (bool(cfg.base) == (task == "tiny"),
         f"--task {task}: all tasks but tiny need --base, and tiny has its own base"),
        (cfg.dtype == "fp16" and cfg.method == "full",
         "--method full cannot train weights in --dtype fp16: give bf16 or fp32"),
        (cfg.stream and (not cfg.base or cfg.devices or cfg.compile),
         "--stream needs --base, and works without --devices and --compile"),
        (cfg.shots and (not on_glue or cfg.head == "classifier"),
         f"--shots {cfg.shots}{of_side} needs a GLUE --task and --head lm"),
        (cfg.layers and (not on_glue or cfg.head == "lm" or cfg.shots
                        or not cfg.side and cfg.eval_only),
         f"--layers {cfg.layers}{of_side} ends the base early, for a classifier: give a GLUE "
         "--task without --head lm and --shots, and with --eval_only a --side"),
        (cfg.epochs and (cfg.max_iters or cfg.eval_only),
         "--epochs sets the iterations of training: leave out --max_iters and --eval_only"),
        (cfg.eval_only and cfg.resume, "--resume continues training: leave out --eval_only"),
        (cfg.resume and not (cfg.base or cfg.sweep or (Path(out_dir) / SETTINGS_FILE).exists()),
         f"--resume: {out_dir} has no run to continue: give its --out_dir"),
        (cfg.head == "classifier" and not on_glue, f"--head classifier is not for --task {task}"),
        (cfg.instructions and task != "mmlu", f"--instructions is for --task mmlu, not {task}"),
        (cfg.method == "lst" and cfg.mix not in (None, "side"),
         "--method lst predicts from the side network only: leave out --mix and --variant"),
        (cfg.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))),
         "--compile needs a C++ compiler, and there is none here"),
        (cfg.sweep and not beside, "--sweep is for --method qst and lst: train the others alone"),
        (cfg.sweep and cfg.eval_only, "--sweep trains: evaluate each --side alone"),
        (cfg.cache_hidden and (cfg.eval_only or cfg.compile or not beside),
         "--cache_hidden is for training side networks, without --compile"),
        (cfg.head == "classifier" and cfg.eval_only and not cfg.side,
         "--head classifier: the base has none; give --head lm, or --side"),
        (cfg.eval_only and (Path(out_dir) / SETTINGS_FILE).exists(),
         f"--out_dir {out_dir} has a run whose result.json this would replace: give another"),
    )
