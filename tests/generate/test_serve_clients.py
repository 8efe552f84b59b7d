"""data/generate/serve.py: what clients do wrong, and what is refused before anything is loaded."""

import json
import re
import signal
import socket
import threading
import time

import pytest
import torch
from helpers import run_forked, tuned
from served import (  # noqa: F401, fixtures among them
    answer, expected, folders, hook, models, request, send, server, texts,
)

import qst
from data import InputError
from data.generate import serve
from qst import QST
from side import SideConfig

WRONG = {  # what is sent: (status, what the message names)
    b"{": (400, "no JSON"), b"\xff\xfe": (400, ""), b"": (400, "no JSON"), b"[]": (400, "body is"),
    b"[" * 60000: (400, "recursion"), b"null": (400, "body"), b"{}": (400, "model"),
}
MESSAGES = [
    [], {}, "Hi", [1], [{}], [{"role": "user"}], [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": "\ud800"}], [{"role": "assistant", "content": "a"}],
]
FIELDS = dict(
    model=7, n=2, temperature=-1, top_p=0, max_tokens=0, max_completion_tokens="9", stream=1,
    seed=1.5, stream_options=[], tools=[{}], logprobs=True, logit_bias={"5": 1}, stop=["a"],
)


def test_wrong_requests(server):
    """Each is one sentence with a status, in OpenAI's form; afterwards the server answers."""
    wrong = dict(WRONG)
    for messages in MESSAGES:
        wrong[json.dumps(request(messages=messages)).encode()] = (400, "essage")
    for name, value in FIELDS.items():
        wrong[json.dumps(request(**{name: value})).encode()] = (400, name)
    wrong[json.dumps(request(temperature=float("nan"))).encode()] = (400, "temperature")
    wrong[json.dumps(request("none")).encode()] = (404, "choose base, one, third")
    wrong[json.dumps(request(text="Tom " * 200)).encode()] = (400, "and the model 128 positions")
    wrong[b" " * 70000] = (413, "at most 67584 bytes")
    for body, (status, named) in wrong.items():
        found = send(server, body)
        check(found, status, named)
    check(send(server, None, "GET", "/"), 404, "/v1/models")
    check(send(server, b"{}", "PUT"), 501, "PUT")
    check(send(server, b"{}", **{"Content-Length": "x"}), 400, "x")
    check(send(server, None, "GET", "/v1/models", Host="evil.example:80"), 403, "localhost")
    check(send(server, request(), Host="evil.example"), 403, "localhost")
    local = f"localhost:{server.server_port}"
    assert send(server, None, "GET", "/v1/models", Host=local)[0] == 200


def check(found, status, named):
    assert found[0] == status, found
    error = found[1]["error"]
    assert named in error["message"] and error["message"].isprintable(), error
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


def sent(server, content):
    """A connection on which some bytes have been sent."""
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=60)
    connection.sendall(content)
    return connection


def as_http(body):
    text = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def test_what_is_no_http(server):
    """A line of noise, one that is too long, and a body that ends early get an error in JSON."""
    whole = as_http(request())
    for content in (b"noise\r\n\r\n", b"G" * 70000 + b"\r\n\r\n", whole[:-1] + b"\0", whole[:-9]):
        with sent(server, content) as connection:
            connection.shutdown(socket.SHUT_WR)
            response = connection.makefile("rb").read()
            assert json.loads(response.split(b"\r\n\r\n")[-1])["error"]["message"], content
    assert answer(server)


