"""Flags of train.py that contradict each other: what is so, and the sentence that refuses it."""

import os
import shutil
from pathlib import Path

from data.settings.flags import SETTINGS_FILE, default_out_dir, refuse_if
from data.settings.methods import SIDE_METHODS


def refuse(cfg, task, on_glue):
    """Refuse settings before anything is loaded. cfg: as given, with None where nothing is"""
    cores = os.cpu_count() or 1
    no_classifier = cfg.eval_only and not cfg.side
    out_dir = cfg.out_dir or default_out_dir(cfg.eval_only)
    beside = cfg.method in SIDE_METHODS  # whether a side network learns, and not the base
    refuse_if(
        (cfg.base and not cfg.data,
         "--base needs --data, the task's file or folder: see --data in --help"),
        (cfg.data and not cfg.base, "--data needs --base: the folder of a LLaMA or OPT model"),
        (bool(cfg.base) == (task == "tiny"),
         f"--task {task} is not for this: all but tiny need --base, and tiny has its own"),
        (cfg.dtype == "fp16" and cfg.method == "full",
         "weights in 16 bits cannot learn in --dtype fp16: give bf16 or fp32"),
        (cfg.optimizer == "muon" and cfg.optimizer_bits == 8,
         "--optimizer_bits 8 is of --optimizer adamw, and not of muon"),
        (cfg.stream and (cfg.task == "tiny" or not cfg.base or cfg.devices or cfg.compile),
         "--stream needs a --base, and is neither for --devices nor for --compile"),
        (cfg.threads > cores, f"--threads {cfg.threads} is more than this machine's {cores}"),
        (cfg.shots and (not on_glue or cfg.head == "classifier"),
         f"--shots {cfg.shots}{f', with which --side {cfg.side} was trained,' if cfg.side else ''} "
         "stand before questions in words: they need a --task of GLUE, and --head lm"),
        (cfg.eval_only and cfg.resume, "--resume goes on with training: leave out --eval_only"),
        (cfg.head == "classifier" and not on_glue, f"--head classifier is not of --task {task}"),
        (cfg.samples_interval and task not in ("tiny", "instruct"),
         f"--samples_interval is of --task tiny and instruct, and not of {task}"),
        (cfg.instructions and task != "mmlu", f"--instructions is for --task mmlu, not {task}"),
        (cfg.method == "lst" and cfg.mix not in (None, "side"),
         "--method lst predicts from the side network alone: leave out --mix, --variant"),
        (cfg.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
         "--compile needs a C++ compiler, and there is none here"),
        (cfg.sweep and not beside, "--sweep is for --method qst and lst: train the others alone"),
        (cfg.cache_hidden and (cfg.eval_only or cfg.compile or not beside),
         "--cache_hidden is for training side networks, without --compile"),
        (cfg.cache_hidden and cfg.side and cfg.repair,
         f"--cache_hidden stores the states of a base with a --repair of its own, and --side "
         f"{cfg.side} has another: leave out --cache_hidden"),
        (cfg.head == "classifier" and no_classifier,
         "--head classifier: the base has none; give --head lm, or --side"),
        (cfg.eval_only and (Path(out_dir) / SETTINGS_FILE).exists(),
         f"--out_dir {out_dir} has a run whose result.json this would replace: give another"),
    )
