"""The ladder: base and side in lockstep, the loss, generation, saving and loading the side.

    python qst.py --base FOLDER --side FOLDER --prompt "..."
    python qst.py chat --base FOLDER --side FOLDER
    python qst.py answer --base FOLDER --side FOLDER --questions FILE.jsonl --out FILE.jsonl
    python qst.py merge --base FOLDER --side FOLDER --out FOLDER
    python qst.py import-released --base FOLDER --released FOLDER --out FOLDER

B, T, C, V: batch, length, n_embd, vocab_size; h_f, h_g: hidden states of base and side.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from data import chat, mt_bench, pad_left, released
from data.files import read_json, some, write_json
from data.hub import copy_tokenizer
from data.safetensors import read_safetensors, write_safetensors
from data.settings import Parser, run
from data.tokenizer import load_tokenizer
from model import (
    Generator, Transformer, from_pretrained, positions_and_mask, rotary_table, save_pretrained, token_loss,
)  # fmt: skip
from quant import InputError, Linear4bit
from side import INSIDE, RELEASED, SideConfig, SideNetwork, check_quant, full_weight

FORMAT = 1  # of a side checkpoint


class Tuned(Generator, nn.Module):
    """A base, frozen but for what a method trains inside it, `side`; QST is another subclass's.

    base: a frozen `Transformer`; config: a `SideConfig`
    """

    def __init__(self, base, config):
        super().__init__()
        if any(True for _ in base.parameters()):
            raise InputError("The base is not frozen, or holds another method's parts: load it anew.")
        check_quant(config.method, quant_kind(base))
        self.base, self.config = base, base.config
        # Taken now: a method may be about to change the base.
        self.fingerprint = fingerprint(base) if base.device.type != "meta" else None
        with torch.device(base.device):
            inside = INSIDE.get(config.method)
            self.side = inside(base, config) if inside else SideNetwork(base.config, config)

    def hidden(self, idx, keep=None, cache=None):
        """idx (B, T) -> the state that the LM head reads, (B, T, C)."""
        return self.base.hidden(idx, keep, cache)

    def head(self, h):
        """(..., C) -> logits (..., V), or (..., n_labels) of a classifier."""
        classifier = self.side.classifier
        return self.base.head(h) if classifier is None else classifier(h)

    @property
    def head_learns(self):
        return self.side.classifier is not None or self.base.head_learns

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) the ids that follow -> logits (B, T, V), loss or None."""
        logits = self.head(self.hidden(idx))
        return logits, None if targets is None else token_loss(logits, targets)

    def new_cache(self, max_len):
        return self.base.new_cache(max_len)

    def calibrate(self, prompts):
        """What is inside the base needs nothing from the data before it learns."""

    def merge(self, dtype=torch.bfloat16):
        """One frozen `Transformer` of plain weights that computes what base and parts compute."""

        def read(name, shape):
            path, _, attribute = name.rpartition(".")
            module = self.base.get_submodule(path)
            packed = attribute == "weight" and isinstance(module, Linear4bit)
            return full_weight(module) if packed else getattr(module, attribute).detach()

        if self.side.config.method not in ("lora", "qlora", "peqa", "full"):
            raise InputError(f"What --method {self.side.config.method} trains cannot be merged into the base.")
        with torch.device("meta"):
            merged = Transformer(self.config)
        return merged.freeze("none", dtype, self.device, read)

    def save_side(self, folder):
        """Write side.safetensors and side.json, each whole or not at all."""
        folder = Path(folder)
        write_safetensors(folder / "side.safetensors", self.side.state_dict())
        about = {"format": FORMAT, "config": asdict(self.side.config), "base": self.fingerprint}
        write_json(folder / "side.json", about)

    @staticmethod
    def from_side(base, folder):
        """A base with what `save_side` left in a folder."""
        return tune(base, read_side(folder)[0]).load_side(folder)

    def load_side(self, folder):
        """Replace the side network, config and all, by a saved one, and return self.

        It must have been trained on this base; every tensor must be there, and no other.
        """
        config, trained_on = read_side(folder)
        ours = self.fingerprint
        if differ := [key for key in ours if trained_on.get(key) != ours[key]]:
            told = ", ".join(f"{k} {trained_on.get(k)} there and {ours[k]} here" for k in differ)
            raise InputError(f"{folder} was trained on another base: {told}.")
        path = Path(folder) / "side.safetensors"
        tensors = {name: read() for name, read in read_safetensors(path).items()}
        side = self.side
        if config != side.config:
            if config.method in INSIDE or side.config.method in INSIDE:
                raise InputError(f"{folder} has other settings than these parts: load the base anew.")
            side = QST(self.base, config).side
        fill(side, tensors, path)
        self.side = side
        return self


