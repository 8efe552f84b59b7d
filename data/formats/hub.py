"""Folders of the Hugging Face Hub: the files of tensors, read with config.json.

    open_files       the files -> {name: function that reads the tensor}; nothing is read yet
    choose_weights   of these, those that a model has, each of its shape

data/formats/save.py writes such a folder. Names are "ours", LLaMA's, and "theirs", of a folder; where OPT's differ, OPT_NAMES has them.
"""

import re
from pathlib import Path

from tqdm import tqdm

from data import InputError, leaf
from data.formats.fields import TEXT, field, first_few, shown, table_of
from data.formats.files import read_json
from data.formats.safetensors import read_safetensors

IN_16_BITS = ("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")  # always
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


def open_files(folder, config):
    """Find a folder's weights: {their name, less "model.": function that reads the tensor}.

    config: a `ModelConfig`; another number of layers is refused before one is built
    """
    files = find_files(Path(folder))
    tensors = {name.removeprefix("model."): read for name, read in files.items()}
    if len(tensors) < len(files):
        raise InputError(f'{folder} has a tensor twice, with and without "model." in front.')
    prefix = their_name(config.family, "layers.")
    layers = {n.removeprefix(prefix).partition(".")[0] for n in tensors if n.startswith(prefix)}
    numbers = dict.fromkeys(map(str, range(config.n_layer)))
    for why, found in (("lacks", numbers.keys() - layers), ("has", layers - numbers.keys())):
        if found:
            first = min(found, key=lambda number: (len(number), number))
            sizes = f"num_hidden_layers is {config.n_layer}, its files have {len(layers)}"
            what = f"{why} {first_few([f'layers.{first}'])}"
            raise InputError(f"{folder} {what}: in config.json {sizes}; get both of one model.")
    return tensors


def find_files(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return read_shards(folder, folder / f"{name}.index.json")
    raise InputError(
        f"{folder} has no weights: model.safetensors, pytorch_model.bin or an index of either."
    )


def read_file(path):
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return leaf("pickled").read_tensors(path)


def read_shards(folder, index):
    """The tensors of all files that an index names, each from the file that it should be in."""
    weight_map = field(index, read_json(index), "weight_map", table_of(TEXT))
    tensors, found = {}, {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}", shard, re.ASCII):
            raise InputError(f"{index} names a file outside its folder: {shown(shard)}.")
        if not (folder / shard).exists():
            raise InputError(f"{folder / shard} is missing, and {index} names it.")
        for name, read in read_file(folder / shard).items():
            tensors[name], found[name] = read, shard if name not in found else "two files"
    if differ := sorted(n for n in {*found, *weight_map} if found.get(n) != weight_map.get(n)):
        raise InputError(f"{index} and its files disagree about {first_few(differ)}.")
    return tensors


def choose_weights(folder, config, tensors, shapes, quant):
    """The weights of a model: {our name: function that reads the tensor, or a `Quantized4bit`}, and
    whether any is in 4 bits already.

    config: a `ModelConfig`; tensors: from `open_files`; shapes: {our name: shape}. Every name must
    be among the tensors, and every tensor among the names.
    """
    # What bitsandbytes stores beside the 4-bit codes of NAME.weight is called NAME.weight.absmax, ...
    fields = {n: tensors.pop(n) for n in list(tensors) if ".weight." in n}
    theirs = {name: their_name(config.family, name) for name in shapes}
    optional = {"lm_head.weight"} if config.tied else set()  # some folders store the tied head too
    found = {n for n in tensors if not n.endswith("rotary_emb.inv_freq")} - optional
    if missing := sorted(set(theirs.values()) - found):
        names = first_few(missing)
        raise InputError(f"{folder} lacks {names}: is its config.json another model's?")
    packed = {}  # {name: {field: function that reads it}} of the linear layers in 4 bits
    for n, read in fields.items():
        name, _, rest = n.rpartition(".weight.")
        packed.setdefault(name + ".weight", {})[rest] = read
    linear = {theirs[n] for n, shape in shapes.items() if len(shape) == 2 and n not in IN_16_BITS}
    surplus = found - set(theirs.values()) | set(packed) - linear
    if surplus:
        names = first_few(sorted(surplus))
        raise InputError(f"{folder} has {names}, which this architecture does not use, or not so.")

    bar = tqdm(desc=f"loading {folder}", total=len(shapes), unit="tensor", leave=False, delay=2)

    def reader(ours):
        name, shape = theirs[ours], tuple(shapes[ours])

        def read():
            bar.update()
            where, tensor = f"{folder}: {name}", tensors[name]()
            if name in packed:
                tensor = leaf("bnb").read_weight(where, tensor, packed[name], quant)
            elif not tensor.is_floating_point():
                raise InputError(f"{where} is {tensor.dtype}, and no scales are with it.")
            if tensor.shape != shape:
                sizes = f"shape {tuple(tensor.shape)}, and config.json says {shape}"
                raise InputError(f"{folder}: {ours} has {sizes}.")
            return tensor

        return read

    return {ours: reader(ours) for ours in shapes}, bool(packed)
