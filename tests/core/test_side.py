"""side.py: the side network is the paper's, in its equations, start values and sizes."""

import math

import pytest
import torch
from helpers import shaken, small_base, small_config
from torch.nn import functional as F

from data import InputError
from data.settings.methods import RELEASED
from model import PRESETS, LayerNorm, count_weights, positions_and_mask, rotary_table
from qst import QST
from side import DOWNSAMPLERS, SideConfig, SideNetwork


@pytest.mark.parametrize("kind", DOWNSAMPLERS[:5])  # the paper's; an exercise adds a sixth
def test_the_forward_pass_is_the_papers_equations(kind, idx):
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


class Slice(torch.nn.Module):
    """Every fourth channel: a view of h_f."""

    def forward(self, h_f):
        return h_f[..., ::4]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", [*DOWNSAMPLERS, "slice"])
def test_backward_keeps_little_of_h_f(kind, checkpoint, norm, monkeypatch):
    """With --h_f_bits 8, nothing that a step keeps is as large as h_f in 16 bits; of any kind of
    downsampler, also one that returns a view of h_f."""
    if kind == "slice":
        make = lambda config, n_in, n_out: torch.nn.Sequential(Slice(), *[LayerNorm(n_out)] * norm)
        monkeypatch.setattr("side.make_downsample", make)
    known = "linear" if kind == "slice" else kind
    config = SideConfig(reduction=4, rank=2, downsample=known, downsample_norm=norm)
    side, kept = SideNetwork(small_config(n_embd=64), config), []
    side.save_memory(checkpoint, h_f_bits=8)
    h_f, h_g = torch.randn(4, 16, 64), torch.randn(4, 16, 16)
    note = lambda t: kept.append(t.untyped_storage().nbytes()) or t
    for run in (lambda: side.start(h_f), lambda: side.step(0, h_f, h_g)):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = run()
        assert out.untyped_storage().nbytes() == out.nbytes
    assert max(kept) <= h_f.nbytes / 2  # queries and keys of the narrow layer are one tensor


def test_a_rank_above_the_base_is_refused(base):
    """Before modules of that size are made; as many are the most."""
    assert QST(base, SideConfig(reduction=4, rank=32)).side.downsample[0].down.out_features == 32
    with pytest.raises(InputError, match="--rank 999999999 is more than the base's 32 channels"):
        QST(base, SideConfig(reduction=4, rank=999_999_999))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_of_the_mix_add_up_to_1(dtype):
    """Where the base and the side network agree, the mix is what they agree on, whatever alpha is:
    in 16 bits too; and its gradient in fp16 is finite where a sum over all channels is not."""
    side = SideNetwork(small_config(), SideConfig(reduction=4, upsample_bias=True))
    torch.nn.init.zeros_(side.upsample.weight)
    h_f, h_g = torch.ones(2, 3, 32, dtype=dtype), torch.zeros(2, 3, 8, dtype=dtype)
    torch.nn.init.ones_(side.upsample.bias)
    for alpha in (1.0, 0.999, 0.73, 0.3):
        side.alpha.data.fill_(alpha)
        assert torch.equal(side.mix(h_f, h_g), h_f)
    side.upsample.bias.data.fill_(-1)
    mixed = side.mix(h_f, h_g)
    mixed.backward(torch.full_like(mixed, 5e3))  # of a channel 60,000, of all of them 1,920,000
    assert side.alpha.grad.item() == pytest.approx(32 * 6 * 2 * 5e3, rel=0.01)


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


def test_mixes_and_gates(base):
    """The residual mix and the summing gate are sums, without a parameter of their own."""
    side = shaken(QST(base, SideConfig(reduction=4, mix="residual", gate="sum"))).side
    assert side.alpha is None and side.gamma is None
    h_f, h_g = torch.randn(2, 5, 32), torch.randn(2, 5, 8)
    assert torch.allclose(side.mix(h_f, h_g), h_f + h_g @ side.upsample.weight.T, atol=1e-6)
    expected = side.layers[2](side.downsample[3](h_f) + h_g)
    assert torch.equal(side.step(3, h_f, h_g), expected)


def test_a_factor_near_0_is_not_lost_in_bf16():
    """1 - alpha is taken in fp32: with alpha just below 1 the side network still counts in bf16."""
    side = SideNetwork(small_config(), SideConfig(reduction=4))
    side.alpha.data.fill_(0.999)
    h_f, h_g = torch.zeros(2, 32).bfloat16(), torch.randn(2, 8).bfloat16()
    expected = 0.001 * side.upsample(h_g).float()
    assert torch.allclose(side.mix(h_f, h_g).float(), expected, rtol=0.02, atol=1e-6)


def test_the_gradient_of_alpha_fits_into_fp16():
    """A sum over all channels would not: those of each channel are added up in fp32."""
    side = SideNetwork(small_config(), SideConfig(reduction=4))
    h_f, h_g = torch.full((100, 32), 100.0).half(), torch.zeros(100, 8).half()
    side.mix(h_f, h_g).sum().backward()
    assert side.alpha.grad == 100 * 100 * 32 > torch.finfo(torch.float16).max


def test_standardization(base, idx, tmp_path):
    """Channels of what the downsamplers read have mean 0 and variance 1 over the texts' tokens,
    among which are neither padding nor the first of each; a saved side network knows them."""
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
        tokens = torch.cat([row[i][0, 1:] for row in states])
        seen = model.side.standardized(i, tokens)
        assert seen.mean(0).abs().max() < 1e-4
        assert torch.allclose(seen.var(0, correction=0), torch.ones(32), atol=1e-3)
    model.save_side(tmp_path)
    again = QST.from_side(base, tmp_path)
    assert torch.equal(again.side.mean, model.side.mean)
    assert torch.equal(again(idx)[0], model(idx)[0])


