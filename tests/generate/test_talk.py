"""data/generate/talk.py and the commands that talk: what a conversation remembers, and is shown."""

import argparse
import io
import json
import shutil

import pytest
import torch
from chat_templates import LLAMA2
from helpers import say

import qst
from data import InputError
from data.generate import talk
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained, read_config
from qst import QST
from side import SideConfig


class Parrot:
    """Says again what it was last asked, and remembers the prompts."""

    def __init__(self, tokenizer, fails_after=None):
        self.tokenizer, self.prompts, self.most, self.fails_after = tokenizer, [], [], fails_after

    def __call__(self, ids, most):
        self.prompts.append(self.tokenizer.decode(ids))
        self.most.append(most)
        question = self.prompts[-1].split("### Instruction:\n")[-1].split("\n\n### Response")[0]
        for i, id in enumerate(self.tokenizer.encode(question)[:most]):
            if i == self.fails_after:
                raise KeyboardInterrupt
            yield id


@pytest.fixture
def parrot(tiny_model):
    return Parrot(load_tokenizer(tiny_model))


def talk_with(say, positions=1000, max_new_tokens=100, **more):
    return talk.Talk(say, say.tokenizer, chat.ChatTemplate(), positions, max_new_tokens, **more)


def test_a_talk_remembers(parrot):
    """Each prompt holds the system message and all earlier turns; reset leaves the former."""
    conversation = talk_with(parrot, system="Be.")
    for question in ("one", "two"):
        assert conversation.ask(question) == 0 and "".join(conversation.answer()) == question
    assert conversation.messages == say(
        "system: Be.", "user: one", "assistant: one", "user: two", "assistant: two"
    )
    second = parrot.prompts[1]
    assert second.startswith("Be.") and second.index("one") < second.index("two")
    conversation.reset()
    assert conversation.messages == say("system: Be.")


def test_a_talk_drops_its_oldest_turns(parrot):
    """Whole turns go, the oldest first, as few as possible; the system message and room for an
    answer stay; a question that is itself too long changes nothing."""
    conversation = talk_with(parrot, positions=80, max_new_tokens=20, system="Be.")
    dropped = []
    for i in range(6):
        dropped.append(conversation.ask(f"Tom {i}"))
        assert "".join(conversation.answer()) == f"Tom {i}" and parrot.most[-1] == 20
        assert parrot.prompts[-1].startswith("Be.")
    assert dropped[0] == 0 and set(dropped[-3:]) == {2}
    left = conversation.messages
    with pytest.raises(chat.Refused, match="tokens, and the model 80 positions"):
        conversation.ask("word " * 200)
    assert conversation.messages == left
    talk_so_far = left[:-1], parrot.tokenizer, chat.ChatTemplate()
    ids, _ = chat.prompt_that_fits(*talk_so_far, 10_000)
    for room in (len(ids), len(ids) - 1):
        fit, kept = chat.prompt_that_fits(*talk_so_far, room)
        assert (fit == ids) == (room == len(ids)) and len(fit) <= room
        assert kept[0]["role"] == "system"


def test_no_position_is_wasted(parrot):
    """The last token of an answer is never read, and so needs no position: neither where turns are
    dropped, nor where a prompt leaves little room."""
    history = say("user: one", "assistant: two")
    whole, _ = chat.ChatTemplate().encode([*history, *say("user: three")], parrot.tokenizer)
    for spare, dropped in ((0, 0), (-1, 2)):
        conversation = talk_with(parrot, len(whole) + 4 - 1 + spare, 4)
        conversation.messages = list(history)
        assert conversation.ask("three") == dropped
    alone, _ = chat.ChatTemplate().encode(say("user: three"), parrot.tokenizer)
    for positions in (len(alone), len(alone) + 2):
        conversation = talk_with(parrot, positions, 100)
        conversation.ask("three")
        list(conversation.answer())
        assert parrot.most[-1] == positions - len(alone) + 1


def test_an_answer_may_be_as_long_as_there_are_positions(tiny_model, monkeypatch):
    """And a prompt that is too long asks for one token, whose refusal says so."""
    asked = []
    note = lambda model, ids, most, *rest: asked.append((len(ids), most)) or iter([])
    monkeypatch.setattr(talk, "stream_ids", note)
    for words in (30, 60, 500):
        qst.main(["--base", str(tiny_model), "--prompt", "Tom " * words, "--raw"])
    positions = read_config(tiny_model).max_positions
    assert [length + most - 1 for length, most in asked[:2]] == [positions] * 2
    assert asked[2][0] > positions and asked[2][1] == 1


