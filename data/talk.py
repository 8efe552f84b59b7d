"""Talking to a model: the answer to one prompt, and conversations that are remembered.

The model is anything that data/sampling.py can generate from.
"""

import contextlib
from itertools import chain

import torch

from data import sampling
from data.fields import Refused
from data.instruct import prompt_that_fits
from quant import InputError


def stream_ids(model, ids, max_new_tokens, end_ids, args):
    """Yield the ids that a model says after those of a prompt.

    args: the flags of `sampling.FLAGS`
    """
    idx = torch.tensor([ids], device=model.device)
    choice = args.temperature, args.top_k, args.top_p
    for token in sampling.stream(model, idx, max_new_tokens, *choice, end_ids, seed=args.seed):
        yield token.item()


def answer_prompt(model, tokenizer, template, framed, args):
    """Print the answer to --prompt; if it is not framed as a question, print its continuation."""
    if framed:
        try:
            ids, _ = template.encode([{"role": "user", "content": args.prompt}], tokenizer)
        except Refused as error:
            raise InputError(f"--prompt {error}.") from None
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    room = max(1, min(128, model.config.max_positions - len(ids) + 1))
    max_new_tokens = room if args.max_new_tokens is None else args.max_new_tokens
    new = stream_ids(model, ids, max_new_tokens, template.end_ids(tokenizer), args)
    print_stream(tokenizer.stream(new if framed else chain(ids, new)))


def start(model, tokenizer, template, args, default_max_new_tokens):
    """Begin a conversation with a model. args: the flags of `sampling.FLAGS`, perhaps --system"""
    end_ids, system = template.end_ids(tokenizer), getattr(args, "system", None)

    def say(ids, max_new_tokens):
        return stream_ids(model, ids, max_new_tokens, end_ids, args)

    longest = default_max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    return Talk(say, tokenizer, template, model.config.max_positions, longest, system)


class Talk:
    """A conversation with a model, which is remembered as long as it fits.

    say: (ids of a prompt, max_new_tokens) -> the ids that the model says, one by one
    positions: the most tokens that the model can see; max_new_tokens: of the longest answer

    Every answer computes its whole prompt anew. The caches of the last answer could be kept, but
    only where the history's ids are the same again: after a cut, or in LLaMA-2's frame, they are
    not.
    """

    def __init__(self, say, tokenizer, template, positions, max_new_tokens, system=None):
        if max_new_tokens < 1:
            raise InputError(f"--max_new_tokens {max_new_tokens} must be at least 1.")
        self.say, self.tokenizer, self.template = say, tokenizer, template
        self.positions, self.max_new_tokens = positions, max_new_tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self):
        self.messages = list(self.system)

    def ask(self, question):
        """Put a question; returns how many old messages were dropped to make room for an answer.

        `Refused` says why it cannot be put; the history is then what it was.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        room = self.positions - min(self.max_new_tokens, self.positions // 4) + 1
        ids, kept = prompt_that_fits(messages, self.tokenizer, self.template, room)
        if len(ids) > self.positions:
            raise Refused(f"has {len(ids)} tokens, and the model {self.positions} positions")
        self.ids, self.messages = ids, kept
        return len(messages) - len(kept)

    def answer(self):
        """Yield the answer in pieces, and remember them, even if it is stopped."""
        self.messages.append({"role": "assistant", "content": ""})
        max_new_tokens = min(self.max_new_tokens, self.positions - len(self.ids) + 1)
        for piece in self.tokenizer.stream(self.say(self.ids, max_new_tokens)):
            self.messages[-1]["content"] += piece
            yield piece

    def in_the_terminal(self):
        """Ask what is typed, until /exit or Ctrl-D."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, gives input() its arrow keys
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
                self.reset()
            elif question:
                self.ask_and_print(question)

    def ask_and_print(self, question):
        try:
            if dropped := self.ask(question):
                print(f"[the {dropped} oldest messages no longer fit, and are forgotten]")
            print_stream(self.answer())
        except Refused as error:
            print(f"[not asked: it {error}]")
        except KeyboardInterrupt:
            print(" [stopped]")


def print_stream(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