class QST(Tuned):
    """Quantized side tuning (arXiv 2401.07159 §3.2): a frozen base, and a side network beside it.

    base: a `Transformer` that is frozen; config: the side network's, by default the paper's
    """

    def __init__(self, base, config=None):
        super().__init__(base, config or SideConfig())

    def hidden(self, idx, keep=None, cache=None):
        """Climb the ladder: idx (B, T) -> the state that the LM head reads, (B, T, C)."""
        base, side = self.base, self.side
        N = len(base.layers)
        borrowed = side.config.attention == "borrowed"
        cache = cache or [None] * 2 * N
        past = cache[0].length if cache[0] else 0
        with torch.no_grad():  # nothing of the base is kept for the backward pass
            positions, mask = positions_and_mask(idx, keep, past)
            h_f = base.embed(idx, positions)
            rope_f = rotary_table(base.config, positions, h_f.dtype)
            rope_g = rotary_table(side.narrow, positions, h_f.dtype)
        h_g = side.start(h_f)
        for i in range(N):
            look = [] if borrowed else None  # for the layer's queries and keys
            with torch.no_grad():
                h_f = base.layers[i](h_f, mask, rope_f, cache[i], look)
            h_g = side.rung(i, h_f, h_g, mask, rope_g, cache[N + i], look)
        with torch.no_grad():
            # differs from the paper: mixed after the final norm, as in the released code. That is
            # what the frozen head was trained to read; the paper says no more than "h_f_N".
            h_f = base.final(h_f)
        return side.mix(h_f, h_g)

    def new_cache(self, max_len):
        """The base's caches, and then the side's."""
        return self.base.new_cache(max_len) + self.base.new_cache(max_len)

    @torch.no_grad()
    def calibrate(self, prompts):
        """Take mean and variance of the base's channels from a few texts, lists of ids.

        Some channels of a real model are hundreds of times larger than the others, and all but
        constant; what the downsamplers are to read is hidden beneath them.
        """
        if not self.side.config.standardize:
            return
        layers, side = self.base.layers, self.side
        sums = torch.zeros(2, *side.mean.shape, dtype=torch.float64, device=self.device)

        def see(i, h_f):
            h_f = h_f[keep.bool()].double()
            sums[:, i] += torch.stack([h_f.sum(dim=0), h_f.square().sum(dim=0)])

        hooks = [layers[0].register_forward_pre_hook(lambda layer, args: see(0, args[0]))]
        hooks += [
            layer.register_forward_hook(lambda layer, args, h_f, i=i: see(i, h_f))
            for i, layer in enumerate(layers, 1)
        ]
        for start in range(0, len(prompts), 4):  # a few at a time, of which nothing is kept
            idx, keep = pad_left(prompts[start : start + 4], device=self.device)
            self.base.hidden(idx, keep)
        for hook in hooks:
            hook.remove()
        mean, square = sums / sum(map(len, prompts))
        side.mean.copy_(mean)
        side.scale.copy_((square - mean.square() + 1e-6).rsqrt())


def tune(base, config):
    """A base with what is to be trained: a side network (LST is a setting of QST), or parts inside."""
    return (Tuned if config.method in INSIDE else QST)(base, config)


