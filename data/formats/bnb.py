"""The 4 bits of the library bitsandbytes, as they stand in checkpoints on the Hub.

A weight is the tensor of its codes, and beside it, named like it with something behind
    absmax, quant_map                   each block's scale, and the code book
    nested_absmax, nested_quant_map     the same again of the scales, if they are quantized too
    quant_state.bitsandbytes__nf4       bytes of JSON: the shape, the sizes of blocks, ...
"""

import json

import torch

from data import InputError
from data.formats.fields import NEEDED, TABLE, TEXT, field, list_of, number, one_of, shown, whole
from data.formats.files import parse_json
from data.formats.safetensors import LARGEST_WEIGHT
from quant import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, DYNAMIC_CODEBOOK, Quantized4bit

STATE = "quant_state.bitsandbytes__"
FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
OFFSET = number(-LARGEST_WEIGHT, LARGEST_WEIGHT)
PLAIN = {  # the fields of the JSON: what they may be, and what it means that one is not there
    "shape": (list_of(whole(1, 1 << 30), 2, 2), NEEDED), "blocksize": (one_of(BLOCK_SIZE), NEEDED),
    "quant_type": (one_of(*CODEBOOKS), None), "dtype": (TEXT, None),
}
NESTED = PLAIN | {
    "nested_blocksize": (one_of(ABSMAX_BLOCK_SIZE), NEEDED), "nested_offset": (OFFSET, NEEDED),
    "nested_dtype": (one_of("float32"), None),
}


def is_field(name):
    return name.rpartition(".weight.")[2].startswith((*FIELDS, STATE))


def read_weight(where, codes, mine, quant):
    """Put one weight together from its fields, {name: function that reads it}.

    where: names the file and the weight; quant: --quant, which must be what the weight is in
    """
    refuse = lambda why: InputError(f"{where} {why}: get the folder anew.")
    nested = "nested_absmax" in mine
    needed = FIELDS if nested else FIELDS[:2]
    states = [n for n in mine if n.startswith(STATE)]
    if len(states) != 1 or set(mine) != {*needed, *states}:
        raise refuse(f"lacks one of its quant_state, {', '.join(needed)}, or has others")
    kind = states[0].removeprefix(STATE)
    if kind != quant and kind in CODEBOOKS:
        raise InputError(f"{where} is already quantized to {kind}: give --quant {kind}.")
    state = read_state(f"{where}, its quant_state", mine[states[0]](), NESTED if nested else PLAIN)
    if kind not in CODEBOOKS or state["quant_type"] not in (None, kind):
        raise refuse(f"is in {shown(kind)} or {shown(state['quant_type'])}, which cannot be read")
    tensors = {name: mine[name]() for name in needed}
    shape = torch.Size(state["shape"])
    blocks, offset = -(-shape.numel() // BLOCK_SIZE), None
    sizes = {"absmax": (torch.uint8 if nested else torch.float32, blocks)}
    if nested:
        offset = torch.tensor(float(state["nested_offset"]))
        sizes["nested_absmax"] = torch.float32, -(-blocks // ABSMAX_BLOCK_SIZE)
    fits = codes.dtype == torch.uint8 and codes.numel() == -(-shape.numel() // 2)
    for name, (dtype, n) in sizes.items():
        fits = fits and tensors[name].dtype == dtype and tensors[name].shape == (n,)
    if not fits:
        raise refuse(f"has codes or scales that do not fit its shape {tuple(shape)}")
    for name, ours in (("quant_map", CODEBOOKS[kind]), ("nested_quant_map", DYNAMIC_CODEBOOK)):
        theirs = tensors.get(name, ours)
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            raise refuse("has another code book than ours")
    nested_absmax = tensors.get("nested_absmax")
    return Quantized4bit(codes.reshape(-1), tensors["absmax"], nested_absmax, offset, shape, kind)


def read_state(where, tensor, table):
    """The JSON that is stored as a tensor of bytes: {field: value} of a table."""
    if tensor.dtype != torch.uint8 or tensor.numel() > 10_000:
        raise InputError(f"{where} is not a short text: get the folder anew.")
    try:
        state = parse_json(bytes(tensor.flatten().tolist()))
    except ValueError as error:
        message = f"{where} cannot be read as JSON ({error}): get the folder anew."
        raise InputError(message) from None
    if not TABLE.fits(state):
        raise InputError(f"{where} is not a table: get the folder anew.")
    return {name: field(where, state, name, *kind) for name, kind in table.items()}


def weight_fields(name, weight, dtype):
    """The tensors that the library stores for a `Quantized4bit`: {name: tensor}."""
    state = dict(
        quant_type=weight.kind, blocksize=BLOCK_SIZE, dtype=dtype, shape=list(weight.shape)
    )
    found = {"": weight.codes.view(-1, 1), ".absmax": weight.absmax}
    found[".quant_map"] = CODEBOOKS[weight.kind].clone()
    if weight.nested_absmax is not None:
        state |= dict(nested_blocksize=ABSMAX_BLOCK_SIZE, nested_dtype="float32")
        state |= dict(nested_offset=weight.offset.item())
        found[".nested_absmax"] = weight.nested_absmax
        found[".nested_quant_map"] = DYNAMIC_CODEBOOK.clone()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found[f".{STATE}{weight.kind}"] = text
    return {name + suffix: tensor for suffix, tensor in found.items()}


def settings(kind, dtype):
    """What config.json says of such a folder."""
    return dict(
        quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="uint8",
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )
