"""model.py, against what transformers gives (tests/fixtures, made by make_fixtures.py)."""

import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import FIXTURES, TEST_DATA, needs_test_data, small_base, small_config
from torch import nn

from model import (
    PRESETS, Transformer, count_weights, from_pretrained, quantize_folder, read_config,
)  # fmt: skip
from data import pad_left
from data.hub import save_pretrained
from data.safetensors import read_safetensors, write_safetensors
from data.sampling import KVCache, sample
from qst import fingerprint
from quant import InputError, Linear4bit

FOLDERS = [FIXTURES / name for name in (
    "llama_gqa", "llama_linear_bias_tied", "llama_rope3", "mistral", "opt_pre", "opt_350m"
)] + sorted((TEST_DATA / "oracle/hf").glob("*"))  # fmt: skip


def oracle(folder):
    names = dict(input_ids="idx", mask_right="right", mask_left="left", greedy_from_8="greedy",
                 logits_mask_right="logits_right", logits_mask_left="logits_left")  # fmt: skip
    z = np.load(folder / "expected.npz")
    return {names.get(k, k): torch.from_numpy(v) for k, v in z.items()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_logits_equal_transformers(folder):
    """fp32 logits are those of transformers within 1e-4 of their scale, also beside padding."""
    z, model = oracle(folder), from_pretrained(folder, "none", torch.float32)
    scale = z["logits"].abs().max()
    assert (model(z["idx"]) - z["logits"]).abs().max() < 1e-4 * scale
    for side in ("right", "left"):
        keep = z[side]
        logits = model(z["idx"], keep)
        assert logits.isfinite().all()
        assert (logits - z[f"logits_{side}"])[keep.bool()].abs().max() < 1e-4 * scale


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_greedy_text_equals_transformers(folder):
    """Greedy generation with the cache gives the same tokens."""
    greedy = oracle(folder)["greedy"]
    prompt = 8 if greedy.shape[1] == 20 else 4
    model = from_pretrained(folder, "none", torch.float32)
    assert torch.equal(model.generate(greedy[:, :prompt], greedy.shape[1] - prompt), greedy)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cache_equals_no_cache(family, idx):
    """Tokens fed in pieces through the cache give the logits of all at once."""
    model, cache = small_base(family=family), None
    whole, cache = model(idx), model.new_cache(10)
    pieces = [model(idx[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9), (9, 10))]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_padded_batch_equals_single_prompts(family):
    """Prompts of unequal length, padded on the left, go on as each does alone."""
    model = small_base(family=family)
    prompts = [[5, 9, 3], [7, 8, 4, 11, 30, 2], [12]]
    idx, keep = pad_left(prompts)
    together = model.generate(idx, 8, keep=keep)[:, idx.shape[1] :]
    for prompt, row in zip(prompts, together):
        assert torch.equal(model.generate(torch.tensor([prompt]), 8)[0, len(prompt) :], row)


def test_generation_stops_at_the_end_token(idx):
    """All rows end: the stream stops early, and a row that has ended repeats its end token."""
    model = small_base()
    free = model.generate(idx, 12)[:, 10:]
    ends = [free[0, 2].item(), free[1, 4].item(), free[2, 1].item()]
    stopped = model.generate(idx, 12, eos_id=ends)[:, 10:]
    assert stopped.shape[1] < 12
    for row, plain in zip(stopped.tolist(), free.tolist()):
        first = min(i for i, token in enumerate(plain) if token in ends)
        assert row[: first + 1] == plain[: first + 1] and set(row[first + 1 :]) <= {ends[0]}


def test_sampling():
    """top-k and top-p leave out what they should, and the seed decides the rest."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    draw = lambda **k: sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **k)
    counts = lambda tokens: (tokens.bincount(minlength=4) / 4000).tolist()
    assert counts(draw()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert counts(draw(top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert counts(draw(top_p=0.75)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert counts(draw(top_p=0.1)) == [1, 0, 0, 0]
    assert torch.equal(draw(), draw()) and sample(logits).eq(0).all()
    cold = sample(logits, 0.1, generator=torch.Generator().manual_seed(0))
    assert cold.eq(0).float().mean() > 0.98


def test_safetensors_round_trip(tmp_path):
    """What we write, we read, whatever the dtype and shape; and nothing of it is copied."""
    tensors = {
        "a": torch.randn(3, 5), "half": torch.randn(7).half(), "b": torch.randn(2, 1, 3).bfloat16(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", tensors)
    readers = read_safetensors(tmp_path / "x.safetensors")
    assert list(readers) == list(tensors)
    for name, tensor in tensors.items():
        read = readers[name]()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "too long": dict(header={"a": ENTRY}, data=bytes(8), length=1 << 40),
    "not JSON": dict(header=b"{nonsense", data=bytes(8)),
    "not UTF-8": dict(header=b'{"\xff": 1}', data=bytes(8)),
    "not a table": dict(header=[1, 2]),
    "out of range": dict(header={"a": ENTRY | {"data_offsets": [8, 16]}}, data=bytes(8)),
    "negative": dict(header={"a": ENTRY | {"data_offsets": [-8, 0]}}, data=bytes(8)),
    "wrong size": dict(header={"a": ENTRY | {"shape": [3]}}, data=bytes(8)),
    "unknown dtype": dict(header={"a": ENTRY | {"dtype": "Q7"}}, data=bytes(8)),
    "negative shape": dict(header={"a": ENTRY | {"shape": [-1, -2]}}, data=bytes(8)),
    "fractional shape": dict(header={"a": ENTRY | {"shape": [2.0]}}, data=bytes(8)),
    "overlap": dict(header={"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, data=bytes(12)),
    "hole": dict(header={"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, data=bytes(20)),
    "bytes left": dict(header={"a": ENTRY}, data=bytes(20)),
    "cut short": dict(header={"a": ENTRY}, data=bytes(4)),
    "no offsets": dict(header={"a": {"dtype": "F32", "shape": [2]}}, data=bytes(8)),
    "entry is a list": dict(header={"a": [1]}, data=bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    """One sentence that names the file, and no byte beyond it is read."""
    path = tmp_path / "x.safetensors"
    write_raw(path, **LIES[lie])
    with pytest.raises(InputError, match="x.safetensors"):
        read_safetensors(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="x.safetensors"):
        read_safetensors(tmp_path / "x.safetensors")


def copy(name, tmp_path, **config):
    """A copy of a fixture with some of its config.json changed (None: taken out)."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    settings = {k: v for k, v in settings.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("field, value", [
    ("model_type", "gpt2"), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}), ("model_type", None),
    ("hidden_size", None), ("rope_parameters", {"rope_type": "llama3", "factor": 2.0}),
])  # fmt: skip
def test_what_we_cannot_compute_is_refused_by_name(field, value, tmp_path):
    """An unknown architecture is refused in a sentence with config.json's field."""
    folder = copy("llama_rope3", tmp_path, **{field: value})
    wanted = {"rope_parameters": "yarn|low_freq_factor"}.get(field, field)
    with pytest.raises(InputError, match=f"config.json.*({wanted})"):
        from_pretrained(folder)


