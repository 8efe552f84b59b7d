"""No step waits for the GPU. Meta tensors have no values: whoever asks them for one fails. So what
runs on them never asks. tests/devices/test_gpu_runs.py asks a GPU itself."""


import pytest
import torch
from benchmarks.kernels import as_on_a_gpu
from helpers import shaken, small_base

import train
from data.frozen import prefix_cache
from data.frozen.hidden_cache import HiddenCache
from data.run.run import Run
from data.tasks.examples import collate
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained, read_config
from qst import QST, add_trainable

from train import TrainConfig

PREFIX = list(range(3, 23))


@pytest.mark.parametrize("changes", [
    {}, dict(optimizer="muon", weight_decay=0.1), dict(optimizer_bits=8),
    dict(optimizer="muon", optimizer_bits=8),
], ids=str)
@pytest.mark.parametrize("hit", [True, False], ids=["prefix", "another beginning"])
def test_a_step(changes, hit):
    """With each optimizer, and after a shared prefix, which is computed once, or another one."""
    settings = dict(base="any", data="any", reduction=4, rank=4) | changes
    cfg = train.resolve(TrainConfig(**settings))
    examples = [(PREFIX + rest, [-100] * 19 + rest + [2]) for rest in ([5, 9], [30, 31])]
    base = prefix_cache.share_prefix(small_base().to("meta"), examples)
    run = Run(add_trainable(base, train.side_config(cfg)), cfg)
    for group in run.optimizer.param_groups if cfg.optimizer_bits == 32 else ():
        group["fused"], group["foreach"] = True, False
    idx, targets = collate(examples)
    idx[1, 7] += not hit
    with as_on_a_gpu():
        for _ in range(2):
            ((loss, taken),) = train.train_step([run], [(idx, targets, 1.0)], 1)
    assert loss.is_meta and taken.is_meta
    assert (base.source.kept is not None) == hit


@pytest.mark.parametrize("changes", [{}, dict(h_f_bits=16), dict(downsample="avgpool")], ids=str)
def test_states_from_the_cache(changes, cfg, tiny_model, tmp_path):
    """After the epoch that writes them, forward and backward wait for nothing."""
    (tmp_path / "cache").mkdir()
    cfg = train.resolve(TrainConfig(**cfg | changes | dict(cache_hidden=str(tmp_path / "cache"))))
    config, tokenizer = read_config(tiny_model), load_tokenizer(tiny_model)
    task = train.load_task(cfg, tokenizer, config)
    cache = HiddenCache(cfg, [cfg], tiny_model, config, torch.float32, task)
    base = from_pretrained(tiny_model, "nf4", torch.float32)
    cache.attach(base, None)
    model = shaken(train.prepare(QST(base, train.side_config(cfg)), cfg))
    idx, targets = collate(task.train[:4])
    for device in ("cpu", "meta"):
        loss = model.to(device).loss(idx, targets)
        loss.backward()
        assert cache.is_read == loss.is_meta == (device == "meta")
