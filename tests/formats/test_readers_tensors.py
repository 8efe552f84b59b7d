"""Files of tensors: what each reader must refuse, and why."""

import json
import math
import os
import pickle
import time
import zipfile

import pytest
import torch
from helpers import FIXTURES, change, copy, refused, small_config

from data.formats.pickled import read_tensors
from data.formats.safetensors import read_safetensors, write_safetensors
from data.formats.save import save_pretrained
from model import Transformer, from_pretrained


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize("header", [
    entry(dtype=[]), entry(dtype={}), entry(shape=[10**300] * 20000), entry(shape=[0, 2**64]),
    entry(shape={}),
    entry(shape=""), entry(shape=[True, 2]), entry(data_offsets=[0, "8"]),
    entry(data_offsets=[0, 8, 8]),
    entry(shape=[2] + [1] * 100), {"a": []}, {"a": None}, {"__metadata__": 3},
    {"__metadata__": {"a": 1}}, {"\ud800": {}},
])
def test_headers_of_other_types(header, tmp_path):
    """Every value of a header may be anything."""
    text, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    start = time.monotonic()
    refused(read_safetensors, path, named=str(path))
    assert time.monotonic() - start < 1


def test_empty_tensors_of_any_size(tmp_path):
    """A shape with a 0 needs no bytes; its other sizes may still be too large for a tensor."""
    path = tmp_path / "x.safetensors"
    for shape, fits in (([0, 3], True), ([0, 2**60, 2**60], False)):
        text = json.dumps(entry(shape=shape, data_offsets=[0, 0])).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        if fits:
            assert list(read_safetensors(path)["a"]().shape) == shape
        else:
            assert "too large" in refused(read_safetensors, path, named=str(path))


@pytest.mark.parametrize("weight_map", [
    "x", {"a": ["b"]}, {"a": "/etc/passwd"}, {"a": "config.json"}, {"a": "..", "b": 1}, None
])
def test_an_index_of_other_types(weight_map, tmp_path):
    """The files of an index are texts, names in its own folder, and files of tensors."""
    folder = copy(FIXTURES / "llama_gqa", tmp_path)
    change(folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(from_pretrained, folder, named=str(folder))


@pytest.mark.parametrize("other", [0, 2])
def test_a_tensor_in_two_files(other, tmp_path):
    """Two files may not both have a tensor, of which the last would count."""
    folder = copy(FIXTURES / "llama_gqa", tmp_path)
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    name = next(n for n, shard in weight_map.items() if shard == shards[1])
    tensors = {n: read().clone() for n, read in read_safetensors(folder / shards[other]).items()}
    write_safetensors(folder / shards[other], tensors | {name: torch.zeros(2)})
    assert name in refused(from_pretrained, folder, named=str(path))


ODD = [[torch.zeros(2)], {1: torch.zeros(2)}, {"a": "b"}, {"a": {"b": torch.zeros(2)}}, {}, 7, None,
       {"a": torch.zeros(2).double()}, {"a": torch.zeros(2).to_sparse()},
       {"\ud800": torch.zeros(2)}, {("a", torch.zeros(2, 2)): torch.zeros(2)}]


@pytest.mark.parametrize("content", ODD, ids=str)
def test_what_torch_saves_beside_tables_of_tensors(content, tmp_path):
    """Lists, numbers, other names and kinds of tensors are refused by the file's name."""
    folder = copy(FIXTURES / "opt_pre", tmp_path)
    torch.save(content, folder / "pytorch_model.bin")
    refused(from_pretrained, folder, named=str(folder))


def repacked(path, member, content):
    """Write a complete file of torch.save, in which a member is another, or one more."""
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {f"{root}/{member}": content}).items():
            archive.writestr(name, data)
    return path


def test_a_compressed_archive_is_refused(tmp_path):
    """Of compressed members we would take the wrong bytes for the tensors."""
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


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_cannot_run(protocol, tmp_path):
    """Whatever instruction calls a function, nothing of a pickle is run, in a complete archive."""
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    call = pickle.dumps(Evil(), protocol)
    bare = call[2:] if protocol > 1 else call  # its protocol is not said
    old = b"(V%s\nios\nmkdir\n." % os.fsencode(marker)
    table = b"\x80\x02}X\1\0\0\0a" + pickle.dumps(Evil(), 2)[2:-1] + b"s."
    for program in (call, bare, old, table):
        path = repacked(tmp_path / "x.bin", "data.pkl", program)
        refused(read_tensors, path, named=str(path))
        assert not marker.exists()


