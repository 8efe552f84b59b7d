"""Format conversations with a model's chat template, without running its Jinja code.

A conversation (see data/tasks/instruct.py) becomes parts, [(text or id, is in an answer), ...]. A
marker such as <|im_end|> is an *id*. A message is a *string*, which never becomes a special token:
a user who writes "<|im_end|>" closes nothing.

The markers in the folder's chat template choose the format:
    ChatML     <|im_start|>user\\n..<|im_end|>\\n               SmolLM2, Qwen2, Qwen2.5
    LLaMA-3    <|start_header_id|>user<|end_header_id|>\\n\\n..<|eot_id|>       also 3.1 and 3.2
    LLaMA-2    <s>[INST] .. [/INST] answer </s>
    plain      `frame`, if there is no template; a merged model stores it as a template
The loss counts an answer and the token that ends it, so that the model learns to stop.

differs from the templates: answers are encoded separately from the prompt, as in generation. The
ids differ only if an answer begins with a space.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from data import InputError, Refused
from data.formats.fields import TABLE, TEXT, either, field, list_of
from data.formats.files import read_json, read_text, write_atomically
from data.tokens.tokenizer import SentencePiece


@dataclass(frozen=True)
class ChatTemplate:
    """Hold the name of a format, and the system prompt that the template itself contains."""

    name: str = "plain"
    system: str = ""

    def parts(self, messages, tokenizer):
        """Format a conversation, or raise `Refused`; after a question, an answer is begun."""
        if self.name not in FORMATS:
            return plain(messages, tokenizer)
        messages = [{**m, "content": with_input(m)} for m in messages]
        return FORMATS[self.name](messages, tokenizer, self.system)

    def encode(self, messages, tokenizer):
        """Encode a conversation: its ids, and for each whether it is in an answer."""
        ids, inside = [], []
        for part, answer in self.parts(messages, tokenizer):
            new = [part] if isinstance(part, int) else tokenizer.encode(part)
            ids += new
            inside += [answer] * len(new)
        return ids, inside

    def check(self, conversation):
        """Refuse a conversation for training if any of its texts has LLaMA-2's markers."""
        if self.name == "LLaMA-2":
            check_llama2(conversation, ("system", "user", "assistant"))

    def end_ids(self, tokenizer):
        """List all ids that end an answer; a base model may not count its template's marker."""
        mark = {"ChatML": "<|im_end|>", "LLaMA-3": "<|eot_id|>"}.get(self.name)
        own = markers(tokenizer, mark) if mark else []
        return list(dict.fromkeys(own + tokenizer.eos_ids))


def with_input(message):
    """Join the text of a message and an instruction's input."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def chatml(messages, tokenizer, system):
    """Format as ChatML. system: for conversations without a system message"""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    start, end = markers(tokenizer, "<|im_start|>", "<|im_end|>")
    return turns(messages, lambda role: [start, f"{role}\n"], end, after=["\n"])


def llama3(messages, tokenizer, system):
    """Format as LLaMA-3. system: precedes any system message (the dates of 3.1 and 3.2)"""
    messages = [{**m, "content": m["content"].strip()} for m in messages]
    if system:
        own, messages = split_system(messages)
        messages = [{"role": "system", "content": system + (own or "")}, *messages]
    bos, start, stop, end = markers(
        tokenizer, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    return [(bos, False), *turns(messages, lambda role: [start, role, stop, "\n\n"], end)]


def llama2(messages, tokenizer, system):
    """Format as LLaMA-2, whose [INST] and <<SYS>> are plain text that no question may contain."""
    check_llama2(messages, ("system", "user"))
    own, messages = split_system(messages)
    space = "" if isinstance(tokenizer, SentencePiece) else " "  # sentencepiece adds its own
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


def plain(messages, tokenizer):
    """Format each instruction with `frame`, after any system message."""
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


def frame(instruction, input=""):
    """Format an instruction for a model without a template, up to the start of the answer."""
    middle = f"\n\n### Input:\n{input}" if input else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


WRITTEN_OUT = (  # the plain format as a template, which transformers renders to the same text
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}{% endfor %}"
)
FORMATS = {"ChatML": chatml, "LLaMA-3": llama3, "LLaMA-2": llama2}  # all others are plain


def turns(messages, header, end, after=()):
    """Put each message between its role's header and the end token, a question in one string."""
    parts, outside = [], lambda *texts: [(text, False) for text in texts]
    for message in messages:
        *head, last = header(message["role"])
        answer = message["role"] == "assistant"
        if answer:
            parts += [*outside(*head, last), (message["content"], True), (end, True)]
        else:
            parts += outside(*head, last + message["content"], end)
        parts += outside(*after)
    return parts if answer else parts + outside(*header("assistant"))


