"""Folders of the Hugging Face Hub, in and out: config.json, tensors, and bitsandbytes' 4 bits.

    read_config      config.json -> the fields of a `ModelConfig`; what we cannot compute is refused
    open_weights     the files -> {name: function that reads the tensor}; nothing is read yet
    save_pretrained  both, the other way

Names are "ours", LLaMA's, and "theirs", of a folder; where OPT's differ, OPT_NAMES has them.
"""

import json
from pathlib import Path

import torch

from data.files import first_few, read_json, write_json
from data.safetensors import read_safetensors, write_safetensors
from quant import (
    ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, DYNAMIC_CODEBOOK, InputError, Linear4bit, Quantized4bit,
)  # fmt: skip

# --------------------------------------------------------------------------------------
# config.json: our fields of a `ModelConfig`, theirs, and what it means that one is not there

NEEDED = object()
COMMON = {
    "vocab_size": ("vocab_size", NEEDED), "n_layer": ("num_hidden_layers", NEEDED),
    "n_embd": ("hidden_size", NEEDED), "n_head": ("num_attention_heads", NEEDED),
    "max_positions": ("max_position_embeddings", NEEDED),
    "bos_id": ("bos_token_id", None), "eos_id": ("eos_token_id", None),
}  # fmt: skip
FIELDS = {
    "llama": COMMON | {
        "n_ffn": ("intermediate_size", NEEDED), "n_kv_head": ("num_key_value_heads", 0),
        "head_dim": ("head_dim", 0), "norm_eps": ("rms_norm_eps", NEEDED),
        "attention_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False),
        "tied": ("tie_word_embeddings", False),
    },
    "opt": COMMON | {
        "n_ffn": ("ffn_dim", NEEDED), "embed_dim": ("word_embed_proj_dim", 0),
        "pre_norm": ("do_layer_norm_before", True), "tied": ("tie_word_embeddings", True),
        "attention_bias": ("enable_bias", True), "mlp_bias": ("enable_bias", True),
    },
}  # fmt: skip
ONLY = {  # all that we compute; the first is what it means that the field is not there
    "llama": {"hidden_act": ("silu",), "partial_rotary_factor": (1.0, None)},
    "opt": {"activation_function": ("relu",), "layer_norm_elementwise_affine": (True,)},
}
FAMILIES = {"llama": "llama", "mistral": "llama", "opt": "opt"}
ROPE = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}  # fmt: skip


def read_config(folder):
    """Read config.json: {field of `ModelConfig`: value}; what we cannot compute is refused by its name."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give one in Hugging Face's layout.")
    path = Path(folder) / "config.json"
    c = read_json(path)

    def refuse(field, value, known):
        raise InputError(f"{path}: {field} is {value!r}; only {' or '.join(map(str, known))} is supported.")

    if (kind := c.get("model_type")) not in FAMILIES:
        refuse("model_type", kind, FAMILIES)
    family = FAMILIES[kind]
    for field, known in ONLY[family].items():
        if c.get(field, known[0]) not in known:
            refuse(field, c[field], known)
    quantized = c.get("quantization_config") or {}
    if quantized.get("quant_method", "bitsandbytes") != "bitsandbytes" or quantized.get("load_in_8bit"):
        refuse("quantization_config", quantized.get("quant_method"), ["bitsandbytes' 4 bits"])
    config = {"family": family}
    for ours, (theirs, absent) in FIELDS[family].items():
        if absent is NEEDED and c.get(theirs) is None:
            raise InputError(f"{path} lacks the field '{theirs}'.")
        config[ours] = absent if c.get(theirs) is None else c[theirs]
    if family == "opt":
        config["final_norm"] = config["pre_norm"] and not c.get("_remove_final_layer_norm", False)
        return config
    # Within the window, sliding attention is plain attention: so we only go that far.
    config["max_positions"] = min(config["max_positions"], c.get("sliding_window") or config["max_positions"])
    # Both spellings: rope_theta and rope_scaling, or one rope_parameters for the two.
    scaling = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    config["rope_theta"] = float(scaling.pop("rope_theta", None) or c.get("rope_theta") or 10000.0)
    kind = scaling.setdefault("rope_type", scaling.pop("type", "default"))
    if kind not in ROPE:
        refuse("rope_scaling's type", kind, ROPE)
    if missing := [field for field in ROPE[kind] if field not in scaling]:
        raise InputError(f"{path} lacks the field '{missing[0]}'.")
    return config | dict(rope_scaling=None if kind == "default" else scaling)


def to_theirs(config):
    """A `ModelConfig` -> the fields of config.json."""
    written = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS[config.family].items()}
    written |= {field: known[0] for field, known in ONLY[config.family].items()}
    if config.family == "opt":
        removed = config.pre_norm and not config.final_norm
        return written | dict(
            model_type="opt", architectures=["OPTForCausalLM"], _remove_final_layer_norm=removed
        )
    return written | dict(
        model_type="llama", architectures=["LlamaForCausalLM"],
        rope_theta=config.rope_theta, rope_scaling=config.rope_scaling,
    )  # fmt: skip


# --------------------------------------------------------------------------------------
# Names and files

OPT_NAMES = {  # ours (LLaMA's): OPT's
    "self_attn.o_proj.": "self_attn.out_proj.",
    "input_layernorm.": "self_attn_layer_norm.",
    "post_attention_layernorm.": "final_layer_norm.",
    "mlp.up_proj.": "fc1.",
    "mlp.down_proj.": "fc2.",
}


def their_name(family, name):
    """Our name of a weight -> the checkpoint's, less the leading "model."."""
    if family == "llama" or name.startswith("lm_head."):
        return name
    if name.startswith("norm."):
        return "decoder.final_layer_norm." + name.removeprefix("norm.")
    for ours, theirs in OPT_NAMES.items():
        name = name.replace(ours, theirs)
    return "decoder." + name


