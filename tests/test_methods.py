"""The seven methods on one base: start, gradients, learning, saving, merging; and PEQA's integers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_base, small_config
from test_qst import shaken
from torch.nn import functional as F

import qst
import quant
import train
from data import tiny
from data import pad_left
from data.hub import save_pretrained
from data.report import activation_bytes
from data.safetensors import read_safetensors
from model import PRESETS, Transformer, count_weights, from_pretrained
from qst import QST, tune
from quant import InputError, Linear4bit, pack, quantize_int, unpack_codes
from side import METHODS, SideConfig
from train import TrainConfig

KINDS = {method: kinds[0] for method, kinds in METHODS.items()} | {"peqa": "int4-16"}
INSIDE = ["lora", "qlora", "adapter", "peqa", "full"]
FAMILIES = {"llama": {}, "grouped": dict(n_kv_head=2), "opt": dict(family="opt")}
each_method = pytest.mark.parametrize("method", KINDS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def make(method, family="llama", kind=None, **settings):
    base = small_base(kind or KINDS[method], **FAMILIES[family])
    torch.manual_seed(2)
    return tune(base, SideConfig(**dict(method=method, reduction=4, rank=4) | settings))


def moved(model, seed=1):
    """Move what learns away from its start, and scales and whole models only a little."""
    if model.side.config.method not in ("peqa", "full"):
        return shaken(model, seed)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return model


def gradients(model, idx):
    model.zero_grad()
    model.loss(idx, idx).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------
# All methods


@each_family
@pytest.mark.parametrize("method", ["qst", *INSIDE])
def test_a_method_starts_at_its_base(method, family, idx):
    """Bit for bit at the base as it is stored: for qlora and qst in NF4, for peqa in integers."""
    expected = small_base(KINDS[method], **FAMILIES[family])(idx)
    assert torch.equal(make(method, family)(idx)[0], expected)


def test_lst_predicts_from_the_side_network_alone(idx):
    """LST is QST's ladder with linear downsamplers and h = upsample(h_g): not at the base."""
    model = make("lst")
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
    model = moved(make(method, family))
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
    model = make(method)
    rate = 3e-3 if method in ("peqa", "full") else 1e-2
    cfg = train.resolve(TrainConfig(method=method, learning_rate=rate, warmup_iters=0))
    optimizer, scaler = train.make_optimizer(model, cfg), torch.amp.GradScaler("cpu", enabled=False)
    before = model.loss(idx, idx).item()
    for i in range(20):
        train.train_step(model.loss, optimizer, scaler, iter([(idx, idx)]), idx.device, i, cfg)
    assert model.loss(idx, idx).item() < 0.9 * before


@each_family
@each_method
def test_saved_is_loaded(method, family, tmp_path, idx):
    """Into a fresh base of the same kind, bit for bit; another base is refused, and so is one that
    has parts already."""
    model = moved(make(method, family))
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
    if method in INSIDE:
        with pytest.raises(InputError, match="load it anew"):
            QST.from_side(again.base, tmp_path)


def test_parts_of_other_settings_are_not_put_into_parts(tmp_path):
    make("qlora", rank=2).save_side(tmp_path)
    with pytest.raises(InputError, match="other settings .* load the base anew"):
        make("qlora").load_side(tmp_path)


@each_family
@each_method
def test_generation_with_a_cache(method, family, idx):
    """Gives what recomputing everything gives; a padded prompt, what it gives alone."""
    model = moved(make(method, family))
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
    base.freeze(KINDS[method], torch.bfloat16, "meta").checkpoint = method in INSIDE
    model = tune(base, SideConfig(method=method))
    optimizer = train.make_optimizer(model, train.resolve(TrainConfig()))
    idx = torch.zeros(2, 64, dtype=torch.long, device="meta")
    logits, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    assert logits.dtype == torch.bfloat16 and loss.device.type == "meta"
    dtype = torch.bfloat16 if method == "full" else torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@each_family
