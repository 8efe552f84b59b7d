"""What comes from outside loads, or is refused in one sentence with the file's name and the field's.

Here is what each reader must refuse, and why; tests/fuzz.py looks for what nobody has thought of.
"""

import dataclasses
import json
import math
import os
import pickle
import shutil
import time
import zipfile

import pytest
import torch
from conftest import FIXTURES, small_config
from mutants import RAW, VALUES, dump

import model
from data import chat
from data.fields import shown
from data.files import read_json
from data.hub import save_pretrained
from data.pickled import read_tensors
from data.safetensors import read_safetensors, write_safetensors
from data.tokenizer import load_tokenizer
from model import Transformer, from_pretrained
from quant import InputError


def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / source.name, dirs_exist_ok=True)


def change(path, **values):
    """Replace fields of a JSON file, and return the file."""
    path.write_bytes(dump(json.loads(path.read_bytes()) | values))
    return path


def refused(call, *args, named=""):
    """The sentence that refuses: of one line, not long, and with a name in it."""
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600 and named in text, text
    return text


# --------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("name", ["llama_gqa", "llama_rope3", "mistral", "opt_350m"])
def test_every_field_of_a_config_by_every_type(name, tmp_path):
    """A value of any type, in the place of any field, is read as what it is, or refused by name."""
    folder = copy(FIXTURES / name, tmp_path)
    path = folder / "config.json"
    good, fields = json.loads(path.read_text()), [f.name for f in dataclasses.fields(model.ModelConfig)]
    before = vars(model.read_config(folder))
    for field in good:
        for value in VALUES:
            path.write_bytes(dump(good | {field: value}))
            try:
                after = vars(model.read_config(folder))
            except InputError as error:
                assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 600
                continue
            for key in fields:
                odd = type(after[key]) is not type(before[key]) and after[key] is not None
                assert not odd or {type(after[key]), type(before[key])} <= {int, list, type(None), float}


@pytest.mark.parametrize("field, value", [
    ("num_attention_heads", 4.0), ("num_attention_heads", 5), ("num_key_value_heads", 3), ("vocab_size", "x"),
    ("hidden_size", 0), ("num_hidden_layers", -1), ("head_dim", 7), ("rope_theta", 0), ("rope_theta", "1e4"),
    ("tie_word_embeddings", "false"), ("eos_token_id", 48), ("eos_token_id", [2, -2]), ("bos_token_id", True),
    ("rms_norm_eps", 0), ("quantization_config", "x"), ("sliding_window", 0), ("model_type", ["llama"]),
    ("rope_scaling", {"type": "linear", "factor": 0}), ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": ["linear"]}), ("rope_scaling", {"partial_rotary_factor": 0.5}),
])  # fmt: skip
def test_a_config_that_makes_no_sense(field, value, tmp_path):
    """Sizes that do not fit, other types, and ids out of the vocabulary are refused by name."""
    folder = copy(FIXTURES / "llama_linear_bias_tied", tmp_path)
    path = change(folder / "config.json", **{field: value})
    text = refused(model.read_config, folder, named=str(path))
    assert field in text or "rope_parameters" in text


def test_layers_are_counted_before_one_is_built(tmp_path, monkeypatch):
    """A config.json with more layers than there are tensors for costs no time."""
    folder = copy(FIXTURES / "llama_rope3", tmp_path)
    monkeypatch.setattr(model, "Transformer", lambda config: pytest.fail("built"))
    for n, told in ((900, "lacks layers.2"), (1, "has layers.1"), (1000000, "num_hidden_layers")):
        change(folder / "config.json", num_hidden_layers=n)
        assert told in refused(from_pretrained, folder, named=str(folder))


# --------------------------------------------------------------------------------------
# Any file


