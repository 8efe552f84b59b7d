"""QST: the forward pass of a frozen base and its side network, side checkpoints, commands.

    python qst.py --base FOLDER --side FOLDER --prompt "..."
    python qst.py chat --base FOLDER --side FOLDER
    python qst.py answer --base FOLDER --side FOLDER --questions FILE.jsonl --out FILE.jsonl
    python qst.py serve --base FOLDER --side FOLDER --side FOLDER
    python qst.py merge --base FOLDER --side FOLDER --out FOLDER
    python qst.py import-released --base FOLDER --released FOLDER --out FOLDER

B, T, C, V: batch, length, n_embd, vocab_size; h_f, h_g: hidden states of base and side.
"""

import json
import sys
from pathlib import Path

import torch

from data import InputError, find_folder, leaf
from data.devices.device import pick_device, pick_dtype
from data.formats.safetensors import copy_into
from data.frozen.fingerprint import differences, fingerprint, quant_kind
from data.frozen.hidden import channel_statistics
from data.generate import sampling
from data.run import checkpoint
from data.settings.flags import Parser, run_main
from data.settings.methods import RELEASED, SIDE_METHODS, check_quant
from data.tokens.tokenizer import copy_tokenizer, load_tokenizer
from model import (
    LanguageModel, Linear, Transformer, from_pretrained, positions_and_mask, token_loss,
)
from quant import Linear4bit, Quantized
from side import IN_BASE_METHODS, LoRALinear, SideConfig, SideNetwork


def forward(base, side, idx, keep=None, cache=None):
    """The forward pass of QST: idx (B, T) -> the input of the LM head, (B, T, C).

    base: the frozen `Transformer`, or what yields the same hidden states (data/frozen/sources.py)
    side: a `SideNetwork`, or several as one (data/run/sweep.py), which return a list
    keep (B, past + T): 0 where a prompt is padded; cache: from `QST.new_cache`, to generate
    """
    N = side.n_layer * side.every  # layers of the base; `every` is 1 in the paper, and n_layer N
    of_base, of_side = (cache[:N], cache[N:]) if cache else (None, None)
    # It yields the embedding h_f_0, each layer's output h_f_1 ... h_f_N, and last the normed h_f_N.
    states = without_graph(base.states(idx, keep, of_base, side.every))
    h_f = next(states)
    positions, mask = positions_and_mask(h_f, keep, past=cache[0].length if cache else 0)
    rope, side = side.rotary_table(positions, h_f.dtype), side.cast(h_f.dtype)
    h_g = side.start(h_f)
    for i in range(1, side.n_layer + 1):
        h_f = next(states)
        h_g = side.step(i, h_f, h_g, mask, rope, of_side)
    # differs from the paper: mixed after the final norm, as in the released code. The frozen head
    # was trained on normed states. The paper says only "h_f_N".
    h_f = next(states)  # the normed h_f_N
    return side.mix(h_f, h_g)


@torch.no_grad()  # on a generator: on while it runs, off between two calls of `next`
def without_graph(states):
    """Compute hidden states without a graph, so that backward never enters the base."""
    yield from states


