"""Conversations in the frame that a chat model was trained in, without running its Jinja template.

A conversation (see instruct.py) becomes parts, [(text or id, is it part of an answer?), ...]. A
marker that is a token, such as <|im_end|>, is an *id*; what people wrote is a *string*, and a
string never becomes a special token. So a user who writes "<|im_end|>" into a message closes
nothing.

The frame is chosen by the markers in the folder's chat template:
    ChatML     <|im_start|>user\\n..<|im_end|>\\n               SmolLM2, Qwen2, Qwen2.5
    LLaMA-3    <|start_header_id|>user<|end_header_id|>\\n\\n..<|eot_id|>       also 3.1 and 3.2
    LLaMA-2    <s>[INST] .. [/INST] answer </s>
    plain      the frame of `frame`, for a base model, which has no template; a merged model has
               the same frame as a template, `keep_frame`
The loss counts an answer and the token that ends it: the model has to learn to stop.

differs from the templates: answers are encoded apart from what stands before them, since that is
what the model will see when it generates; the ids differ only if an answer begins with a space.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from data import InputError, Refused
from data.formats.fields import TABLE, TEXT, either, field, list_of
from data.formats.files import read_json, read_text, write_atomically
from data.tokens.tokenizer import SentencePiece


@dataclass(frozen=True)
class ChatTemplate:
    """The name of a frame, and what the template itself says to the model."""

    name: str = "plain"
    system: str = ""

    def parts(self, messages, tokenizer):
        """Frame a conversation; if its last message is no answer, it is the prompt of one.

        `Refused` says why a template cannot hold it.
        """
        if FRAMES[self.name] is not plain:
            messages = [{**m, "content": with_input(m)} for m in messages]
        return FRAMES[self.name](messages, tokenizer, self.system)

    def encode(self, messages, tokenizer):
        """The ids of a conversation, and of each whether it belongs to an answer."""
        ids, inside = [], []
        for part, answer in self.parts(messages, tokenizer):
            new = [part] if isinstance(part, int) else tokenizer.encode(part)
            ids += new
            inside += [answer] * len(new)
        return ids, inside

    def check(self, conversation):
        """Refuse what must not be trained on: LLaMA-2's markers in any text."""
        if self.name == "LLaMA-2":
            check_turns(conversation)
            check_forged(conversation)

    def end_ids(self, tokenizer):
        """All ids that end an answer. A base model with a template may not count its marker."""
        mark = {"ChatML": "<|im_end|>", "LLaMA-3": "<|eot_id|>"}.get(self.name)
        own = markers(tokenizer, mark) if mark else []
        return list(dict.fromkeys(own + tokenizer.eos_ids))


def with_input(message):
    """The text of a message, with an instruction's input below it."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


# --------------------------------------------------------------------------------------
# The frames


def chatml(messages, tokenizer, system):
    """`system` is what the template says for a conversation that has no system message."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    start, end = markers(tokenizer, "<|im_start|>", "<|im_end|>")
    return turns(messages, lambda role: [start, f"{role}\n"], end, after=["\n"])


def llama3(messages, tokenizer, system):
    """`system` is what the template puts before any system message (the dates of 3.1 and 3.2)."""
    messages = [{**m, "content": m["content"].strip()} for m in messages]
    if system:
        own, messages = split_system(messages)
        messages = [{"role": "system", "content": system + (own or "")}, *messages]
    bos, start, stop, end = markers(
        tokenizer, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    return [(bos, False), *turns(messages, lambda role: [start, role, stop, "\n\n"], end)]


def llama2(messages, tokenizer, system):
    """Its [INST] and <<SYS>> are plain text, so that nobody may write them into a question."""
    check_turns(messages)
    check_forged(m for m in messages if m["role"] != "assistant")
    own, messages = split_system(messages)
    space = "" if isinstance(tokenizer, SentencePiece) else " "  # sentencepiece puts its own
    parts = []
    for i, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "user":
            if i == 0 and own is not None:
                text = f"<<SYS>>\n{own}\n<</SYS>>\n\n{text}"
            parts += [(tokenizer.bos_id, False), (f"[INST] {text.strip()} [/INST]", False)]
        else:
            parts += [(f"{space}{text.strip()} ", True), (tokenizer.eos_id, True)]
    return parts


def plain(messages, tokenizer, system):
    """Instructions in the frame of `frame`; a system message stands before the next one."""
    parts, before = [(tokenizer.bos_id, False)], ""
    for message in messages:
        if message["role"] == "system":
            before += message["content"] + "\n\n"
        elif message["role"] == "user":
            parts.append((before + frame(message["content"], message.get("input")), False))
            before = ""
        else:
            parts += [(message["content"], True), (tokenizer.eos_id, True)]
    return parts


FRAMES = {
    "ChatML": chatml, "LLaMA-3": llama3, "LLaMA-2": llama2, "plain": plain, "written out": plain,
}


def turns(messages, header, end, after=()):
    """Put each message between its role's header and the end token.

    A message that is no answer is one string with the text before it, as the template has it.
    """
    parts = []
    for message in messages:
        *head, last = header(message["role"])
        answer = message["role"] == "assistant"
        parts += [(part, False) for part in head]
        if answer:
            parts += [(last, False), (message["content"], True), (end, True)]
        else:
            parts += [(last + message["content"], False), (end, False)]
        parts += [(part, False) for part in after]
    if not answer:
        parts += [(part, False) for part in header("assistant")]
    return parts


def markers(tokenizer, *texts):
    """The ids of a template's markers."""
    for text in texts:
        if text not in tokenizer.special:
            raise InputError(
                f"The chat template of {tokenizer.folder} needs {text}, which its tokenizer lacks:"
                " copy all of the model's tokenizer files there, of one model."
            )
    return [tokenizer.special[text] for text in texts]


def split_system(messages):
    """Take the system message from the front: (its text or None, the other messages)."""
    first, *rest = messages
    return (first["content"], rest) if first["role"] == "system" else (None, messages)


def check_turns(messages):
    for i, message in enumerate(split_system(messages)[1]):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise Refused("has turns that do not alternate, which LLaMA-2's template needs")


def check_forged(messages):
    # differs from the template, which lets them through; Meta's own code refuses them.
    for message in messages:
        for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if mark in with_input(message):
                raise Refused(f"has {mark} in a message, which would look like a turn")


# --------------------------------------------------------------------------------------
# Recognizing a folder's template

SIGNS = {  # what a template must contain
    "ChatML": ("<|im_start|>", "<|im_end|>"),
    "LLaMA-3": ("<|start_header_id|>", "<|eot_id|>"),
    "LLaMA-2": ("[INST]", "<<SYS>>"),
}


# The plain frame as a template, which transformers renders to the same text.
WRITTEN_OUT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)
LONGEST_TEMPLATE = 1 << 15  # letters, since a search below is quadratic; LLaMA-3.1's has 4,000


