"""data/frozen/prefix_cache.py: a prefix read once, and all of it each time, say the same."""

import numpy as np
import pytest
import torch
from helpers import FAMILIES, curves, each_family, small_base

import train
from data import IGNORE_INDEX
from data.frozen import prefix_cache
from data.tasks.examples import collate
from model import quantize_folder
from qst import add_trainable
from quant import Linear4bit
from side import SideConfig
from train import TrainConfig

PREFIX = list(range(3, 23))


def answered(*rests):
    """Examples that begin alike, with a target at each of their other tokens."""
    asked_of = lambda rest: [IGNORE_INDEX] * (len(PREFIX) - 1) + rest + [2]
    return [(PREFIX + rest, asked_of(rest)) for rest in rests]


@each_family
@pytest.mark.parametrize("settings", [{}, dict(every=3, standardize=True), dict(method="lst")],
                         ids=["paper", "every", "lst"])
def test_as_without(family, settings):
    """Loss, gradients and the states that standardize it; and how much a layer computes of them."""
    examples = answered([5, 9, 30], [31, 32, 33, 34, 35], [7, 40], [11, 12, 13])
    found = []
    for attach in (lambda base, _: base, prefix_cache.share_prefix):
        base, lengths = attach(small_base(**FAMILIES[family]), examples), []
        own = base.layers[1].mlp.forward
        base.layers[1].mlp.forward = lambda x, own=own: lengths.append(x.shape[1]) or own(x)
        torch.manual_seed(0)
        model = add_trainable(base, SideConfig(reduction=4, rank=4, **settings))
        model.calibrate([ids for ids, _ in examples])
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for half in (examples[:2], examples[2:]):
            loss = model.loss(*collate(half))
            loss.backward()
        found.append([loss, *(p.grad for p in model.parameters()), *model.side.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    expected = [20, 5] * ("standardize" in settings) + [20] * ("standardize" not in settings)
    assert lengths == expected + [5, 3]  # the prefix once, and then what comes after it


def test_what_begins_otherwise_is_read_whole():
    """Another beginning in one row, too short a batch, padding on the left, and generation."""
    alone, base = small_base(), small_base()
    prefix_cache.share_prefix(base, answered([5, 9], [30]))
    rows = torch.tensor([PREFIX + [5, 9], PREFIX + [30, 0]])
    other = rows.clone()
    other[1, 3] = 60
    keep = torch.ones_like(rows)
    keep[0, :2] = 0
    for idx, args in ((rows, ()), (other, ()), (rows[:, :20], ()), (rows[:, :21], ()),
                      (rows, (keep,)), (rows[:1], ())):
        torch.testing.assert_close(base(idx, *args), alone(idx, *args), rtol=1e-4, atol=1e-4)
    assert torch.equal(base.generate(rows, 4), alone.generate(rows, 4))


def test_a_prefix_must_be_worth_it():
    def kept(examples):
        return prefix_cache.share_prefix(small_base(), examples).source is not None

    assert kept(answered([5, 9], [30]))
    assert not kept([(ids[13:], targets[13:]) for ids, targets in answered([5, 9], [30])])
    assert not kept([(PREFIX[:8], []), (PREFIX, [])])  # one id must be left of each
    assert not kept(answered([5] * 190, [9] * 190))  # less than a tenth
    assert not kept([])


@pytest.mark.parametrize("settings", [
    {}, dict(variant="fast"), dict(stream=True),
    dict(sweep="seed=1,2"), dict(method="lst", quant="nf4"), dict(cache_hidden="cache"),
    dict(sweep="learning_rate=1e-2,1e-3", cache_hidden="cache"),
    dict(devices="cpu,cpu"), dict(method="adapter", quant="nf4", reduction=None),
], ids=lambda settings: ", ".join(map(str, settings.values())) or "paper")
def test_runs(settings, cfg, tiny_model, tmp_path, monkeypatch):
    """A run's losses are those of one without. The base computes less, but where its layers
    learn."""
    if settings.get("stream"):
        quantize_folder(tiny_model, tmp_path / "nf4")
        cfg |= dict(base=str(tmp_path / "nf4"))
    tokens, forward = [], Linear4bit.forward

    def counted(layer, x):
        tokens.append(x.shape[:-1].numel())
        return forward(layer, x)

    monkeypatch.setattr(Linear4bit, "forward", counted)
    found, computed = [], []
    for name, worth in (("alone", 1000), ("prefix", 4)):  # the plain frame has more than 4
        monkeypatch.setattr(prefix_cache, "SHORTEST_PREFIX", worth)
        tokens.clear()
        own = dict(out_dir=str(tmp_path / name), max_iters=4)
        if "cache_hidden" in settings:
            own |= dict(cache_hidden=str(tmp_path / f"{name}-cache"))
        train.main(TrainConfig(**cfg | settings | own))
        logs = sorted((tmp_path / name).rglob("log.csv"))
        found.append(np.stack([curves(log.parent) for log in logs]))
        computed.append(sum(tokens))
    np.testing.assert_allclose(*found, atol=1e-4)
    without = settings.get("method") == "adapter"
    assert computed[0] == computed[1] if without else computed[0] > 1.05 * computed[1]
