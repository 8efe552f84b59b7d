"""The authors' side checkpoints: read into ours, they compute what the released code computes."""

import pytest
import torch
from helpers import small_base
from samples import released_state
from torch.nn import functional as F

from data import InputError
from data.settings.methods import RELEASED
from model import rotary_table
from qst import QST, import_released
from side import SideConfig


def released_logits(base, files, idx):
    """The released forward pass, from the description of its code in issue and paper notes."""
    opt, N, (B, T) = base.config.family == "opt", base.config.n_layer, idx.shape
    layers, D = files["qst_layers_parameters.pt"], files["qst_downsample_parameters.pt"]
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
        split = lambda y: y.view(B, T, heads, -1).transpose(1, 2)
        q, k, v = (split(linear(x, f"{i}.self_attn.{name}_proj")) for name in "qkv")
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
        )
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

    positions = torch.arange(T)[None]
    h = next(base.states(idx))
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
    assert model.side.config == SideConfig(reduction=4, rank=3, heads=4, **RELEASED)
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
    with pytest.raises(InputError, match="does not fit a llama model with 5 layers"):
        import_released(small_base(n_layer=5), tmp_path)
    with pytest.raises(InputError, match="shape"):
        import_released(small_base(n_ffn=96), tmp_path)
    (tmp_path / "lm_head_z_path.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="lm_head_z_path.pt cannot be read"):
        import_released(base, tmp_path)
    (tmp_path / "lm_head_z_path.pt").unlink()
    with pytest.raises(InputError, match="lm_head_z_path.pt is missing"):
        import_released(base, tmp_path)