def test_loading_is_strict_in_both_directions(tmp_path):
    """A tensor missing, left over or of another shape is named."""
    with pytest.raises(InputError, match="lacks layers.2"):
        from_pretrained(copy("llama_rope3", tmp_path / "1", num_hidden_layers=3))
    with pytest.raises(InputError, match="has layers.1"):
        from_pretrained(copy("llama_rope3", tmp_path / "2", num_hidden_layers=1))
    with pytest.raises(InputError, match="gate_proj.weight has shape"):
        from_pretrained(copy("llama_rope3", tmp_path / "3", intermediate_size=48))


def test_shards(tmp_path):
    """A shard that is missing, outside the folder, or other than its index says, is refused."""
    folder = copy("llama_gqa", tmp_path / "1")
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
    with pytest.raises(InputError, match="nowhere is not a folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is missing"):
        from_pretrained(tmp_path)
    folder = copy("llama_rope3", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        from_pretrained(folder)


def test_a_pickle_runs_no_code(tmp_path):
    """pytorch_model.bin is opened as plain tensors only."""
    folder = copy("opt_pre", tmp_path)
    marker = tmp_path / "ran"
    class Evil:  # noqa: E306
        def __reduce__(self):
            return (os.mkdir, (str(marker),))
    torch.save({"model.decoder.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        from_pretrained(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["llama_gqa", "opt_350m"])
def test_loading_in_4_bits(name):
    """Every linear layer but the head is quantized, to what quantizing it afterwards gives."""
    model, plain = from_pretrained(FIXTURES / name, "nf4", torch.float32), None
    plain = from_pretrained(FIXTURES / name, "none", torch.float32)
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            ours = model.get_submodule(path)
            weight, bias = module.weight, module.bias
            again = Linear4bit.from_linear(module)
            assert torch.equal(ours.codes, again.codes) and torch.equal(ours.absmax, again.absmax)
            assert (bias is None) == (ours.bias is None) and len(weight) == ours.out_features
    assert not list(model.parameters()) and not list(plain.parameters())
    assert (model(torch.tensor([[3, 4]])) - plain(torch.tensor([[3, 4]]))).abs().max() > 1e-4


def test_nan_in_a_checkpoint_is_named(tmp_path):
    torch.manual_seed(0)
    model = Transformer(small_config())
    with torch.no_grad():
        model.layers[2].mlp.up_proj.weight[3, 4] = math.nan
    save_pretrained(model, tmp_path)
    with pytest.raises(InputError, match="layers.2.mlp.up_proj.weight"):
        from_pretrained(tmp_path)


def test_saved_folder_loads_again(tmp_path, idx):
    """`save_pretrained` and `from_pretrained` are inverse, config and all."""
    config = small_config(n_kv_head=2, rope_scaling={"rope_type": "linear", "factor": 2.0}, tied=True)
    model = Transformer(config)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path, "none", torch.float32)
    assert read_config(tmp_path) == config and torch.equal(model(idx), again(idx))


def test_weights_of_the_presets():
    """The presets have as many weights as their authors say."""
    billions = {"llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977, "opt-1.3b": 1.316,
                "llama-3-8b": 8.030, "opt-6.7b": 6.658, "smollm2-135m": 0.1345}  # fmt: skip
    for name, expected in billions.items():
        assert count_weights(PRESETS[name]) / 1e9 == pytest.approx(expected, abs=6e-4)


def test_a_sequence_longer_than_the_positions():
    model = small_base()
    with pytest.raises(InputError, match="65 tokens.*64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="lower max_new_tokens"):
        model.generate(torch.zeros(1, 60, dtype=torch.long), 10)
    with pytest.raises(InputError, match="shorten the prompt"):
        model.generate(torch.zeros(1, 70, dtype=torch.long), 10)


@pytest.mark.parametrize("wrong", [
    dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-3), dict(top_p=0.0)
])  # fmt: skip
def test_sampling_settings_that_make_no_sense(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        small_base().generate(torch.zeros(1, 3, dtype=torch.long), **dict(max_new_tokens=2) | wrong)


def test_a_full_disk_leaves_nothing(tmp_path):
    """Writing to a full device is one sentence, and no part of a file stays."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "x.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match="x.safetensors could not be written"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(100000)})
    assert list(tmp_path.iterdir()) == []


def test_cache_is_allocated_once():
    """The cache's buffers are made at its first use, and never again."""
    cache = KVCache(8)
    cache.append(*torch.zeros(2, 1, 2, 3, 4))
    place = cache.k.data_ptr()
    k, _ = cache.append(*torch.ones(2, 1, 2, 2, 4))
    assert cache.k.data_ptr() == place and k.shape == (1, 2, 5, 4) and k[..., 3:, :].eq(1).all()


@needs_test_data
def test_the_known_story():
    """stories260K in full precision tells the story that it is known for."""
    from data.tokenizer import load_tokenizer

    folder = TEST_DATA / "models/stories260K"
    model, tokenizer = from_pretrained(folder, "none", torch.float32), load_tokenizer(folder)
    idx = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("Once upon a time")]])
    text = tokenizer.decode(model.generate(idx, 40)[0].tolist())
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play")


