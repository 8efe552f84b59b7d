"""data/frozen/hidden_cache.py: an epoch from the cache is one with the base; others are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import curves, left, short_run, small_config

import train
from data import InputError
from data.formats.save import save_pretrained
from data.frozen.hidden_cache import targets_by_ids
from data.tasks.scoring import choice_logits
from model import Transformer, quantize_folder, read_config
from quant import Linear4bit
from train import TrainConfig


@pytest.fixture
def cfg(cfg):
    """Half of the data: an epoch has four iterations."""
    data = Path(cfg["data"])
    data.write_text("\n".join(data.read_text().split("\n")[:20]))
    return cfg | dict(max_iters=6, eval_interval=2, held_out=0.2)


@pytest.fixture
def asked(monkeypatch):
    """A list with an item for each product of a 4-bit layer."""
    calls, forward = [], Linear4bit.forward

    def counted(layer, x):
        calls.append(1)
        return forward(layer, x)

    monkeypatch.setattr(Linear4bit, "forward", counted)
    return calls


@pytest.mark.parametrize(
    "settings, atol",
    [(dict(h_f_bits=16), 2e-3), (dict(h_f_bits=16, dtype="bf16"), 2e-2),
     (dict(h_f_bits=8), 5e-3), (dict(h_f_bits=4), 0.1),
     (dict(downsample="avgpool"), 2e-3), (dict(downsample="maxpool", task="text"), 2e-3),
     (dict(standardize=True, gate="sum", downsample="linear", h_f_bits=16), 1e-2),
     (dict(every=3, read_embedding=False, h_f_bits=16), 1e-2),
     (dict(n_embd=64, h_f_bits=8), 5e-3), (dict(n_embd=64, h_f_bits=4, dtype="bf16"), 0.1),
     (dict(devices="cpu,cpu", h_f_bits=16), 2e-3)],
    ids=["16", "bf16", "8", "4", "avgpool", "maxpool, text", "fast", "every", "8, whole blocks",
         "4, whole blocks, bf16", "devices"],
)
def test_as_with_the_base(settings, atol, cfg, asked, tiny_model, tmp_path):
    """A run that writes the cache and one that reads it have the losses of one without: to rounding
    with 16 bits. Once all is written, no layer of the base is asked."""
    if settings.get("task") == "text":
        Path(cfg["data"]).with_suffix(".txt").write_text("Leo went to the mill. " * 200)
        cfg |= dict(data=str(Path(cfg["data"]).with_suffix(".txt")), sequence_len=32)
    if n_embd := settings.get("n_embd"):  # whose states are kept, and come, packed
        cfg |= dict(base=str(shutil.copytree(tiny_model, tmp_path / "wide")))
        size = read_config(tiny_model).vocab_size
        config = small_config(vocab_size=size, n_embd=n_embd, max_positions=128)
        torch.manual_seed(0)  # and not what the tests before this one have left
        save_pretrained(Transformer(config), cfg["base"])
    cfg |= {name: value for name, value in settings.items() if name != "n_embd"}
    found, counts = [], []
    for name in ("alone", "writing", "reading"):
        asked.clear()
        cached = {} if name == "alone" else dict(cache_hidden=str(tmp_path / "cache"))
        result = train.main(TrainConfig(**cfg | cached | dict(out_dir=str(tmp_path / name))))
        found.append(curves(tmp_path / name))
        counts.append(len(asked))
        read = result["cached_iterations"]
        assert read == 0 if name == "alone" else read >= 2
        assert result["loss_after"] < result["loss_before"]
    for curve in found[1:]:
        np.testing.assert_allclose(curve, found[0], atol=atol, rtol=0)
        # Rounding grows with the iterations: the first four are nearer.
        np.testing.assert_allclose(curve[:4], found[0][:4], atol=atol / 4, rtol=0)
    assert counts[2] == 0 < counts[1] < counts[0] and read == 6


def test_goes_on_and_mends(cfg, asked, tmp_path):
    """What an interrupted run has written serves the next; of a damaged file only the damage is
    made again, with the same bytes; what is generated has the base."""
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), h_f_bits=16)
    train.main(TrainConfig(**cfg | dict(max_iters=1)))
    sums = np.fromfile(tmp_path / "cache" / "sums.bin", np.uint32)
    assert 0 < (sums == 0).sum() < len(sums)
    asked.clear()
    train.main(TrainConfig(**cfg))
    first = len(asked)
    states = (tmp_path / "cache" / "states.bin").read_bytes()
    assert np.fromfile(tmp_path / "cache" / "sums.bin", np.uint32).all() and first
    expected = left(cfg["out_dir"])
    damaged = bytearray(states)
    damaged[1000] ^= 1
    (tmp_path / "cache" / "states.bin").write_bytes(damaged)
    asked.clear()
    train.main(TrainConfig(**cfg))
    assert 0 < len(asked) <= 3 * 7 * 2 < first
    np.testing.assert_allclose(curves(cfg["out_dir"])[:4], np.array(
        [float(cell or "nan") for row in expected[1][1:3] for cell in row[1:3]]), atol=2e-3)
    mended = np.frombuffer((tmp_path / "cache" / "states.bin").read_bytes(), np.uint8)
    assert (mended != np.frombuffer(states, np.uint8)).mean() < 0.05
    asked.clear()
    train.main(TrainConfig(**cfg))
    assert not asked


@pytest.mark.parametrize("stream", [False, True])
def test_the_base_is_loaded_again_to_answer(stream, cfg, tmp_path, monkeypatch):
    """After training the layers come back, generate (not beside --stream), and score as ever."""
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), h_f_bits=16, stream=stream)
    if stream:
        quantize_folder(cfg["base"], tmp_path / "nf4")
        cfg |= dict(base=str(tmp_path / "nf4"))
    found = []
    load = train.load_task

    def asking(*args):
        task = load(*args)
        idx = torch.tensor([[1, 5, 9]])
        said = lambda model: [] if stream else model.generate(idx, 6).tolist()
        scored = lambda beside: choice_logits(beside, idx.tolist())[0].tolist()
        task.score = lambda beside: [dict(said=said(beside.models[0]), scored=scored(beside))]
        return task

    monkeypatch.setattr(train, "load_task", asking)
    for cached in (cfg, cfg, cfg | dict(cache_hidden="")):
        found.append(train.main(TrainConfig(**cached)))
    said, scored = ([result[f"{name}_after"] for result in found] for name in ("said", "scored"))
    assert said[0] == said[1] and (stream or len(said[1][0]) == len(said[2][0]) == 9)
    np.testing.assert_allclose(scored[1], scored[2], atol=0.02)


def test_a_sweep_from_the_cache(cfg, asked, tmp_path):
    """A laboratory: many side networks, and no base. Each is what it is alone with the cache."""
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), h_f_bits=8)
    train.main(TrainConfig(**cfg))
    asked.clear()
    table = train.main(TrainConfig(**cfg, sweep="gate=scalar,sum learning_rate=1e-2,3e-3"))
    assert not asked and len(table["runs"]) == 4
    worst = table["runs"][-1]["out_dir"]
    settings = json.loads((Path(worst) / "result.json").read_text())["config"]
    train.main(TrainConfig(**settings | dict(out_dir=str(tmp_path / "alone"))))
    assert left(worst) == left(tmp_path / "alone")


def test_a_sweep_that_answers_has_the_base_once(cfg, asked, tmp_path, monkeypatch):
    """Loaded again from the cache's run, it computes a score once for all side networks."""
    load, prompts = train.load_task, [[1, 5, 9, i, *range(i, 12)] for i in range(3, 12)]
    cfg |= dict(cache_hidden=str(tmp_path / "cache"))
    train.main(TrainConfig(**cfg))

    def scoring(*args):
        task = load(*args)
        logits = lambda beside: choice_logits(beside, prompts, [3, 7])
        task.score = lambda beside: [dict(scored=each.tolist()) for each in logits(beside)]
        return task

    monkeypatch.setattr(train, "load_task", scoring)
    counts = []
    for seeds in ("1", "1,2,3"):
        asked.clear()
        train.main(TrainConfig(**cfg, sweep=f"seed={seeds}"))
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("settings, pool, bits", [
    (dict(data_seed=3, sweep="standardize=true,false h_f_bits=4,16"), None, 16),
    (dict(downsample="avgpool", sweep="downsample=linear seed=1,2"), None, 8),
    (dict(h_f_bits=4, sweep="downsample=avgpool reduction=2 seed=1,2"), ["avgpool", 2], 16),
    (dict(h_f_bits=4, sweep="h_f_bits=8 seed=1,2"), None, 8),
], ids=["part", "linear", "pool", "bits"])
def test_what_is_kept_is_what_the_runs_read(settings, pool, bits, cfg, tmp_path):
    """And not what the sweep's other flags say; also where runs look at different batches."""
    cfg |= settings
    found = []
    for folder in ("", *2 * [str(tmp_path / "cache")]):
        rows = train.main(TrainConfig(**cfg, cache_hidden=folder))["runs"]
        found.append([row["loss"] for row in sorted(rows, key=lambda row: row["settings"])])
    about = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (about["pool"], about["bits"]) == (pool, bits)
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=1e-2)


