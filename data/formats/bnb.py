"""Read and write 4-bit weights in the format of the library bitsandbytes, as on the Hub.

NAME.weight holds the codes, bytes of any dtype. The other fields are called NAME.weight.FIELD:
    absmax, quant_map                   the scale of each block, and the code book
    nested_absmax, nested_quant_map     the same for the scales, if they are quantized too
    quant_state.bitsandbytes__nf4       bytes of JSON: the shape, the sizes of blocks, ...
"""

import json

import torch

from data import InputError
from data.formats.fields import NEEDED, TABLE, TEXT, field, list_of, number, one_of, shown, whole
from data.formats.files import parse_json
from data.formats.safetensors import LARGEST_WEIGHT, tensor_bytes
from quant import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, DYNAMIC_CODEBOOK, Quantized4bit

STATE = "quant_state.bitsandbytes__"
FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
OFFSET = number(-LARGEST_WEIGHT, LARGEST_WEIGHT)
PLAIN = {  # the fields of the JSON: their kinds, and the values of missing fields
    "shape": (list_of(whole(1, 1 << 30), 2, 2), NEEDED), "blocksize": (one_of(BLOCK_SIZE), NEEDED),
    "quant_type": (one_of(*CODEBOOKS), None), "dtype": (TEXT, None),
}
NESTED = PLAIN | {
    "nested_blocksize": (one_of(ABSMAX_BLOCK_SIZE), NEEDED), "nested_offset": (OFFSET, NEEDED),
    "nested_dtype": (one_of("float32"), None),
}


def read_weight(where, codes, mine, quant):
    """Build a `Quantized4bit` from its codes and `mine`, {field: function that reads it}.

    where: names the file and the weight; quant: --quant, which must be the weight's own format
    """
    refuse = lambda why: InputError(f"{where} {why}: download the folder again.")
    nested = "nested_absmax" in mine
    needed = FIELDS if nested else FIELDS[:2]
    states = [n for n in mine if n.startswith(STATE)]
    if len(states) != 1 or set(mine) != {*needed, *states}:
        raise refuse(f"lacks one of its quant_state, {', '.join(needed)}, or has others")
    kind = states[0].removeprefix(STATE)
    if kind != quant and kind in CODEBOOKS:
        raise InputError(f"{where} is already {kind}: give --quant {kind} or the 16-bit folder.")
    about, text = f"{where}, its quant_state", bytes(tensor_bytes(mine[states[0]]()))
    state = {"state": parse_json(text, f"{about} is not JSON", ": download the folder again")}
    state, table = field(about, state, "state", TABLE), NESTED if nested else PLAIN
    state = {name: field(about, state, name, *kind) for name, kind in table.items()}
    if kind not in CODEBOOKS or state["quant_type"] not in (None, kind):
        raise refuse(f"is in {shown(kind)} or {shown(state['quant_type'])}, which cannot be read")
    tensors = {n: mine[n]() for n in needed} | {"codes": codes.reshape(-1).view(torch.uint8)}
    shape, offset = torch.Size(state["shape"]), None
    blocks = -(-shape.numel() // BLOCK_SIZE)
    sizes = {"codes": (torch.uint8, -(-shape.numel() // 2))}
    sizes["absmax"] = torch.uint8 if nested else torch.float32, blocks
    if nested:
        offset = torch.tensor(float(state["nested_offset"]))
        sizes["nested_absmax"] = torch.float32, -(-blocks // ABSMAX_BLOCK_SIZE)
    for name, (dtype, n) in sizes.items():
        if tensors[name].dtype != dtype or tensors[name].shape != (n,):
            raise refuse(f"has codes or scales that do not fit its shape {tuple(shape)}")
    for name, ours in (("quant_map", CODEBOOKS[kind]), ("nested_quant_map", DYNAMIC_CODEBOOK)):
        theirs = tensors.get(name, ours)
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            raise refuse("has another code book than ours")
    scales = tensors["absmax"], tensors.get("nested_absmax")
    return Quantized4bit(tensors["codes"], *scales, offset, shape, kind)


def weight_fields(name, weight, dtype):
    """Return the tensors that bitsandbytes stores for a `Quantized4bit`: {name: tensor}."""
    state = dict(
        quant_type=weight.kind, blocksize=BLOCK_SIZE, dtype=dtype, shape=list(weight.shape)
    )
    found = {"": weight.codes.view(-1, 1), ".absmax": weight.absmax}
    found[".quant_map"] = CODEBOOKS[weight.kind].clone()
    if weight.nested_absmax is not None:
        state |= dict(nested_blocksize=ABSMAX_BLOCK_SIZE, nested_dtype="float32")
        state["nested_offset"] = weight.offset.item()
        found[".nested_absmax"] = weight.nested_absmax
        found[".nested_quant_map"] = DYNAMIC_CODEBOOK.clone()
    found[f".{STATE}{weight.kind}"] = torch.tensor([*json.dumps(state).encode()]).byte()
    return {name + suffix: tensor for suffix, tensor in found.items()}


def settings(kind, dtype):
    """Return the quantization_config that config.json needs for such weights."""
    return dict(
        quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False,
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage="uint8",
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )
