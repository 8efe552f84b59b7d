"""The side checkpoint on disk: whole at any moment, never a mixture, and of its base alone."""

import hashlib
import json
import os
import sys
from itertools import count

import pytest
import torch
from helpers import (
    change, is_a_sentence, refused, sign_again, small_base, small_config,
)
from mutants import VALUES, dump

from data import InputError
from data.formats.safetensors import read_header, read_safetensors, write_safetensors
from data.frozen.fingerprint import alike, fingerprint
from model import Transformer
from qst import QST, read_side, add_trainable
from side import SideConfig


def saved(folder, **settings):
    torch.manual_seed(0)
    model = add_trainable(small_base(), SideConfig(reduction=4, rank=4, **settings))
    model.save_side(folder)
    return model


def end_before_operation(n, folder):
    """Let this process die before its n-th opening or renaming of a file of a folder."""
    done = count()

    def hook(event, arguments):
        if event in ("open", "os.rename") and str(folder) in str(arguments[0]) and next(done) == n:
            os._exit(0)

    sys.addaudithook(hook)


def test_a_kill_leaves_the_old_or_the_new_one(tmp_path):
    """A process that dies between any two operations leaves a checkpoint that loads, all of the
    old one or all of the new one, though the settings of each would fit the other's weights."""
    idx, seen = torch.arange(5).unsqueeze(0), []
    models = [saved(tmp_path, downsample=kind) for kind in ("avgpool", "maxpool")]
    for model in models:
        model.side.alpha.data.fill_(0.5)
    logits = [model(idx)[0] for model in models]
    for n in range(6):
        models[0].save_side(tmp_path)
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            end_before_operation(n, tmp_path)
            models[1].save_side(tmp_path)
            os._exit(0)
        os.waitpid(child, 0)
        found = QST.from_side(small_base(), tmp_path)(idx)[0]
        seen += [i for i, expected in enumerate(logits) if torch.equal(found, expected)]
    assert seen == [0, 0, 1, 1, 1, 1]


def test_the_sum_is_of_the_file(tmp_path):
    """side.json has the SHA-256 of side.safetensors, and the settings of its metadata."""
    saved(tmp_path)
    about = json.loads((tmp_path / "side.json").read_text())
    content = (tmp_path / "side.safetensors").read_bytes()
    assert about.pop("sha256") == hashlib.sha256(content).hexdigest()
    assert json.loads(read_header(tmp_path / "side.safetensors")[1]["side"]) == about


def test_damaged_weights_are_refused(tmp_path):
    """One bit of a tensor, or the names of two that were swapped, are not what was saved."""
    saved(tmp_path)
    path = tmp_path / "side.safetensors"
    content = path.read_bytes()
    swapped = content.replace(b"q_proj", b"______").replace(b"k_proj", b"q_proj")
    swapped = swapped.replace(b"______", b"k_proj")
    for bad in (content[:-5] + bytes([content[-5] ^ 4]) + content[-4:], swapped):
        path.write_bytes(bad)
        refused(QST.from_side, small_base(), tmp_path, named=str(path))


def test_a_copy_that_says_otherwise(tmp_path):
    """A side.json of other weights does not count; one of these that was changed is refused."""
    saved(tmp_path)
    path = tmp_path / "side.json"
    good = path.read_text()
    path.unlink()
    assert read_side(tmp_path)[0].reduction == 4
    path.write_text(good)
    change(path, sha256="0" * 64, config={})
    assert read_side(tmp_path)[0].reduction == 4
    path.write_text(good)
    change(path, config=json.loads(good)["config"] | {"downsample": "lora"})
    assert "other settings" in refused(read_side, tmp_path, named=str(path))