@pytest.mark.parametrize("name", ["states.bin", "last.bin", "sums.bin", "cache.json"])
def test_a_missing_file(name, cfg, tmp_path, monkeypatch):
    """What it had is made again, and the base is loaded again once, not for each batch."""
    loads, load = [], train.from_pretrained
    monkeypatch.setattr(train, "from_pretrained", lambda *args: loads.append(1) or load(*args))
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), h_f_bits=16)
    expected = train.main(TrainConfig(**cfg))["loss_after"]
    (tmp_path / "cache" / name).unlink()
    loads.clear()
    assert train.main(TrainConfig(**cfg))["loss_after"] == pytest.approx(expected, abs=2e-3)
    assert len(loads) == (2 if name in ("states.bin", "last.bin") else 1)
    loads.clear()
    assert train.main(TrainConfig(**cfg))["cached_iterations"] == 6 and len(loads) == 1


@pytest.mark.parametrize("changes, message", [
    (dict(every="1"), "every is '1'; it must be a whole number"), (dict(bits=5), "bits is 5"),
    (dict(every=0), "every is 0"), (dict(fingerprint=None), "lacks the field 'fingerprint'"),
    (dict(pool=3), "another pooling"),
])
def test_a_damaged_cache_json(changes, message, cfg, tmp_path):
    cfg |= dict(cache_hidden=str(tmp_path / "cache"))
    train.main(TrainConfig(**cfg))
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        train.main(TrainConfig(**cfg))