READ = {  # file: (a folder that has it, the function that reads it there)
    "config.json": ("llama_gqa", from_pretrained), "model.safetensors": ("mistral", from_pretrained),
    "model.safetensors.index.json": ("llama_gqa", from_pretrained),
    "model-00002-of-00005.safetensors": ("llama_gqa", from_pretrained),
    "pytorch_model.bin": ("opt_pre", from_pretrained), "tokenizer.model": ("tokenizers/opt", load_tokenizer),
    "tokenizer.json": ("tokenizers/qwen2", load_tokenizer), "merges.txt": ("tokenizers/opt", load_tokenizer),
    "tokenizer_config.json": ("tokenizers/qwen2", load_tokenizer), "vocab.json": ("tokenizers/opt", load_tokenizer),
    "generation_config.json": ("tokenizers/opt", load_tokenizer), "chat_template.jinja": ("mistral", chat.load_template),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_is_refused(name, tmp_path):
    """A device, which never ends, a pipe, which never begins, and a folder; a link to a file is one."""
    source, read = READ[name]
    folder = copy(FIXTURES / source, tmp_path)
    path, kept = folder / name, tmp_path / "elsewhere"
    if path.exists():
        path.rename(kept)
        path.symlink_to(kept)
        read(folder)
        path.unlink()
    for make in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path), path.mkdir):
        make()
        refused(read, folder, named=str(path))
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("text, told", [
    ("[" * 100000, "nested too deep"), ('{"a": NaN}', "NaN is no number"), ('{"a": 1e999}', "too large"),
    ('{"a": -Infinity}', "Infinity"), ('{"a": 1, "a": 2}', "'a' stands twice"), ("[1]", "not a JSON object"),
    ('{"a": ' + "1" * 5000 + "}", "digits"), ("\xff", "utf-8"),
])  # fmt: skip
def test_json_that_is_none(text, told, tmp_path):
    """JSON is what the standard says; Python's reader takes more, and ends in other errors."""
    path = tmp_path / "some.json"
    path.write_bytes(text.encode("latin-1"))
    assert told in refused(read_json, path, named=str(path))


def test_messages_are_short():
    """Of a value from a file a message shows 80 characters, none of which moves the cursor."""
    for value in [v for v in VALUES if not str(v).startswith(RAW)] + ["\x1b[2J" * 9, {"a": "b" * 10**6}]:
        assert len(shown(value)) <= 80 and shown(value).isprintable()


# --------------------------------------------------------------------------------------
# Tensors


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize("header", [
    entry(dtype=[]), entry(dtype={}), entry(shape=[10**300] * 20000), entry(shape=[0, 2**64]), entry(shape={}),
    entry(shape=""), entry(shape=[True, 2]), entry(data_offsets=[0, "8"]), entry(data_offsets=[0, 8, 8]),
    entry(shape=[2] + [1] * 100), {"a": []}, {"a": None}, {"__metadata__": 3}, {"__metadata__": {"a": 1}}, {"\ud800": {}},
])  # fmt: skip
def test_headers_of_other_types(header, tmp_path):
    """Every value of a header may be anything."""
    text, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    start = time.monotonic()
    refused(read_safetensors, path, named=str(path))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("weight_map", ["x", {"a": ["b"]}, {"a": "/etc/passwd"}, {"a": "config.json"}, {"a": "..", "b": 1}, None])
