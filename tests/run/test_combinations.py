"""What can be combined: caches, devices; sweeps with compilation and checkpoints."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import left, small_config

import train
from data import InputError
from data.formats.save import save_pretrained
from data.run.state import FILES
from model import Transformer, read_config
from qst import QST
from train import TrainConfig


def test_a_cache_of_a_base_on_several_devices(cfg, tmp_path):
    """It is that of a base on one device."""
    cfg |= dict(h_f_bits=16, max_iters=12)
    for devices in ("", "cpu,cpu"):
        cached = dict(cache_hidden=str(tmp_path / f"cache{devices}"), devices=devices)
        for name in ("writing", "reading"):
            result = train.main(TrainConfig(**cfg | cached))
        assert result["cached_iterations"] == 12
    states = [(tmp_path / f"cache{end}" / "states.bin").read_bytes() for end in ("", "cpu,cpu")]
    assert states[0] == states[1]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_sweep(cfg, tmp_path, monkeypatch):
    """Each run is what it is alone, up to rounding. (Without the C++ code, which takes long.)"""
    compiler = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    layer = shutil.copytree(cfg["base"], tmp_path / "layer")  # of one layer, which takes less long
    torch.manual_seed(0)
    size = read_config(layer).vocab_size
    save_pretrained(Transformer(small_config(vocab_size=size, n_layer=1, max_positions=128)), layer)
    cfg |= dict(base=str(layer), max_iters=3, eval_interval=3)
    found = {}
    for compiled in (False, True):
        table = train.main(TrainConfig(**cfg, sweep="gate=scalar,sum", compile=compiled))
        found[compiled] = {row["settings"]: row["loss"] for row in table["runs"]}
    assert found[True] == pytest.approx(found[False], abs=1e-4)
    assert len(set(found[True].values())) == 2


def test_a_run_that_cannot_be_made_is_a_row(cfg):
    """The other runs of a sweep are what they would have been; so it is with one whose state does
    not fit."""
    cfg |= dict(max_iters=8)
    table = train.main(TrainConfig(**cfg, sweep="reduction=4,3 seed=1,2"))
    errors = {row["settings"]: row.get("error", "") for row in table["runs"]}
    for seed in (1, 2):
        assert "--reduction 3 does not divide" in errors[f"reduction=3,seed={seed}"]
        assert not errors[f"reduction=4,seed={seed}"]
    out = Path(cfg["out_dir"])
    expected = left(out / "reduction=4,seed=1")
    shutil.copy(out / "reduction=4,seed=1" / FILES[0], out / "reduction=4,seed=2" / FILES[0])
    again = cfg | dict(resume=True)
    table = train.main(TrainConfig(**again, sweep="reduction=4 seed=1,2"))
    errors = {row["settings"]: row.get("error", "") for row in table["runs"]}
    assert "was begun with another --seed" in errors["reduction=4,seed=2"]
    assert left(out / "reduction=4,seed=1") == expected
    kept = (out / "settings.json").read_text()
    with pytest.raises(InputError, match="ended well.* begun with another --sequence_len"):
        train.main(TrainConfig(**again | dict(sequence_len=80), sweep="reduction=4 seed=1,2"))
    assert (out / "settings.json").read_text() == kept  # for the next --resume
    with pytest.raises(InputError, match="No run of the sweep has ended well"):
        train.main(TrainConfig(**cfg, sweep="reduction=3,5"))


def test_a_side_network_that_cannot_be_loaded_is_a_row(cfg, monkeypatch):
    """At the end of a sweep the other runs have their results."""
    load = QST.load_side

    def refusing(model, folder):
        if "gate=sum" in str(folder):
            raise InputError("It is damaged.")
        return load(model, folder)

    monkeypatch.setattr(QST, "load_side", refusing)
    table = train.main(TrainConfig(**cfg, sweep="gate=scalar,sum"))
    errors = {row["settings"]: row.get("error", "") for row in table["runs"]}
    assert errors == {"gate=scalar": "", "gate=sum": "It is damaged."}
    assert (Path(cfg["out_dir"]) / "gate=scalar" / "result.json").exists()


def test_a_cache_of_fewer_bits(cfg, tmp_path):
    """It is refused to runs that read more; one of more bits serves them all."""
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), max_iters=2)
    train.main(TrainConfig(**cfg, h_f_bits=8))
    train.main(TrainConfig(**cfg, h_f_bits=4))
    with pytest.raises(InputError, match="--cache_hidden .* is of fewer --h_f_bits: give another"):
        train.main(TrainConfig(**cfg, h_f_bits=16))


def test_the_base_answers_once(cfg, monkeypatch):
    """What it said at the start is in the state, and in the result of a run that goes on."""
    asked = []

    def samples(model, *_):
        asked.append(model.side.alpha.item())
        return [dict(prompt="q", expected="e", answer=f"a{len(asked)}")]

    monkeypatch.setattr("data.tasks.instruct.samples", samples)
    train.main(TrainConfig(**cfg | dict(max_iters=2)))
    result = train.main(TrainConfig(**cfg | dict(max_iters=4, resume=True)))
    assert asked[0] == 1.0 and len(asked) == 3 and 1.0 not in asked[1:]
    assert result["samples"] == [dict(prompt="q", expected="e", answer="a1", QST="a3")]