def test_a_stopped_answer_is_remembered(tiny_model):
    """What was said before Ctrl-C is part of the conversation."""
    parrot = Parrot(load_tokenizer(tiny_model), fails_after=4)
    conversation = talk_with(parrot)
    conversation.ask("Tom went to the lake.")
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces += conversation.answer()
    assert conversation.messages[-1]["role"] == "assistant" and conversation.messages[-1]["content"]
    assert "Tom went to the lake.".startswith(conversation.messages[-1]["content"])
    conversation.ask("Tom went to the lake.")
    pieces = conversation.answer()  # and one that is stopped while a piece is being shown
    assert next(pieces) == conversation.messages[-1]["content"]


def converse(tiny_model, typed, monkeypatch, capsys):
    """What is printed after each line that is typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    qst.main(["chat", "--base", str(tiny_model), "--max_new_tokens", "5"])
    return capsys.readouterr().out.split("\n> ")[1:]


def test_chat_in_the_terminal(tiny_model, monkeypatch, capsys):
    """History, /reset, an empty line, /exit and the end of the input."""
    talk_to = lambda typed: converse(tiny_model, typed, monkeypatch, capsys)
    said = talk_to("Tom?\nTom?\n\n/reset\nTom?\n/exit\nno\n")
    first, again, empty, _, reset = said[:5]
    assert first.strip() and first == reset != again and not empty.strip() and len(said) == 6
    said = talk_to("Tom?\n" + "Tom is sad and Leo is happy? " * 20 + "\nTom?\n")
    assert said[0] == first and "not asked: it has" in said[1] and said[2] == again
    assert "oldest messages, which no longer fit" in "".join(talk_to("Tom lost a cat?\n" * 9))


def test_ctrl_c_stops_the_answer_and_not_the_conversation(tiny_model, monkeypatch, capsys):
    """Ctrl-C during an answer, and at the prompt, leads to the next question."""
    typed = iter(["Tom went to the lake.", KeyboardInterrupt, "Leo?", EOFError])

    def type_next(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    parrot = Parrot(load_tokenizer(tiny_model), fails_after=4)
    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(talk, "stream_ids", lambda model, ids, most, *rest: parrot(ids, most))
    qst.main(["chat", "--base", str(tiny_model)])
    out = capsys.readouterr().out
    assert "Tom" in out and out.count("[stopped]") == 1 and "Leo?" in out.split("[stopped]")[1]
    assert len(parrot.prompts) == 2 and parrot.prompts[1].count("### Instruction") == 2


def test_prompts_have_the_models_own_format(tiny_model, tmp_path, monkeypatch, capsys):
    """--prompt has the chat template; without one a base continues the text, and with a
    side network has the plain format; --raw never has a format, nor needs a known template."""
    base = from_pretrained(tiny_model, "nf4", torch.float32)
    QST(base, SideConfig(reduction=4)).save_side(tmp_path / "side")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer, prompts = load_tokenizer(folder), []
    say_nothing = lambda model, ids, *rest: prompts.append(tokenizer.decode(ids)) or iter([])
    monkeypatch.setattr(talk, "stream_ids", say_nothing)
    ask = lambda *flags: qst.main(["--base", str(folder), "--prompt", "Hi", *flags])
    ask()
    ask("--side", str(tmp_path / "side"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=LLAMA2)))
    ask()
    ask("--raw")
    assert prompts == ["Hi", chat.frame("Hi"), "[INST] Hi [/INST]", "Hi"]
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not this') }}")
    with pytest.raises(InputError, match="--prompt is refused by the chat template: not this"):
        ask()
    (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    ask("--raw")
    with pytest.raises(InputError, match="chat_template.jinja: the chat template fails"):
        ask()


def test_side_weights_are_cast_once(tiny_model, tmp_path):
    """To talk, a side network has the base's dtype, but for alpha and the gates; and answers the
    same as with weights in fp32, which are cast for each token."""
    torch.manual_seed(0)
    model = QST(from_pretrained(tiny_model, "nf4", torch.bfloat16), SideConfig(reduction=4))
    model.side.alpha.data.fill_(0.5)
    model.save_side(tmp_path)
    args = argparse.Namespace(base=str(tiny_model), side=str(tmp_path), quant="nf4", dtype="bf16",
                              device="cpu", stream=False)
    loaded, _ = qst.load_model(args)
    kept = {n for n, p in loaded.side.named_parameters() if p.dtype == torch.float32}
    assert kept == {"alpha", "gamma"}
    idx = torch.arange(5, 25).view(2, 10)
    assert torch.equal(loaded.generate(idx, 8), model.generate(idx, 8))