def test_each_state_is_standardized_by_its_own_channels(base):
    """What a step reads has the mean and the scale of the state after its layer, and the start
    those of the embedding."""
    side = shaken(QST(base, SideConfig(reduction=4, standardize=True, gate="sum"))).side
    side.mean.copy_(torch.randn(4, 32))
    side.scale.copy_(torch.rand(4, 32) + 0.5)
    h_f, h_g = torch.randn(2, 5, 32), torch.randn(2, 5, 8)
    read = lambda i: side.downsample[i]((h_f - side.mean[i]) * side.scale[i])
    assert torch.equal(side.start(h_f), read(0))
    for i in (1, 2, 3):
        assert torch.equal(side.step(i, h_f, h_g), side.layers[i - 1](read(i) + h_g))


def test_a_channel_that_never_changes_has_a_finite_scale(base):
    """Of one token every variance is 0; and where there is only a first, there is none."""
    model = QST(base, SideConfig(reduction=4, standardize=True))
    for texts in ([[5, 6]], [[5]]):
        model.calibrate(texts)
        assert model.side.scale.isfinite().all()


def test_standardizing_is_in_fp32():
    """A mean that is rounded to 16 bits would move all that is near it."""
    side = SideNetwork(small_config(), SideConfig(reduction=4, standardize=True))
    side.mean.fill_(300.7)
    side.scale.fill_(1.003)
    h_f = (300 + torch.randn(5, 32)).bfloat16()
    expected = ((h_f.float() - 300.7) * 1.003).bfloat16()
    assert torch.equal(side.standardized(1, h_f), expected)


def test_reductions_that_do_not_fit_are_refused():
    """The message says which reductions do."""
    with pytest.raises(InputError, match="--reduction 3 .* choose one of 1, 2, 4"):
        SideNetwork(small_config(), SideConfig(reduction=3))
    with pytest.raises(InputError, match="--downsample .sum. is unknown"):
        SideConfig(downsample="sum")
    with pytest.raises(InputError, match="--rank 33 is more than the base's 32 channels"):
        QST(small_base(), SideConfig(reduction=4, rank=33))
    SideNetwork(small_config("opt"), SideConfig(reduction=32))  # one channel: no rotary pairs


@pytest.mark.parametrize("base, channels, heads", [
    ((32, 8), 256, 32), ((32, 8), 160, 20), ((32, 32), 160, 20), ((9, 3), 36, 3), ((8, 8), 8, 1),
    ((4, 2), 2, 1), ((16, 8), 90, 9), ((3, 1), 48, 3),
])
def test_a_side_network_has_heads_of_8_channels_or_more(base, channels, heads):
    """As many heads as the base, or fewer; 0 stands for as many, whatever their width."""
    n_head, n_kv_head = base
    config = small_config(n_head=n_head, n_kv_head=n_kv_head, n_embd=2 * channels, head_dim=8)
    side = SideNetwork(config, SideConfig(reduction=2))
    assert side.config.heads == side.model_config.n_head == heads
    assert side.layers[0].self_attn.q_proj.out_features == channels
    kv_heads = side.model_config.n_kv_head
    assert heads % kv_heads == 0 and (kv_heads == heads or n_head > n_kv_head)
    if channels % (2 * n_head) == 0:
        as_many = SideNetwork(config, SideConfig(reduction=2, heads=0))
        assert as_many.model_config.n_head == n_head
        assert as_many.model_config.n_kv_head == n_kv_head


def test_heads_and_reductions_that_do_not_divide_the_channels():
    """The message says which do."""
    with pytest.raises(InputError, match="5 heads do not divide .* 8 channels"):
        SideNetwork(small_config(), SideConfig(reduction=4, heads=5))
    with pytest.raises(InputError, match="--reduction 32 .* into a multiple of 2: choose one of 1"):
        SideNetwork(small_config(), SideConfig(reduction=32))  # rotary positions turn pairs
    with pytest.raises(InputError, match="--reduction 4 .* choose one of 1, 2[.]"):
        SideNetwork(small_config(n_ffn=3), SideConfig(reduction=4))  # its MLP would have no channel


@pytest.mark.parametrize("preset, released", [
    ("llama-2-7b", 28_623_104), ("llama-2-13b", 54_756_160), ("llama-2-70b", 282_944_000),
    ("opt-1.3b", 5_869_824), ("opt-2.7b", 11_720_000), ("opt-6.7b", 28_582_400),
])
def test_trainable_parameters_of_the_released_variant(preset, released):
    """SideConfig(**RELEASED) has exactly as many parameters as the released code."""
    with torch.device("meta"):
        side = SideNetwork(PRESETS[preset], SideConfig(**RELEASED))
    assert sum(p.numel() for p in side.parameters()) == released


def test_trainable_parameters_of_the_papers_variant():
    """The paper's own architecture on LLaMA-2-7B: 0.42 % (Table 6 says 0.41, 0.85, 0.38)."""
    total, percent = count_weights(PRESETS["llama-2-7b"]), {}
    for kind in DOWNSAMPLERS:
        with torch.device("meta"):
            side = SideNetwork(PRESETS["llama-2-7b"], SideConfig(downsample=kind))
        trainable = sum(p.numel() for p in side.parameters())
        percent[kind] = 100 * trainable / (total + trainable)
        if kind == "adapter":
            assert trainable == 28_659_745
    paper = dict(linear=0.85, lora=0.41, adapter=0.41, maxpool=0.38, avgpool=0.38)
    assert percent == pytest.approx(paper, abs=0.06)