def test_every_field_of_the_settings_by_every_type(tmp_path):
    """A value of any type, in the place of any setting, loads or is refused by the file's name."""
    saved(tmp_path)
    path, loaded = tmp_path / "side.json", []
    good = json.loads(path.read_text())
    del good["sha256"]
    path.unlink()
    weights = tmp_path / "side.safetensors"
    tensors = {name: read().clone() for name, read in read_safetensors(weights).items()}
    for table in (good, good["config"], good["base"]):
        for name, before in list(table.items()):
            for value in VALUES:
                table[name] = value
                write_safetensors(weights, tensors, {"side": dump(good).decode()})
                try:
                    read_side(tmp_path)
                    loaded.append((name, value))
                except InputError as error:
                    assert is_a_sentence(str(error), str(tmp_path)), error
            table[name] = before
    settings = SideConfig(reduction=4, rank=4, heads=1)
    for name, value in loaded:
        right = type(value) is type(getattr(settings, name, "text"))
        absent = name in ("heads", "layers") and value is None  # not in all files
        assert right or absent or name == "format", (name, value)


@pytest.mark.parametrize("settings, message", [
    (dict(rank=2), "has shape"), (dict(rank=8), "has shape"), (dict(reduction=1), "has shape"),
    (dict(rank=(1 << 20) - 1), "is more than the base's"),
    (dict(n_labels=2), "lacks classifier.weight"),
    (dict(method="qlora", reduction=16), "lacks layers.0"),
    (dict(downsample="linear"), "lacks"),
])
def test_settings_that_are_not_those_of_the_tensors(settings, message, tmp_path):
    """Also if they are signed: the modules that they make are not those of the file."""
    saved(tmp_path)
    config = json.loads((tmp_path / "side.json").read_text())["config"]
    sign_again(tmp_path, config=config | settings)
    assert message in refused(QST.from_side, small_base(), tmp_path)


def test_weights_that_are_no_numbers(tmp_path):
    """A NaN in a side network, or bytes for floats, are refused by the tensor's name."""
    saved(tmp_path)
    path = tmp_path / "side.safetensors"
    good = {name: read().clone() for name, read in read_safetensors(path).items()}
    for bad in (good["gamma"] * torch.nan, good["gamma"].byte(), good["gamma"] + torch.inf):
        sign_again(tmp_path, good | {"gamma": bad})
        assert "gamma" in refused(QST.from_side, small_base(), tmp_path, named=str(path))


# --------------------------------------------------------------------------------------
# What tells one base from another


def copies(**scaled):
    """The same random weights, or some of them times something, frozen in any way."""

    def make(quant, dtype, stored=torch.float32):
        torch.manual_seed(0)
        model = Transformer(small_config(attention_bias=True))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.data *= next((f for part, f in scaled.items() if part in name), 1.0)
        return model.to(stored).freeze(quant, dtype)

    return make


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("scaled", [
    dict(embed=3.0), dict(norm=2.0), dict(bias=1.02), dict(lm_head=1.1)
])
def test_another_finetune_is_another_base(quant, scaled, tmp_path):
    """Weights of the same signs, and the same codes, are not the same weights."""
    QST(copies()(quant, torch.float32), SideConfig(reduction=4)).save_side(tmp_path)
    other = copies(**scaled)(quant, torch.float32)
    assert "other weights" in refused(QST.from_side, other, tmp_path, named=str(tmp_path))


def test_a_scaled_matrix_is_another_base(tmp_path):
    """Also where it is not quantized, and only its values differ."""
    QST(copies()("none", torch.float32), SideConfig(reduction=4)).save_side(tmp_path)
    refused(QST.from_side, copies(q_proj=1.5)("none", torch.float32), tmp_path, named=str(tmp_path))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_copies_in_other_dtypes_are_the_same_base():
    """Stored in fp32, bf16 or fp16, and loaded in any of them: the same up to rounding, also of
    values that fp16 rounds to its smallest step or to 0."""
    made = copies(norm=1e-5, embed=1e-8)
    bases = (made("none", dtype, stored) for dtype in DTYPES for stored in DTYPES)
    samples = [fingerprint(base)["values"] for base in bases]
    assert all(alike(a, b) for a in samples for b in samples)
    assert not alike(samples[0], samples[0][:-4]) and len(set(samples)) > 1
