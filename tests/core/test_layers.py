"""--layers K: a classifier's base ends after its K-th layer, and nothing later is read."""

import json
import re

import pytest
import torch
from helpers import FIXTURES, change, copy_folder, glue_run, sign_again, small_config

import train
from account import AccountConfig, memory_report, parse_args, settings_of_step, untrained
from account import main as account
from data import IGNORE_INDEX, InputError, leaf
from data.devices.device import loss_and_kept
from data.formats import hub
from data.formats.config_json import first_layers
from data.formats.safetensors import write_safetensors
from data.frozen.fingerprint import fingerprint
from data.run import checkpoint
from data.run.resume import refuse_others
from model import PRESETS, from_pretrained, quantize_folder, read_config
from qst import QST, FinetunedModel
from qst import main as qst
from side import SideConfig
from train import TrainConfig

NUMBER = r"(?:.*\.)?layers\.(\d+)\."
IN_BASE = dict(reduction=None)


def cut(folder, target, layers):
    """Cut a folder by hand: write its files without the later layers."""
    files = hub.find_files(folder)
    number = {name: re.match(NUMBER, name) for name in files}
    kept = {n: read() for n, read in files.items() if not number[n] or int(number[n][1]) < layers}
    target.mkdir()
    write_safetensors(target / "model.safetensors", kept)
    about = json.loads((folder / "config.json").read_text()) | dict(num_hidden_layers=layers)
    about |= {n: about[n][:layers] for n in ("no_rope_layers", "layer_types") if n in about}
    (target / "config.json").write_text(json.dumps(about))
    for path in folder.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name, layers", [
    ("llama_gqa", 1), ("smollm3", 2), ("smollm3", 1), ("qwen3", 1), ("opt_pre", 1), ("opt_350m", 1),
])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_first_layers_are_a_model_that_was_cut(name, layers, quant, tmp_path):
    """Its config, its fingerprint and its states are those of a folder without later layers."""
    whole = read_config(FIXTURES / name)
    assert layers < whole.n_layer
    load = lambda folder, **how: from_pretrained(folder, quant, torch.float32, **how)
    ours = load(FIXTURES / name, layers=layers)
    theirs = load(cut(FIXTURES / name, tmp_path / "cut", layers))
    assert ours.config == theirs.config and fingerprint(ours) == fingerprint(theirs)
    idx = torch.randint(3, 30, (2, 9))
    assert torch.equal(ours(idx), theirs(idx))
    assert len(list(ours.states(idx))) == layers + 2
    complete = load(FIXTURES / name, layers=whole.n_layer)
    assert complete.config == whole and torch.equal(complete(idx), load(FIXTURES / name)(idx))


@pytest.mark.parametrize("stream", [False, True])
def test_later_layers_are_never_read(tiny_model, tmp_path, monkeypatch, stream):
    """No reader of theirs is called, in 4 bits too: neither a weight's nor its scales'."""
    packed, found, find = tmp_path / "nf4", set(), hub.find_files
    quantize_folder(tiny_model, packed)
    noted = lambda name, read: lambda: found.add(name) or read()
    watched = lambda folder: {name: noted(name, read) for name, read in find(folder).items()}
    monkeypatch.setattr(hub, "find_files", watched)
    base = from_pretrained(packed, "nf4", torch.float32, stream=stream, layers=2)
    list(base.states(torch.arange(3, 9)[None]))
    numbers = {int(found[1]) for found in (re.match(NUMBER, name) for name in found) if found}
    assert numbers == {0, 1} and len(base.layers) == 2
    assert any("absmax" in name for name in found) and "model.norm.weight" in found