def import_released(base, folder):
    """The authors' side checkpoint, in a `QST` of their architecture and of the tensors' sizes."""
    tensors, sizes = released.read(folder, base.config)
    model = QST(base, SideConfig(**RELEASED, **sizes))
    fill(model.side, tensors, folder)
    return model


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
    digest = hashlib.sha256(json.dumps(shape).encode())
    for module in base.modules():
        packed = isinstance(module, Linear4bit)
        for name, tensor in module.named_buffers(recurse=False):
            some = tensor.flatten()[:: max(1, tensor.numel() // 1024)].cpu()
            some = some if packed and name != "bias" else some.signbit()
            digest.update(some.numpy().tobytes())
    return {"quant": quant_kind(base), "weights": digest.hexdigest()[:16]}


def quant_kind(base):
    return next((m.kind for m in base.modules() if isinstance(m, Linear4bit)), "none")


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


def load_base(args):
    device = pick_device(args.device)
    side = getattr(args, "side", None)
    quant = args.quant or side and read_side(side)[1].get("quant") or "nf4"
    return from_pretrained(args.base, quant, pick_dtype(args.dtype, device), device)


def load_model(args):
    """The base with its side network, if there is one, and its tokenizer."""
    tokenizer, base = load_tokenizer(args.base), load_base(args)
    model = QST.from_side(base, args.side) if args.side else base
    if args.side and model.side.classifier is not None:
        raise InputError(f"--side {args.side} is a classifier: score it with train.py --eval_only.")
    return model, tokenizer


def say(model, ids, max_new_tokens, end_ids, args):
    """Yield the ids that a model says after those of a prompt."""
    idx = torch.tensor([ids], device=pick_device(args.device))
    for token in model.stream(
        idx, max_new_tokens, args.temperature, args.top_k, args.top_p, end_ids, seed=args.seed
    ):
        yield token.item()


def generate(args):
    """Answer one prompt, or go on with it."""
    template = chat.ChatTemplate() if args.raw else chat.load_template(args.base)
    framed = not args.raw and (args.side or template.name != "plain")
    model, tokenizer = load_model(args)
    if framed:
        try:
            ids, _ = template.encode([{"role": "user", "content": args.prompt}], tokenizer)
        except chat.Refused as error:
            raise InputError(f"--prompt {error}.") from None
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    most = args.max_new_tokens
    if most is None:
        most = max(1, min(128, model.config.max_positions - len(ids) + 1))
    new = say(model, ids, most, template.end_ids(tokenizer), args)
    # Plain text is shown with what it is made to go on.
    chat.show(tokenizer.stream(new if framed else chain(ids, new)))


def start_talk(args, most):
    """A conversation with the model of the flags."""
    template = chat.load_template(args.base)
    model, tokenizer = load_model(args)
    ends, most = template.end_ids(tokenizer), most if args.max_new_tokens is None else args.max_new_tokens
    reply = lambda ids, most: say(model, ids, most, ends, args)
    return chat.Talk(reply, tokenizer, template, model.config.max_positions, most, getattr(args, "system", None))


def chat_command(args):
    """Talk to a model: /reset forgets, /exit or Ctrl-D ends, and Ctrl-C stops an answer."""
    talk = start_talk(args, most=512)
    print(chat_command.__doc__)
    talk.in_the_terminal()


def answer_command(args):
    """Answer the questions of MT-Bench, in the format of FastChat. A file that an earlier run has
    begun is finished; both turns of a question are one conversation."""
    if args.side:
        read_side(args.side)  # or it says what is missing
    mt_bench.answer_file(args, lambda: start_talk(args, most=1024))


def import_command(args):
    """Turn a released side checkpoint into one of ours."""
    model = import_released(load_base(args), args.released)
    model.save_side(args.out)
    config = model.side.config
    print(f"{args.out}: reduction {config.reduction}, rank {config.rank}, as released")


def merge_command(args):
    """Write what LoRA, QLoRA, PEQA or full finetuning has made of a base as a Hugging Face folder of
    plain weights, in bf16 if --dtype does not say otherwise."""
    if any(Path(args.out).glob("*")):  # the base's own folder, for one
        raise InputError(f"--out {args.out} is not empty: give a new folder.")
    model, _ = load_model(args)
    dtype = torch.bfloat16 if args.dtype == "auto" else pick_dtype(args.dtype, model.device)
    save_pretrained(model.merge(dtype), args.out)
    copy_tokenizer(args.base, args.out)
    print(f"{args.out}: {model.side.config.method}, merged in {str(dtype).removeprefix('torch.')}")


FLAGS = {
    "base": dict(required=True, help="folder of a LLaMA or OPT model"),
    "side": dict(help="folder of a side checkpoint; without one, the base alone answers"),
    "quant": dict(help="nf4, fp4, none, int4, int4-64, ...; default: nf4, or what --side was trained on"),
    "dtype": dict(default="auto", help="fp32, bf16, fp16; auto: by the device"),
    "device": dict(default="auto", help="auto: a GPU where there is one"),
    "max_new_tokens": dict(type=int, help="default: 128, or as many as there is room for; chat 512, answer 1024"),
    "temperature": dict(type=float, default=0.0, help="0, the default: the most likely token"),
    "top_k": dict(type=int, default=0, help="only the k most likely tokens; 0: all"),
    "top_p": dict(type=float, default=1.0, help="only the likeliest tokens of this probability"),
    "seed": dict(type=int, default=1337),
    "prompt": dict(required=True, help="a question, put in the chat template of the base's folder; without a"
        " template, a base alone goes on with the text, and beside a side network it is put in the frame of"
        " data/instruct.py"),
    "raw": dict(action="store_true", help="always go on with the text"),
    "system": dict(help="what the model is told before the conversation"),
    "released": dict(required=True, help="the folder with the authors' six .pt files"),
    "out": dict(required=True, help="what to write: a folder, or the file of answers"),
    **mt_bench.FLAGS,
}  # fmt: skip
BASE, SAMPLE = "base quant dtype device", "max_new_tokens temperature top_k top_p seed"
COMMANDS = {  # name: (function, its flags); the first goes without its name
    "generate": (generate, f"{BASE} side {SAMPLE} prompt raw"),
    "chat": (chat_command, f"{BASE} side {SAMPLE} system"),
    "answer": (answer_command, f"{BASE} side {SAMPLE} out {' '.join(mt_bench.FLAGS)}"),
    "merge": (merge_command, f"{BASE} side out"),
    "import-released": (import_command, f"{BASE} released out"),
}
ALSO = f"Also, each with its own --help: {', '.join(f'`qst.py {name}`' for name in list(COMMANDS)[1:])}."


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in COMMANDS else "generate"
    command, flags = COMMANDS[name]
    parser = Parser(f"qst.py {name}", description=command.__doc__, epilog=ALSO)
    for flag in flags.split():
        parser.add_argument(f"--{flag}", **FLAGS[flag])
    command(parser.parse_args(argv))


if __name__ == "__main__":
    run(main)
