"""`qst.py serve` for an hour: eight clients, some of which do everything wrong."""

import collections
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.common import ROOT, print_row, print_table
from data import InputError
from data.formats.save import save_pretrained
from data.tasks import tiny
from data.tokens.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, from_pretrained
from qst import QST
from side import SideConfig

CLIENTS, MINUTE = 8, 60  # seconds
QUESTIONS = ["Hi", "Who was it, and where?", "Tom went to the lake. He lost his dog. " * 3 + "And?"]
CHAT = "/v1/chat/completions"
BAD = [  # bodies that are refused: not JSON, wrong fields, too many bytes
    b"{", b"[]", b"\xff", b"[" * 50_000, b'{"model": "one", "messages": []}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}',
    b'{"model": "one", "n": 3, "messages": [{"role": "user", "content": "Hi"}]}',
    b'{"model": "one", "messages": [{"role": "user", "content": "%b"}]}' % (b"word " * 9000),
    b" " * 1_000_000,
]


def soak(minutes="60", base=None):
    """Print each minute what the clients have got, and the server's memory, threads and files.
    base: a model folder; by default an untrained one"""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(base or make_base(f"{folder}/base"))
        names = [base.name, *make_sides(base, Path(folder))]
        flags = [word for name in names[1:] for word in ("--side", f"{folder}/{name}")]
        server = subprocess.Popen(
            [sys.executable, ROOT / "qst.py", "serve", "--base", base, *flags, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # off after `&`
        )
        found = re.match(r"http://127.0.0.1:(\d+)/", server.stdout.readline())
        if not found:
            raise InputError(f"The server has not started: {server.communicate()[1].strip()}.")
        run(server, int(found[1]), names, float(minutes))


def make_base(folder):
    """Write an untrained model with the tokenizer of the built-in example."""
    os.mkdir(folder)
    tiny.train_tokenizer(Path(folder) / "tokenizer.model")
    size = load_tokenizer(folder).vocab_size
    save_pretrained(Transformer(ModelConfig(size, 3, 4, 64, 128, max_positions=512)), folder)
    return folder


def make_sides(base, folder):
    """Write three side networks that are far from the base, and return their names."""
    model = from_pretrained(base)
    for seed, (name, every) in enumerate({"one": 1, "two": 1, "few": 0}.items()):
        torch.manual_seed(seed)
        side = QST(model, SideConfig(reduction=4, every=every))
        side.side.alpha.data.fill_(0.5)
        side.save_side(folder / name)
    return ["one", "two", "few"]


def run(server, port, names, minutes):
    counts, first, stop = collections.Counter(), {}, threading.Event()
    work = lambda number: client(random.Random(number), port, names, counts, first, stop)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    kinds = ("answered", "refused", "vanished", "errors", "different")
    print_table(f"{CLIENTS} clients, {minutes:g} minutes", "minute", *kinds, "memory, MB",
                "threads", "files")
    [thread.start() for thread in threads]
    start = time.monotonic()
    for minute in range(1, round(minutes) + 1):
        time.sleep(max(0, start + minute * MINUTE - time.monotonic()))
        if server.poll() is not None:
            break
        status = Path(f"/proc/{server.pid}/status").read_text()
        kilobytes, n_threads = re.search(r"VmRSS:\s*(\d+)(?s:.*)Threads:\s*(\d+)", status).groups()
        files = len(os.listdir(f"/proc/{server.pid}/fd"))
        memory = f"{int(kilobytes) / 1e3:.1f}"
        print_row(minute, *(counts[kind] for kind in kinds), memory, n_threads, files)
    stop.set()
    [thread.join() for thread in threads]
    server.send_signal(signal.SIGINT)
    errors = server.communicate()[1]
    print(f"\nThe server's last words: {errors.strip()}")
    for error in sorted(name for name in counts if name not in kinds):
        print(f"{counts[error]} times: {error}")


def client(random, port, names, counts, first, stop):
    """Send requests one after the other. first: the first answer to each question at temperature
    0, with which later ones are compared: another batch may round differently"""
    while not stop.is_set():
        kind = random.choices([ask, misuse, vanish], [6, 2, 2])[0]
        try:
            counts[kind(random, port, names, first)] += 1
        except Exception as error:
            counts["errors"] += 1
            counts[f"{kind.__name__}: {error!r}"[:200]] += 1


def request(random, names):
    message = dict(role="user", content=random.choice(QUESTIONS))
    return dict(
        model=random.choice(names), messages=[message], max_tokens=random.choice((1, 8, 40)),
        temperature=random.choice((0, 0, 1)), stream=random.random() < 0.5,
        stream_options={"include_usage": True},
    )


def ask(random, port, names, first):
    body = request(random, names)
    status, text = send(port, json.dumps(body).encode())
    assert status == 200, text[:100]
    if body["stream"]:
        *events, used, done = text.split("\n\n")[:-1]
        assert done == "data: [DONE]", text[-100:]
        choices = [json.loads(event[6:])["choices"][0] for event in events]
        answer, end = "".join(c["delta"].get("content", "") for c in choices), choices[-1]
        usage = json.loads(used[6:])["usage"]
    else:
        table = json.loads(text)
        end, usage = table["choices"][0], table["usage"]
        answer = end["message"]["content"]
    assert 1 <= usage["completion_tokens"] <= body["max_tokens"], usage
    assert end["finish_reason"] in ("stop", "length"), end
    if body["temperature"]:
        return "answered"
    key = body["model"], body["messages"][0]["content"], body["max_tokens"]
    return "answered" if first.setdefault(key, answer) == answer else "different"


def misuse(random, port, names, first):
    status, text = send(port, random.choice(BAD))
    assert status in (400, 404, 413) and json.loads(text)["error"]["message"], (status, text[:100])
    return "refused"


def vanish(random, port, names, first):
    """Send a request, or a part of one, and close the connection at some time."""
    body = json.dumps(request(random, names) | {"max_tokens": 200}).encode()
    content = b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(content[: random.choice((9, len(content) - 5, len(content)))])
        time.sleep(random.choice((0, 0.05, 0.3)))
    return "vanished"


def send(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", CHAT, body)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
