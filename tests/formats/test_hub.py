"""data/formats/hub.py and `from_pretrained`: Hugging Face folders, read strictly and written."""

import math
import os

import pytest
import torch
from helpers import FIXTURES, change, copy_folder, small_config

from data import InputError
from data.formats.files import read_json
from data.formats.safetensors import read_safetensors, write_safetensors
from data.formats.save import save_pretrained
from model import Transformer, from_pretrained, read_config


@pytest.mark.parametrize("field, value", [
    ("model_type", "gpt2"), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}), ("model_type", None),
    ("hidden_size", None), ("rope_parameters", {"rope_type": "llama3", "factor": 2.0}),
    ("quantization_config", {"quant_method": "gptq"}), ("is_causal", False),
    ("per_layer_config", {"0": {"rms_norm_eps": 0.5}}), ("transformers_weights", "x.safetensors"),
])
def test_what_we_cannot_compute_is_refused_by_name(field, value, tmp_path):
    """An unknown architecture is refused in a sentence with config.json's field."""
    folder = copy_folder("llama_rope3", tmp_path, **{field: value})
    method = "method is .gptq.*unquantized"
    named = {"rope_parameters": "yarn|low_freq_factor", "quantization_config": method}
    with pytest.raises(InputError, match=f"config.json.*({named.get(field, field)})"):
        from_pretrained(folder)


def test_loading_is_strict_in_both_directions(tmp_path):
    """A tensor missing, left over or of another shape is named."""
    with pytest.raises(InputError, match="lacks layers.2"):
        from_pretrained(copy_folder("llama_rope3", tmp_path / "1", num_hidden_layers=3))
    with pytest.raises(InputError, match="has layers.1"):
        from_pretrained(copy_folder("llama_rope3", tmp_path / "2", num_hidden_layers=1))
    with pytest.raises(InputError, match="gate_proj.weight has shape"):
        from_pretrained(copy_folder("llama_rope3", tmp_path / "3", intermediate_size=48))


def test_a_tensor_with_both_names(tmp_path):
    """A base model's names lack "model.": of two that are the same then, none is preferred."""
    folder = copy_folder("llama_rope3", tmp_path)
    path = folder / "model.safetensors"
    tensors = {name: read() for name, read in read_safetensors(path).items()}
    tensors["norm.weight"] = 2 * tensors["model.norm.weight"]
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match='has a tensor twice, with and without "model." in front'):
        from_pretrained(folder)


def test_shards(tmp_path):
    """A shard that is missing, outside the folder, or other than its index says, is refused."""
    folder = copy_folder("llama_gqa", tmp_path / "1")
    index = folder / "model.safetensors.index.json"
    original = index.read_text()
    index.write_text(original.replace("model-00002", "../model-00002"))
    with pytest.raises(InputError, match="outside its folder"):
        from_pretrained(folder)
    index.write_text(original.replace("model.norm.weight", "model.morn.weight"))
    with pytest.raises(InputError, match="model.norm.weight"):
        from_pretrained(folder)
    index.write_text(original)
    (folder / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00005.safetensors is missing"):
        from_pretrained(folder)


def test_missing_files(tmp_path):
    """Each is named: the folder, its config.json, its weights."""
    with pytest.raises(InputError, match="nowhere/config.json is missing"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is missing: .*, unlike a LoRA"):
        from_pretrained(tmp_path)
    folder = copy_folder("llama_rope3", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        from_pretrained(folder)


def test_a_pickle_runs_no_code(tmp_path):
    """pytorch_model.bin is opened as plain tensors only."""
    folder = copy_folder("opt_pre", tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"model.decoder.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        from_pretrained(folder)
    assert not marker.exists()


def test_nan_in_a_checkpoint_is_named(tmp_path):
    """Quantizing refuses it by the name of the tensor."""
    torch.manual_seed(0)
    model = Transformer(small_config())
    with torch.no_grad():
        model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
    save_pretrained(model, tmp_path)
    with pytest.raises(InputError, match="layers.2.mlp.up_proj.weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [
    "llama_gqa", "llama_rope3", "llama_linear_bias_tied", "opt_pre", "opt_350m", "qwen2", "qwen3",
    "smollm3",
])
def test_a_saved_model_is_the_same_model(name, tmp_path):
    """What `save_pretrained` writes is read to the same config and logits, bit for bit."""
    base = from_pretrained(FIXTURES / name, "none", torch.float32)
    save_pretrained(base, tmp_path)
    again = from_pretrained(tmp_path, "none", torch.float32)
    idx = torch.arange(3, 13).unsqueeze(0)
    assert again.config == base.config and torch.equal(again(idx), base(idx))
    written = read_json(tmp_path / "config.json")["model_type"]
    assert written == name.partition("_")[0]


@pytest.mark.parametrize("name, embedding", [
    ("llama_linear_bias_tied", "model.embed_tokens.weight"),
    ("opt_350m", "model.decoder.embed_tokens.weight"),
])
def test_a_stored_tied_head(name, embedding, tmp_path):
    """A folder may store it too, or in place of the embedding; one with other values is refused."""
    folder = copy_folder(name, tmp_path)
    path = folder / "model.safetensors"
    tensors = {name: read().clone() for name, read in read_safetensors(path).items()}
    expected, idx = from_pretrained(folder, "none", torch.float32), torch.arange(3, 13)[None]
    tensors["lm_head.weight"] = tensors[embedding].clone()
    alone = {name: tensor for name, tensor in tensors.items() if name != embedding}
    for stored in (tensors, alone):
        write_safetensors(path, stored)
        assert torch.equal(from_pretrained(folder, "none", torch.float32)(idx), expected(idx))
    tensors["lm_head.weight"][3, 4] += 1
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match='lm_head.weight that is not .*"tie_word_embeddings": fal'):
        from_pretrained(folder)


def test_a_window_that_is_not_given(tmp_path):
    """Mistral's default in transformers is 4,096; null is none."""
    folder = copy_folder("mistral", tmp_path, max_position_embeddings=9000, sliding_window=None)
    assert read_config(folder).max_positions == 4096  # None took it out
    for value, positions in ((None, 9000), (99, 99)):
        change(folder / "config.json", sliding_window=value)
        assert read_config(folder).max_positions == positions


def test_both_tables_of_rotary_positions(tmp_path):
    """rope_scaling comes before rope_parameters, as in transformers 5."""
    tables = dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=100.0)
    tables |= dict(rope_scaling={"rope_type": "linear", "factor": 4.0})
    config = read_config(copy_folder("llama_gqa", tmp_path, **tables))
    assert config.rope_scaling == tables["rope_scaling"] and config.rope_theta == 100
