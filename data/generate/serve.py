"""qst.py serve: one base and several side networks answer OpenAI's clients, on 127.0.0.1.

A side network cannot be merged into its base. Here each is a model by its folder's name, and so is
the base. The main thread owns them all: it takes the requests that wait, and computes one token of
each with one pass of the base. Each connection has a thread, which checks and answers a request.
"""

import json
import os
import queue
import select
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

from data import Refused
from data.formats.fields import (
    TABLE, TEXT, TRUE_OR_FALSE, either, field, first_few, list_of, number, one_of, reason, whole,
)
from data.generate import sampling
from data.settings.flags import refuse_if
from data.settings.methods import SIDE_METHODS
from data.tokens.chat import load_template

FLAGS = {
    "side": dict(action="append", default=[], help="folder of a side checkpoint; may be repeated"),
    "port": dict(type=int, default=8000, help="port of 127.0.0.1; 0: any free one"),
}
HERE = "127.0.0.1", "localhost"
ROWS, TOKENS = 16, 2048  # the most requests in a batch, and tokens of prompts in a pass
FIELDS = {  # of a request: what each may be, and its default; `user` changes nothing
    "model": (TEXT,), "messages": (list_of(TABLE, 1),), "n": (one_of(1), 1), "user": (TEXT, ""),
    "temperature": (either(one_of(0), number(0.001, 2)), 1), "top_p": (number(0.001, 1), 1),
    "max_tokens": (whole(1, 1 << 30), 512), "max_completion_tokens": (whole(1, 1 << 30), None),
    "seed": (whole(0, (1 << 63) - 1), None), "stream": (TRUE_OR_FALSE, False),
    "stream_options": (TABLE, {}),
}
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


class Failed(Exception):
    """Why a request has no answer: an HTTP status and a sentence."""


