"""data/formats/config_json.py: each field is obeyed as transformers does, or refused by its name.

fuzzing/fuzz_configs.py compares random cases; here are its finds, with and without transformers.
"""

import json

import fuzz_configs
import pytest
import torch
from helpers import change, copy_folder

from data.formats import config_json
from model import read_config


def read(name, tmp_path, take_out=(), **fields):
    """The `ModelConfig` of a fixture whose config.json lacks fields, or has others."""
    folder = copy_folder(name, tmp_path)
    path = change(folder / "config.json", **fields)
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in take_out}
    path.write_text(json.dumps(kept))
    return read_config(folder)


@pytest.mark.parametrize("name, expected", [
    ("llama_gqa", dict(norm_eps=1e-6, max_positions=2048, bos_id=1, eos_id=2, n_kv_head=4)),
    ("mistral", dict(norm_eps=1e-6, max_positions=4096, bos_id=1, eos_id=2, n_kv_head=8)),
    ("opt_pre", dict(max_positions=2048, bos_id=2, eos_id=2, tied=True, attention_bias=True)),
    ("qwen2", dict(max_positions=32768, bos_id=None, eos_id=None, n_kv_head=32, head_dim=2)),
    ("qwen3", dict(max_positions=32768, eos_id=None, n_kv_head=32, head_dim=128, tied=False)),
    ("smollm3", dict(max_positions=32768, n_kv_head=4, tied=True, rope_theta=2e6, no_rope=(4,))),
])
def test_missing_fields_have_the_values_of_their_class(name, expected, tmp_path):
    """As in transformers' LlamaConfig, MistralConfig, ..."""
    out = {theirs for theirs, *_ in config_json.FIELDS["llama" if name != "opt_pre" else "opt"]
           .values()} - {"vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"}
    out -= {"intermediate_size", "ffn_dim"}
    out |= {"sliding_window", "rope_parameters", "no_rope_layers", "layer_types"}
    more = {"mistral": dict(num_attention_heads=8, hidden_size=64)}
    more |= dict.fromkeys(["qwen2", "qwen3"], dict(num_attention_heads=32, hidden_size=64))
    more["smollm3"] = dict(vocab_size=130000, num_hidden_layers=5)
    config = read(name, tmp_path, out, **more.get(name, {}))
    assert {field: getattr(config, field) for field in expected} == expected


def test_null_is_another_value_than_none_at_all(tmp_path):
    """A null id is none; a null window is none."""
    nulls = dict(bos_token_id=None, eos_token_id=None, sliding_window=None)
    config = read("mistral", tmp_path, **nulls, max_position_embeddings=9000)
    assert (config.bos_id, config.eos_id, config.max_positions) == (None, None, 9000)


def test_fields_that_a_class_does_not_have(tmp_path):
    """Mistral has no biases, whatever config.json says."""
    config = read("mistral", tmp_path, attention_bias=True, mlp_bias=True)
    assert not config.attention_bias and not config.mlp_bias


def test_dynamic_scaling_begins_beyond_our_limit(tmp_path):
    """Within max_position_embeddings it is no scaling."""
    scaling = {"type": "dynamic", "factor": 2.0}
    config = read("llama_gqa", tmp_path, ["rope_parameters"], rope_scaling=scaling)
    assert config.rope_scaling is None and config.max_positions == 64


@pytest.mark.parametrize("inner, outer, expected", [
    (16, None, 16), (16, 8, 8), (None, 8, 8), (None, None, 64),
])
def test_the_original_length_of_llama3(inner, outer, expected, tmp_path):
    """A field of config.json itself precedes that of the table; without both it is the length."""
    name = "original_max_position_embeddings"
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaling |= {name: inner} if inner else {}
    fields = {"rope_scaling": scaling} | ({name: outer} if outer else {})
    config = read("llama_gqa", tmp_path, ["rope_parameters"], **fields)
    assert config.rope_scaling[name] == expected


@pytest.mark.parametrize("fields, expected", [
    (dict(dtype="float16", torch_dtype="float32"), "float16"), (dict(dtype="float16"), "float16"),
    (dict(torch_dtype="float32"), "float32"), ({}, "bfloat16"),
])
def test_the_dtype_has_two_names(fields, expected, tmp_path):
    """The one of today precedes the older one, as in transformers."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert config_json.read_dtype(tmp_path) == getattr(torch, expected)


SCALED = {**fuzz_configs.SCALED, "rope_theta": 50.0}
FOUND = [  # (class, what is changed)
    ("mistral", {"is_causal": False}), ("llama", {"is_causal": None}),
    ("mistral", {"mlp_bias": True, "attention_bias": True}), ("mistral", {"bos_token_id": "out"}),
    ("opt", {"eos_token_id": "out", "bos_token_id": "out"}), ("llama", {"sliding_window": 5}),
    ("llama", {"attention_chunk_size": 5}), ("llama", {"rms_norm_eps": "out"}),
    ("mistral", {"max_position_embeddings": "out", "sliding_window": "out"}),
    ("llama", {"rope_scaling": SCALED, "original_max_position_embeddings": 12}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 50.0}}),
    ("llama", {"per_layer_config": {"1": {"skip": ["mlp"]}}}),
    ("mistral", {"num_key_value_heads": "out", "num_attention_heads": 8}),
    ("opt", {"layer_norm_elementwise_affine": False}), ("llama", {"rope_theta": 50.0}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "attention_bias": False}),
    ("qwen3", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"head_dim": "out"}),
    ("smollm3", {"no_rope_layers": [0, 1], "sliding_window": 5, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "layer_types": ["sliding_attention"] * 2}),
    ("smollm3", {"no_rope_layers": "out", "no_rope_layer_interval": 2}),
    ("smollm3", {"rope_parameters": "out", "attention_chunk_size": 5}),
]


def defects(tmp_path, kinds):
    """Of the cases that were once wrong, those that are."""
    found = {}
    for kind, changes in FOUND:
        good = fuzz_configs.good_fields(kind, kinds)
        what = fuzz_configs.outcome(kind, good, changes, False, tmp_path, kinds, seed=0)
        found[kind, str(changes)] = what
    return {case: what for case, what in found.items() if what[0] not in ("equal", "refused")}


def test_the_logits_are_those_of_transformers(tmp_path):
    """Of the cases that were once wrong, and of forty random ones (where it is installed)."""
    pytest.importorskip("transformers", "5")
    assert not defects(tmp_path, fuzz_configs.classes())
    assert fuzz_configs.run(seed=0, numbers=range(40)) == 0


WITHOUT_EPS = {k: v for k, v in config_json.FIELDS["llama"].items() if k != "norm_eps"}


@pytest.mark.parametrize("table, value", [
    ("MISSING", {"llama": {}, "mistral": {}, "opt": {}}), ("ALWAYS", {}),
    ("FIELDS", config_json.FIELDS | {"llama": WITHOUT_EPS}), ("ORIGINAL", "no field"),
    ("ROPE", config_json.ROPE | {"yarn": {}}),
])
def test_the_comparison_can_fail(table, value, monkeypatch, tmp_path):
    """Without defaults, a list of what is refused, a field, or a rule, it finds defects."""
    pytest.importorskip("transformers", "5")
    monkeypatch.setattr(config_json, table, value)
    assert defects(tmp_path, fuzz_configs.classes())
