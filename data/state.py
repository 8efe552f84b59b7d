"""The state of a run, so that it goes on after an end as if there had been none: --resume.

state.pt is 32 bytes of SHA-256, and then what `torch.save` writes. A new one takes the place of the
old one only when it is whole, and the old one stays beside it as state.previous.pt.
"""

import contextlib
import hashlib
import io
import os
import signal

import torch

from data import distributed
from data.files import write_atomically
from data.optim import load_optimizer
from quant import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAMES = "state.pt", "state.previous.pt"


def save_state(out_dir, state):
    """state: a dict of tensors, numbers, strings, and lists and dicts of them"""
    newest, previous = (out_dir / name for name in NAMES)

    def write(file):
        file.write(bytes(32))  # room for the digest
        hashed = HashedFile(file)
        torch.save(state, hashed)
        file.seek(0)
        file.write(hashed.digest.digest())
        if newest.exists():
            os.replace(newest, previous)

    write_atomically(newest, write)


class HashedFile:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, part):
        self.digest.update(part)
        return self.file.write(part)

    def flush(self):
        self.file.flush()


def load_state(out_dir):
    """The newest whole state that there is; None without any."""
    for name in NAMES:
        path = out_dir / name
        if not path.exists():
            continue
        with open(path, "rb") as file:
            digest, content = file.read(32), io.BytesIO(file.read())
        if hashlib.sha256(content.getbuffer()).digest() == digest:
            return torch.load(content, map_location="cpu", weights_only=True)
        print(f"{path} is damaged, and removed.")
        path.unlink(missing_ok=True)
    return None


MAY_DIFFER = "resume", "out_dir", "max_iters", "device", "threads", "compile", "log_interval"


class RunState:
    """All that a run needs to go on: what learns, its optimizer, the scaler of fp16, and the log.

    about: settings and data, which must be the same when it goes on
    """

    def __init__(self, out_dir, about, side, optimizer, scaler, log):
        self.out_dir, self.about, self.log = out_dir, about, log
        self.side, self.optimizer, self.scaler = side, optimizer, scaler

    def save(self):
        if distributed.rank() == 0:
            learners = {name: getattr(self, name) for name in ("side", "optimizer", "scaler")}
            state = {name: learner.state_dict() for name, learner in learners.items()}
            save_state(self.out_dir, state | dict(about=self.about, log=self.log.state()))

    def load(self):
        """Go on from what lies in the folder; returns whether there is anything."""
        state = load_state(self.out_dir)
        if state is None:
            return False
        for name, value in self.about.items():
            if name not in MAY_DIFFER and (old := state["about"].get(name)) != value:
                raise InputError(
                    f"--resume: {self.out_dir} was begun with another --{name}, {old} and not "
                    f"{value}: give the same, or another --out_dir."
                )
        self.side.load_state_dict(state["side"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.log.go_on(state["log"])
        return True


def remove_earlier_run(out_dir):
    """Remove what an earlier run left in a folder: nobody must take it for what this run makes."""
    files = "side.safetensors", "side.json", "log.csv", "loss.svg", "result.json", *NAMES
    for path in [out_dir / name for name in files] + [*out_dir.glob("last/side.*")]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run_in(out_dir):
    """Refuse a second run that writes to a folder while the first one does."""
    if fcntl is None or distributed.rank():
        yield
        return
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        message = f"Another run writes to {out_dir}: wait, or give another --out_dir."
        raise InputError(message) from None
    finally:
        os.close(folder)


@contextlib.contextmanager
def stop_signals():
    """A list that has something in it once the run is asked to stop, by Ctrl-C or SIGTERM: a step
    is never left half done. A second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals come to the main thread only
        old = {}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
