"""Folders in 4 bits: quantized while loading, by bitsandbytes, or by `model.py quantize`."""

import json
from functools import partial

import pytest
import torch
from helpers import FIXTURES, copy_folder, run_script, small_base
from samples import oracle
from torch import nn

from data import InputError
from data.formats.bnb import weight_fields
from data.formats.safetensors import read_safetensors, write_safetensors
from data.formats.save import save_pretrained
from data.frozen.fingerprint import fingerprint
from model import from_pretrained, quantize_folder
from quant import Linear4bit, quantize_4bit


@pytest.mark.parametrize("name", ["llama_gqa", "opt_350m"])
def test_loading_in_4_bits(name):
    """Every linear layer but the head is quantized, to what quantizing it afterwards gives."""
    model = from_pretrained(FIXTURES / name, "nf4", torch.float32)
    plain = from_pretrained(FIXTURES / name, "none", torch.float32)
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer, again = model.get_submodule(path), Linear4bit.from_linear(module)
            assert torch.equal(layer.weight.codes, again.weight.codes)
            assert torch.equal(layer.weight.absmax, again.weight.absmax)
            assert (module.bias is None) == (layer.bias is None)
            assert layer.out_features == len(module.weight)
    assert not list(model.parameters()) and not list(plain.parameters())
    assert (model(torch.tensor([[3, 4]])) - plain(torch.tensor([[3, 4]]))).abs().max() > 1e-4


@pytest.mark.parametrize("name, kind", [("bnb_llama", "nf4"), ("bnb_opt", "fp4")])
def test_folders_of_bitsandbytes(name, kind):
    """A folder that transformers wrote in 4 bits gives the logits that it has there; what it
    skipped stays as it is, and nothing is quantized anew: the codes are the file's."""
    folder = FIXTURES / name
    z, model = oracle(folder), from_pretrained(folder, kind, torch.float32)
    assert (model(z["idx"]) - z["logits"]).abs().max() < 1e-5 * z["logits"].abs().max()
    layer = model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Linear4bit)
    assert isinstance(layer.mlp.down_proj, Linear4bit) == (name == "bnb_llama")
    wanted = "model.layers.0.self_attn.q_proj.weight" if name == "bnb_llama" else None
    if wanted:
        codes = read_safetensors(folder / "model.safetensors")[wanted]()
        assert torch.equal(layer.self_attn.q_proj.weight.codes, codes.view(-1))
    with pytest.raises(InputError, match=f"is already {kind}: give --quant {kind}"):
        from_pretrained(folder, "none")


@pytest.mark.parametrize("name", ["llama_linear_bias_tied", "opt_350m"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantized_folder(name, kind, tmp_path, idx):
    """`model.py quantize` writes what quantizing while loading gives, bit for bit."""
    quantize_folder(FIXTURES / name, tmp_path / "out", kind)
    ours = from_pretrained(tmp_path / "out", kind, torch.float32)
    direct = from_pretrained(FIXTURES / name, kind, torch.float32)
    idx = idx % 48
    assert torch.equal(ours(idx), direct(idx))
    assert fingerprint(ours) == fingerprint(direct)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["quantization_config"]["bnb_4bit_quant_type"] == kind


def test_quantizing_on_the_command_line(tiny_model, tmp_path):
    """It says what it has written; a folder in 4 bits is left as it is, and named."""
    printed = run_script("model.py", "quantize", str(tiny_model), str(tmp_path / "out"))
    assert printed.startswith(f"{tmp_path / 'out'}: nf4, 0.000 GB")
    with pytest.raises(SystemExit, match="out is in 4 bits already: there is nothing to do"):
        run_script("model.py", "quantize", str(tmp_path / "out"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_a_stale_quantization_config(tmp_path):
    """The weights decide: 16-bit ones are quantized, whatever config.json still says."""
    folder = copy_folder("llama_gqa", tmp_path, quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    })
    quantize_folder(folder, tmp_path / "out")
    direct = from_pretrained(FIXTURES / "llama_gqa", "nf4")
    assert fingerprint(from_pretrained(tmp_path / "out", "nf4")) == fingerprint(direct)


def rewrite(folder, change):
    """Apply a function to a folder's tensors."""
    path = folder / "model.safetensors"
    tensors = {name: read().clone() for name, read in read_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_of_another_dtype(dtype, tmp_path):
    """bnb_4bit_quant_storage, as for FSDP, changes the dtype of the codes and no byte of them."""

    def change(tensors):
        for name in [name for name in tensors if f"{name}.absmax" in tensors]:
            tensors[name] = tensors[name].view(-1).view(dtype).unsqueeze(1)

    folder = rewrite(copy_folder("bnb_llama", tmp_path), change)
    ours = from_pretrained(folder, "nf4", torch.float32)
    expected = from_pretrained(FIXTURES / "bnb_llama", "nf4", torch.float32)
    assert fingerprint(ours) == fingerprint(expected)
    assert ours.layers[0].mlp.up_proj.weight.codes.dtype == torch.uint8


def test_a_4_bit_head(tmp_path):
    """It is dequantized: our heads have 16 bits. An embedding in 4 bits is refused by name."""
    weight = torch.randn(48, 64)
    packed = quantize_4bit(weight, "nf4")

    def change(name, tensors):
        del tensors[name]
        tensors.update(weight_fields(name, packed, "float32"))

    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        folder = rewrite(copy_folder("bnb_llama", tmp_path / name), partial(change, name))
        if name == "lm_head.weight":
            ours = from_pretrained(folder, "nf4", torch.float32)
            assert torch.equal(ours.lm_head.weight, packed.dequantize(torch.float32))
        else:
            with pytest.raises(InputError, match="has embed_tokens.weight, unlike config.json"):
                from_pretrained(folder, "nf4")


@pytest.mark.parametrize("family, own", [
    ("llama", {}), ("qwen2", dict(attention_bias="qkv")), ("qwen3", dict(qk_norm=True)),
    ("smollm3", dict(no_rope=(1, 3))),
])
def test_transformers_reads_our_folder(family, own, tmp_path, idx):
    """transformers with bitsandbytes loads it, and gets our logits (where both are installed)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    model = small_base("none", n_embd=64, n_ffn=128, **own)
    save_pretrained(model, tmp_path / "in")
    quantize_folder(tmp_path / "in", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu"
    )
    assert any("4bit" in type(module).__name__ for module in theirs.modules())
    assert theirs.config.model_type == family
    ours = from_pretrained(tmp_path / "out", "nf4", torch.float32)
    with torch.no_grad():
        expected = theirs.dequantize()(idx).logits
    assert (ours(idx) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("change, message", [
    ({"blocksize": 128}, "blocksize is 128; it must be 64"),
    ({"shape": [64, 65]}, "do not fit its shape"),
    ({"shape": None}, "lacks the field .shape"), ("quant_map", "another code book"),
    ("absmax", "lacks one of its"),
])
def test_a_4_bit_tensor_that_is_not_as_it_should_be(change, message, tmp_path):
    """A quant_state that we cannot follow exactly is refused by the name of the tensor."""
    folder = copy_folder("bnb_llama", tmp_path)
    tensors = {n: r().clone() for n, r in read_safetensors(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "absmax":
        del tensors[f"{name}.absmax"]
    elif change == "quant_map":
        tensors[f"{name}.quant_map"] += 0.001
    else:
        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | change
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(InputError, match=f"layers.0.mlp.up_proj.weight.*{message}"):
        from_pretrained(folder)