PICKLES = {  # takes all memory, or ends Python; too long; has a list; ends too early; is none
    "it wants GLOBAL": b"\x80\x02c__builtin__\nbytearray\n\x8a\5\0\0\0\0\2\x85R.",
    "too many tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.",
    "too long": b"\x80\x02" + b"K\1" * (1 << 20) + b".",
    "do not need": b"\x80\x02]K\1K\1s.",
    "exhausted": b"\x80\x02}(K\1",
    "": b"",
}


@pytest.mark.parametrize("why", PICKLES)
def test_a_pickle_that_tensors_do_not_need(why, tmp_path):
    """It is refused before it takes memory, or the whole process."""
    path = repacked(tmp_path / "x.bin", "data.pkl", PICKLES[why])
    assert why in refused(read_tensors, path, named=str(path))


MEMBERS = {
    "constants.pkl": b"x",  # as in a file of TorchScript
    "version": b"x",
    "byteorder": b"x",
    "data/0": bytes(8),  # of a tensor's 16
    "data/1": b"x",
    "x/DATA.PKL": b"x",
}


@pytest.mark.parametrize("member", MEMBERS)
def test_an_archive_with_a_strange_member(member, tmp_path, recwarn):
    """It is refused in one sentence, with no warning; also where a tensor's bytes are too few."""
    path = repacked(tmp_path / "x.bin", member, MEMBERS[member])
    told = refused(read_tensors, path, named=str(path))
    assert ("fewer or more bytes" in told) == member.startswith("data/") and not recwarn.list


@pytest.mark.parametrize("left", [0, 100, -100, -1])
def test_a_file_cut_short(left, tmp_path):
    """It is refused, wherever it ends."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(99)}, path)
    path.write_bytes(path.read_bytes()[:left])
    refused(read_tensors, path, named=str(path))


def test_tensors_are_ones_own(tmp_path):
    """What is written to the tensors is not written to the file, which is not mapped any more."""
    path = tmp_path / "x.bin"
    torch.save({name: torch.ones(1 << 16, requires_grad=name == "b") for name in "abc"}, path)
    before = path.read_bytes()
    tensors = [read() for read in read_tensors(path).values()]
    assert str(path) not in open("/proc/self/maps").read()
    for tensor in tensors:
        assert not tensor.requires_grad
        tensor.zero_()
    assert path.read_bytes() == before
    assert all(read().sum() == 1 << 16 for read in read_tensors(path).values())


def test_views_of_a_storage(tmp_path):
    """A transposed tensor is read rightly; what would be larger than its file is refused."""
    path, x = tmp_path / "x.bin", torch.arange(12.0).view(3, 4)
    torch.save({"a": x.T, "b": x[1:], "c": torch.nn.Parameter(x[:0])}, path)
    tensors = {name: read() for name, read in read_tensors(path).items()}
    assert torch.equal(tensors["a"], x.T) and torch.equal(tensors["b"], x[1:])
    assert len(tensors["c"]) == 0
    torch.save({"a": torch.zeros(1).expand(10**9)}, path)
    assert "the same bytes" in refused(read_tensors, path, named=str(path))
    torch.save(dict.fromkeys(map(str, range(1000)), torch.zeros(1000)), path)
    assert "the same bytes" in refused(read_tensors, path, named=str(path))


@pytest.mark.parametrize("name, kinds", [
    ("embed_tokens.weight", ("none", "nf4")), ("norm.weight", ("none", "nf4")),
    ("lm_head.weight", ("none", "int4")),
    ("layers.1.self_attn.q_proj.bias", ("none", "nf4")),
    ("layers.0.mlp.up_proj.weight", ("none", "nf4", "int3")),
])
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
        arguments = folder, "nf4", torch.float16
        assert "in float16 they may be" in refused(from_pretrained, *arguments, named="up_proj")


@pytest.mark.parametrize("field, value", [
    ("shape", "x"), ("shape", [64.0, 64]), ("blocksize", "64"), ("nested_offset", [0.1]),
    ("nested_offset", 1e300),
    ("nested_offset", None), ("nested_blocksize", 4096), ("quant_type", "fp4"), ("dtype", 7),
    ("nested_absmax", math.nan), ("nested_absmax", torch.zeros(3)), ("absmax", torch.zeros(64)),
    ("quant_map", torch.zeros(16)),
    ("nested_quant_map", None), ("quant_map", None), ("extra", torch.zeros(1)),
    ("quant_state.bitsandbytes__nf4", torch.zeros(9)),
])
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
