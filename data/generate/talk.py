"""Answer prompts, and hold conversations that remember their earlier messages."""

import contextlib
from itertools import chain

import torch

from data import InputError, Refused, find_folder
from data.formats.files import read_text
from data.generate import sampling
from data.settings.flags import refuse_if
from data.tokens.chat import ChatTemplate, load_template, prompt_that_fits


def stream_ids(model, ids, max_new_tokens, end_ids, args):
    """Yield the ids that a model generates after a prompt. args: the flags of `sampling.FLAGS`"""
    idx = torch.tensor([ids], device=model.device)
    choice = args.temperature, args.top_k, args.top_p
    for token in sampling.stream(model, idx, max_new_tokens, *choice, end_ids, seed=args.seed):
        yield token.item()


def check(args):
    """Refuse flags that contradict each other, before the base is found."""
    batch = getattr(args, "batch", None)
    refuse_if(
        (hasattr(args, "batch") and (args.prompt is None) == (batch is None),
         "give one of --prompt, and --batch FILE with one prompt per line"),
        (getattr(args, "prompt", None) == "", "--prompt is empty: give a question"),
        (args.stream and not batch, sampling.ONE_BY_ONE),
    )
    sampling.check(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    args.base = find_folder(args.base)


def answer_prompts(args, load):
    """Print the answer to --prompt, or the answers to --batch, which are generated together.

    With --raw, or without a chat template and a side network, print continuations instead.
    load: function that returns the model and its tokenizer
    """
    check(args)
    template = ChatTemplate() if args.raw else load_template(args.base)
    chat = not args.raw and (args.side or template.text)
    model, tokenizer = load()
    prompts = {"--prompt": args.prompt}  # {place, for messages: prompt}
    if args.batch:
        lines = enumerate(read_text(args.batch, "give --batch a file of prompts").splitlines(), 1)
        prompts = {f"{args.batch}, line {i}": line for i, line in lines if line.strip()}
    if not prompts:
        raise InputError(f"--batch {args.batch} has no prompts: give a file with one per line.")
    rows = []
    for where, prompt in prompts.items():
        question = {"role": "user", "content": prompt}
        try:
            ids = template.encode([question], tokenizer)[0] if chat else tokenizer.encode(prompt)
        except Refused as error:
            raise InputError(f"{where} {error}.") from None
        rows.append(ids if chat else [tokenizer.bos_id, *ids])
    end_ids, longest = template.end_ids(tokenizer), max(map(len, rows))
    room = max(1, min(128, model.config.max_positions - longest + 1))
    max_new_tokens = room if args.max_new_tokens is None else args.max_new_tokens
    if not args.batch:
        new = stream_ids(model, rows[0], max_new_tokens, end_ids, args)
        return print_stream(tokenizer.stream(new if chat else chain(rows[0], new)))
    idx, keep = sampling.pad_left(rows, device=model.device)
    choice = args.temperature, args.top_k, args.top_p, end_ids, keep, args.seed
    answers = model.generate(idx, max_new_tokens, *choice)[:, longest:].tolist()
    for prompt, ids, answer in zip(prompts.values(), rows, answers):
        text = tokenizer.decode(answer if chat else ids + answer)
        print(f"> {prompt}\n{text}\n" if chat else f"{text}\n")


def start(args, load, default_max_new_tokens):
    """Start a conversation. load: function that returns the model and its tokenizer"""
    check(args)
    template = load_template(args.base)
    model, tokenizer = load()
    end_ids, system = template.end_ids(tokenizer), getattr(args, "system", None)
    say = lambda ids, max_new_tokens: stream_ids(model, ids, max_new_tokens, end_ids, args)
    longest = default_max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    return Talk(say, tokenizer, template, model.config.max_positions, longest, system)


class Talk:
    """Hold a conversation with a model, and remember as many messages as fit.

    say: function of a prompt's ids and max_new_tokens, which yields the ids of the answer
    positions: the most tokens in a sequence; max_new_tokens: the most tokens in an answer
    Every answer computes its whole prompt: the ids of the history change when messages are dropped,
    and in LLaMA-2's format, so that a cache would seldom help.
    """

    def __init__(self, say, tokenizer, template, positions, max_new_tokens, system=None):
        self.say, self.tokenizer, self.template = say, tokenizer, template
        self.positions, self.max_new_tokens = positions, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self):
        self.messages = list(self.system)

    def ask(self, question):
        """Add a question, and return how many old messages were dropped to make room. `Refused`
        gives the reason if it cannot be asked; the history is then unchanged."""
        messages = [*self.messages, {"role": "user", "content": question}]
        room = self.positions - min(self.max_new_tokens, self.positions // 4) + 1
        ids, kept = prompt_that_fits(messages, self.tokenizer, self.template, room)
        if len(ids) > self.positions:
            raise Refused(f"has {len(ids)} tokens, and the model {self.positions} positions")
        self.ids, self.messages = ids, kept
        return len(messages) - len(kept)

    def answer(self):
        """Yield the answer in pieces, and remember them, even if the answer is stopped."""
        self.messages.append({"role": "assistant", "content": ""})
        max_new_tokens = min(self.max_new_tokens, self.positions - len(self.ids) + 1)
        for piece in self.tokenizer.stream(self.say(self.ids, max_new_tokens)):
            self.messages[-1]["content"] += piece
            yield piece

    def in_the_terminal(self):
        """Answer what the user types, until /exit or Ctrl-D."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, gives input() its arrow keys
        while True:
            question = ""
            try:
                question = input("\n> ").strip()
                if question == "/exit":
                    return
                if question == "/reset":
                    self.reset()
                elif question:
                    if dropped := self.ask(question):
                        print(f"[dropped the {dropped} oldest messages, which no longer fit]")
                    print_stream(self.answer())
            except EOFError:
                return print()
            except Refused as error:
                print(f"[not asked: it {error}]")
            except KeyboardInterrupt:
                if question:
                    print(" [stopped]")


def print_stream(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
