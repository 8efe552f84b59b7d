"""What learns inside the base, each method by itself; and merging it into plain weights."""

import pytest
import torch
from helpers import FAMILIES, KINDS, each_family, moved, small_base, tuned
from torch.nn import functional as F

from data.formats.hub import OPT_NAMES
from data.formats.safetensors import read_safetensors
from data.formats.save import save_pretrained
from model import count_weights, from_pretrained
from qst import QST, add_trainable
from side import SideConfig


@each_family
@pytest.mark.parametrize("method", ["lora", "qlora", "peqa", "full"])
def test_merging(method, family, tmp_path, idx):
    """A Hugging Face folder of plain weights has the logits of base and parts, to rounding; in
    transformers too."""
    model = moved(tuned(method, family))
    expected = model(idx)[0].detach()
    save_pretrained(model.merge(torch.float32), tmp_path)
    ours = from_pretrained(tmp_path, "none", torch.float32)
    close = lambda logits: (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert close(ours(idx)) and not close(small_base(KINDS[method], **FAMILIES[family])(idx))
    assert model.merge().lm_head.weight.dtype == torch.bfloat16
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert close(theirs(idx).logits.detach())


def test_lora_adds_a_low_rank_product():
    """A layer is x (W + 16 / rank up down), W being the weight in 4 bits."""
    layer = moved(tuned("qlora")).base.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    product = 4 * layer.pair.up.weight @ layer.pair.down.weight
    weight = layer.linear.weight.dequantize() + product
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-5)


@each_family
def test_lora_is_pefts(family, tmp_path, idx):
    """With the same branches, logits and gradients are peft's (rank 4, alpha 16, all linears)."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = moved(tuned("lora", family))
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
        error = (parameter.grad - parameters[name].grad).abs().max()
        assert error < 1e-4 * parameter.grad.abs().max() + 1e-6


def test_the_adapter_is_houlsbys(idx):
    """Behind the attention and the MLP, before the residual: y + up(silu(down(y)))."""
    model = moved(tuned("adapter"))
    layer, plain = model.base.layers[1], small_base("none").layers[1]
    x = torch.randn(2, 7, 32)
    for name in ("self_attn", "mlp"):
        context = (None, None, None) if name == "self_attn" else ()
        y, part = getattr(plain, name)(x, *context), model.side.layers[1][name]
        expected = y + F.silu(y @ part.down.weight.T) @ part.up.weight.T
        assert torch.allclose(getattr(layer, name)(x, *context), expected, atol=1e-5)


def test_full_finetuning_keeps_a_tied_head_tied(tmp_path, idx):
    """One parameter is embedding and head, once in the file too, also after it is loaded."""
    model = moved(tuned("full", "opt"))
    assert model.base.lm_head.weight is model.base.embed_tokens.weight
    assert not list(model.base.buffers())
    model.save_side(tmp_path)
    numel = sum(read().numel() for read in read_safetensors(tmp_path / "side.safetensors").values())
    assert numel == count_weights(model.config)
    again = QST.from_side(small_base("none", family="opt"), tmp_path).base
    assert again.lm_head.weight is again.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_full_finetuning_of_a_classifier_leaves_out_the_head(tied):
    """Nothing is counted as learning that gets no gradient; a tied head is the embedding."""
    model = add_trainable(small_base("none", tied=tied), SideConfig(method="full", n_labels=2))
    idx = torch.arange(5).repeat(2, 1)
    model.loss(idx, torch.tensor([[-100] * 4 + [1]] * 2)).backward()
    assert all(p.grad is not None for p in model.parameters())