@pytest.mark.parametrize("name, kind", [("bnb_llama", "nf4"), ("bnb_opt", "fp4")])
def test_folders_of_bitsandbytes(name, kind):
    """A folder that transformers wrote in 4 bits gives the logits that it has there; what it
    skipped stays as it is, and nothing is quantized anew: the codes lie in the memory map."""
    folder = FIXTURES / name
    z, model = oracle(folder), from_pretrained(folder, kind, torch.float32)
    assert (model(z["idx"]) - z["logits"]).abs().max() < 1e-5 * z["logits"].abs().max()
    layer = model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Linear4bit)
    assert isinstance(layer.mlp.down_proj, Linear4bit) == (name == "bnb_llama")
    wanted = "model.layers.0.self_attn.q_proj.weight" if name == "bnb_llama" else None
    if wanted:
        codes = read_safetensors(folder / "model.safetensors")[wanted]()
        assert torch.equal(layer.self_attn.q_proj.codes, codes.view(-1))
    with pytest.raises(InputError, match=f"already quantized to {kind}: give --quant {kind}"):
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


def test_transformers_reads_our_folder(tmp_path, idx):
    """transformers with bitsandbytes loads it, and gets our logits (where both are installed)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    save_pretrained(Transformer(small_config(n_embd=64, n_ffn=128)), tmp_path / "in")
    quantize_folder(tmp_path / "in", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu"
    )
    assert any("4bit" in type(module).__name__ for module in theirs.modules())
    ours = from_pretrained(tmp_path / "out", "nf4", torch.float32)
    with torch.no_grad():
        expected = theirs.dequantize()(idx).logits
    assert (ours(idx) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("change, told", [
    ({"blocksize": 128}, "blocksize is 128; it must be 64"), ({"shape": [64, 65]}, "do not fit its shape"),
    ({"shape": None}, "lacks the field .shape"), ("quant_map", "another code book"),
    ("absmax", "lacks one of its"),
])  # fmt: skip
def test_a_4_bit_tensor_that_is_not_as_it_should_be(change, told, tmp_path):
    """A quant_state that we cannot follow exactly is refused by the name of the tensor."""
    folder = copy("bnb_llama", tmp_path)
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
    with pytest.raises(InputError, match=f"layers.0.mlp.up_proj.weight.*{told}"):
        from_pretrained(folder)
    other = copy("llama_rope3", tmp_path / "2", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="quantization_config.quant_method is .gptq"):
        from_pretrained(other)


@pytest.mark.parametrize("name", ["llama_gqa", "llama_rope3", "llama_linear_bias_tied", "opt_pre", "opt_350m"])
def test_a_saved_model_is_the_same_model(name, tmp_path):
    """What `save_pretrained` writes is read to the same config and logits, bit for bit."""
    base = from_pretrained(FIXTURES / name, "none", torch.float32)
    save_pretrained(base, tmp_path)
    again = from_pretrained(tmp_path, "none", torch.float32)
    idx = torch.arange(3, 13).unsqueeze(0)
    assert again.config == base.config and torch.equal(again(idx), base(idx))
