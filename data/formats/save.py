"""Write a model as a folder of the Hugging Face Hub: config.json and model.safetensors."""

from pathlib import Path

from data import leaf
from data.formats.config_json import FIELDS, ONLY
from data.formats.files import write_json
from data.formats.hub import their_name
from data.formats.safetensors import write_safetensors
from quant import Linear4bit, Quantized4bit


def save_pretrained(model, folder):
    """Write a model in the dtype of its weights; 4-bit weights get bitsandbytes' format."""
    c, tensors = model.config, {}
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    written = to_theirs(c) | dict(torch_dtype=dtype)
    for path, module in model.named_modules():
        if isinstance(module, Quantized4bit) or (path == "lm_head" and c.tied):
            continue  # a `Quantized4bit` is written with its layer
        prefix = "" if path == "lm_head" else "model."
        own = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        if isinstance(module, Linear4bit):
            name = prefix + their_name(c.family, f"{path}.weight")
            tensors |= leaf("bnb").weight_fields(name, module.weight, dtype)
            written["quantization_config"] = leaf("bnb").settings(module.weight.kind, dtype)
        for attribute, tensor in own.items():
            tensors[prefix + their_name(c.family, f"{path}.{attribute}")] = tensor
    write_safetensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", written)


def to_theirs(config):
    """Translate a `ModelConfig` to the fields of config.json. Which class it is shows in the few
    fields that one class alone has."""
    table, kind = FIELDS[config.family].items(), "OPT" if config.family == "opt" else "Llama"
    written = {theirs: getattr(config, ours) for ours, (theirs, *_) in table} | ONLY[config.family]
    if kind == "OPT":
        written["_remove_final_layer_norm"] = config.pre_norm and not config.final_norm
    else:
        written |= dict(rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
        kind = "Qwen3" if config.qk_norm else "Qwen2" if config.attention_bias == "qkv" else kind
    if config.no_rope:
        rotate, kind = [i not in config.no_rope for i in range(1, config.n_layer + 1)], "SmolLM3"
        written |= dict(no_rope_layers=[*map(int, rotate)], pad_token_id=None)
    return written | dict(model_type=kind.lower(), architectures=[f"{kind}ForCausalLM"])
