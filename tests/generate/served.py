"""A server for the tests of data/generate/serve.py, its models by themselves, and a client."""

import contextlib
import http.client
import json
import shutil
import threading

import pytest
import torch
from chat_templates import LLAMA2
from helpers import shaken

import qst
from data.generate import sampling, serve
from data.tokens.chat import load_template
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained
from qst import QST
from side import SideConfig

QUESTIONS = ["Hi", "Where is Tom?", "Tom went to the lake and lost his dog. How is he?"]
NAMES = ["base", "one", "third"]


class Watched(serve.Server):
    """A server that a test can look into, and end."""

    def read(self, body):
        self.newest = super().read(body)
        return self.newest


class End:
    @property
    def ids(self):
        raise SystemExit  # ends the thread of `run`


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A model folder with a chat template, and two side networks with an own `every`."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_model, root / "base")
    (root / "base/tokenizer_config.json").write_text(json.dumps(dict(chat_template=LLAMA2)))
    base = from_pretrained(root / "base", "nf4", torch.float32)
    for seed, (name, every) in enumerate({"one": 1, "third": 3}.items()):
        model = shaken(QST(base, SideConfig(reduction=4, every=every)), seed)
        model.side.alpha.data.fill_(-1)  # far from the base
        model.save_side(root / name)
    return root


@pytest.fixture(scope="module")
def models(folders):
    """{name: what generates by itself}"""
    base = from_pretrained(folders / "base", "nf4", torch.float32)
    return {"base": base} | {name: QST.from_side(base, folders / name) for name in NAMES[1:]}


@pytest.fixture(scope="module")
def server(folders, models):
    base = models["base"]
    sides = {name: getattr(model, "side", None) for name, model in models.items()}
    texts = load_tokenizer(folders / "base"), load_template(folders / "base")

    def work():
        with contextlib.suppress(SystemExit):
            server.run(qst.forward, base, sides, *texts)

    with Watched(("127.0.0.1", 0), serve.Handler) as server:
        worker = threading.Thread(target=work)
        worker.start()
        yield server
        server.waiting.put(End())
        worker.join()
        server.shutdown()


@pytest.fixture
def hook(models):
    """Call a function before each pass of the base, with (B, T, C)."""
    hooks = []
    layer = models["base"].layers[0]
    call = lambda f: lambda layer, args: f(args[0].shape) and None
    yield lambda f: hooks.append(layer.register_forward_pre_hook(call(f)))
    for one in hooks:
        one.remove()


def request(name="one", text="Hi", **more):
    message = {"role": "user", "content": text}
    return dict(model=name, messages=[message], temperature=0, max_tokens=12) | more


def send(server, body, method="POST", path="/v1/chat/completions", **headers):
    """The status and the content of a response: JSON, or a list of events."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.getheader("Content-Type") == "text/event-stream":
        return response.status, [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
    return response.status, json.loads(text)


def answer(server, *args, **more):
    status, found = send(server, request(*args, **more))
    assert status == 200, found
    return found["choices"][0]["message"]["content"]


def expected(server, models, name, text, *sampled, most=12):
    """What a model generates by itself."""
    ids, _ = server.template.encode([dict(role="user", content=text)], server.tokenizer)
    new = sampling.stream(models[name], torch.tensor([ids]), most, *sampled, eos_id=server.ends)
    return server.tokenizer.decode([token.item() for token in new])


def drain(row):
    """The ids that a row has generated, up to its end."""
    ids, end = [], None
    while end is None:
        id, end = row.out.get_nowait()
        ids.append(id)
    return ids


def texts(events):
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return [choice["delta"].get("content", "") for choice in choices]
