"""The ladder: base and side in lockstep, the loss, generation, saving and loading the side.

    python qst.py --base FOLDER --side FOLDER --prompt "..."
    python qst.py import-released FOLDER --base FOLDER --out FOLDER

B, T, C, V: batch, length, n_embd, vocab_size; h_f, h_g: hidden states of base and side.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from model import (
    OPT_NAMES, Generator, from_pretrained, positions_and_mask, read_json, read_safetensors,
    rotary_table, some, token_loss, write_json, write_safetensors,
)  # fmt: skip
from quant import InputError, Linear4bit
from side import RELEASED, Branches, SideConfig, SideNetwork

FORMAT = 1  # of a side checkpoint


class QST(Generator, nn.Module):
    """Quantized side tuning (arXiv 2401.07159 §3.2): a frozen base, and a side network beside it.

    base: a `Transformer` that is frozen; config: the side network's, by default the paper's
    """

    def __init__(self, base, config=None):
        super().__init__()
        self.base, self.config = base, base.config
        with torch.device(base.embed_tokens.weight.device):
            self.side = self.make_side(base, config or SideConfig())

    @staticmethod
    def make_side(base, config):
        return SideNetwork(base.config, config)

    def hidden(self, idx, keep=None, cache=None):
        """Climb the ladder: idx (B, T) -> the state that the LM head reads, (B, T, C)."""
        base, side = self.base, self.side
        N = len(base.layers)
        look = [] if side.config.attention == "borrowed" else None
        cache = cache or [None] * 2 * N
        past = cache[0].length if cache[0] else 0
        with torch.no_grad():  # nothing of the base is kept for the backward pass
            positions, mask = positions_and_mask(idx, keep, past)
            h_f = base.embed(idx, positions)
            rope_f = rotary_table(base.config, positions, h_f.dtype)
            rope_g = rotary_table(side.narrow, positions, h_f.dtype)
        h_g = side.start(h_f)
        for i in range(N):
            with torch.no_grad():
                h_f = base.layers[i](h_f, mask, rope_f, cache[i], look)
            h_g = side.rung(i, h_f, h_g, mask, rope_g, cache[N + i], look)
        with torch.no_grad():
            # differs from the paper: mixed after the final norm, as in the released code. That is
            # what the frozen head was trained to read; the paper says no more than "h_f_N".
            h_f = base.final(h_f)
        return side.mix(h_f, h_g)

    def head(self, h):
        """(..., C) -> logits (..., V), or (..., n_labels) of a classifier."""
        classifier = self.side.classifier
        return self.base.head(h) if classifier is None else classifier(h)

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) the ids that follow -> logits (B, T, V), loss or None."""
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, token_loss(logits, targets)

    def new_cache(self, max_len):
        """The base's caches, and then the side's."""
        return self.base.new_cache(max_len) + self.base.new_cache(max_len)

    def save_side(self, folder):
        """Write side.safetensors and side.json, each whole or not at all."""
        folder = Path(folder)
        write_safetensors(folder / "side.safetensors", self.side.state_dict())
        write_json(
            folder / "side.json",
            {"format": FORMAT, "config": asdict(self.side.config), "base": fingerprint(self.base)},
        )

    @staticmethod
    def from_side(base, folder):
        """A base with the side network that `save_side` left in a folder."""
        return tune(base, read_side(folder)[0]).load_side(folder)

    def load_side(self, folder):
        """Replace the side network, config and all, by a saved one, and return self.

        It must have been trained on this base; every tensor must be there, and no other.
        """
        config, trained_on = read_side(folder)
        ours = fingerprint(self.base)
        if differ := [key for key in ours if trained_on.get(key) != ours[key]]:
            told = ", ".join(f"{k} {trained_on.get(k)} there and {ours[k]} here" for k in differ)
            raise InputError(f"{folder} was trained on another base: {told}.")
        path = Path(folder) / "side.safetensors"
        tensors = {name: read() for name, read in read_safetensors(path).items()}
        side = self.side if config == self.side.config else type(self)(self.base, config).side
        fill(side, tensors, path)
        self.side = side
        return self