def test_a_slow_client(server, monkeypatch):
    """One that stops in the middle of its request is left; others need not wait for it."""
    assert serve.Handler.timeout == 30
    parts = (b"", b"POST /v1/ch", as_http(request())[:-5])
    slow = [sent(server, content) for content in parts]
    assert answer(server)
    monkeypatch.setattr(serve.Handler, "timeout", 0.1)
    slower = [sent(server, content) for content in parts]
    assert [connection.recv(1) for connection in slower] == [b""] * 3
    for connection in slow + slower:
        connection.close()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_client(server, hook, stream):
    """Its row ends, though nothing is sent to it, and the batch with it."""
    hold, passes = threading.Event(), []
    hook(lambda shape: passes.append(shape) or hold.wait(60))
    server.newest = None
    connection = sent(server, as_http(request(stream=stream, max_tokens=90)))
    wait_for(lambda: passes)
    connection.close()
    try:
        wait_for(lambda: server.newest.ended)
    finally:
        hold.set()
    assert answer(server) and len([shape for shape in passes if shape[1] > 1]) == 2
    assert len(passes) == 1 + 12


def test_an_error_reaches_only_its_batch(server, hook):
    """Before the first token it is a status, later an event; the next request is answered."""
    passes = []

    def fail(shape):
        passes.append(shape)
        if len(passes) == at:
            raise RuntimeError("the GPU is on fire")

    hook(fail)
    for at, stream in ((1, False), (1, True), (5, False)):
        passes.clear()
        check(send(server, request(stream=stream)), 500, "failed: the GPU is on fire")
        assert answer(server)
    at = 5
    passes.clear()
    status, events = send(server, request(stream=True))
    assert status == 200 and "on fire" in json.loads(events[-1])["error"]["message"]
    assert answer(server)


def test_what_is_refused_at_the_start(folders, tmp_path, models, packed):
    """One sentence each, before the base is loaded if possible."""
    base, one = str(folders / "base"), str(folders / "one")
    QST(models["base"], SideConfig(reduction=4, n_labels=2)).save_side(tmp_path / "labels")
    tuned("qlora").save_side(tmp_path / "qlora")
    shared = ["--base", base, "--side", one, "--device", "cpu", "--dtype", "fp32"]
    taken = socket.create_server(("127.0.0.1", 0))
    for flags, why in {
        ("--side", f"{one}/"): "Of base, one, one two are equal",
        ("--side", str(tmp_path / "nothing")): "side.safetensors",
        ("--side", str(tmp_path / "labels")): "labels is a classifier",
        ("--side", str(tmp_path / "qlora")): "qlora is inside the base: merge it",
        ("--stream",): "omit it to serve", ("--port", "70000"): "or above 65535",
        ("--port", str(taken.getsockname()[1])): "is in use",
        ("--port", "0", "--quant", "none"): "another base",
    }.items():
        with pytest.raises(InputError, match=why):
            qst.main(["serve", *shared, *flags])


def test_the_command(folders, server):
    """It names its address and its models, answers, and ends with one line at Ctrl-C; a port in
    use is an error of one line."""
    flags = ["serve", "--base", folders / "base", "--device", "cpu", "--port"]
    used = run_forked("qst.py", *flags, server.server_port)
    running = run_forked("qst.py", *flags, 0, "--side", folders / "one")
    while not (line := read(running.files[0])).endswith("\n"):
        assert not running.ended()
        time.sleep(0.02)
    running.server_port = int(re.fullmatch(
        r"http://127.0.0.1:(\d+)/v1 serves base, one\n", line)[1])
    assert answer(running)
    running.kill(signal.SIGINT)
    assert running.wait() == (1, line, "interrupted\n")
    code, out, errors = used.wait()
    assert (code, out) == (1, "") and re.fullmatch(r"error: --port \d+ is in use, .*\n", errors)


def read(file):
    file.seek(0)
    return file.read()


def test_openais_client(server, models):
    """Their own client reads our lists, answers, events and errors."""
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == list(models)
    asked = request(text="Where is Tom?")
    wanted = expected(server, models, "one", "Where is Tom?")
    assert client.chat.completions.create(**asked).choices[0].message.content == wanted
    options = dict(stream=True, stream_options={"include_usage": True})
    chunks = list(client.chat.completions.create(**asked, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert chunks[-1].usage.completion_tokens == 12
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(**asked | {"model": "none"})
    with pytest.raises(openai.BadRequestError, match="must be 1"):
        client.chat.completions.create(**asked, n=2)
