"""The seven methods on one base: start, gradients, learning, saving, and what contradicts them."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, KINDS, each_family, moved, small_base, tuned

import qst
import train
from data import InputError
from data.devices.device import loss_and_kept
from data.formats.config_json import read_dtype
from data.generate.sampling import pad_left
from data.run.optim import make_optimizer
from data.run.run import Run
from data.tasks import tiny
from model import PRESETS, Transformer, count_weights, from_pretrained
from qst import QST, add_trainable
from side import IN_BASE_METHODS, SideConfig
from train import TrainConfig

each_method = pytest.mark.parametrize("method", KINDS)


def gradients(model, idx):
    model.zero_grad()
    model.loss(idx, idx).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_family
@pytest.mark.parametrize("method", IN_BASE_METHODS)
def test_a_method_starts_at_its_base(method, family, idx):
    """Bit for bit at the base as it is stored: for qlora in NF4, for peqa in integers."""
    expected = small_base(KINDS[method], **FAMILIES[family])(idx)
    assert torch.equal(tuned(method, family)(idx)[0], expected)


def test_lst_predicts_from_the_side_network_alone(idx):
    """LST is QST with linear downsamplers and h = upsample(h_g): not at the base."""
    model = tuned("lst")
    assert (model.side.config.downsample, model.side.config.mix) == ("linear", "side")
    assert model.side.alpha is None and type(model) is QST
    h_f, h_g = torch.randn(2, 5, 32), torch.randn(2, 5, 8)
    assert torch.equal(model.side.mix(h_f, h_g), h_g @ model.side.upsample.weight.T)
    assert not torch.allclose(model(idx)[0], model.base(idx), atol=1)
    own = SideConfig(method="lst", downsample="adapter", mix="alpha")
    assert (own.downsample, own.mix) == ("adapter", "alpha")


@each_family
@each_method
def test_what_learns(method, family, idx):
    """Just the intended parameters, all of them with a gradient, and nothing else of the base."""
    model = moved(tuned(method, family))
    c, learned = model.config, gradients(model, idx)
    assert set(learned) == {name for name, _ in model.named_parameters()}
    # A bias of the keys changes no softmax.
    assert all(g.abs().max() > 0 for name, g in learned.items() if "k_proj.bias" not in name)
    count = sum(p.numel() for p in model.parameters())
    shapes = [m for m in Transformer(c).layers.modules() if isinstance(m, torch.nn.Linear)]
    expected = {
        "lora": sum(4 * (m.in_features + m.out_features) for m in shapes),
        "qlora": sum(4 * (m.in_features + m.out_features) for m in shapes),
        "adapter": c.n_layer * 2 * 2 * 4 * c.n_embd,
        "peqa": sum(m.in_features * m.out_features // 16 for m in shapes),
        "full": count_weights(c),
    }
    assert count == expected.get(method, sum(p.numel() for p in model.side.parameters()))
    assert not any(b.requires_grad for b in model.buffers())


@each_method
def test_a_method_learns(method, idx):
    """The loss of one batch falls in 20 steps of the loop."""
    model = tuned(method)
    rate = 3e-3 if method in ("peqa", "full") else 1e-2
    cfg = train.resolve(TrainConfig(method=method, learning_rate=rate, warmup_iters=0))
    run = Run(model, cfg)
    before = model.loss(idx, idx).item()
    for _ in range(20):
        train.train_step([run], [(idx, idx, 1.0)], 1)
    assert model.loss(idx, idx).item() < 0.9 * before


@each_family
@each_method
def test_saved_is_loaded(method, family, tmp_path, idx):
    """Into a fresh base of the same kind, bit for bit; another base is refused, and so is one that
    has parts already."""
    model = moved(tuned(method, family))
    model.save_side(tmp_path)
    fresh = lambda seed=0: small_base(KINDS[method], seed, **FAMILIES[family])
    again = QST.from_side(fresh(), tmp_path)
    assert type(again) is type(model) and again.side.config == model.side.config
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert not torch.equal(again(idx)[0], fresh()(idx))
    again.save_side(tmp_path)  # the fingerprint is that of the base before the method changed it
    assert torch.equal(QST.from_side(fresh(), tmp_path)(idx)[0], model(idx)[0])
    with pytest.raises(InputError, match="trained on another base: weights"):
        QST.from_side(fresh(seed=5), tmp_path)
    if method in IN_BASE_METHODS:
        with pytest.raises(InputError, match="load it anew"):
            QST.from_side(again.base, tmp_path)


def test_parts_of_other_settings_are_not_put_into_parts(tmp_path):
    """What is inside the base already cannot be replaced by what has other shapes."""
    tuned("qlora", rank=2).save_side(tmp_path)
    with pytest.raises(InputError, match="other settings .* load the base anew"):
        tuned("qlora").load_side(tmp_path)


@each_family
@each_method
def test_generation_with_a_cache(method, family, idx):
    """Gives what recomputing everything gives; a padded prompt, what it gives alone."""
    model = moved(tuned(method, family))
    expected = idx
    for _ in range(6):
        token = model(expected)[0][:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(model.generate(idx, 6), expected)
    padded, keep = pad_left([[5, 9, 3], [7, 8, 4, 11, 30, 2]])
    alone = model.generate(torch.tensor([[5, 9, 3]]), 4)[0, 3:]
    assert torch.equal(model.generate(padded, 4, keep=keep)[0, 6:], alone)


@pytest.mark.parametrize("preset", ["llama-2-70b", "opt-1.3b"])
@each_method
def test_a_training_step_on_meta_tensors(method, preset):
    """A step in bf16, checkpointed where that is of use, makes no tensor on another device."""
    with torch.device("meta"):
        base = Transformer(replace(PRESETS[preset], n_layer=2))
    base.freeze(KINDS[method], torch.bfloat16, "meta").checkpoint = method in IN_BASE_METHODS
    model = add_trainable(base, SideConfig(method=method))
    optimizer = make_optimizer(model, train.resolve(TrainConfig()))
    idx = torch.zeros(2, 64, dtype=torch.long, device="meta")
    logits, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    assert logits.shape == (2, 64, base.config.vocab_size)
    assert logits.dtype == torch.bfloat16 and loss.device.type == "meta"
    dtype = torch.bfloat16 if method == "full" else torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@each_family
@pytest.mark.parametrize("method", IN_BASE_METHODS)
def test_checkpointing(method, family, idx):
    """Gradients are the same with less kept for them: every layer's input, and one layer's rest;
    and what is generated is the same, from the cache of keys and values."""
    model = moved(tuned(method, family))
    plain, kept = gradients(model, idx), loss_and_kept(model, idx, idx)[1]
    answer = model.generate(idx[:, :4], 6)
    model.base.checkpoint = True
    assert torch.equal(model.generate(idx[:, :4], 6), answer)
    again = gradients(model, idx)
    assert set(plain) == set(again) and all(torch.equal(plain[name], again[name]) for name in plain)
    assert loss_and_kept(model, idx, idx)[1] < kept / 2


@pytest.mark.parametrize("method, kind", [
    ("lora", "nf4"), ("qlora", "none"), ("full", "nf4"), ("peqa", "nf4"), ("qst", "int4"),
    ("adapter", "int3"),
])
def test_contradictions(method, kind):
    """A method refuses a base that is stored otherwise than it needs, before anything is loaded."""
    message = f"--method {method} needs a base with --quant .*, and not {kind}"
    with pytest.raises(InputError, match=message):
        train.resolve(TrainConfig(method=method, quant=kind))
    with pytest.raises(InputError, match=message):
        add_trainable(small_base(kind), SideConfig(method=method))


@each_method
@pytest.mark.usefixtures("no_answers")
def test_every_method_through_the_command_lines(method, tiny_model, tmp_path, capsys, monkeypatch):
    """train.py trains, and evaluates what it has saved; qst.py generates with it, and merges it."""
    out, data = tmp_path / "out", tmp_path / "stories.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(40, seed=1)))
    common = dict(base=str(tiny_model), data=str(data), batch_size=4, sequence_len=100)
    flags = dict(checkpoint=True) if method in IN_BASE_METHODS else dict(reduction=4)
    flags |= dict(quant="int4-8") if method == "peqa" else {}
    result = train.main(
        TrainConfig(method=method, out_dir=str(out), max_iters=2, **common, **flags)
    )
    config = from_pretrained(tiny_model).config
    frozen = 0 if method == "full" else count_weights(config)
    assert result["total_parameters"] == frozen + result["trainable_parameters"]
    common |= dict(side=str(out))
    scored = dict(eval_only=True, held_out=0.5, out_dir=str(tmp_path / "eval"))
    again = train.main(TrainConfig(**scored, **common))
    assert again["config"]["method"] == method and 0 < again["loss"] < 20
    with pytest.raises(InputError, match="--rank is fixed by --side .*: remove the flag"):
        train.resolve(TrainConfig(rank=3, **common))
    tuned = ["--base", str(tiny_model), "--side", str(out)]
    qst.main([*tuned, "--prompt", "Hi", "--max_new_tokens", "2"])
    merge = ["merge", *tuned, "--out", str(tmp_path / "merged")]
    if method in ("qst", "lst", "adapter"):
        with pytest.raises(InputError, match="merge"):
            qst.main(merge)
        return
    qst.main([*merge[:-1], str(tmp_path / "bf16")])
    qst.main([*merge, "--dtype", "fp32"])
    printed = capsys.readouterr().out
    for folder, dtype in (("bf16", "bfloat16"), ("merged", "float32")):
        assert f"{folder}: {method}, merged in {dtype}." in printed
        assert read_dtype(tmp_path / folder) == getattr(torch, dtype)
    assert (tmp_path / "merged/tokenizer.model").exists()
    idx = torch.randint(3, config.vocab_size, (2, 12))
    merged = from_pretrained(tmp_path / "merged", "none", torch.float32)(idx)
    base = from_pretrained(tiny_model, again["config"]["quant"], torch.float32)
    assert torch.allclose(merged, QST.from_side(base, out)(idx)[0], atol=1e-4)
    question = ["--prompt", "Who?", "--max_new_tokens", "9", "--dtype", "fp32"]
    capsys.readouterr()
    qst.main([*tuned, *question])
    answer = capsys.readouterr().out
    merged = ["--base", str(tmp_path / "merged"), "--quant", "none", *question[2:]]
    qst.main([*merged, *question[:2]])
    assert capsys.readouterr().out == answer  # in the frame in which it was trained
    monkeypatch.setattr("builtins.input", lambda *_, turns=iter(["Who?", "/exit"]): next(turns))
    qst.main(["chat", *merged])
    assert answer.strip() and answer.strip() in capsys.readouterr().out
    for taken in (tiny_model, tmp_path / "merged", tmp_path / "no folder" / ".." / "merged"):
        with pytest.raises(InputError, match="is not empty: give a new folder"):
            qst.main([*merge[:-1], str(taken)])


def test_a_command_that_is_not_there():
    with pytest.raises(InputError, match="no command 'chta': choose generate, chat, answer"):
        qst.main(["chta", "--base", "FOLDER"])