def test_other_bases_and_examples(cfg, tiny_model, tmp_path):
    """Each is refused in a sentence, and nothing is touched."""
    cfg |= dict(cache_hidden=str(tmp_path / "cache"), max_iters=2)
    train.main(TrainConfig(**cfg))
    before = (tmp_path / "cache" / "states.bin").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    path = other / "model.safetensors"
    tensors = bytearray(path.read_bytes())
    tensors[-3] ^= 1
    path.write_bytes(tensors)
    for settings, message in (
        (dict(base=str(other)), "of another base"), (dict(quant="fp4"), "of another --quant"),
        (dict(dtype="bf16"), "of another --dtype"), (dict(data_seed=5), "of other examples"),
        (dict(sequence_len=40), "of other examples"), (dict(max_examples=15), "other examples"),
    ):
        with pytest.raises(InputError, match=message):
            train.main(TrainConfig(**cfg | settings))
    lora = dict(method="qlora", reduction=None)
    for settings in (lora, dict(eval_only=True), dict(compile=True)):
        with pytest.raises(InputError, match="--cache_hidden is for training side networks"):
            train.main(TrainConfig(**cfg | settings))
    assert (tmp_path / "cache" / "states.bin").read_bytes() == before


def test_answers_are_shown_without_the_bases(tiny_model, tmp_path, capsys):
    """A base that is only in the cache is not asked; what the side network answers is shown."""
    cfg = short_run(tiny_model, tmp_path, 40, max_iters=1, cache_hidden=str(tmp_path / "cache"))
    samples = train.main(TrainConfig(**cfg))["samples"]
    assert len(samples) == 3
    shown = capsys.readouterr().out.split("held-out loss")[1]
    for sample in samples:
        assert sample["answer"] is None and f"   QST       {sample['QST']}" in shown
    assert "   base" not in shown and "Ask it yourself" in shown


def test_examples_of_the_same_ids_are_one():
    """It is as long as the longest, padding aside, and has the targets of all."""
    none, key = -100, lambda ids: np.array(ids, np.int64).tobytes()
    examples = [([5, 6], [6, none]), ([5, 6, 0], [none, 7, none]), ([5, 6], [6, none]),
                ([8], [none])]
    assert targets_by_ids(examples) == {key([5, 6]): (3, [0, 1]), key([8]): (1, [])}


def test_room_is_checked_before(cfg, tmp_path):
    """Nothing is written that has no room."""
    folder = tmp_path / "cache"
    with pytest.raises(InputError, match="needs .* GB, and --cache_limit_gb is 1e-06: --h_f_bits"):
        train.main(TrainConfig(**cfg, cache_hidden=str(folder), cache_limit_gb=1e-6))
    assert [path.name for path in folder.iterdir()] == ["cache.lock"]


@pytest.mark.parametrize("changes", [dict(data_seed=9), dict(h_f_bits=16), dict(weight_decay=1.0)])
def test_two_runs_begin_a_cache_together(changes, cfg, tmp_path, monkeypatch):
    """While one loads its base, the other comes: it uses the cache that the first has begun, or is
    refused. Each has the losses that it has alone, to rounding."""
    cfg |= dict(h_f_bits=8)
    names, alone = ("first", "second"), []
    for name, settings in zip(names, ({}, changes)):
        own = cfg | settings | dict(out_dir=str(tmp_path / f"{name} alone"))
        alone.append(train.main(TrainConfig(**own))["loss_after"])
    first, second = (cfg | dict(cache_hidden=str(tmp_path / "cache"), out_dir=str(tmp_path / name))
                     for name in names)
    load, found = train.from_pretrained, []

    def loading(*args):
        monkeypatch.setattr(train, "from_pretrained", load)
        base, state = load(*args), torch.get_rng_state()
        if "weight_decay" in changes:
            found.append(train.main(TrainConfig(**second | changes))["loss_after"])
        else:
            with pytest.raises(InputError, match="of other examples|of fewer --h_f_bits"):
                train.main(TrainConfig(**second | changes))
        torch.set_rng_state(state)
        return base

    monkeypatch.setattr(train, "from_pretrained", loading)
    found.insert(0, train.main(TrainConfig(**first))["loss_after"])
    np.testing.assert_allclose(found, alone[: len(found)], atol=5e-3)
    assert np.fromfile(tmp_path / "cache" / "sums.bin", np.uint32).all()