class Server(ThreadingHTTPServer):
    """Generate for the requests that `Handler` checks and answers.

    models: {name: side network, or None for the base alone}; forward: that of qst.py
    """

    request_queue_size = 128

    def run(self, forward, base, models, tokenizer, template):
        """Answer until Ctrl-C. What goes wrong in a batch reaches only its requests."""
        self.forward, self.base, self.models, self.tokenizer = forward, base, models, tokenizer
        self.template, self.ends = template, template.end_ids(tokenizer)
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        while True:
            rows = [self.waiting.get()]
            while len(rows) < ROWS and not self.waiting.empty():
                rows.append(self.waiting.get())
            try:
                self.generate(rows)
            except Exception as error:
                for row in rows:
                    row.out.put((None, f"The batch of this request failed: {reason(error)}."))

    @torch.no_grad()
    def generate(self, rows):
        """Compute one token of every row with each pass of the base, until all have ended."""
        base, N = self.base, self.base.config.n_layer
        idx, keep = sampling.pad_left([row.ids for row in rows], base.device)
        room = idx.shape[1] + max(row.most for row in rows)
        cache, groups = base.new_cache(room), []
        for side in {row.side for row in rows} - {None}:
            mine = [i for i, row in enumerate(rows) if row.side is side]
            groups.append((side, mine, side.new_cache(room)))
        while not all(row.ended for row in rows):
            for part in idx.split(TOKENS // len(rows), dim=1):
                seen = keep[:, : cache[0].length + part.shape[1]]
                states = list(base.states(part, seen, cache))
                h = states[-1][:, -1].clone()
                for side, mine, own in groups:  # to `forward`, what yields the states is the base
                    recorded = (h_f[mine] for h_f in (*states[: -1 : side.every], states[-1]))
                    known = SimpleNamespace(states=lambda *_, recorded=recorded: recorded)
                    args = part[mine], seen[mine], own[:1] * N + own  # the first has the length
                    h[mine] = self.forward(known, side, *args)[:, -1]
            ids = torch.cat([
                sampling.sample(logits, row.temperature, 0, row.top_p, row.generator)
                for row, logits in zip(rows, base.head(h).split(1))
            ])
            for row, id in zip(rows, ids.tolist()):
                row.most -= 1
                end = "stop" if id in self.ends else None if row.most else "length"
                row.out.put((id, end))
                if end is not None:  # else it stays as the client's thread may have set it
                    row.ended = True
            # An ended row stays at its position: the next could be beyond the model's last.
            on = keep.new_tensor([[not row.ended] for row in rows])
            idx, keep = ids.unsqueeze(1), torch.cat([keep, on], dim=1)

    def read(self, body):
        """Check a request, and encode its prompt. ended: nothing follows, or nobody waits for it;
        out: queue of (an id that is generated, why it is the last one, or None)."""
        body = field("The request", {"body": json.loads(body)}, "body", TABLE)
        row = {name: field("The request", body, name, *kind) for name, kind in FIELDS.items()}
        row, messages = SimpleNamespace(**row, ended=False, out=queue.SimpleQueue()), []
        for i, table in enumerate(row.messages, 1):
            role = field(f"Message {i}", table, "role", one_of(*ROLES))
            content = field(f"Message {i}", table, "content", TEXT)
            messages.append(dict(role=ROLES[role], content=content))
        unknown = [name for name, value in body.items() if value and name not in FIELDS]
        refuse_if(
            (unknown, f"The request has {first_few(unknown)}, which is not known here: omit it"),
            (role != "user", "The last message must be the user's"),
        )
        if row.model not in self.models:
            raise Failed(404, f"There is no such model: choose {', '.join(self.models)}.")
        row.ids, _ = self.template.encode(messages, self.tokenizer)
        length, positions = len(row.ids), self.base.config.max_positions
        sizes = f"The prompt has {length} tokens, and the model {positions} positions"
        refuse_if((length > positions, f"{sizes}: shorten it"))
        row.most = min(row.max_completion_tokens or row.max_tokens, positions - length + 1)
        seeded = torch.Generator(self.base.device)
        row.generator = None if row.seed is None else seeded.manual_seed(row.seed)
        row.side = self.models[row.model]
        return row


class Handler(BaseHTTPRequestHandler):
    """Answer the request of a connection, with JSON or with events."""

    timeout, disable_nagle_algorithm = 30, True  # seconds in which a client does nothing
    events = False  # whether events have been sent

    def handle(self):
        with suppress(OSError):  # the client has vanished, or is too slow
            super().handle()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)  # a client that still sends would lose the answer
            any(not self.rfile.read1(1 << 16) for _ in range(1 << 10))

    def log_message(self, *args):
        """Print nothing."""

    def send(self, table, status=200, events=False):
        if not self.events:
            self.send_response(status)
            kind = "text/event-stream" if events else "application/json"
            self.send_header("Content-Type", kind)
            self.end_headers()
        self.events |= events
        text = json.dumps(table)
        self.wfile.write((f"data: {text}\n\n" if self.events else text).encode())

    def send_error(self, status, message=None, explain=None):
        """Send an error in OpenAI's form. The base class calls this too."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = dict(message=message or "The request is no HTTP.", type=kind, param=None, code=None)
        self.send(dict(error=error), status)

    def do_POST(self):
        row, server, asked = None, self.server, (self.command, self.path)
        try:
            if self.headers.get("Host", "localhost").partition(":")[0] not in HERE:
                raise Failed(403, f"The Host must be {' or '.join(HERE)}.")  # and no web page's own
            if asked == ("GET", "/v1/models"):
                own = dict(object="model", created=0, owned_by="qst")
                return self.send(dict(object="list", data=[own | {"id": n} for n in server.models]))
            if asked != ("POST", "/v1/chat/completions"):
                raise Failed(404, "There is GET /v1/models and POST /v1/chat/completions.")
            length = int(self.headers.get("Content-Length", -1))
            most = (1 << 16) + 16 * server.base.config.max_positions
            if not 0 <= length <= most:
                why = f"The request needs a Content-Length of at most {most} bytes."
                raise Failed(413 if length > most else 411, why)
            row = server.read(self.rfile.read(length))
            server.waiting.put(row)
            self.answer(row)
        except Failed as error:
            self.send_error(*error.args)
        except (ValueError, RecursionError) as error:  # also InputError
            it = {Refused: "The conversation ", json.JSONDecodeError: "The body is no JSON: "}
            self.send_error(400, it.get(type(error), "") + reason(error))
        finally:
            if row:
                row.ended = True

    do_GET = do_POST

    def answer(self, row):
        """Send what a row generates, in events or at the end."""
        about = dict(id=f"chatcmpl-{id(row):x}", created=int(time.time()), model=row.model)
        about["object"] = "chat.completion" + ".chunk" * row.stream
        choice = lambda **more: about | dict(choices=[dict(index=0, finish_reason=None) | more])
        text, row.end, row.count = "", None, 0  # why it ended, and how many ids it has
        for piece in self.server.tokenizer.stream(self.ids(row)):
            text += piece
            if row.stream and (piece or not self.events):
                role = {} if self.events else {"role": "assistant"}
                self.send(choice(delta=role | {"content": piece}), events=True)
        usage = dict(prompt_tokens=len(row.ids), completion_tokens=row.count)
        usage = dict(usage=usage | {"total_tokens": sum(usage.values())})
        if not row.stream:
            said = dict(role="assistant", content=text)
            return self.send(choice(message=said, finish_reason=row.end) | usage)
        self.send(choice(delta={}, finish_reason=row.end))
        if row.stream_options.get("include_usage"):
            self.send(about | dict(choices=[]) | usage)
        self.wfile.write(b"data: [DONE]\n\n")

    def ids(self, row):
        """Yield what a row generates, while the client waits for it."""
        while row.end is None:
            if select.select([self.connection], [], [], 0)[0] and not self.rfile.peek(1):
                raise ConnectionError
            with suppress(queue.Empty):
                id, row.end = row.out.get(timeout=1)
                if id is None:
                    raise Failed(500, row.end)
                row.count += 1
                yield id


def serve(args, read_side, load_model, from_side, forward):
    """Load the base and the side networks, and serve them. The functions are those of qst.py."""
    folders, args.side = args.side, None
    names = [os.path.basename(os.path.abspath(folder)) for folder in (args.base, *folders)]
    used = 0 < args.port < 1 << 16 and not socket.socket().connect_ex((HERE[0], args.port))
    refuse_if(
        (args.stream, "--stream reads all weights anew for every token: omit it to serve"),
        (not 0 <= args.port < 1 << 16 or used, f"--port {args.port} is in use, or above 65535"),
        (len({*names}) < len(names), f"Of {', '.join(names)} two are equal: rename a folder"),
    )
    for folder in folders:
        config, trained_on = read_side(folder)
        refuse_if(
            (config.n_labels, f"--side {folder} is a classifier, which writes no text"),
            (config.method not in SIDE_METHODS, f"--side {folder} is inside the base: merge it"),
        )
        args.quant = args.quant or trained_on.get("quant")
    with Server((HERE[0], args.port), Handler) as server, torch.no_grad():
        base, tokenizer = load_model(args)
        sides = [from_side(base, folder).side for folder in folders]
        sides = [side.cast(base.embed_tokens.weight.dtype) for side in sides]
        print(f"http://127.0.0.1:{server.server_port}/v1 serves {', '.join(names)}", flush=True)
        models = dict(zip(names, [None, *sides]))
        server.run(forward, base, models, tokenizer, load_template(args.base))
