"""The state of a run, so that it goes on after an end as if there had been none: --resume.

state.safetensors has tensors, and as one more of them the JSON that says what each is; its
metadata has a SHA-256 of all. A new one takes its name when it is whole, and the one before it
stays beside it as state.previous.safetensors. No pickle: it may come from a stranger, too.
"""

import contextlib
import json
import os
import signal

import torch

from data import InputError
from data.devices import distributed
from data.formats.fields import TABLE, Kind, field, number, shown, table_of, whole
from data.formats.files import file_size
from data.formats.safetensors import (
    copy_into, read_header, read_safetensors, tensor_bytes, write_safetensors,
)
from data.run.checkpoint import digest
from data.run.optim import load_moments

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAMES = "state.safetensors", "state.previous.safetensors"
TENSOR = Kind("a tensor", lambda v: isinstance(v, torch.Tensor))
SCALER = {  # what fp16's GradScaler keeps
    "scale": number(1e-30, 1e30), "growth_factor": number(1, 1e3), "backoff_factor": number(0, 1),
    "growth_interval": whole(1, 1 << 31), "_growth_tracker": whole(0, 1 << 31),
}


def save_state(out_dir, tree):
    """tree: a table of tensors, numbers, texts, and lists and tables of them"""
    newest, previous = (out_dir / name for name in NAMES)
    tensors = {}
    text = json.dumps(without_tensors(tree, tensors))  # a loss may be NaN, which only Python reads
    tensors["tree"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    if newest.exists():
        os.replace(newest, previous)
    write_safetensors(newest, tensors, {"format": "pt", "sha256": digest("", tensors)})


def without_tensors(tree, tensors):
    """Put each tensor of a tree into `tensors`, and {"tensor": its name there} in its place."""
    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {str(name): without_tensors(part, tensors) for name, part in tree.items()}
    return tree


def with_tensors(tree, tensors, depth=6):
    """Undo `without_tensors`; a KeyError where a tensor is missing or the tree too deep."""
    if not isinstance(tree, dict):
        return tree
    if [*tree] == ["tensor"] and isinstance(tree["tensor"], str):
        return tensors[tree["tensor"]]
    if depth == 0:
        raise KeyError("depth")
    return {name: with_tensors(part, tensors, depth - 1) for name, part in tree.items()}


def load_state(out_dir):
    """The newest whole state that there is, and its path; None, None without any. Damaged ones go
    where one is whole; where none is, they are refused, and all that lies there stays."""
    damaged = []
    for path in [out_dir / name for name in NAMES if (out_dir / name).exists()]:
        file_size(path, "remove it")  # no folder, device or pipe
        try:
            state = read_state(path)
        except (InputError, ValueError, KeyError, RecursionError):
            damaged.append(path)
            continue
        for other in damaged:
            print(f"{other} is damaged, and removed.")
            other.unlink()
        return state, path
    if damaged:
        raise InputError(
            f"{damaged[0]} is damaged, and there is no other state: without --resume the run "
            "begins anew, and replaces what it left."
        )
    return None, None


def read_state(path):
    tensors = {name: read() for name, read in read_safetensors(path).items()}
    if digest("", tensors) != read_header(path)[1]["sha256"]:
        raise InputError(f"{path} is damaged.")
    tree = json.loads(bytes(tensor_bytes(tensors.pop("tree"))))
    if not TABLE.fits(tree):
        raise InputError(f"{path} is damaged.")
    return with_tensors(tree, tensors)


MAY_DIFFER = (
    "resume", "out_dir", "max_iters", "device", "stream", "threads", "compile", "log_interval",
    "samples_interval", "preamble",  # which is of the data
)


class RunState:
    """All that a run needs to go on: what learns, its optimizer, the scaler of fp16, and the log.

    about: settings and data, which must be the same when it goes on
    """

    def __init__(self, out_dir, about, side, optimizer, scaler, log):
        self.out_dir, self.about, self.log = out_dir, about, log
        self.side, self.optimizer, self.scaler = side, optimizer, scaler

    def save(self):
        if distributed.rank() == 0:
            save_state(self.out_dir, dict(
                side=self.side.state_dict(), moments=self.optimizer.state_dict()["state"],
                scaler=self.scaler.state_dict(), about=self.about, log=self.log.state(),
            ))

    def load(self):
        """Go on from what lies in the folder; returns whether there is anything."""
        state, path = load_state(self.out_dir)
        if state is None:
            print(f"{self.out_dir} has no state to go on from: the run begins.")
            return False
        parts = ("about", "side", "moments", "scaler", "log")
        about, side, moments, scaler, log = (field(path, state, part, TABLE) for part in parts)
        for name, value in self.about.items():
            if name not in MAY_DIFFER and (old := about.get(name)) != value:
                raise InputError(
                    f"--resume: {self.out_dir} was begun with another --{name}, {shown(old)} and "
                    f"not {shown(value)}: give the same, or another --out_dir."
                )
        log = {name: field(path, log, f"log.{name}", kind) for name, kind in self.log.STATE.items()}
        if self.scaler.is_enabled():
            scaler = {name: field(path, scaler, f"scaler.{name}", k) for name, k in SCALER.items()}
        field(path, state, "side", table_of(TENSOR))
        field(path, state, "moments", table_of(TABLE))
        copy_into(self.side, side, path)
        load_moments(self.optimizer, moments, path)
        self.scaler.load_state_dict(scaler)
        self.log.go_on(log)
        last = self.log.iteration >= self.log.cfg.max_iters
        what = "had ended with" if last else "goes on after"
        scored = ", and is scored again" * last
        print(f"{self.out_dir} {what} iteration {self.log.iteration}{scored}.")
        return True


def remove_earlier_run(out_dir):
    """Remove what an earlier run left in a folder: nobody must take it for what this run makes."""
    files = "side.safetensors", "side.json", "log.csv", "loss.svg", "mix.svg", "result.json", *NAMES
    files += "sweep.json", "sweep.svg"
    paths = [out_dir / name for name in files] + [*out_dir.glob("last/side.*")]
    if any(path.exists() for path in paths):
        print(f"What an earlier run left in {out_dir} is replaced.", flush=True)
    for path in paths:
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


STOPPING = """
Stopping after this iteration, to save all. Ctrl-C again stops at once, and what came after the last
evaluation is lost.
"""


@contextlib.contextmanager
def stop_signals():
    """A list that has something in it once the run is asked to stop, by Ctrl-C or SIGTERM: a step
    is never left half done. A second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1 and distributed.rank() == 0:
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(2, STOPPING.encode())  # not print, in which a signal may have come

    try:
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals come to the main thread, which may have runs in others
        old = {}
    try:
        yield asked
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
