"""Make ids of conversations with a model's chat template, and find those of the answers.

A conversation (see data/tasks/instruct.py) is rendered up to an answer, as in generation, and up to
its end. What the answer adds is learned, with the special token that ends it, so that the model
learns to stop. A template may rewrite earlier turns, for example to drop their thoughts: then the
next answer is in an example of its own.

What people wrote never becomes a special token: a user who writes "<|im_end|>" closes nothing.
A folder without a template has the plain format, `frame`. A merged model stores it as a template.
"""

import json
import math
import re
import resource
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache, partial
from os.path import commonprefix
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import InputError, Refused
from data.formats.fields import TABLE, TEXT, either, field, list_of, reason
from data.formats.files import read_json, read_text, write_atomically
from data.tokens.tokenizer import BREAK

LONGEST_TEMPLATE = 1 << 15  # letters; gpt-oss's has 17,000
SECONDS, MEMORY, LETTERS = 1, 1 << 28, 1 << 20  # of a rendering; long messages may have more


class ChatTemplate:
    """Hold the text of a template: none, or WRITTEN_OUT, has the plain format.

    absent: "bos_token" or "eos_token", if the folder says that the model has none
    """

    def __init__(self, text="", path="", absent=()):
        self.text, self.path, self.absent = text, path, absent
        self.plain = text in ("", WRITTEN_OUT)

    def encode(self, messages, tokenizer):
        """Encode a conversation: its ids, and for each whether it is in an answer to be learned.

        After a question, an answer is begun. `Refused` gives the reason if it is not possible.
        """
        if self.plain or messages[-1]["role"] == "assistant":
            return self.examples(messages, tokenizer)[-1]
        (ids,) = self.ids_of(tokenizer, messages)
        return ids, [False] * len(ids)

    def examples(self, messages, tokenizer, most=math.inf):
        """Encode a conversation to learn from: [(ids, inside), ...], with each answer in one.

        Answers that begin after the first `most` ids are left out.
        """
        if self.plain:
            return [plain(messages, tokenizer)]
        made, kept = [], 0  # kept: ids of the last example up to its last answer's end
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or kept > most:
                continue
            prompt, ids = self.ids_of(tokenizer, messages[: i + 1])
            start = len(commonprefix((prompt, ids)))  # the next token may begin in the prompt
            text = with_input(message)  # a template may change the rest, such as thoughts
            word = (re.findall(r"\w+", text) or text.split() or [""])[-1]
            word = tokenizer.decode(tokenizer.encode(word))
            ends = [n for n, id in enumerate(ids, 1) if n > start and id in tokenizer.special_ids]
            ends = [n for n in [*ends, len(ids)] if word in tokenizer.decode(ids[start:n])]
            if not ends:
                raise Refused("has an answer that the chat template leaves out")
            end = ends[0]
            inside = [start <= n < end for n in range(len(ids))]
            if made and made[-1][0][:kept] == prompt[:kept] == ids[:kept]:  # nothing is rewritten
                inside[:kept] = made.pop()[1][:kept]
            made.append((ids, inside))
            kept = end
        return made

    def ids_of(self, tokenizer, messages):
        """Encode a conversation up to the start of its last answer, and, if it has one, all."""
        said = [dict(role=m["role"], content=tokenizer.hide(with_input(m))) for m in messages]
        # Letters set apart make no special token, whatever the template does with them.
        apart = lambda text: re.sub(r"(\S)", rf"{BREAK}\1{BREAK}", text)
        check = [message | {"content": apart(message["content"])} for message in said]
        done = messages[-1]["role"] == "assistant"
        renders = [(said[: len(said) - done], True), *[(said, False)] * done, (check, not done)]
        texts = {id: text for text, id in tokenizer.added.items()}
        names = {"bos_token": texts.get(tokenizer.bos_id), "eos_token": texts.get(tokenizer.eos_id)}
        names = {name: text for name, text in names.items() if text and name not in self.absent}
        texts = render(self.path, self.text, renders, names)
        if not texts[-2].startswith(texts[0]):  # for example, the prompt alone has a system message
            before, answer, _ = texts[-1].rpartition(check[-1]["content"].strip())
            texts[0] = before if answer else texts[0]
        *found, checked = [tokenizer.encode(text, special=True) for text in texts]
        marks = [[id for id in ids if id in tokenizer.special_ids] for ids in (found[-1], checked)]
        if marks[0] != marks[1]:
            raise Refused("has a text that becomes a special token in the chat template")
        return found

    def end_ids(self, tokenizer):
        """List all ids that end an answer; a base model may not count its template's own."""
        talk, own = [dict(role=role, content="a") for role in ("user", "assistant")], []
        with suppress(Refused):
            ids, inside = self.encode(talk, tokenizer)
            own = [id for id, on in zip(ids, inside) if on and id in tokenizer.special_ids]
        return list(dict.fromkeys(own[-1:] + tokenizer.eos_ids))