def test_an_index_of_other_types(weight_map, tmp_path):
    """The files of an index are texts, names in its own folder, and files of tensors."""
    folder = copy(FIXTURES / "llama_gqa", tmp_path)
    change(folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(from_pretrained, folder, named=str(folder))


def test_a_tensor_in_another_file_than_its_index_says(tmp_path):
    """Two files may not both have a tensor, of which the last would count."""
    folder = copy(FIXTURES / "llama_gqa", tmp_path)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    one, other = sorted(set(weight_map.values()))[:2]
    name = next(n for n, shard in weight_map.items() if shard == one)
    tensors = {n: read().clone() for n, read in read_safetensors(folder / other).items()}
    write_safetensors(folder / other, tensors | {name: torch.zeros(2)})
    assert name in refused(from_pretrained, folder, named=str(path))


ODD = [[torch.zeros(2)], {1: torch.zeros(2)}, {"a": "b"}, {"a": {"b": torch.zeros(2)}}, {}, 7, None,
       {"a": torch.zeros(2).double()}, {"a": torch.zeros(2).to_sparse()}, {"\ud800": torch.zeros(2)}]  # fmt: skip


@pytest.mark.parametrize("content", ODD, ids=str)
def test_what_torch_saves_beside_tables_of_tensors(content, tmp_path):
    """Lists, numbers, other names and kinds of tensors are refused by the file's name."""
    folder = copy(FIXTURES / "opt_pre", tmp_path)
    torch.save(content, folder / "pytorch_model.bin")
    refused(from_pretrained, folder, named=str(folder))


def packed(path, program, data=bytes(16), kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", data)
    return path


def test_a_compressed_archive_is_refused(tmp_path):
    """Of compressed members a memory map would take the wrong bytes for the tensors."""
    folder = copy(FIXTURES / "opt_pre", tmp_path)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "compressed" in refused(from_pretrained, folder, named=str(path))
    with zipfile.ZipFile(path, "w") as archive:  # not aligned, and in another order
        for name in reversed(members):
            archive.writestr(name, members[name])
    again = torch.load(FIXTURES / "opt_pre/pytorch_model.bin")
    assert all(torch.equal(read(), again[name]) for name, read in read_tensors(path).items())


def test_a_pickle_cannot_run_or_hang(tmp_path):
    """No function but those of tensors is called, and no tuple of tuples becomes a key: hashing one
    that holds another twice, sixty times over, would take years."""
    bomb = ()
    for _ in range(60):
        bomb = (bomb, bomb)
    objects = [os.system, {"a": os.getcwd}, {"a": bomb}, bomb, torch.zeros, bytearray(8)]
    programs = [pickle.dumps(thing, protocol=2) for thing in objects]
    programs += [b"\x80\x02}" + programs[3][2:-1] + b"K\x01s.", b"", b"\x80\x02}K\x01s", b"(" * 99]
    start = time.monotonic()
    for program in programs:
        path = packed(tmp_path / "x.bin", program)
        refused(read_tensors, path, named=str(path))
    assert time.monotonic() - start < 2


def test_views_of_a_storage(tmp_path):
    """A transposed tensor is read rightly; what would be larger than its file is refused."""
    path, x = tmp_path / "x.bin", torch.arange(12.0).view(3, 4)
    torch.save({"a": x.T, "b": x[1:], "c": torch.nn.Parameter(x[:0])}, path)
    tensors = {name: read() for name, read in read_tensors(path).items()}
    assert torch.equal(tensors["a"], x.T) and torch.equal(tensors["b"], x[1:]) and len(tensors["c"]) == 0
    torch.save({"a": torch.zeros(1).expand(10**9)}, path)
    assert "not all there" in refused(read_tensors, path, named=str(path))
    torch.save(dict.fromkeys(map(str, range(1000)), torch.zeros(1000)), path)
    assert "the same bytes" in refused(read_tensors, path, named=str(path))


@pytest.mark.parametrize("name, kinds", [
    ("embed_tokens.weight", ("none", "nf4")), ("norm.weight", ("none", "nf4")), ("lm_head.weight", ("none", "int4")),
    ("layers.1.self_attn.q_proj.bias", ("none", "nf4")), ("layers.0.mlp.up_proj.weight", ("none", "nf4", "int3")),
])  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e31])
def test_values_that_no_model_has(name, kinds, value, tmp_path):
    """A NaN, an infinite or a huge value is refused by the tensor's name, quantized or not."""
    torch.manual_seed(0)
    broken = Transformer(small_config(attention_bias=True))
    broken.get_parameter(name).data.view(-1)[-3] = value
    save_pretrained(broken, tmp_path)
    for kind in kinds:
        assert name in refused(from_pretrained, tmp_path, kind, torch.float32, named=str(tmp_path))


def test_values_beyond_fp16(tmp_path):
    """What fp32 holds and fp16 does not is refused in fp16, also where scales of 4 bits say it."""
    large = Transformer(small_config())
    large.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    save_pretrained(large, tmp_path / "a")
    save_pretrained(from_pretrained(tmp_path / "a", "nf4", torch.float32), tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        from_pretrained(folder, "nf4", torch.bfloat16)
        assert "fp16" in refused(from_pretrained, folder, "nf4", torch.float16, named="up_proj").replace("float16", "fp16")


@pytest.mark.parametrize("field, value", [
    ("shape", "x"), ("shape", [64.0, 64]), ("blocksize", "64"), ("nested_offset", [0.1]), ("nested_offset", 1e300),
    ("nested_offset", None), ("nested_blocksize", 4096), ("quant_type", "fp4"), ("dtype", 7),
    ("nested_absmax", math.nan), ("nested_absmax", torch.zeros(3)), ("absmax", torch.zeros(64)), ("quant_map", torch.zeros(16)),
    ("nested_quant_map", None), ("quant_map", None), ("extra", torch.zeros(1)), ("quant_state.bitsandbytes__nf4", torch.zeros(9)),
])  # fmt: skip
def test_a_4_bit_weight_of_other_types(field, value, tmp_path):
    """Every field of a weight of bitsandbytes may be missing, or anything."""
    folder = copy(FIXTURES / "bnb_llama", tmp_path)
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = {n: read().clone() for n, read in read_safetensors(path).items()}
    key, state = f"{name}.{field}", f"{name}.quant_state.bitsandbytes__nf4"
    if isinstance(value, torch.Tensor):
        tensors[key] = value
    elif key in tensors and value is None:
        del tensors[key]
    elif key in tensors:
        tensors[key].fill_(value)
    else:
        text = json.dumps(json.loads(bytes(tensors[state].tolist())) | {field: value}).encode()
        tensors[state] = torch.tensor(list(text), dtype=torch.uint8)
    write_safetensors(path, tensors)
    assert "layers.0.mlp.up_proj" in refused(from_pretrained, folder, "nf4", named=str(folder))
