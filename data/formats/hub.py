"""Find and check the weights in a folder of the Hugging Face Hub.

`open_files` returns the readers of all tensors, and `choose_weights` those that a model needs.
data/formats/save.py writes such a folder. "Our" names are LLaMA's; OPT's differ as in OPT_NAMES.
"""

import re
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, leaf
from data.formats import config_json
from data.formats.fields import TEXT, field, first_few, shown, table_of
from data.formats.files import read_json
from data.formats.safetensors import read_safetensors

OPT_NAMES = {  # ours (LLaMA's): OPT's
    "self_attn.o_proj.": "self_attn.out_proj.",
    "input_layernorm.": "self_attn_layer_norm.",
    "post_attention_layernorm.": "final_layer_norm.",
    "mlp.up_proj.": "fc1.",
    "mlp.down_proj.": "fc2.",
}


def their_name(family, name):
    """Translate our name of a weight to the checkpoint's, without the leading "model."."""
    if family == "llama" or name.startswith("lm_head."):
        return name
    name = re.sub(r"^norm\.", "final_layer_norm.", name)
    for ours, theirs in OPT_NAMES.items():
        name = name.replace(ours, theirs)
    return "decoder." + name


def open_files(folder, config):
    """Find a folder's weights: {their name without "model.": function that reads the tensor}.

    config: a `ModelConfig`, perhaps of only the first of the layers that config.json counts
    """
    files = find_files(Path(folder))
    tensors = {name.removeprefix("model."): read for name, read in files.items()}
    if len(tensors) < len(files):
        raise InputError(f'{folder} has a tensor twice, with and without "model." in front.')
    prefix = their_name(config.family, "layers.")
    of = {n: n.removeprefix(prefix).partition(".")[0] for n in tensors if n.startswith(prefix)}
    if differ := {*of.values()} ^ set(map(str, range(config_json.read(folder)["n_layer"]))):
        first = min(differ, key=lambda number: (len(number), number))
        what = f"{'has' if first in of.values() else 'lacks'} {first_few([f'layers.{first}'])}"
        raise InputError(f"{folder} {what}, unlike config.json: get all files of one model.")
    return {name: tensors[name] for name in tensors if int(of.get(name, 0)) < config.n_layer}


def find_files(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return read_shards(folder / f"{name}.index.json")
    raise InputError(f"{folder} has no weights: copy model.safetensors or all its parts there.")


def read_file(path):
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return leaf("pickled").read_tensors(path)


def read_shards(index):
    """Read the tensors of all files in an index; each must be in the file that it names."""
    weight_map = field(index, read_json(index), "weight_map", table_of(TEXT))
    tensors, found = {}, {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", shard, re.ASCII):
            raise InputError(f"{index} names a file outside its folder: {shown(shard)}.")
        for name, read in read_file(index.parent / shard).items():
            tensors[name], found[name] = read, shard if name not in found else "two files"
    if differ := sorted(n for n in {*found, *weight_map} if found.get(n) != weight_map.get(n)):
        raise InputError(f"{index} and its files disagree about {first_few(differ)}.")
    return tensors


def choose_weights(folder, config, tensors, shapes, quant):
    """Choose a model's weights: {our name: function that reads it}, and whether any has 4 bits.

    A function returns a tensor or a `Quantized4bit`. Missing and surplus tensors are refused.
    config: a `ModelConfig`; tensors: from `open_files`; shapes: {our name: shape}
    """
    packed = {}  # {NAME.weight: {FIELD: its reader}}; bitsandbytes names it NAME.weight.FIELD
    for field_name in [n for n in tensors if ".weight." in n]:
        name, _, rest = field_name.rpartition(".weight.")
        packed.setdefault(name + ".weight", {})[rest] = tensors.pop(field_name)
    theirs = {name: their_name(config.family, name) for name in shapes}
    needed = set(theirs.values())
    if config.tied and (head := tensors.pop("lm_head.weight", None)):
        embedding = tensors.setdefault(theirs["embed_tokens.weight"], head)  # some store one
        if embedding is not head and not torch.equal(embedding(), head()):
            what = "an lm_head.weight that is not its embedding"
            raise InputError(f'{folder} has {what}: give config.json "tie_word_embeddings": false.')
    found = {n for n in tensors if not n.endswith("rotary_emb.inv_freq")}
    if missing := sorted(needed - found):
        raise InputError(f"{folder} lacks {first_few(missing)}: is config.json another model's?")
    linear = {theirs[n] for n, shape in shapes.items() if len(shape) == 2 and "embed" not in n}
    if surplus := sorted(found - needed | set(packed) - linear):
        what = f"has {first_few(surplus)}"
        raise InputError(f"{folder} {what}, unlike config.json: get all files of one model.")
    bar = tqdm(desc=f"loading {folder}", total=len(shapes), unit="tensor", leave=False, delay=2)

    def read(ours):
        bar.update()
        name, shape = theirs[ours], tuple(shapes[ours])
        where, tensor = f"{folder}: {name}", tensors[name]()
        if name in packed:
            tensor = leaf("bnb").read_weight(where, tensor, packed[name], quant)
            tensor = tensor.dequantize() if ours == "lm_head.weight" else tensor
        elif not tensor.is_floating_point():
            raise InputError(f"{where} is {tensor.dtype} and has no scales.")
        if tensor.shape != shape:
            raise InputError(f"{where} has shape {tuple(tensor.shape)}, and config.json {shape}.")
        return tensor

    return {ours: partial(read, ours) for ours in shapes}, bool(packed)