@pytest.mark.parametrize("method", INSIDE)
def test_checkpointing(method, family, idx):
    """Gradients are the same with less kept for them: every layer's input, and one layer's rest."""
    model = moved(make(method, family))
    plain, kept = gradients(model, idx), activation_bytes(model, idx, idx)
    model.base.checkpoint = True
    again = gradients(model, idx)
    assert set(plain) == set(again) and all(torch.equal(plain[name], again[name]) for name in plain)
    assert activation_bytes(model, idx, idx) < kept / 2


@pytest.mark.parametrize("method, kind", [
    ("lora", "nf4"), ("qlora", "none"), ("full", "nf4"), ("peqa", "nf4"), ("qst", "int4"),
    ("adapter", "int3"),
])  # fmt: skip
def test_contradictions(method, kind):
    """A method refuses a base that is stored otherwise than it needs, before anything is loaded."""
    told = f"--method {method} needs a base with --quant .*, and not {kind}"
    with pytest.raises(InputError, match=told):
        train.resolve(TrainConfig(method=method, quant=kind))
    with pytest.raises(InputError, match=told):
        tune(small_base(kind), SideConfig(method=method))


@pytest.mark.parametrize("flags, told", [
    (dict(h_f_bits=5), "--h_f_bits 5 is unknown: choose 16, 8, 4"),
    (dict(optimizer_bits=4), "--optimizer_bits 4 is unknown: choose 32, 8"),
    (dict(method="qlora", h_f_bits=8), "--h_f_bits is of --method qst and lst, and not of qlora"),
    (dict(method="full", reduction=4), "--reduction is of --method qst"), (dict(method="peqa", variant="fast"), "--variant is of"),
    (dict(method="peqa", quant="int5"), "--quant int4 or int3, and not int5"),
    (dict(method="full", dtype="fp16"), "cannot learn in --dtype fp16"),
])  # fmt: skip
def test_flags_that_contradict_the_method(flags, told):
    with pytest.raises(InputError, match=told):
        train.resolve(TrainConfig(**flags))


def test_defaults_of_a_method():
    """The base's storage, and LST's reduction, where the user says nothing."""
    done = {m: train.resolve(TrainConfig(base="x", data="y", method=m)) for m in KINDS}
    assert {m: c.quant for m, c in done.items()} == dict(
        qst="nf4", qlora="nf4", lst="none", lora="none", adapter="none", full="none", peqa="int4"
    )
    assert {m: c.reduction for m, c in done.items() if c.reduction != 16} == {"lst": 8}
    assert train.resolve(TrainConfig(method="lst", reduction=4)).reduction == 4


@each_method
def test_every_method_through_the_command_lines(method, tiny_model, tmp_path, capsys):
    """train.py trains, and evaluates what it has saved; qst.py generates with it, and merges it."""
    out, data = tmp_path / "out", tmp_path / "stories.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(40, seed=1)))
    common = dict(base=str(tiny_model), data=str(data), batch_size=4, sequence_len=100)
    flags = dict(checkpoint=True) if method in INSIDE else dict(reduction=4)
    flags |= dict(quant="int4-8") if method == "peqa" else {}
    result = train.main(
        TrainConfig(method=method, out_dir=str(out), max_iters=2, **common, **flags)
    )
    config = from_pretrained(tiny_model).config
    frozen = 0 if method == "full" else count_weights(config)
    assert result["total_parameters"] == frozen + result["trainable_parameters"]
    again = train.main(
        TrainConfig(side=str(out), eval_only=True, held_out=0.5, out_dir=str(tmp_path / "eval"), **common)
    )
    assert again["config"]["method"] == method and 0 < again["loss"] < 20
    with pytest.raises(InputError, match="--rank: --side .* has its own; leave it out"):
        train.resolve(TrainConfig(side=str(out), rank=3, **common))
    qst.main(["--base", str(tiny_model), "--side", str(out), "--prompt", "Hi", "--max_new_tokens", "2"])
    merge = ["merge", "--base", str(tiny_model), "--side", str(out), "--out", str(tmp_path / "merged")]
    if method in ("qst", "lst", "adapter"):
        with pytest.raises(InputError, match="merge"):
            qst.main(merge)
        return
    qst.main([*merge, "--dtype", "fp32"])
    assert f"{method}, merged in float32" in capsys.readouterr().out
    assert (tmp_path / "merged/tokenizer.model").exists()
    idx = torch.randint(3, config.vocab_size, (2, 12))
    merged = from_pretrained(tmp_path / "merged", "none", torch.float32)(idx)
    base = from_pretrained(tiny_model, again["config"]["quant"], torch.float32)
    assert torch.allclose(merged, QST.from_side(base, out)(idx)[0], atol=1e-4)
    for taken in (tiny_model, tmp_path / "merged"):
        with pytest.raises(InputError, match="is not empty: give a new folder"):
            qst.main([*merge[:-1], str(taken)])