def test_a_folder_is_still_compared_with_its_config(tmp_path):
    """A layer more or less than config.json says is refused, also where it is not used."""
    folder = copy_folder("smollm3", tmp_path, num_hidden_layers=4, no_rope_layers=None)
    with pytest.raises(InputError, match=r"lacks layers\.3"):
        from_pretrained(folder, "none", layers=1)
    change(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(InputError, match=r"has layers\.2"):
        from_pretrained(folder, "none", layers=1)


@pytest.mark.parametrize("settings", [
    {}, dict(variant="fast", reduction=4), dict(method="lst"), dict(method="qlora") | IN_BASE,
    dict(method="adapter") | IN_BASE, dict(method="full", learning_rate=1e-3) | IN_BASE,
], ids=["qst", "fast", "lst", "qlora", "adapter", "full"])
def test_a_run_is_that_of_a_base_that_was_cut(tiny_model, glue_folder, tmp_path, settings):
    """What is trained and its scores, bit for bit; the checkpoint knows the number of layers."""
    task = dict(task="sst2", max_iters=10, eval_interval=5) | settings
    ours = glue_run(tiny_model, glue_folder, tmp_path / "a", layers=2, **task)
    theirs = glue_run(cut(tiny_model, tmp_path / "cut", 2), glue_folder, tmp_path / "b", **task)
    assert checkpoint.read(tmp_path / "a", SideConfig)[0].layers == 2
    tensors = [checkpoint.load(tmp_path / name) for name in "ab"]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    for name in ("accuracy_after", "loss_after", "total_parameters", "weights_bytes"):
        assert ours[name] == theirs[name], name
    scored = dict(task="sst2", side=str(tmp_path / "a"), eval_only=True, reduction=None)
    again = glue_run(tiny_model, glue_folder, tmp_path / "eval", **scored)
    assert again["accuracy"] == ours["accuracy_after"] and again["config"]["layers"] == 2


def test_a_checkpoint_of_two_layers(tiny_model, glue_folder, tmp_path):
    """Other numbers of layers are refused by a sentence that says what to do; a base of Python's
    too. A checkpoint of an older commit has all layers, and a run continues."""
    out, task = tmp_path / "out", dict(task="sst2", max_iters=4, eval_interval=4)
    glue_run(tiny_model, glue_folder, out, layers=2, **task)
    with pytest.raises(InputError, match="--layers is fixed by --side .*: remove the flag"):
        glue_run(tiny_model, glue_folder, tmp_path / "b", side=str(out), layers=1, **task)
    with pytest.raises(InputError, match="another --layers, 2 and not 3"):
        glue_run(tiny_model, glue_folder, out, layers=3, resume=True, **task)
    with pytest.raises(InputError, match="another --layers, 0 and not 2"):
        refuse_others(out, {}, dict(layers=2))  # a state of an older commit
    more = task | dict(max_iters=8)
    assert glue_run(tiny_model, glue_folder, out, layers=2, resume=True, **more)["iterations"] == 8
    with pytest.raises(InputError, match="was trained on another base"):
        QST.from_side(from_pretrained(tiny_model, "nf4", torch.float32), out)
    base = from_pretrained(tiny_model, "nf4", torch.float32, layers=2)
    assert QST.from_side(base, out).side.n_layer == 2
    with pytest.raises(InputError, match="is a classifier: score it with train.py --eval_only"):
        qst(["--base", str(tiny_model), "--side", str(out), "--prompt", "a"])
    glue_run(tiny_model, glue_folder, tmp_path / "all", **task)
    side = json.loads((tmp_path / "all/side.json").read_text())["config"]
    assert side.pop("layers") == 0
    sign_again(tmp_path / "all", config=side)
    scored = dict(task="sst2", eval_only=True, side=str(tmp_path / "all"))
    assert glue_run(tiny_model, glue_folder, tmp_path / "old", **scored)["config"]["layers"] == 0


@pytest.mark.parametrize("settings, message", [
    (dict(layers=4), "--layers 4: give 1 to 3, all that the base has"),
    (dict(layers=-1), "--layers -1 must be at least 0"),
    (dict(layers=2, every=3), "--every 3 does not divide 2 layers"),
    (dict(layers=2, head="lm"), "give a GLUE --task without --head lm"),
    (dict(layers=2, shots=2), "without --head lm and --shots"),
    (dict(layers=2, eval_only=True), "and with --eval_only a --side"),
    (dict(layers=2, task="instruct"), "--layers 2 ends the base early, for a classifier"),
    (dict(sweep="layers=1,2"), "--sweep layers=1,2: it takes"),
])
def test_mistakes(tiny_model, glue_folder, tmp_path, settings, message):
    """Each is one sentence, before the base is loaded."""
    with pytest.raises(InputError, match=message) as error:
        glue_run(tiny_model, glue_folder, tmp_path / "out", **dict(task="sst2") | settings)
    assert "\n" not in str(error.value)
    if "give 1 to" not in message and "every" not in message:
        cfg = dict(base="shape", data="any", task="sst2") | settings
        with pytest.raises(InputError, match=message):
            cfg = TrainConfig(**cfg)
            leaf("sweep").settings_of_runs(cfg, train.resolve(cfg), train.resolve)


def test_it_combines(tiny_model, packed, glue_folder, tmp_path):
    """A sweep, two devices, streaming and the cache give the loss of a plain run; a cache of other
    layers is refused."""
    task = dict(task="sst2", max_iters=6, eval_interval=3, layers=2, h_f_bits=16)

    def run(name, base=tiny_model, **how):
        return glue_run(base, glue_folder, tmp_path / name, **task | how)

    loss, cache = run("plain")["loss_after"], dict(cache_hidden=str(tmp_path / "cache"))
    assert run("sweep", sweep="every=1,2")["runs"][0]["loss"] <= loss
    swept = json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]
    assert loss in [row["loss"] for row in swept]
    assert run("devices", devices="cpu,cpu")["loss_after"] == pytest.approx(loss)
    assert run("stream", packed, stream=True)["loss_after"] == loss
    for name in ("writes", "reads"):
        assert run(name, **cache)["loss_after"] == pytest.approx(loss, rel=2e-2)
    for layers in (0, 1):
        with pytest.raises(InputError, match="is of another --layers: give another folder"):
            run("other", layers=layers, **cache)
    with pytest.raises(InputError, match="--layers 2 of --side .*plain ends the base early"):
        how = dict(task="text", side=str(tmp_path / "plain"), eval_only=True)
        glue_run(tiny_model, glue_folder, tmp_path / "text", **how)


@pytest.mark.parametrize("method", ["qst", "qlora"])
def test_the_account_counts_the_first_layers(method, tmp_path, monkeypatch):
    """It is the account of a model that was cut, with a classifier, and what a real step keeps."""
    config = small_config(n_layer=3)
    side = dict(reduction=2) if method == "qst" else {}
    cfg = AccountConfig(method=method, task="sst2", batch_size=3, sequence_len=12, device="cpu",
                        layers=2, **side)
    shorter = first_layers(config, 2)
    report = memory_report(cfg, shorter)
    cfg = settings_of_step(cfg)
    model = untrained(cfg, shorter, torch.float32, "cpu")
    idx = torch.zeros(3, 12, dtype=torch.long)
    targets = torch.full_like(idx, IGNORE_INDEX)
    targets[:, -1] = 0
    assert report["activations_bytes"] == loss_and_kept(model, idx, targets)[1]
    assert model.side.classifier is not None and isinstance(model, FinetunedModel)
    monkeypatch.setitem(PRESETS, "small", config)
    flags = f"--preset small --task sst2 --method {method} --checkpoint false --out_dir {tmp_path}"
    weights = [account(parse_args([*flags.split(), *more.split()]))[0]["weights_bytes"]
               for more in ("--sequence_len 12", "--sequence_len 12 --layers 2")]
    assert weights[1] < weights[0]