class FinetunedModel(LanguageModel):
    """A frozen base and its trainable part `side`: inside the base (LoRA, ...), or in the subclass
    `QST` beside it.

    base: a frozen `Transformer`; config: a `SideConfig`, afterwards `side.config`
    """

    def __init__(self, base, config):
        super().__init__()
        if any(True for _ in base.parameters()):
            message = "The base is not frozen, or holds another method's modules: load it anew."
            raise InputError(message)
        check_quant(config.method, quant_kind(base), hasattr(base, "stream"))
        self.base, self.config = base, base.config  # the ModelConfig
        # Computed first: the method may modify the base.
        self.fingerprint = None if base.device.type == "meta" else fingerprint(base)
        self.side = self.make_side(config)

    def make_side(self, config):
        """Make the trainable part. Methods inside the base modify the base."""
        if config.rank > (C := self.config.n_embd):
            raise InputError(f"--rank {config.rank} is more than the base's {C} channels.")
        with torch.device(self.base.device):
            if config.method in SIDE_METHODS:
                side = SideNetwork(self.config, config)
            else:
                side = IN_BASE_METHODS[config.method](self.base, config)
            labels = config.n_labels  # if there are any, a classifier replaces the LM head
            width = self.config.n_embd
            side.classifier = Linear(width, labels, bias=False) if labels else None
        return side

    def hidden(self, idx, keep=None, cache=None):
        """idx (B, T) -> the hidden state that the LM head takes as input, (B, T, C)."""
        return self.base.hidden(idx, keep, cache)

    def head(self, h):
        """(..., C) -> logits (..., V), or (..., n_labels) of a classifier."""
        classifier = self.side.classifier
        return self.base.head(h) if classifier is None else classifier(h)

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T), the ids that follow -> logits (B, T, V), loss or None."""
        logits = self.head(self.hidden(idx))
        return logits, None if targets is None else token_loss(logits, targets)

    @property
    def head_is_trainable(self):
        return self.side.classifier is not None or self.base.head_is_trainable

    def new_cache(self, max_len):
        return self.base.new_cache(max_len)

    def calibrate(self, prompts, measure=channel_statistics):
        """Do nothing: methods inside the base need no calibration."""

    def merge(self, dtype=torch.bfloat16):
        """Make one frozen `Transformer` of plain weights that computes the same."""
        check_mergeable(self.side.config.method)

        def read(name):
            path, _, attribute = name.rpartition(".")
            module = self.base.get_submodule(path)
            if attribute == "weight" and isinstance(module, (Linear, Linear4bit, LoRALinear)):
                return full_weight(module)
            return getattr(module, attribute).detach()

        with torch.device("meta"):
            merged = Transformer(self.config)
        return merged.freeze("none", dtype, self.device, read)

    def save_side(self, folder):
        """Write side.safetensors, with the settings in its metadata, and their copy side.json."""
        tensors = self.side.state_dict()
        checkpoint.write(folder, tensors, self.side.config, self.fingerprint)

    def load_side(self, folder):
        """Replace the side network and its settings by saved ones, and return self.

        It must have been trained on this base, and have exactly the tensors of its settings.
        """
        config, trained_on = read_side(folder)
        if different := differences(trained_on, self.fingerprint):
            different = f"another base: {', '.join(different)}; give the same --base and --quant"
            raise InputError(f"{folder} was trained on {different}.")
        if config != self.side.config:
            if not {config.method, self.side.config.method} <= set(SIDE_METHODS):
                message = f"{folder} has other settings than these modules: load the base anew."
                raise InputError(message)
            self.side = self.make_side(config)
        copy_into(self.side, checkpoint.load(folder), Path(folder) / "side.safetensors")
        return self

    @staticmethod
    def from_side(base, folder):
        """Load a saved side network, or the trained part of another method, for a base."""
        return add_trainable(base, read_side(folder)[0]).load_side(folder)


class QST(FinetunedModel):
    """Quantized side tuning (arXiv 2401.07159 §3.2): a frozen base, and a side network beside it.

    base: a frozen `Transformer`; config: the side network's `SideConfig`, by default the paper's
    """

    def __init__(self, base, config=None):
        super().__init__(base, config or SideConfig())

    def hidden(self, idx, keep=None, cache=None):
        """See `forward`."""
        return forward(self.base.source or self.base, self.side, idx, keep, cache)

    def new_cache(self, max_len):
        return self.base.new_cache(max_len) + self.side.new_cache(max_len)

    def calibrate(self, prompts, measure=channel_statistics):
        """With --standardize, measure the base's channels on some texts, tuples of ids.

        Some channels of a real model are hundreds of times larger than the others and almost
        constant. They hide what the downsamplers should read. 64 texts are enough.
        measure: `channel_statistics`, or a cached version of it
        """
        if self.side.config.standardize:
            mean, variance = measure(self.base, prompts, self.side.every)
            self.side.mean.copy_(mean)
            self.side.scale.copy_((variance + 1e-6).rsqrt())


class SharedBase:
    """Models that share one pass of their base. Results are lists, with one item per model.

    models: one `LanguageModel` of any kind, or several `QST`s
    compiled: whether `compute`, which is otherwise `hidden`, is compiled
    """

    def __init__(self, models, compiled=False):
        self.models, self.compiled, self.config = models, compiled, models[0].config
        self.as_one = leaf("sweep").as_one(models) if len(models) > 1 else models[0]
        self.device = models[0].device
        if compiled:  # make the buffer of unpacked weights: inside a graph it would cost a second
            self.hidden(torch.zeros(64, 1, dtype=torch.long, device=self.device))
        self.compute = torch.compile(self.hidden, dynamic=True) if compiled else self.hidden

    def hidden(self, idx, keep=None, cache=None):
        """The hidden state of each model."""
        h = self.as_one.hidden(idx, keep, cache)
        return h if isinstance(h, list) else [h]

    def new_cache(self, max_len):
        return self.as_one.new_cache(max_len)


def check_mergeable(method):
    if method not in ("lora", "qlora", "peqa", "full"):
        advice = "for a merged model, train with --method qlora or lora"
        raise InputError(f"--method {method} cannot be merged into the base: {advice}.")


@torch.no_grad()
def full_weight(module):
    """The weight of any linear layer as one matrix in fp32."""
    if isinstance(module, LoRALinear):
        up, down = module.pair.up.weight.float(), module.pair.down.weight.float()
        return full_weight(module.linear) + module.scaling * up @ down
    weight = module.weight
    return weight.dequantize() if isinstance(weight, Quantized) else weight.float()


def add_trainable(base, config):
    """Make a `QST`, or for a method inside the base a `FinetunedModel`."""
    return (QST if config.method in SIDE_METHODS else FinetunedModel)(base, config)


def import_released(base, folder):
    """Load the authors' side checkpoint as a `QST` with their architecture."""
    tensors, sizes = leaf("released").read(folder, base.config)
    model = QST(base, SideConfig(**RELEASED, **sizes))
    copy_into(model.side, tensors, folder)
    return model


