"""data/generate/serve.py: several models in one batch, and answers in the form of OpenAI's."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import shaken, small_base
from served import (  # noqa: F401, fixtures among them
    NAMES, QUESTIONS, answer, drain, expected, folders, hook, models, request, send, server, texts,
)

import qst
from data.generate import serve
from qst import QST
from side import SideConfig


def test_answers_are_those_of_the_command(server, folders, capsys):
    """Each model answers as `qst.py --prompt` does, and is in the list."""
    assert [one["id"] for one in send(server, None, "GET", "/v1/models")[1]["data"]] == NAMES
    said = set()
    for name in NAMES:
        side = ["--side", str(folders / name)] if name != "base" else []
        flags = ["--base", str(folders / "base"), "--dtype", "fp32", "--device", "cpu"]
        qst.main([*flags, *side, "--prompt", QUESTIONS[1], "--max_new_tokens", "12"])
        said.add(answer(server, name, QUESTIONS[1]))
        assert capsys.readouterr().out == answer(server, name, QUESTIONS[1]) + "\n"
    assert len(said) == 3


@pytest.mark.parametrize("tokens", [2048, 36])
def test_one_pass_of_the_base_for_all_models(server, models, hook, tokens, monkeypatch):
    """Requests of all models with prompts of all lengths are one batch: the base computes each
    token once, also where prompts are cut into parts; and each row is as if it were alone."""
    monkeypatch.setattr(serve, "TOKENS", tokens)
    pairs = [(name, text) for text in QUESTIONS for name in NAMES]
    rows = [server.read(json.dumps(request(*pair, max_tokens=5 + i)))
            for i, pair in enumerate(pairs)]
    passes = []
    hook(passes.append)
    server.generate(rows)
    prompt = max(len(row.ids) for row in rows)
    found = [drain(row) for row in rows]
    assert sum(shape[1] for shape in passes) == prompt + max(map(len, found)) - 1
    assert {shape[0] for shape in passes} == {9}
    assert len([shape for shape in passes if shape[1] > 1]) == -(-prompt // (tokens // 9))
    for i, (ids, pair) in enumerate(zip(found, pairs)):
        assert server.tokenizer.decode(ids) == expected(server, models, *pair, most=5 + i)


def test_many_threads(server, models):
    """Many clients at once, of all models: each gets its own answer, in events or not."""
    pairs = [(name, text) for text in QUESTIONS for name in NAMES] * 3
    wanted = {pair: expected(server, models, *pair, most=6) for pair in pairs}
    found = [None] * len(pairs)

    def ask(i):
        if i % 2:
            found[i] = answer(server, *pairs[i], max_tokens=6)
        else:
            asked = request(*pairs[i], stream=True, max_tokens=6)
            found[i] = "".join(texts(send(server, asked)[1]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(pairs))]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == [wanted[pair] for pair in pairs]


def test_events(server):
    """They have the text of the whole answer in pieces, why it ended, what was used, and an end."""
    whole = send(server, request(text=QUESTIONS[1]))[1]
    options = dict(stream=True, stream_options={"include_usage": True})
    status, events = send(server, request(text=QUESTIONS[1], **options))
    assert status == 200 and events[-1] == "[DONE]" and len(texts(events)) > 5
    assert "".join(texts(events)) == whole["choices"][0]["message"]["content"]
    *_, last, used = map(json.loads, events[:-1])
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert used["usage"] == whole["usage"] and used["choices"] == []
    assert used["usage"]["completion_tokens"] == 12
    first = json.loads(events[0])
    assert first["object"] == "chat.completion.chunk" and whole["object"] == "chat.completion"
    assert first["choices"][0]["delta"]["role"] == "assistant"


def test_an_end_token_ends(server, monkeypatch):
    """Then the reason is "stop", the text ends there, and the batch too."""
    ids = drain(generated(server, request(max_tokens=8)))
    at = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    monkeypatch.setattr(server, "ends", [ids[at]])
    found = send(server, request(max_tokens=8))[1]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == at + 1


def generated(server, *bodies):
    rows = [server.read(json.dumps(body)) for body in bodies]
    server.generate(rows)
    return rows[0]


def test_each_row_has_its_own_sampling(server, models):
    """In one batch: a seed gives what it gives alone, and another temperature changes nothing."""
    hot = dict(temperature=1.5, top_p=0.9, seed=3)
    row = generated(server, request(**hot), request("third", QUESTIONS[2]), request(temperature=2))
    ids, _ = server.template.encode(request()["messages"], server.tokenizer)
    alone = models["one"].generate(torch.tensor([ids]), 12, 1.5, 0, 0.9, server.ends, seed=3)
    assert drain(row) == alone[0, len(ids) :].tolist()
    cold = generated(server, request(), request(temperature=2), request("base", temperature=2))
    assert server.tokenizer.decode(drain(cold)) == expected(server, models, "one", "Hi")
    assert answer(server, **hot) == answer(server, **hot) != answer(server, **hot | {"seed": 4})


def test_an_ended_row_leaves_no_position(server):
    """A row that has ended at the last position stays there while others go on. OPT has no more."""
    base = small_base(family="opt")
    side = shaken(QST(base, SideConfig(reduction=4))).side
    make = lambda side, n, most: SimpleNamespace(
        side=side, ids=[5] * n, most=most, temperature=0, top_p=1, generator=None, ended=False,
        out=serve.queue.SimpleQueue())
    rows = [make(side, 62, 3), make(None, 3, 30), make(side, 4, 20)]
    alone = SimpleNamespace(base=base, forward=qst.forward, ends=[])
    serve.Server.generate(alone, rows)
    found = [drain(row) for row in rows]
    assert [len(ids) for ids in found] == [3, 30, 20]
    for row, ids in zip(rows, found):
        one = make(row.side, len(row.ids), len(ids))
        serve.Server.generate(alone, [one])
        assert drain(one) == ids
