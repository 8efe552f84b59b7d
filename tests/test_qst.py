"""side.py and qst.py: the equations, the gradients, generation and the side checkpoint."""

import json
import math

import pytest
import torch
from conftest import as_of_an_older_commit, small_base, small_config
from torch.nn import functional as F

import side
import train
from model import (
    PRESETS, Transformer, count_weights, positions_and_mask, rotary_table,
)  # fmt: skip
from data import IGNORE_INDEX, pad_left
from data.safetensors import read_safetensors, write_safetensors
from qst import QST, fingerprint, import_released, tune
from quant import InputError
from side import RELEASED, SideConfig, SideNetwork

KINDS = ["linear", "lora", "adapter", "maxpool", "avgpool"]


def shaken(model, seed=1):
    """Move every parameter of the side network away from its start."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_training_starts_exactly_at_the_base(family, kind, idx):
    """With alpha at 1, the logits are the base's, bit for bit, whatever the side network holds."""
    base = small_base(family=family)
    logits, loss = QST(base, SideConfig(reduction=4, downsample=kind))(idx)
    assert torch.equal(logits, base(idx)) and loss is None


def test_at_step_0_only_alpha_has_a_gradient(base, idx):
    """The side network's gradients are all zero until alpha moves, and none is once it has."""
    model = QST(base, SideConfig(reduction=4))
    gradients = lambda: {
        n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None
    }
    model(idx, idx)[1].backward()
    nonzero = [name for name, g in gradients().items() if g > 0]
    assert nonzero == ["side.alpha"]
    with torch.no_grad():
        model.side.alpha -= 0.1
    model.zero_grad()
    model(idx, idx)[1].backward()
    assert all(g > 0 for g in gradients().values())
    assert len(gradients()) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ladder_is_the_papers_equations(kind, idx):
    """The forward pass equals QST §3.2, written out layer by layer from the base's states."""
    base = small_base()
    model = shaken(QST(base, SideConfig(reduction=4, downsample=kind)))
    side = model.side

    def down(i, h):
        d = side.downsample[i]
        if kind == "linear":
            return h @ d.down.weight.T
        if kind == "lora":
            return h @ d.down.weight.T @ d.up.weight.T
        if kind == "adapter":
            return F.silu(h @ d.down.weight.T) @ d.up.weight.T
        groups = h.reshape(*h.shape[:-1], 8, 4)
        return groups.max(dim=-1).values if kind == "maxpool" else groups.mean(dim=-1)

    from model import positions_and_mask, rotary_table

    positions, mask = positions_and_mask(idx)
    states = [base.embed_tokens(idx)]
    for layer in base.layers:
        states.append(layer(states[-1], mask, rotary_table(base.config, positions, torch.float32)))
    h_g = down(0, states[0])
    for i in range(3):
        beta = 1 / (1 + math.exp(-side.gamma[i].item()))
        mixed = (1 - beta) * down(i + 1, states[i + 1]) + beta * h_g
        h_g = side.layers[i](mixed, mask, rotary_table(side.model_config, positions, torch.float32))
    h = side.alpha * base.norm(states[-1]) + (1 - side.alpha) * (h_g @ side.upsample.weight.T)
    expected = h @ base.lm_head.weight.T
    assert torch.allclose(model(idx)[0], expected, atol=1e-4 * expected.abs().max().item())


def test_start_values():
    """gamma 0 and alpha 1 as in the paper; as released, 0.5 and 1 through a sigmoid."""
    paper = SideNetwork(small_config(), SideConfig(reduction=4))
    assert paper.alpha.shape == () and paper.alpha == 1
    assert paper.gamma.shape == (3,) and paper.gamma.eq(0).all()
    released = SideNetwork(small_config(), SideConfig(reduction=4, **RELEASED))
    assert released.alpha.shape == (32,) and released.alpha.eq(1).all()
    assert released.gamma.shape == (3, 8) and released.gamma.eq(0.5).all()
    h_f, h_g = torch.randn(2, 32), torch.randn(2, 8)
    part = 1 / (1 + math.exp(-1))
    expected = part * h_f + (1 - part) * released.upsample(released.norm(h_g))
    assert torch.allclose(released.mix(h_f, h_g), expected, atol=1e-6)