def read_side(folder):
    """The settings of a side checkpoint: the `SideConfig`, and the fingerprint of the base."""
    return checkpoint.read(folder, SideConfig)


# --------------------------------------------------------------------------------------
# The command line


def load_base(args):
    device = pick_device(args.device)
    side = getattr(args, "side", None)
    quant = args.quant or side and read_side(side)[1].get("quant") or "nf4"
    return from_pretrained(args.base, quant, pick_dtype(args.dtype, device), device, args.stream)


def load_model(args):
    """The base, with its side network if --side names one, and its tokenizer."""
    args.base = find_folder(args.base)
    if args.side and read_side(args.side)[0].n_labels:
        raise InputError(f"--side {args.side} is a classifier: score it with train.py --eval_only.")
    tokenizer, base = load_tokenizer(args.base), load_base(args)
    model = QST.from_side(base, args.side) if args.side else base
    for part in model.side.children() if isinstance(model, QST) else ():
        part.to(base.embed_tokens.weight.dtype)  # once, and not for each token
    return model, tokenizer


def prompt_command(args):
    """Answer a prompt, or every prompt in a file; with --raw, continue the text instead."""
    leaf("talk").answer_prompts(args, lambda: load_model(args))


def chat_command(args):
    """Talk to a model: /reset forgets, /exit or Ctrl-D ends, and Ctrl-C stops an answer."""
    conversation = leaf("talk").start(args, lambda: load_model(args), 512)
    print(chat_command.__doc__)
    conversation.in_the_terminal()


def answer_command(args):
    """Answer the questions of MT-Bench, in the format of FastChat. An unfinished file is continued;
    both turns of a question are one conversation."""
    if args.side:
        read_side(args.side)  # refuse a missing one before anything is written
    start = lambda: leaf("talk").start(args, lambda: load_model(args), 1024)
    leaf("mt_bench").answer_file(args, start)


def serve_command(args):
    """Serve the base and each --side as models for OpenAI's clients, on 127.0.0.1."""
    leaf("serve").serve(args, read_side, load_model, QST.from_side, forward)


def import_command(args):
    """Convert a side checkpoint of the authors' released code into one of ours."""
    args.base = find_folder(args.base)
    model = import_released(load_base(args), args.released)
    model.save_side(args.out)
    config = model.side.config
    print(f"{args.out}: reduction {config.reduction}, rank {config.rank}, as released")


def merge_command(args):
    """Write a base with the changes of LoRA, QLoRA, PEQA or full finetuning as a Hugging Face
    folder of plain weights, in bf16 or --dtype."""
    if not args.side:
        raise InputError("merge needs --side: the --out_dir of a run of train.py.")
    if any(Path(args.out).resolve().glob("*")):  # for example the base's own folder
        raise InputError(f"--out {args.out} is not empty: give a new folder.")
    check_mergeable(read_side(args.side)[0].method)  # before the base is loaded
    model, _ = load_model(args)
    dtype = torch.bfloat16 if args.dtype == "auto" else pick_dtype(args.dtype, model.device)
    leaf("save").save_pretrained(model.merge(dtype), args.out)
    copy_tokenizer(args.base, args.out)
    leaf("chat").keep_plain_template(args.out)
    dtype = str(dtype).removeprefix("torch.")
    print(f"{args.out}: {model.side.config.method}, merged in {dtype}. Load it with --quant none; "
          "without this flag its weights are quantized to NF4.")


TABLE = Path(__file__).parent / "data" / "settings" / "commands.json"
FLAGS = json.loads(TABLE.read_text()) | sampling.FLAGS
BASE, DRAW = "base quant dtype device stream", " ".join(sampling.FLAGS)
COMMANDS = {  # name: (function, its flags); the first is the default
    "generate": (prompt_command, f"{BASE} side {DRAW} prompt batch raw"),
    "chat": (chat_command, f"{BASE} side {DRAW} system"),
    "answer": (answer_command, f"{BASE} side {DRAW} out questions model_id fastchat_temperatures"),
    "serve": (serve_command, f"{BASE} side port"),
    "merge": (merge_command, f"{BASE} side out"),
    "import-released": (import_command, f"{BASE} released out"),
}
ALSO = f"Also, each with its own --help: {', '.join(f'`qst.py {name}`' for name in COMMANDS)}."


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "generate"
    if name not in COMMANDS:
        raise InputError(f"qst.py has no command {name!r}: choose {', '.join(COMMANDS)}.")
    command, flags = COMMANDS[name]
    known = FLAGS | (leaf("serve").FLAGS if name == "serve" else {})
    parser = Parser(f"qst.py {name}", description=command.__doc__, epilog=ALSO)
    for flag in flags.split():
        parser.add_argument(f"--{flag}", **known[flag])
    command(parser.parse_args(argv))


if __name__ == "__main__":
    run_main(main, "give a shorter text, --quant nf4, or a 4-bit folder with --stream")