class Finetuned(QST):
    """A method that trains parts inside the base, so that backward runs through all of it."""

    make_side = staticmethod(Branches)

    def hidden(self, idx, keep=None, cache=None):
        return self.base.hidden(idx, keep, cache)

    def new_cache(self, max_len):
        return self.base.new_cache(max_len)


def tune(base, config):
    """A base with what is to be trained: `QST`, or another method."""
    return (QST if config.method == "qst" else Finetuned)(base, config)


def fill(module, tensors, where):
    """Copy tensors into a module, strictly: every one must be there, fit, and no other."""
    own = module.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise InputError(f"{where} lacks {some(missing)}.")
    if left := sorted(set(tensors) - set(own)):
        raise InputError(f"{where} has {some(left)}, which the side network does not.")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, and not "
                f"{tuple(tensor.shape)}."
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def read_side(folder):
    """Read side.json: the `SideConfig`, and the fingerprint of the base."""
    path = Path(folder) / "side.json"
    if not path.exists():
        raise InputError(f"{path} is missing: give the --out_dir of a run of train.py.")
    about = read_json(path)
    try:
        if about["format"] != FORMAT:
            raise InputError(f"{path} has format {about['format']}; this code reads {FORMAT}.")
        return SideConfig(**about["config"]), dict(about["base"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged, or of another version ({error}).") from None


def fingerprint(base):
    """What tells one frozen base from another: its shape, its quantization, a hash of its weights.

    The hash is of some 1,000 values of every tensor, so that a 70B model takes a moment: the codes
    and scales of what is in 4 bits, and of the rest the signs, which are the same in every dtype.
    """
    shape = {k: v for k, v in asdict(base.config).items() if k not in ("bos_id", "eos_id")}
    digest, quant = hashlib.sha256(json.dumps(shape).encode()), "none"
    for module in base.modules():
        packed = isinstance(module, Linear4bit)
        quant = module.kind if packed else quant
        for name, tensor in module.named_buffers(recurse=False):
            some = tensor.flatten()[:: max(1, tensor.numel() // 1024)].cpu()
            some = some if packed and name != "bias" else some.signbit()
            digest.update(some.numpy().tobytes())
    return {"quant": quant, "weights": digest.hexdigest()[:16]}


# --------------------------------------------------------------------------------------
# Side checkpoints of the released research code: files of state dicts, with no config

RELEASED_FILES = {  # ours: (theirs, and their names of what is in it)
    "layers": ("qst_layers_parameters.pt", OPT_NAMES),
    "downsample": (
        "qst_downsample_parameters.pt",
        {"0.down.": "adapter_A.", "0.up.": "adapter_B.", "1.": "post_layer_norm."},
    ),
    "gamma": ("qst_z_parameters.pt", {}),
    "norm": ("qst_norm_parameters.pt", {}),
    "upsample": ("qst_upsample_parameters.pt", {}),
}


def import_released(base, folder):
    """Read a side checkpoint of the released code into a `QST` with the same architecture.

    Its sizes are those of the tensors. The mix of its OPT variant, which gives the side network
    the weight sigmoid(z) where LLaMA's gives it 1 - sigmoid(z), is ours with alpha = -z.
    """
    opt = base.config.family == "opt"
    released = {}
    for ours, (file, names) in RELEASED_FILES.items():
        for name, tensor in read_pt(Path(folder) / file).items():
            for our_part, their_part in names.items() if ours != "layers" or opt else ():
                name = name.replace(their_part, our_part)
            released[f"{ours}.{name}"] = tensor
    gates = [released.pop(f"gamma.{i}", None) for i in range(base.config.n_layer)]
    if any(gate is None for gate in gates) or "downsample.0.0.down.weight" not in released:
        raise InputError(f"{folder} is not of a model with {base.config.n_layer} layers like {base.config.family}.")
    mix = read_pt(Path(folder) / f"lm_head_z_{'parameters' if opt else 'path'}.pt")
    released |= {"gamma": torch.stack(gates), "alpha": -mix if opt else mix}
    rank, width = len(released["downsample.0.0.down.weight"]), len(gates[0])
    reduction = base.config.n_embd // width
    model = QST(base, SideConfig(**RELEASED, reduction=reduction, rank=rank))
    fill(model.side, released, folder)
    return model


def read_pt(path):
    if not path.exists():
        raise InputError(f"{path} is missing: a released side checkpoint has six .pt files.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a foreign file
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read as a file of plain tensors ({reason}).") from None


# --------------------------------------------------------------------------------------
# The command line


def pick_device(name):
    """A flag's value -> a torch device; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here; try --device cpu.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name} is unknown: try cuda or cpu.") from None


def pick_dtype(name, device):
    """A flag's value -> a torch dtype; "auto" is fp32 on a CPU and bf16 on a GPU."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in names:
        raise InputError(f"--dtype {name} is unknown: choose auto, {', '.join(names)}.")
    return names[name]


class Parser(argparse.ArgumentParser):
    """Flags in full, and a mistake in one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.exit(f"error: {message}; --help lists the flags")


def parse_args(argv):
    parser = Parser("qst.py", description="Generate text.")
    add = parser.add_argument
    add("--base", required=True, help="folder of a LLaMA or OPT model")
    add("--side", help="folder of a side checkpoint; without one, the base alone goes on with the text")
    add("--prompt", required=True, help="an instruction; without --side, or with --raw, plain text")
    add("--raw", action="store_true", help="take the prompt as it is, without the instruction's frame")
    add("--max_new_tokens", type=int, help="default: 128, or as many as the model has room for")
    add("--temperature", type=float, default=0.0, help="0: always the most likely token")
    add("--top_k", type=int, default=0, help="only the k most likely tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="only the likeliest tokens of this probability")
    add("--seed", type=int, default=1337)
    add_base_flags(parser)
    return parser.parse_args(argv)


def add_base_flags(parser):
    parser.add_argument("--quant", default="nf4", help="nf4, fp4 or none (as it was trained)")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16; auto: by the device")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")


def load_base(args):
    device = pick_device(args.device)
    return from_pretrained(args.base, args.quant, pick_dtype(args.dtype, device), device)


def generate(argv):
    """Stream the answer to one prompt."""
    from data.instruct import frame
    from data.tokenizer import load_tokenizer

    args = parse_args(argv)
    tokenizer, model = load_tokenizer(args.base), load_base(args)
    framed = args.side and not args.raw
    if args.side:
        model = QST.from_side(model, args.side)
    prompt = frame(args.prompt) if framed else args.prompt
    idx = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]])
    idx = idx.to(pick_device(args.device))
    room = model.config.max_positions - idx.shape[1] + 1
    stream = model.stream(
        idx, max(1, min(128, room)) if args.max_new_tokens is None else args.max_new_tokens,
        args.temperature, args.top_k, args.top_p, eos_id=tokenizer.eos_ids, seed=args.seed,
    )  # fmt: skip
    new = (token.item() for token in stream)  # plain text is shown with what it is made to go on
    for piece in tokenizer.stream(new if framed else chain(idx[0].tolist(), new)):
        print(piece, end="", flush=True)
    print()


def import_command(argv):
    """Turn a released side checkpoint into one of ours."""
    parser = Parser("qst.py import-released", description=import_command.__doc__)
    parser.add_argument("folder", help="with the six .pt files")
    parser.add_argument("--base", required=True, help="folder of the model that it was trained on")
    parser.add_argument("--out", required=True, help="where to write side.safetensors and side.json")
    add_base_flags(parser)
    args = parser.parse_args(argv)
    model = import_released(load_base(args), args.folder)
    model.save_side(args.out)
    config = model.side.config
    print(f"{args.out}: reduction {config.reduction}, rank {config.rank}, as released")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["import-released"]:
        return import_command(argv[1:])
    return generate(argv)


def run(main):
    """Run a command line's `main`; the user's mistake is one line, ours a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    run(main)