def load_template(folder):
    """Recognize a folder's chat template; a folder without one has the plain frame."""
    path = Path(folder) / "chat_template.jinja"  # where newer folders keep it
    if path.exists():
        text = read_text(path)
    else:
        path = Path(folder) / "tokenizer_config.json"
        kinds = either(TEXT, list_of(TABLE))
        text = field(path, read_json(path, optional=True), "chat_template", kinds, "")
    if text == WRITTEN_OUT:
        return ChatTemplate("written out")
    if isinstance(text, list):  # several, by name
        several = text
        text = ""
        for one in several:
            own = field(path, one, "chat_template.template", TEXT)
            text = own if field(path, one, "chat_template.name", TEXT) == "default" else text
    if len(text) > LONGEST_TEMPLATE:
        raise InputError(f"{path}: the chat template is longer than {LONGEST_TEMPLATE:,} letters.")
    if not text:
        return ChatTemplate()
    names = [name for name, signs in SIGNS.items() if all(sign in text for sign in signs)]
    if len(names) != 1 or "<think>" in text:  # a thinking model frames its answers in other ways
        seen = dict.fromkeys(re.findall(r"<\|?\w+\|?>|\[/?[A-Z]+\]", text))
        raise InputError(
            f"{path}: the chat template with {', '.join(seen)[:80] or repr(text[:60])} is unknown;"
            f" we know {', '.join(SIGNS)}. Remove it to use the plain frame."
        )
    system = {"ChatML": chatml_system, "LLaMA-3": llama3_system}.get(names[0], lambda text: "")
    return ChatTemplate(names[0], system(text))


def keep_frame(folder):
    """Give a merged model the frame in which it has learned, if its base has no template."""
    if load_template(folder).name == "plain":
        path = Path(folder) / "chat_template.jinja"
        write_atomically(path, lambda file: file.write(WRITTEN_OUT.encode()))


def chatml_system(text):
    """The system prompt that a ChatML template puts in by default, if it has one."""
    # A literal of Jinja, from its opening quote on, in which only its own quote has a backslash.
    literal = r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
    found = re.search(literal, text)
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[2]) if found else ""


def llama3_system(text):
    """The dates of 3.1 and 3.2, today's always being the day that the template falls back to."""
    if "Cutting Knowledge Date" not in text:
        return ""
    # differs from the template of 3.2, which asks the clock: a run must be repeatable.
    return "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def frame(instruction, input=""):
    """Put an instruction into the frame that the answer follows, in a model without a template."""
    middle = f"\n\n### Input:\n{input}" if input else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def prompt_that_fits(messages, tokenizer, template, room):
    """Drop the oldest turns until the prompt has at most `room` ids: (ids, messages that are kept).

    The system message and the last question stay, even if they alone are longer.
    """
    system = messages[: messages[0]["role"] == "system"]
    rest = messages[len(system) :]
    while True:
        ids, _ = template.encode(system + rest, tokenizer)
        starts = [i for i, message in enumerate(rest) if message["role"] == "user"]
        if len(ids) <= room or len(starts) < 2:
            return ids, system + rest
        rest = rest[starts[1] :]