def open_weights(folder, family, shapes, tied, quant):
    """Find the weights of a model: {our name: function that reads the tensor, or a `Quantized4bit`},
    and whether any is in 4 bits already.

    shapes: {our name: shape}. Every name must be in the folder, and every tensor of the folder
    among the names.
    """
    tensors = {n.removeprefix("model."): read for n, read in open_files(folder).items()}
    fields = {n: tensors.pop(n) for n in list(tensors) if is_bnb_field(n)}
    theirs = {name: their_name(family, name) for name in shapes}
    optional = {"lm_head.weight"} if tied else set()  # some folders store the tied head too
    found = {n for n in tensors if not n.endswith("rotary_emb.inv_freq")} - optional
    if missing := sorted(set(theirs.values()) - found):
        raise InputError(f"{folder} lacks {first_few(missing)}: is its config.json another model's?")
    if surplus := sorted(found - set(theirs.values())):
        raise InputError(
            f"{folder} has {first_few(surplus)}, which this architecture does not use."
        )

    def reader(ours):
        name, shape = theirs[ours], tuple(shapes[ours])
        own = {n.removeprefix(name + "."): r for n, r in fields.items() if n.startswith(name + ".")}

        def read():
            tensor = tensors[name]()
            if own:
                tensor = read_bnb(folder, name, tensor, own, quant)
            elif not tensor.is_floating_point():
                raise InputError(f"{folder}: {name} is {tensor.dtype}, and no scales are with it.")
            if tensor.shape != shape:
                sizes = f"shape {tuple(tensor.shape)}, and config.json says {shape}"
                raise InputError(f"{folder}: {ours} has {sizes}.")
            return tensor

        return read

    return {ours: reader(ours) for ours in shapes}, bool(fields)


def open_files(folder):
    """Find a folder's weights and return {name: function that reads the tensor}."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map", {})
            tensors = {}
            for shard in sorted(set(weight_map.values())):
                if Path(shard).name != shard or shard in ("", ".", ".."):
                    raise InputError(f"{index} names a file outside its folder: {shard!r}.")
                if not (folder / shard).exists():
                    raise InputError(f"{folder / shard} is missing, and {index} names it.")
                tensors |= open_file(folder / shard)
            differ = sorted(set(tensors) ^ set(weight_map))
            if differ:
                raise InputError(f"{index} and its files disagree about {first_few(differ)}.")
            return tensors
    raise InputError(
        f"{folder} has no weights: model.safetensors, pytorch_model.bin or an index of either."
    )


def open_file(path):
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a file of plain tensors ({reason}).") from None
    return {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def save_pretrained(model, folder):
    """Write a model as a Hugging Face folder, in the dtype of its weights; packed weights as
    bitsandbytes stores them, which transformers reads too."""
    c, tensors = model.config, {}
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    written = to_theirs(c) | dict(torch_dtype=dtype)
    for path, module in model.named_modules():
        if isinstance(module, Quantized4bit):
            continue  # written with its layer
        prefix = "" if path == "lm_head" else "model."
        own = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        if isinstance(module, Linear4bit):
            own = {} if module.bias is None else {"bias": module.bias}
            name = prefix + their_name(c.family, f"{path}.weight")
            tensors |= bnb_fields(name, module.weight, dtype)
            written["quantization_config"] = bnb_config(module.weight.kind, dtype)
        if path == "lm_head" and c.tied:
            continue
        for attribute, tensor in own.items():
            tensors[prefix + their_name(c.family, f"{path}.{attribute}")] = tensor
    write_safetensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", written)


def read_dtype(folder):
    """The torch dtype that a folder's config.json names for its weights."""
    config = read_json(Path(folder) / "config.json")
    return getattr(torch, config.get("torch_dtype") or config.get("dtype") or "bfloat16")


