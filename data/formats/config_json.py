"""Translate config.json of a model's folder to the fields of a `ModelConfig`.

A setting that model.py cannot compute is refused by its name.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from data import InputError
from data.formats.fields import (
    NEEDED, TABLE, TEXT, TRUE_OR_FALSE, Kind, either, field, list_of, number, one_of, whole,
)
from data.formats.files import read_json

SIZE = whole(1, 1 << 20)
LENGTH = whole(1, 1 << 30)
ID = whole(0, (1 << 20) - 1)
IDS = either(ID, list_of(ID))
POSITIVE = number(1e-3, 1e9)
KINDS = {  # of fields, by their names in families.json
    "size": SIZE, "layers": whole(1, 1000), "length": LENGTH, "ids": IDS, "flag": TRUE_OR_FALSE,
    "eps": number(1e-12, 1),
}
FAMILIES = json.loads(Path(__file__).with_name("families.json").read_text())
FIELDS = {  # of each family: {our field: (theirs, its kind, the value of a missing field)}
    family: {ours: (theirs, KINDS[kind], *(absent or [NEEDED]))
             for ours, (theirs, kind, *absent) in rows.items()}
    for family, rows in FAMILIES["fields"].items()
}
ONLY = FAMILIES["only"]  # the only values that model.py computes, and those of missing fields
ALWAYS = FAMILIES["always"]  # the same, for both families
MISSING = FAMILIES["missing"]  # transformers' values of missing fields; null is another value
SHARED = FAMILIES["shared"]  # the same, of all classes
FIXED = FAMILIES["fixed"]  # what is so in all models of a class, whose config.json has it not
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_8bit": False}
ROPE_THETA = number(1, 1e15)
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
ORIGINAL = "original_max_position_embeddings"
ROPE = {
    "default": {}, "dynamic": {"factor": POSITIVE}, "linear": {"factor": POSITIVE},
    "llama3": dict.fromkeys(LLAMA3, POSITIVE) | {ORIGINAL: LENGTH},
}
DTYPE = one_of("float32", "bfloat16", "float16")
# The shapes of known models, as arguments of `ModelConfig`: to count memory without files
PRESETS = json.loads(Path(__file__).with_name("presets.json").read_text())


def read(folder):
    """Read a folder's config.json: {field of `ModelConfig`: value}."""
    path = Path(folder) / "config.json"
    c = read_json(path, advice="give a whole model's folder, which has one, unlike a LoRA or GGUF")
    model_type = field(path, c, "model_type", one_of(*MISSING))
    family, fixed = "opt" if model_type == "opt" else "llama", FIXED.get(model_type, {})
    c = SHARED | MISSING[model_type] | {name: c[name] for name in c if name not in fixed}
    c["is_causal"] = bool(c["is_causal"])  # null is false
    for name, known in (ALWAYS | ONLY[family]).items():
        field(path, c, name, one_of(known), known)
    quantized = field(path, c, "quantization_config", TABLE, {})
    for name, known in QUANTIZED.items():
        kind_of = Kind(f"{known!r}: get the model's unquantized folder", one_of(known).fits)
        field(path, quantized, f"quantization_config.{name}", kind_of, known)
    config = {"family": family}
    for ours, (theirs, kind, absent) in FIELDS[family].items():
        config[ours] = field(path, c, theirs, kind, absent)
    if family == "opt":
        removed = field(path, c, "_remove_final_layer_norm", TRUE_OR_FALSE, False)
        config["final_norm"] = config["pre_norm"] and not removed
    else:
        config |= fixed
        if model_type not in ("llama", "mistral"):
            slides = "sliding_attention" in field(path, c, "layer_types", list_of(TEXT), [])
            if not slides and not field(path, c, "use_sliding_window", TRUE_OR_FALSE, False):
                c["sliding_window"] = None
        if model_type == "smollm3":
            config["no_rope"] = read_no_rope(path, c, config["n_layer"])
        # Sliding attention equals plain attention within its window: that is our limit.
        for name in ("sliding_window", "attention_chunk_size"):
            window = field(path, c, name, LENGTH, config["max_positions"])
            config["max_positions"] = min(config["max_positions"], window)
        config |= read_rope(path, c, 2e6 if model_type == "smollm3" else 1e4)
    check_sizes(path, config)
    return config


def read_no_rope(path, c, n_layer):
    """SmolLM3's layers without positions, counted from 1: those with a 0, or each fourth."""
    every = field(path, c, "no_rope_layer_interval", SIZE, 4)
    usual = [int(i % every > 0) for i in range(1, n_layer + 1)]
    rotate = field(path, c, "no_rope_layers", list_of(whole(0, 1), n_layer), usual)
    return tuple(i for i in range(1, n_layer + 1) if not rotate[i - 1])


def read_rope(path, c, default):
    """Read rope_theta and rope_scaling, or else the one field rope_parameters of newer folders."""
    tables = [field(path, c, name, TABLE, {}) for name in ("rope_scaling", "rope_parameters")]
    scaling = dict(tables[0] or tables[1])
    theta = field(path, c, "rope_theta", ROPE_THETA, default)
    theta = float(field(path, scaling, "rope_parameters.rope_theta", ROPE_THETA, theta))
    field(path, scaling, "rope_parameters.partial_rotary_factor", one_of(1.0), 1.0)
    scaling.pop("rope_theta", None)
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    kind = field(path, scaling, "rope_scaling.rope_type", one_of(*ROPE))
    if kind == "llama3":  # the field beside the table comes first
        scaling[ORIGINAL] = c.get(ORIGINAL, scaling.get(ORIGINAL, c["max_position_embeddings"]))
    for name, known in ROPE[kind].items():
        field(path, scaling, f"rope_scaling.{name}", known)
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor must be less than high_freq_factor.")
    plain = kind in ("default", "dynamic")  # dynamic scaling begins beyond our limit
    return dict(rope_theta=theta, rope_scaling=None if plain else scaling)


def check_sizes(path, config):
    """Refuse sizes and ids that do not fit each other."""
    heads, width, ids = config["n_head"], config["n_embd"], []
    kv_heads = config.get("n_kv_head") or heads
    head_dim = config.get("head_dim") or width / heads
    for id in (config["bos_id"], config["eos_id"]):
        ids += id if isinstance(id, list) else [] if id is None else [id]
    if head_dim % (1 if config["family"] == "opt" else 2):  # rotary positions rotate pairs
        wrong = f"head_dim, or hidden_size {width} over num_attention_heads {heads}, is odd"
    elif heads % kv_heads:
        wrong = f"num_key_value_heads {kv_heads} do not divide num_attention_heads {heads}"
    elif max(ids, default=0) >= config["vocab_size"]:
        wrong = f"bos_token_id or eos_token_id {max(ids)} is not below vocab_size"
    else:
        return
    raise InputError(f"{path}: {wrong}: download it again.")


def first_layers(config, layers):
    """The `ModelConfig` of a model that ends after so many layers; 0: after its last."""
    if not 0 <= layers <= config.n_layer:
        raise InputError(f"--layers {layers}: give 1 to {config.n_layer}, all that the base has.")
    layers = layers or config.n_layer
    return replace(config, n_layer=layers, no_rope=tuple(i for i in config.no_rope if i <= layers))


def read_dtype(folder):
    """Read the torch dtype of the weights from a folder's config.json."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    older = field(path, config, "torch_dtype", DTYPE, "bfloat16")
    return getattr(torch, field(path, config, "dtype", DTYPE, older))