def test_the_base_is_frozen_and_keeps_nothing(base, idx):
    """No base weight is a parameter, and backward keeps nothing of the base's width but the hidden
    states that a downsampler or alpha reads, once each."""
    model = shaken(QST(base, SideConfig(reduction=4)))
    assert not list(base.parameters())
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert model.hidden(idx).requires_grad
    sizes = [t.untyped_storage().nbytes() // 4 for key, t in kept.items() if key not in own]
    # the embedding, each layer's output, the normed last one, and the upsampled side state
    assert sizes.count(3 * 10 * 32) == 1 + 3 + 1 + 1
    assert not any(size % (3 * 10 * 48) == 0 for size in sizes)  # the base's MLP
    assert max(sizes) == 3 * 10 * 32


@pytest.mark.parametrize("preset, released", [
    ("llama-2-7b", 28_623_104), ("llama-2-13b", 54_756_160), ("llama-2-70b", 282_944_000),
    ("opt-1.3b", 5_869_824), ("opt-2.7b", 11_720_000), ("opt-6.7b", 28_582_400),
])  # fmt: skip
def test_trainable_parameters_of_the_released_variant(preset, released):
    """SideConfig(**RELEASED) has exactly as many parameters as the released code."""
    with torch.device("meta"):
        side = SideNetwork(PRESETS[preset], SideConfig(**RELEASED))
    assert sum(p.numel() for p in side.parameters()) == released


def test_trainable_parameters_of_the_papers_variant():
    """The paper's own architecture on LLaMA-2-7B: 0.42 % (Table 6 says 0.41, 0.85, 0.38)."""
    total, percent = count_weights(PRESETS["llama-2-7b"]), {}
    for kind in KINDS:
        with torch.device("meta"):
            side = SideNetwork(PRESETS["llama-2-7b"], SideConfig(downsample=kind))
        trainable = sum(p.numel() for p in side.parameters())
        percent[kind] = 100 * trainable / (total + trainable)
        if kind == "adapter":
            assert trainable == 28_659_745
    paper = dict(linear=0.85, lora=0.41, adapter=0.41, maxpool=0.38, avgpool=0.38)
    assert percent == pytest.approx(paper, abs=0.06)


def test_a_training_step_on_meta_tensors():
    """A whole step of LLaMA-2-7B runs on the meta device: no tensor is made on another one."""
    with torch.device("meta"):
        base = Transformer(PRESETS["llama-2-7b"])
    model = QST(base.freeze("nf4", torch.bfloat16, "meta"))
    optimizer = train.make_optimizer(model, train.resolve(train.TrainConfig()))
    idx = torch.zeros(4, 384, dtype=torch.long, device="meta")
    logits, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    assert logits.shape == (4, 384, 32000) and loss.device.type == "meta"
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_stay_in_fp32(dtype, idx):
    """The side network computes in the base's dtype and keeps fp32 weights and gradients."""
    torch.manual_seed(0)
    base = Transformer(small_config()).freeze("nf4", dtype)
    model = shaken(QST(base, SideConfig(reduction=4)))
    logits, loss = model(idx, idx)
    loss.backward()
    assert logits.dtype == dtype and loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


VARIANTS = side.VARIANTS | {
    "residual": dict(mix="residual"), "sum": dict(gate="sum"),
    "standardize": dict(standardize=True), "qlora": dict(method="qlora"),
}  # fmt: skip
FAMILIES = {"llama": {}, "grouped": dict(n_kv_head=2), "opt": dict(family="opt")}


@pytest.mark.parametrize("variant", set(VARIANTS) - {"released"})
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_starts_at_the_base(family, variant, idx):
    """Bit for bit, before and after it has seen texts to standardize by."""
    base = small_base(**FAMILIES[family])
    expected = base(idx)
    model = tune(base, SideConfig(reduction=4, rank=4, **VARIANTS[variant]))
    model.calibrate([row.tolist() for row in idx])
    assert torch.equal(model(idx)[0], expected)


def test_mixes_and_gates(base):
    """The residual mix and the summing gate are sums, without a parameter of their own."""
    side = shaken(QST(base, SideConfig(reduction=4, mix="residual", gate="sum"))).side
    assert side.alpha is None and side.gamma is None
    h_f, h_g = torch.randn(2, 5, 32), torch.randn(2, 5, 8)
    assert torch.allclose(side.mix(h_f, h_g), h_f + h_g @ side.upsample.weight.T, atol=1e-6)
    expected = side.layers[2](side.downsample[3](h_f) + h_g)
    assert torch.equal(side.step(2, h_f, h_g), expected)


def test_standardization(base, idx, tmp_path):
    """Channels of what the downsamplers read have mean 0 and variance 1 over the texts' tokens,
    padding not among them; a saved side network knows them."""
    model = QST(base, SideConfig(reduction=4, standardize=True))
    assert torch.equal(model.side.standardized(1, torch.ones(2, 32)), torch.zeros(2, 32))  # not yet
    texts = [row[: 4 + i].tolist() for i, row in enumerate(idx)]
    model.calibrate(texts)
    positions = torch.arange(10).unsqueeze(0)
    states = [[base.embed_tokens(torch.tensor([text]))] for text in texts]
    for row in states:
        rope = rotary_table(base.config, positions[:, : row[0].shape[1]], torch.float32)
        for layer in base.layers:
            row.append(layer(row[-1], None, rope))
    for i in range(4):
        tokens = torch.cat([row[i][0] for row in states])
        seen = model.side.standardized(i, tokens)
        assert seen.mean(0).abs().max() < 1e-4 and torch.allclose(seen.var(0, correction=0), torch.ones(32), atol=1e-3)
    model.save_side(tmp_path)
    again = QST.from_side(base, tmp_path)
    assert torch.equal(again.side.mean, model.side.mean) and torch.equal(again(idx)[0], model(idx)[0])


def test_lora(idx, tmp_path):
    """Only the branches learn, one for every linear layer of the base; they are saved and loaded."""
    base = small_base()
    expected = base(idx)
    model = tune(base, SideConfig(method="qlora", rank=4))
    assert sum(p.numel() for p in model.parameters()) == 3 * 4 * (4 * 64 + 3 * (32 + 48))
    shaken(model)
    model.loss(idx, idx).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    q_proj = base.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    weight = q_proj.linear.quantized.dequantize() + 4 * q_proj.pair.up.weight @ q_proj.pair.down.weight
    assert torch.allclose(q_proj(x), x @ weight.T, atol=1e-5)
    model.save_side(tmp_path)
    again = QST.from_side(small_base(), tmp_path)
    assert torch.equal(again(idx)[0], model(idx)[0]) and not torch.equal(again(idx)[0], expected)


def test_loss_counts_the_targets_only(base, idx):
    """The loss is the mean over targets that are not IGNORE_INDEX."""
    targets = idx.clone()
    targets[:, :6] = IGNORE_INDEX
    logits, loss = QST(base, SideConfig(reduction=4))(idx, targets)
    log_p = logits[:, 6:].log_softmax(dim=-1).gather(2, idx[:, 6:].unsqueeze(2))
    assert loss.item() == pytest.approx(-log_p.mean().item(), rel=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_two_caches(family, changes, idx):
    """Generating through the caches of base and side gives what recomputing everything gives."""
    model = shaken(tune(small_base(**FAMILIES[family]), SideConfig(reduction=4, **changes)))
    expected = idx
    for _ in range(8):
        token = model(expected)[0][:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(model.generate(idx, 8), expected)


def test_padded_batch_equals_single_prompts():
    """Prompts of unequal length in one batch are answered as each is alone."""
    model = shaken(QST(small_base(), SideConfig(reduction=4)))
    prompts = [[5, 9, 3], [7, 8, 4, 11, 30, 2], [12]]
    idx, keep = pad_left(prompts)
    together = model.generate(idx, 8, keep=keep)[:, idx.shape[1] :]
    for prompt, row in zip(prompts, together):
        assert torch.equal(model.generate(torch.tensor([prompt]), 8)[0, len(prompt) :], row)


def test_sampling_depends_on_the_seed_alone(idx):
    model = QST(small_base(), SideConfig(reduction=4))
    draw = lambda seed: model.generate(idx, 10, 1.5, top_k=20, top_p=0.95, seed=seed)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_side_is_the_same_side(changes, tmp_path, idx):
    """What is loaded into a fresh model gives the same logits, bit for bit."""
    model = shaken(tune(small_base(), SideConfig(reduction=4, **changes)))
    model.save_side(tmp_path)
    again = QST.from_side(small_base(), tmp_path)
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert again.side.config == model.side.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["side.json", "side.safetensors"]


@pytest.mark.parametrize("other, told", [
    (dict(seed=5), "weights"), (dict(quant="fp4"), "quant nf4 there and fp4 here"),
    (dict(quant="none"), "quant nf4 there and none here"), (dict(rope_theta=5e5), "weights"),
])  # fmt: skip
def test_a_side_refuses_another_base(other, told, tmp_path):
    """A checkpoint loads only beside the base that it was trained on."""
    QST(small_base(), SideConfig(reduction=4)).save_side(tmp_path)
    with pytest.raises(InputError, match=f"another base: .*{told}"):
        QST.from_side(small_base(**other), tmp_path)


def test_the_fingerprint_does_not_depend_on_the_dtype():
    """The same checkpoint, loaded to compute in fp32 or in fp16, is the same base."""
    torch.manual_seed(0)
    state = Transformer(small_config()).state_dict()
    prints = []
    for dtype in (torch.float32, torch.float16):
        for quant in ("nf4", "none"):
            model = Transformer(small_config())
            model.load_state_dict(state)
            prints.append(fingerprint(model.freeze(quant, dtype)))
    assert prints[0] == prints[2] and prints[1] == prints[3] and prints[0] != prints[1]


def test_a_factor_near_0_is_not_lost_in_bf16():
    """1 - alpha is taken in fp32: with alpha just below 1 the side network still counts in bf16."""
    side = SideNetwork(small_config(), SideConfig(reduction=4))
    side.alpha.data.fill_(0.999)
    h_f, h_g = torch.zeros(2, 32).bfloat16(), torch.randn(2, 8).bfloat16()
    expected = 0.001 * side.upsample(h_g).float()
    assert torch.allclose(side.mix(h_f, h_g).float(), expected, rtol=0.02, atol=1e-6)


def test_a_tensor_missing_or_left_over_is_named(tmp_path):
    """Loading a side network is strict in both directions, and about shapes and formats."""
    base, path = small_base(), tmp_path / "side.safetensors"
    QST(base, SideConfig(reduction=4)).save_side(tmp_path)
    as_of_an_older_commit(tmp_path)
    whole = {name: read().clone() for name, read in read_safetensors(path).items()}
    write_safetensors(path, {k: v for k, v in whole.items() if k != "upsample.weight"})
    with pytest.raises(InputError, match="lacks upsample.weight"):
        QST.from_side(base, tmp_path)
    write_safetensors(path, whole | {"extra": torch.zeros(1)})
    with pytest.raises(InputError, match="has extra, which"):
        QST.from_side(base, tmp_path)
    write_safetensors(path, whole | {"gamma": torch.zeros(7)})
    with pytest.raises(InputError, match="gamma has shape"):
        QST.from_side(base, tmp_path)
    as_of_an_older_commit(tmp_path, format=99)
    with pytest.raises(InputError, match="format is 99; it must be 1 or 2"):
        QST.from_side(base, tmp_path)


def test_reductions_that_do_not_fit_are_refused():
    """The message says which reductions do."""
    with pytest.raises(InputError, match="--reduction 3 .* choose one of 1, 2, 4"):
        SideNetwork(small_config(), SideConfig(reduction=3))
    with pytest.raises(InputError, match="--downsample sum is unknown"):
        SideConfig(downsample="sum")
    SideNetwork(small_config("opt"), SideConfig(reduction=8))  # one channel a head: no rotary pairs
    with pytest.raises(InputError, match="rotary"):
        SideNetwork(small_config(), SideConfig(reduction=8))


def released_state(base, reduction, rank, seed=0):
    """Random tensors under the names, and in the files, of the released code."""
    torch.manual_seed(seed)
    d, s, m = base.config.n_embd, base.config.n_embd // reduction, base.config.n_ffn // reduction
    r, N, opt = torch.randn, base.config.n_layer, base.config.family == "opt"
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    layers = {}
    for i in range(N):
        if opt:
            linears = dict.fromkeys([*names, "self_attn.out_proj"], (s, s)) | {"fc1": (m, s), "fc2": (s, m)}
            norms = ["self_attn_layer_norm", "final_layer_norm"]
        else:
            linears = dict.fromkeys([*names, "self_attn.o_proj"], (s, s))
            linears |= {"mlp.gate_proj": (m, s), "mlp.up_proj": (m, s), "mlp.down_proj": (s, m)}
            norms = ["input_layernorm", "post_attention_layernorm"]
        for name, shape in linears.items():
            layers[f"{i}.{name}.weight"] = r(shape)
            if opt:
                layers[f"{i}.{name}.bias"] = r(shape[0])
        for name in norms:
            layers[f"{i}.{name}.weight"] = 1 + 0.3 * r(s)
            if opt:
                layers[f"{i}.{name}.bias"] = r(s)
    down = {}
    for i in range(N):
        down |= {f"{i}.adapter_A.weight": r(rank, d), f"{i}.adapter_B.weight": r(s, rank),
                 f"{i}.post_layer_norm.weight": 1 + 0.3 * r(s), f"{i}.post_layer_norm.bias": r(s)}  # fmt: skip
    norm = {"weight": 1 + 0.3 * r(s)} | ({"bias": r(s)} if opt else {})
    return {
        "qst_layers_parameters.pt": layers, "qst_downsample_parameters.pt": down,
        "qst_z_parameters.pt": {str(i): r(s) for i in range(N)}, "qst_norm_parameters.pt": norm,
        "qst_upsample_parameters.pt": {"weight": r(d, s), "bias": r(d)},
        f"lm_head_z_{'parameters' if opt else 'path'}.pt": torch.nn.Parameter(r(d)),
    }  # fmt: skip


def released_logits(base, files, idx):
    """The released forward pass, from the description of its code in issue and paper notes."""
    opt, N, D = base.config.family == "opt", base.config.n_layer, files["qst_downsample_parameters.pt"]
    layers, (B, T) = files["qst_layers_parameters.pt"], idx.shape
    eps, heads = base.config.norm_eps, base.config.n_head

    def norm(x, state, name=""):
        if opt:
            return F.layer_norm(x, x.shape[-1:], state[f"{name}weight"], state[f"{name}bias"], 1e-5)
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * state[f"{name}weight"]

    def linear(x, name):
        return F.linear(x, layers[f"{name}.weight"], layers.get(f"{name}.bias"))

    def turn(x):
        half = x.shape[-1] // 2
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(x, i):
        q, k, v = (
            linear(x, f"{i}.self_attn.{n}_proj").view(B, T, heads, -1).transpose(1, 2) for n in "qkv"
        )
        if not opt:
            q, k = turn(q), turn(k)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -1e30)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        return linear(y, f"{i}.self_attn.{'out' if opt else 'o'}_proj")

    def layer(x, i):
        first, second = (
            ("self_attn_layer_norm.", "final_layer_norm.") if opt
            else ("input_layernorm.", "post_attention_layernorm.")
        )  # fmt: skip
        x = x + attention(norm(x, layers, f"{i}.{first}"), i)
        y = norm(x, layers, f"{i}.{second}")
        if opt:
            return x + linear(F.relu(linear(y, f"{i}.fc1")), f"{i}.fc2")
        gate, up = linear(y, f"{i}.mlp.gate_proj"), linear(y, f"{i}.mlp.up_proj")
        return x + linear(F.silu(gate) * up, f"{i}.mlp.down_proj")

    def down(h, i):
        y = F.silu(h @ D[f"{i}.adapter_A.weight"].T) @ D[f"{i}.adapter_B.weight"].T
        weight, bias = D[f"{i}.post_layer_norm.weight"], D[f"{i}.post_layer_norm.bias"]
        return F.layer_norm(y, y.shape[-1:], weight, bias)

    from model import rotary_table

    positions = torch.arange(T)[None]
    h = base.embed(idx, positions)
    q = down(h, 0)
    for i in range(N):
        h = base.layers[i](h, None, rotary_table(base.config, positions, torch.float32))
        g = torch.sigmoid(files["qst_z_parameters.pt"][str(i)])
        q = layer((1 - g) * down(h, i) + g * q, i)
    h, q = base.norm(h), norm(q, files["qst_norm_parameters.pt"])
    up = F.linear(q, *files["qst_upsample_parameters.pt"].values())
    g = torch.sigmoid(files[f"lm_head_z_{'parameters' if opt else 'path'}.pt"])
    return base.lm_head(g * up + (1 - g) * h if opt else (1 - g) * up + g * h)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_released_checkpoints(family, tmp_path, idx):
    """A side checkpoint in the released files computes what the released code computes with it."""
    base = small_base(family=family)
    files = released_state(base, reduction=4, rank=3)
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    model = import_released(base, tmp_path)
    assert model.side.config == SideConfig(reduction=4, rank=3, **RELEASED)
    expected = released_logits(base, files, idx)
    assert (model(idx)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    model.save_side(tmp_path / "ours")
    assert torch.equal(QST.from_side(base, tmp_path / "ours")(idx)[0], model(idx)[0])


def test_a_released_checkpoint_that_does_not_fit(tmp_path):
    """A file that is missing, of another model, or no plain tensors, is named."""
    base = small_base()
    files = released_state(base, reduction=4, rank=3)
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match="not of a model with 5 layers"):
        import_released(small_base(n_layer=5), tmp_path)
    with pytest.raises(InputError, match="shape"):
        import_released(small_base(n_ffn=96), tmp_path)
    (tmp_path / "lm_head_z_path.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="lm_head_z_path.pt cannot be read"):
        import_released(base, tmp_path)
    (tmp_path / "lm_head_z_path.pt").unlink()
    with pytest.raises(InputError, match="lm_head_z_path.pt is missing"):
        import_released(base, tmp_path)