# --------------------------------------------------------------------------------------
# The 4-bit format of bitsandbytes: beside each weight (codes, (n / 2, 1)) its scales and a small
# JSON text, as bytes, with what else one must know

BNB_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")


def is_bnb_field(name):
    return name.rpartition(".weight.")[2].startswith(BNB_FIELDS)


def read_bnb(folder, name, codes, mine, quant):
    """Put one weight together from its fields, {name: function that reads it}."""
    refuse = lambda why: InputError(f"{folder}: {name} {why}.")
    states = [n for n in mine if n.startswith(BNB_FIELDS[-1])]
    if len(states) != 1 or not {"absmax", "quant_map"} <= set(mine):
        raise refuse("lacks one of its quant_state, absmax and quant_map")
    kind = states[0].removeprefix(BNB_FIELDS[-1])
    if kind != quant:
        raise refuse(f"is already quantized to {kind}: give --quant {kind}")
    try:
        state = json.loads(bytes(mine[states[0]]().tolist()))
        shape, block_size = torch.Size(state["shape"]), state["blocksize"]
        nested = [state["nested_blocksize"], state["nested_offset"]] if "nested_absmax" in mine else None
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"has a quant_state that cannot be read ({error})") from None
    if block_size != BLOCK_SIZE or nested and nested[0] != ABSMAX_BLOCK_SIZE:
        raise refuse("has other block sizes than 64 and 256")
    absmax = mine["absmax"]()
    blocks, n = -(-shape.numel() // BLOCK_SIZE), shape.numel()
    fits = codes.dtype == torch.uint8 and codes.numel() == -(-n // 2) and absmax.shape == (blocks,)
    books = [(mine["quant_map"](), CODEBOOKS[kind])]
    offset = nested_absmax = None
    if nested:
        nested_absmax, offset = mine["nested_absmax"](), torch.tensor(float(nested[1]))
        fits = fits and nested_absmax.shape == (-(-blocks // ABSMAX_BLOCK_SIZE),)
        books.append((mine["nested_quant_map"](), DYNAMIC_CODEBOOK))
    if not fits or absmax.dtype != (torch.uint8 if nested else torch.float32):
        raise refuse(f"has codes or scales that do not fit its shape {tuple(shape)}")
    if not all(torch.equal(theirs, ours) for theirs, ours in books):
        raise refuse("has another code book than ours")
    return Quantized4bit(codes.view(-1), absmax, nested_absmax, offset, shape, kind)


def bnb_fields(name, weight, dtype):
    """The tensors that bitsandbytes stores for a `Quantized4bit`: {name: tensor}."""
    state = dict(quant_type=weight.kind, blocksize=BLOCK_SIZE, dtype=dtype, shape=list(weight.shape))
    fields = {"": weight.codes.view(-1, 1), ".absmax": weight.absmax}
    fields[".quant_map"] = CODEBOOKS[weight.kind].clone()
    if weight.nested_absmax is not None:
        state |= dict(nested_blocksize=ABSMAX_BLOCK_SIZE, nested_dtype="float32")
        state |= dict(nested_offset=weight.offset.item())
        fields[".nested_absmax"] = weight.nested_absmax
        fields[".nested_quant_map"] = DYNAMIC_CODEBOOK.clone()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    fields[f".quant_state.bitsandbytes__{weight.kind}"] = text
    return {name + suffix: tensor for suffix, tensor in fields.items()}


def bnb_config(kind, dtype):
    """What config.json says of such a folder."""
    return dict(
        quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="uint8",
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
