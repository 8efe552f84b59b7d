"""The ladder: base and side in lockstep, the loss, generation, saving and loading the side.

    python qst.py --base FOLDER --side FOLDER --prompt "..."
    python qst.py chat --base FOLDER --side FOLDER
    python qst.py answer --base FOLDER --side FOLDER --questions FILE.jsonl --out FILE.jsonl
    python qst.py merge --base FOLDER --side FOLDER --out FOLDER
    python qst.py import-released FOLDER --base FOLDER --out FOLDER

B, T, C, V: batch, length, n_embd, vocab_size; h_f, h_g: hidden states of base and side.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data import chat, mt_bench
from data.download import checksum
from data.tokenizer import load_tokenizer
from model import (
    OPT_NAMES, Generator, Transformer, copy_tokenizer, from_pretrained, pad_left, positions_and_mask,
    read_json, read_safetensors, rotary_table, save_pretrained, some, token_loss, write_json,
    write_safetensors,
)  # fmt: skip
from quant import PACKED, InputError
from side import INSIDE, RELEASED, SideConfig, SideNetwork, check_quant, full_weight

FORMAT = 1  # of a side checkpoint


class QST(Generator, nn.Module):
    """Quantized side tuning (arXiv 2401.07159 §3.2): a frozen base, and a side network beside it.

    base: a `Transformer` that is frozen; config: the side network's, by default the paper's
    """

    def __init__(self, base, config=None):
        super().__init__()
        config, device = config or SideConfig(), base.device
        if any(True for _ in base.parameters()):
            raise InputError("The base is not frozen, or holds another method's parts: load it anew.")
        check_quant(config.method, quant_kind(base))
        self.base, self.config = base, base.config
        # Taken now: a method may be about to change the base.
        self.fingerprint = fingerprint(base) if device.type != "meta" else None
        with torch.device(device):
            self.side = self.make_side(base, config)

    @staticmethod
    def make_side(base, config):
        return SideNetwork(base.config, config)

    def hidden(self, idx, keep=None, cache=None):
        """idx (B, T) -> the state that the LM head reads, (B, T, C)."""
        return self.side.mix(*self.states(idx, keep, cache))

    def states(self, idx, keep=None, cache=None):
        """Climb the ladder: idx (B, T) -> the last h_f (B, T, C) and h_g (B, T, c)."""
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
        return h_f, h_g

    def to_logits(self, h_f, h_g):
        """See `Generator`. The LM head W is linear, and so may come before the mix:

            W (alpha h_f + (1 - alpha) U h_g) = alpha W h_f + (1 - alpha) (W U) h_g

        The right side has no gradient of C channels, only of c, so that backward does without W
        but for W U. With many positions that is a multiplication by W less, of two; W U and its
        gradient cost as much as such a multiplication of 2 c positions, so fewer than 4 c do without.
        """
        side, up = self.side, self.side.upsample
        commutes = side.config.mix in ("alpha", "residual") and up.bias is None
        if not (self.chunk_loss and commutes) or self.head_learns or len(h_g) < 4 * h_g.shape[1]:
            return self.head, (side.mix(h_f, h_g),), ()
        alpha, share = side.shares(h_f.dtype)
        logits = lambda h_f, g, heads, alpha: torch.addcmul(g @ heads, self.head(h_f), alpha)
        heads = self.head(up.weight.T.to(h_f.dtype))  # W U, transposed: (c, V)
        return logits, (h_f, share * side.norm(h_g)), (heads, alpha)

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
            {"format": FORMAT, "config": asdict(self.side.config), "base": self.fingerprint},
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


class Finetuned(QST):
    """A method that trains parts inside the base, so that backward runs through all of it."""

    @staticmethod
    def make_side(base, config):
        return INSIDE[config.method](base, config)

    def calibrate(self, prompts):
        """There are no downsamplers."""

    def hidden(self, idx, keep=None, cache=None):
        return self.base.hidden(idx, keep, cache)

    states, to_logits = Generator.states, Generator.to_logits

    def new_cache(self, max_len):
        return self.base.new_cache(max_len)

    def merge(self, dtype=torch.bfloat16):
        """One frozen `Transformer` of plain weights that computes what base and parts compute."""

        def read(name, shape):
            path, _, attribute = name.rpartition(".")
            module = self.base.get_submodule(path)
            packed = attribute == "weight" and isinstance(module, PACKED)
            return full_weight(module) if packed else getattr(module, attribute).detach()

        if self.side.config.method == "adapter":
            raise InputError("The bottlenecks of --method adapter are not linear: nothing to merge.")
        with torch.device("meta"):
            merged = Transformer(self.config)
        return merged.freeze("none", dtype, self.device, read)


def tune(base, config):
    """A base with what is to be trained: `QST`, of which LST is a setting, or another method."""
    return (Finetuned if config.method in INSIDE else QST)(base, config)


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
        packed = isinstance(module, PACKED)
        for name, tensor in module.named_buffers(recurse=False):
            some = tensor.flatten()[:: max(1, tensor.numel() // 1024)].cpu()
            some = some if packed and name != "bias" else some.signbit()
            digest.update(some.numpy().tobytes())
    return {"quant": quant_kind(base), "weights": digest.hexdigest()[:16]}


def quant_kind(base):
    return next((m.kind for m in base.modules() if isinstance(m, PACKED)), "none")


# --------------------------------------------------------------------------------------
# Side checkpoints of the released research code: files of state dicts, with no config

RELEASED_FILES = {  # ours: (theirs, and their names of what is in it)
    "layers": ("qst_layers_parameters.pt", OPT_NAMES),
    "downsample": (
        "qst_downsample_parameters.pt",
        {"down.": "adapter_A.", "up.": "adapter_B.", "norm.": "post_layer_norm."},
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
    if any(gate is None for gate in gates) or "downsample.0.down.weight" not in released:
        raise InputError(f"{folder} is not of a model with {base.config.n_layer} layers like {base.config.family}.")
    mix = read_pt(Path(folder) / f"lm_head_z_{'parameters' if opt else 'path'}.pt")
    released |= {"gamma": torch.stack(gates), "alpha": -mix if opt else mix}
    rank, width = len(released["downsample.0.down.weight"]), len(gates[0])
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


def add_model_flags(parser, max_new_tokens):
    """The flags that choose a model, and how it says the next token."""
    add_base_flags(parser)
    add = parser.add_argument
    add("--side", help="folder of a side checkpoint; without one, the base alone answers")
    most = max_new_tokens or "128, or as many as the model has room for"
    add("--max_new_tokens", type=int, default=max_new_tokens, help=f"default: {most}")
    add("--temperature", type=float, default=0.0, help="0, the default: the most likely token")
    add("--top_k", type=int, default=0, help="only the k most likely tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="only the likeliest tokens of this probability")
    add("--seed", type=int, default=1337)


def add_base_flags(parser):
    parser.add_argument("--base", required=True, help="folder of a LLaMA or OPT model")
    parser.add_argument("--quant", help="nf4, fp4, none, int4, int4-64, ...; default: nf4, or what "
        "--side was trained on")  # fmt: skip
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16; auto: by the device")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")


def load_base(args, side=None):
    device = pick_device(args.device)
    quant = args.quant or side and read_side(side)[1].get("quant") or "nf4"
    return from_pretrained(args.base, quant, pick_dtype(args.dtype, device), device)


def load_model(args):
    """The base with its side network, if there is one, and its tokenizer."""
    tokenizer, base = load_tokenizer(args.base), load_base(args, args.side)
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


def show(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def generate(argv):
    """Answer one prompt, or go on with it."""
    parser = Parser("qst.py", description=generate.__doc__, epilog=ALSO)
    add_model_flags(parser, None)
    add = parser.add_argument
    add("--prompt", required=True, help="a question, put in the chat template of the base's folder;"
        " without a template, a base alone goes on with the text, and beside a side network it is"
        " put in the frame of data/instruct.py")  # fmt: skip
    add("--raw", action="store_true", help="always go on with the text")
    args = parser.parse_args(argv)
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
    show(tokenizer.stream(new if framed else chain(ids, new)))


def start_talk(args, system=None):
    """A conversation with the model of the flags."""
    template = chat.load_template(args.base)
    model, tokenizer = load_model(args)
    ends = template.end_ids(tokenizer)
    reply = lambda ids, most: say(model, ids, most, ends, args)
    positions = model.config.max_positions
    return chat.Talk(reply, tokenizer, template, positions, args.max_new_tokens, system)


def chat_command(argv):
    """Talk to a model: /reset forgets, /exit or Ctrl-D ends, and Ctrl-C stops an answer."""
    parser = Parser("qst.py chat", description=chat_command.__doc__)
    add_model_flags(parser, 512)
    parser.add_argument("--system", help="what the model is told before the conversation")
    args = parser.parse_args(argv)
    talk = start_talk(args, args.system)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() its arrow keys
    print(chat_command.__doc__)
    while True:
        try:
            question = input("\n> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return print()
        if question == "/exit":
            return
        if question == "/reset":
            talk.reset()
        elif question:
            ask(talk, question)


def ask(talk, question):
    """One question and its answer, in the terminal."""
    try:
        if dropped := talk.ask(question):
            print(f"[the {dropped} oldest messages no longer fit, and are forgotten]")
        show(talk.answer())
    except chat.Refused as error:
        print(f"[not asked: it {error}]")
    except KeyboardInterrupt:
        print(" [stopped]")


def answer_command(argv):
    """Answer the questions of MT-Bench, in the format of FastChat. A file that an earlier run has
    begun is finished; both turns of a question are one conversation."""
    parser = Parser("qst.py answer", description=answer_command.__doc__)
    add_model_flags(parser, 1024)
    add = parser.add_argument
    add("--questions", required=True, help="mt_bench_question.jsonl, or a file like it")
    add("--out", required=True, help="the answers, a line a question")
    add("--model_id", help="the model's name there, behind which the first digits of the side"
        " checkpoint's SHA-256 are put; default: the name of --out, as FastChat has it")  # fmt: skip
    add("--limit", type=int, help="only the first so many questions")
    add("--fastchat_temperatures", action="store_true",
        help="FastChat's temperature for each category, instead of --temperature")  # fmt: skip
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} must be at least 1.")
    model_id = args.model_id or Path(args.out).stem
    if args.side:  # trained anew, it is another model, whose answers must not finish a file
        read_side(args.side)  # or it says what is missing
        model_id += f"-{checksum(Path(args.side) / 'side.safetensors')[:8]}"
    questions = mt_bench.read_questions(args.questions)[: args.limit]
    done = mt_bench.answered(args.out, model_id)
    todo = [question for question in questions if question["question_id"] not in done]
    note = lambda text: tqdm.write(text, sys.stderr)
    with open(args.out, "a", encoding="utf-8") as out:
        talk = start_talk(args)
        for question in tqdm(todo, "answers", unit="question"):
            if args.fastchat_temperatures:
                args.temperature = mt_bench.temperature(question)
            turns = mt_bench.answer(talk, question, note)
            out.write(mt_bench.answer_line(question["question_id"], model_id, turns))
            out.flush()
    print(f"{args.out}: {len(todo)} questions answered, {len(questions) - len(todo)} were before")


def import_command(argv):
    """Turn a released side checkpoint into one of ours."""
    parser = Parser("qst.py import-released", description=import_command.__doc__)
    parser.add_argument("folder", help="with the six .pt files")
    parser.add_argument("--out", required=True, help="where to write side.safetensors and side.json")
    add_base_flags(parser)
    args = parser.parse_args(argv)
    model = import_released(load_base(args), args.folder)
    model.save_side(args.out)
    config = model.side.config
    print(f"{args.out}: reduction {config.reduction}, rank {config.rank}, as released")


def merge_command(argv):
    """Write what LoRA, QLoRA, PEQA or full finetuning has made of a base as a Hugging Face folder of
    plain weights, in bf16 if --dtype does not say otherwise."""
    parser = Parser("qst.py merge", description=merge_command.__doc__)
    parser.add_argument("--side", required=True, help="the --out_dir of a run of train.py")
    parser.add_argument("--out", required=True, help="the folder to write, with its tokenizer")
    add_base_flags(parser)
    args = parser.parse_args(argv)
    if any(Path(args.out).glob("*")):  # the base's own folder, for one
        raise InputError(f"--out {args.out} is not empty: give a new folder.")
    model, _ = load_model(args)
    if not isinstance(model, Finetuned):
        raise InputError(f"--side {args.side} is a side network, which cannot be merged into the base.")
    dtype = torch.bfloat16 if args.dtype == "auto" else pick_dtype(args.dtype, model.device)
    save_pretrained(model.merge(dtype), args.out)
    copy_tokenizer(args.base, args.out)
    print(f"{args.out}: {model.side.config.method}, merged in {str(dtype).removeprefix('torch.')}")


COMMANDS = {
    "chat": chat_command, "answer": answer_command, "import-released": import_command,
    "merge": merge_command,
}  # fmt: skip
ALSO = (
    "Also, each with its own --help: `qst.py chat` talks to a model, `qst.py answer` answers the"
    " questions of MT-Bench, `qst.py merge` writes a LoRA's model as a folder of plain weights, and"
    " `qst.py import-released` reads the authors' side checkpoints."
)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
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
