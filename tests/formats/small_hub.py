"""A small Hub on this machine, with one model, for tests/formats/test_hub_names.py."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler

from helpers import FIXTURES

COMMIT, LATER = "c" * 40, "d" * 40
SHARDS = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server.hub, self.path
        hub.asked.append(path.rpartition("/")[2])
        hub.tokens.append((self.headers["Host"], self.headers["Authorization"]))
        if hub.answers:
            if answer := hub.answers.pop(0):
                return self.answer(answer[0], b"", **answer[1])
        if found := re.fullmatch(r"/api/models/org/model/revision/(.+)\?blobs=true", path):
            commit = hub.revisions.get(found[1])
            about = {"id": "org/model", "sha": commit, "siblings": [*hub.listed()]}
            return self.answer(200 if commit else 404, json.dumps(about).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/org/model/resolve/") and hub.elsewhere:
            return self.answer(302, b"", Location=f"{hub.elsewhere}/cdn/{name}")
        content, start = hub.files[name], 0
        if wanted := self.headers["Range"]:
            hub.ranges.append(wanted)
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.answer(206 if start else 200, content[start:], hub.breaks.pop(name, None))

    def answer(self, code, content, end=None, **headers):
        self.send_response(code)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:end])

    def log_message(self, *_):
        pass


class Hub:
    """answers: [(code, headers), or None: as usual] to the next requests
    breaks: {file: bytes of its next answer}; lies: {file: {field: value}} of the listing
    elsewhere: another host that has the files; asked, tokens, ranges: what was asked for
    """

    def __init__(self, port, cache):
        self.url, self.elsewhere, self.cache = f"http://127.0.0.1:{port}", "", cache
        self.root, self.other_host = cache / "models--org--model", f"http://localhost:{port}"
        # Five files of weights, their index and config.json, and what nobody needs.
        self.files = {path.name: path.read_bytes() for path in (FIXTURES / "llama_gqa").iterdir()}
        self.files |= {"tokenizer_config.json": b"{}", "flax_model.msgpack": b"x", "a.gguf": b"x"}
        self.files |= {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x"}
        self.files |= {"original/config.json": b"x", "model.fp16.safetensors": b"x"}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, "refs%2Fpr%2F1": LATER}
        self.answers, self.breaks, self.lies = [], {}, {}
        self.asked, self.tokens, self.ranges = [], [], []

    def listed(self):
        """The files as the Hub lists them, the large ones by their SHA-256."""
        for name, content in self.files.items():
            file = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if name.endswith(("safetensors", "bin")):
                file["lfs"] = dict(sha256=sha256(content), size=len(content), pointerSize=134)
            yield file | self.lies.get(name, {})

    def snapshot(self, commit=COMMIT):
        return self.root / "snapshots" / commit


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