def with_input(message):
    """Join a message's text and an instruction's input; JSON may hold half a surrogate pair."""
    text = "\n\n".join(filter(None, (message["content"], message.get("input"))))
    return text.encode("utf-8", "replace").decode()


def plain(messages, tokenizer):
    """Encode each instruction with `frame`, after any system message, and each answer: ids, and
    for each whether it is in an answer."""
    parts, before = [([tokenizer.bos_id], False)], ""
    for message in messages:
        if message["role"] == "system":
            before += message["content"] + "\n\n"
        elif message["role"] == "user":
            text = before + frame(message["content"], message.get("input"))
            parts.append((tokenizer.encode(text), False))
            before = ""
        else:
            parts.append(([*tokenizer.encode(message["content"]), tokenizer.eos_id], True))
    return [id for ids, _ in parts for id in ids], [on for ids, on in parts for _ in ids]


def frame(instruction, input=""):
    """Format an instruction for a model without a template, up to the start of the answer."""
    middle = f"\n\n### Input:\n{input}" if input else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


# The plain format as a template, which transformers renders to the same text
WRITTEN_OUT = Path(__file__).with_name("plain.jinja").read_text().strip()


def load_template(folder):
    """Read a folder's chat template; a folder without one has the plain format."""
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path, optional=True)
    text = field(path, config, "chat_template", either(TEXT, list_of(TABLE)), "")
    absent = [name for name in ("bos_token", "eos_token") if config.get(name, "") is None]
    if (newer := Path(folder) / "chat_template.jinja").exists():
        path, text = newer, read_text(newer)
    if isinstance(text, list):  # several templates, with names
        own = lambda one, name: field(path, one, f"chat_template.{name}", TEXT)
        text = {own(one, "name"): own(one, "template") for one in text}
        text = field(f"{path}: its list of chat templates", text, "default", TEXT)
    if len(text) > LONGEST_TEMPLATE:
        raise InputError(f"{path}: the chat template is longer than {LONGEST_TEMPLATE:,} letters.")
    return ChatTemplate(text, path, absent)


def keep_plain_template(folder):
    """Store the plain format as a merged model's template, if its base has no template."""
    path = Path(folder) / "chat_template.jinja"
    config = read_json(path.with_name("tokenizer_config.json"), optional=True)
    if not path.exists() and not config.get("chat_template"):
        write_atomically(path, lambda file: file.write(WRITTEN_OUT.encode()))


def prompt_that_fits(messages, tokenizer, template, room):
    """Drop the oldest turns that do not fit in `room` ids: (ids, remaining messages). The system
    message and the last question stay, even if they are longer."""
    system = messages[: messages[0]["role"] == "system"]
    rest = messages[len(system) :]
    starts = [i for i, message in enumerate(rest) if message["role"] == "user"]
    last = lambda turns: system + rest[starts[-turns] :]
    encode = lambda turns: template.encode(last(turns), tokenizer)[0]
    turns, step = 1, 1  # a step that fits is doubled, another halved: few prompts are encoded
    while step:
        fits = turns + step <= len(starts) and len(encode(turns + step)) <= room
        turns, step = (turns + step, 2 * step) if fits else (turns, step // 2)
    return encode(turns), last(turns)


def render(path, template, renders, names):
    """Render each of `renders`, (messages, whether an answer is begun): a stranger's program, in
    Jinja's sandbox, which hides files and Python. names: {"bos_token": its text, ...}"""
    letters = sum(len(message["content"]) for messages, _ in renders for message in messages)
    try:
        with limits(SECONDS + letters / 1e6):
            to_text = compile_template(template).render
            texts = [to_text(names, messages=m, add_generation_prompt=on) for m, on in renders]
        if sum(map(len, texts)) <= LETTERS + 4 * letters:
            return texts
        raise ValueError("it writes more than a megabyte")
    except Refused:
        raise
    except Exception as error:  # whatever the program does wrong
        advice = "correct it, or remove it to use the plain format"
        raise InputError(f"{path}: the chat template fails ({reason(error)}): {advice}.") from None


@lru_cache(1)
def compile_template(text):
    """Compile a template with the names that the library transformers gives to templates."""

    def refuse(message):
        raise Refused(f"is refused by the chat template: {reason(message)}")

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    del env.filters["random"], env.globals["lipsum"]  # a run must be repeatable
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    # differs from transformers, whose strftime_now asks the clock: a run must be repeatable.
    now = datetime(2024, 7, 26).strftime
    env.globals |= dict(tools=None, documents=None, raise_exception=refuse, strftime_now=now)
    # {% generation %} marks an answer for transformers; here it is a block like any other.
    block = r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})"
    as_if = lambda found: found[1] + ("endif" if found[2] else "if true") + found[3]
    return env.from_string(re.sub(block, as_if, text))


@contextmanager
def limits(seconds):
    """On Linux, stop the body after some seconds of computing, or if it takes MEMORY."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError("it computes without end")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = size + MEMORY if hard < 0 else min(size + MEMORY, hard)  # -1: without end
    handler = signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)