# --------------------------------------------------------------------------------------
# Single methods


@each_family
@pytest.mark.parametrize("method", ["lora", "qlora", "peqa", "full"])
def test_merging(method, family, tmp_path, idx):
    """A Hugging Face folder of plain weights has the logits of base and parts, to rounding; in
    transformers too."""
    model = moved(make(method, family))
    expected = model(idx)[0].detach()
    save_pretrained(model.merge(torch.float32), tmp_path)
    ours = from_pretrained(tmp_path, "none", torch.float32)
    close = lambda logits: (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert close(ours(idx)) and not close(small_base(KINDS[method], **FAMILIES[family])(idx))
    assert model.merge().lm_head.weight.dtype == torch.bfloat16
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert close(theirs(idx).logits.detach())


@each_family
def test_lora_is_pefts(family, tmp_path, idx):
    """With the same branches, logits and gradients are peft's (rank 4, alpha 16, all linears)."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from data.hub import OPT_NAMES

    model = moved(make("lora", family))
    save_pretrained(small_base("none", **FAMILIES[family]), tmp_path)
    names = {"opt": "q_proj k_proj v_proj out_proj fc1 fc2"}.get(
        family, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    ).split()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names))
    parameters = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {}
    for name, parameter in model.base.named_parameters():
        name = name.replace(".pair.down", ".lora_A.default").replace(".pair.up", ".lora_B.default")
        for our_part, their_part in OPT_NAMES.items() if family == "opt" else ():
            name = name.replace(our_part, their_part)
        ours["base_model.model.model." + "decoder." * (family == "opt") + name] = parameter
    assert set(ours) == set(parameters)
    for name, parameter in parameters.items():
        parameter.data.copy_(ours[name])
    logits, loss = model(idx, idx)
    their_logits = theirs(idx).logits
    assert (logits - their_logits).abs().max() < 1e-4 * logits.abs().max()
    loss.backward()
    F.cross_entropy(their_logits.flatten(0, 1), idx.flatten()).backward()
    for name, parameter in ours.items():
        assert (parameter.grad - parameters[name].grad).abs().max() < 1e-4 * parameter.grad.abs().max() + 1e-6


def test_the_adapter_is_houlsbys(idx):
    """Behind the attention and the MLP, before the residual: y + up(silu(down(y)))."""
    model = moved(make("adapter"))
    layer, plain = model.base.layers[1], small_base("none").layers[1]
    x = torch.randn(2, 7, 32)
    for name in ("self_attn", "mlp"):
        context = (None, None, None) if name == "self_attn" else ()
        y, part = getattr(plain, name)(x, *context), model.side.layers[1][name]
        expected = y + F.silu(y @ part.down.weight.T) @ part.up.weight.T
        assert torch.allclose(getattr(layer, name)(x, *context), expected, atol=1e-5)


def test_full_finetuning_keeps_a_tied_head_tied(tmp_path, idx):
    """One parameter is embedding and head, once in the file too, also after it is loaded."""
    model = moved(make("full", "opt"))
    assert model.base.lm_head.weight is model.base.embed_tokens.weight
    assert not list(model.base.buffers())
    model.save_side(tmp_path)
    numel = sum(read().numel() for read in read_safetensors(tmp_path / "side.safetensors").values())
    assert numel == count_weights(model.config)
    again = QST.from_side(small_base("none", family="opt"), tmp_path).base
    assert again.lm_head.weight is again.embed_tokens.weight


# --------------------------------------------------------------------------------------
# PEQA


def by_numpy(weight, bits, group):
    """PEQA's formula, group by group: whole numbers, scales, zero points and what they stand for."""
    top, result = 2**bits - 1, []
    for values in weight.numpy().reshape(-1, group or weight.shape[1]):
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        scale = (high - low) / np.float32(top) if high > low else np.float32(1)
        zero = np.round(-low / scale)
        codes = np.clip(np.round(values / scale) + zero, 0, top)
        result.append((codes, scale, zero, scale * (codes - zero)))
    return [np.array(part) for part in zip(*result)]


CASES = pytest.mark.parametrize("bits, group", [(4, 0), (3, 0), (4, 12), (3, 12)])


@CASES
def test_rounding_is_the_formula(bits, group):
    """Codes, scales, zero points and weights are those of an independent numpy version; no weight
    is off by more than half a scale; also of rows of one sign, of zeros, and of odd sizes."""
    torch.manual_seed(0)
    weight = torch.randn(13, 36) * torch.rand(13, 1)
    weight[1], weight[2], weight[3] = 0, weight[2].abs() + 0.5, -weight[3].abs()
    q = quantize_int(weight, bits, group)
    codes, scales, zeros, restored = by_numpy(weight, bits, group)
    assert np.array_equal(unpack_codes(q.codes, bits)[: 13 * 36].numpy(), codes.reshape(-1))
    assert np.array_equal(q.scales.flatten().numpy(), scales)
    assert np.array_equal(q.zeros.flatten().numpy(), zeros)
    assert np.array_equal(q.dequantize().numpy(), restored.reshape(13, 36))
    error = (q.dequantize() - weight).abs().view(13, -1, group or 36)
    assert (error <= q.scales.unsqueeze(-1) / 2 * 1.0001).all()
    assert q.shape == weight.shape and q.codes.numel() == -(-13 * 36 // 8) * bits


def test_chunks_do_not_show(monkeypatch):
    """A matrix that is handled a few rows at a time is quantized, unpacked and trained the same."""
    torch.manual_seed(0)
    weight, x = torch.randn(37, 24), torch.randn(5, 24)

    def all_of_it():
        layer = Linear4bit(quantize_int(weight, 3, 8))
        layer.scales = torch.nn.Parameter(layer._buffers.pop("scales"))
        layer(x).square().sum().backward()
        return layer.codes, layer.quantized.dequantize(), layer.scales.grad

    whole = all_of_it()
    monkeypatch.setattr(quant, "chunk_size", lambda device: 24 * 8)
    assert all(torch.allclose(a, b) for a, b in zip(whole, all_of_it()))


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_packed_to_the_bit(bits):
    """Eight codes take `bits` bytes, the first in the lowest bits, and come back."""
    codes = torch.randint(0, 2**bits, (8 * 11,), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == 11 * bits and torch.equal(unpack_codes(packed, bits), codes.int())
    number = sum(code << bits * i for i, code in enumerate(codes[:8].tolist()))
    assert packed[:bits].tolist() == list(number.to_bytes(bits, "little"))


def int_layer(bits, group, dtype=torch.float64):
    torch.manual_seed(0)
    layer = Linear4bit(quantize_int(torch.randn(10, 24), bits, group), torch.randn(10)).to(dtype)
    layer.scales = torch.nn.Parameter(layer._buffers.pop("scales"))
    return layer, torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)


@CASES
def test_gradients_against_numerical_differences(bits, group):
    """Of x and of the scales, in float64."""
    layer, x = int_layer(bits, group)
    scales = layer.scales

    def product(x, scales):
        layer.scales.data.copy_(scales.detach())
        return quant._FrozenProduct.apply(x, scales, layer)

    assert torch.autograd.gradcheck(product, (x, scales.detach().clone().requires_grad_()))


@CASES
def test_gradients_against_autograd(bits, group):
    """They are those of a dense W = scale * (code - zero) that autograd knows, and nothing but x is
    kept for them: neither W nor the codes in float."""
    layer, x = int_layer(bits, group, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()
    weighting = torch.randn_like(y)
    ours = torch.autograd.grad((y * weighting).sum(), (x, layer.scales))
    codes = unpack_codes(layer.codes, bits).view(10, -1, group or 24) - layer.zeros.unsqueeze(-1)
    weight = (layer.scales.unsqueeze(-1) * codes).flatten(1)
    dense = F.linear(x, weight, layer.bias)
    assert torch.allclose(y, dense, atol=1e-5)
    for one, two in zip(ours, torch.autograd.grad((dense * weighting).sum(), (x, layer.scales))):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "int3", "int4-8", "int3-16"])
def test_peqa_trains_the_scales_alone(kind, tmp_path, idx):
    """As many numbers as there are scales; whole numbers and zero points are the same bits after
    training; the file holds the scales and nothing else; another file is another task."""
    model = make("peqa", kind=kind)
    start = model.side.state_dict()
    layers = [m for m in model.base.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 3 * 7 and {layer.kind for layer in layers} == {kind}
    group = int(kind.partition("-")[2] or 0)
    count = sum(m.out_features * (m.in_features // (group or m.in_features)) for m in layers)
    assert sum(p.numel() for p in model.parameters()) == count
    before = [(m.codes.clone(), m.zeros.clone(), m.scales.detach().clone()) for m in layers]
    model.save_side(tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(idx, idx).backward()
        optimizer.step()
    for (codes, zeros, scales), m in zip(before, layers):
        assert torch.equal(codes, m.codes) and torch.equal(zeros, m.zeros)
        assert not torch.equal(scales, m.scales)
    model.save_side(tmp_path / "task")
    size = (tmp_path / "task/side.safetensors").stat().st_size
    assert 4 * count <= size < 4 * count + 200 * len(start)
    task = model(idx)[0].detach()
    original = model.load_side(tmp_path / "base")(idx)[0].detach()
    assert torch.equal(original, small_base(kind)(idx)) and not torch.equal(original, task)
    assert torch.equal(model.load_side(tmp_path / "task")(idx)[0], task)


def test_bits_of_a_weight():
    """Per channel of 4,096 weights, 3 bits take 3.01 and 4 bits 4.01; what is no matrix of whole
    groups, or not finite, is refused by its name."""
    weight = torch.randn(16, 4096)
    for bits in (3, 4):
        assert 8 * quantize_int(weight, bits).nbytes / weight.numel() == bits + 40 / 4096
    with pytest.raises(InputError, match="--group_size 100 does not divide layers.0's 4096 columns: .* up to 4096"):
        quantize_int(weight, 4, 100, "layers.0")
    with pytest.raises(InputError, match="powers of two do, up to 32; or 0"):
        quantize_int(weight[:, :96], 4, 64)
    assert quantize_int(weight[:, :96], 4, 32).scales.shape == (16, 3)
    weight[3, 5] = float("nan")
    with pytest.raises(InputError, match="layers.0 has NaN"):
        quantize_int(weight, 4, name="layers.0")
    with pytest.raises(InputError, match="--quant int7 is unknown"):
        Transformer(small_config()).freeze("int7")


@pytest.mark.parametrize("tied", [False, True])
def test_full_finetuning_of_a_classifier_leaves_out_the_head(tied):
    """Nothing is counted as learning that gets no gradient; a tied head is the embedding."""
    model = tune(small_base("none", tied=tied), SideConfig(method="full", n_labels=2))
    idx = torch.arange(5).repeat(2, 1)
    model.loss(idx, torch.tensor([[-100] * 4 + [1]] * 2)).backward()
    assert all(p.grad is not None for p in model.parameters())