def markers(tokenizer, *texts):
    """Look up the ids of a template's markers."""
    for text in texts:
        if text not in tokenizer.special:
            needs = f"needs {text}, which its tokenizer lacks: copy all tokenizer files there"
            raise InputError(f"The chat template of {tokenizer.folder} {needs}.")
    return [tokenizer.special[text] for text in texts]


def split_system(messages):
    """Take the system message from the front: (its text or None, the other messages)."""
    first, *rest = messages
    return (first["content"], rest) if first["role"] == "system" else (None, messages)


def check_llama2(messages, roles):
    """Refuse turns that do not alternate, and markers in the messages of some roles."""
    for i, message in enumerate(split_system(messages)[1]):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise Refused("has turns that do not alternate, which LLaMA-2's template needs")
    # differs from the template, which accepts markers in messages; Meta's own code refuses them.
    for message in messages:
        for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):
            if message["role"] in roles and mark in with_input(message):
                raise Refused(f"has {mark} in a message, which would look like a turn")


SIGNS = {  # texts that a template must contain
    "ChatML": ("<|im_start|>", "<|im_end|>"),
    "LLaMA-3": ("<|start_header_id|>", "<|eot_id|>"),
    "LLaMA-2": ("[INST]", "<<SYS>>"),
}
LONGEST_TEMPLATE = 1 << 15  # letters; LLaMA-3.1's has 4,000, and a search below is quadratic


def load_template(folder):
    """Recognize a folder's chat template; a folder without one has the plain format."""
    path = Path(folder) / "chat_template.jinja"  # newer folders have this file
    if path.exists():
        text = read_text(path)
    else:
        path = Path(folder) / "tokenizer_config.json"
        kinds = either(TEXT, list_of(TABLE))
        text = field(path, read_json(path, optional=True), "chat_template", kinds, "")
    if isinstance(text, list):  # several templates, with names
        own = lambda one, name: field(path, one, f"chat_template.{name}", TEXT)
        text = {own(one, "name"): own(one, "template") for one in text}.get("default", "")
    if len(text) > LONGEST_TEMPLATE:
        raise InputError(f"{path}: the chat template is longer than {LONGEST_TEMPLATE:,} letters.")
    if text in ("", WRITTEN_OUT):
        return ChatTemplate("written out" if text else "plain")
    names = [name for name, signs in SIGNS.items() if all(sign in text for sign in signs)]
    if len(names) != 1 or "<think>" in text:  # thinking models format their answers differently
        seen = dict.fromkeys(re.findall(r"<\|?\w+\|?>|\[/?[A-Z]+\]", text))
        unknown = f"with {', '.join(seen)[:80] or repr(text[:60])} is unknown"
        known = f"known are {', '.join(SIGNS)}. Remove it to use the plain format"
        raise InputError(f"{path}: the chat template {unknown}; {known}.")
    return ChatTemplate(names[0], own_system(names[0], text))


def keep_plain_template(folder):
    """Store the plain format as a merged model's template, if its base has no template."""
    if load_template(folder).name == "plain":
        path = Path(folder) / "chat_template.jinja"
        write_atomically(path, lambda file: file.write(WRITTEN_OUT.encode()))


def own_system(name, text):
    """Find the system prompt that a template contains: ChatML's default, or LLaMA-3.1's dates."""
    if name == "LLaMA-3":
        # differs from 3.2's template, which asks the clock: a run must be repeatable.
        dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        return dates if "Cutting Knowledge Date" in text else ""
    # A Jinja literal, from its opening quote; only its own quote has a backslash inside.
    literal = r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:\\.|(?!\1)[^\\])+?)<\|im_end\|>"""
    found = re.search(literal, text)
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[2]) if found else ""


def prompt_that_fits(messages, tokenizer, template, room):
    """Drop the oldest turns until the prompt has at most `room` ids: (ids, remaining messages).

    The system message and the last question stay, even if they are longer.
    """
    system = messages[: messages[0]["role"] == "system"]
    rest = messages[len(system) :]
    starts = [i for i, message in enumerate(rest) if message["role"] == "user"]
    encode = lambda start: template.encode(system + rest[start:], tokenizer)[0]
    ids, start = encode(0), 0
    if len(ids) > room and len(starts) > 1:
        fits = lambda start: len(encode(start)) <= room
        start = starts[bisect_left(starts, True, lo=1, hi=len(starts) - 1, key=fits)]
        ids = encode(start)
    return ids, system + rest[start:]
