"""The state of a run, from which it continues after a stop or a crash as if there had been none.

state.safetensors has the tensors, and as one more tensor the JSON that names them; its metadata has
a SHA-256 of all. A new file gets its name when it is whole. data/run/resume.py reads it.
"""

import contextlib
import json
import os
import signal

import torch

from data.devices import distributed
from data.formats.files import locked
from data.formats.safetensors import write_safetensors
from data.run.checkpoint import digest

FILES = "state.safetensors", "state.previous.safetensors"  # the second of earlier commits


def save_state(out_dir, tree):
    """Save a tree of tables, lists, numbers, texts and tensors; in JSON, {"tensor": its name}."""
    tensors = {}

    def name_of(tensor):
        tensors[name := str(len(tensors))] = tensor
        return {"tensor": name}

    text = json.dumps(tree, default=name_of)  # a loss may be NaN, which only Python reads
    tensors["tree"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    write_safetensors(out_dir / FILES[0], tensors, {"format": "pt", "sha256": digest("", tensors)})


def remove_earlier_run(out_dir):
    """Remove an earlier run's files, so that nobody takes them for this run's."""
    files = "side.safetensors side.json log.csv loss.svg mix.svg result.json sweep.json sweep.svg"
    paths = [out_dir / name for name in (*files.split(), *FILES)] + [*out_dir.glob("last/side.*")]
    paths = [path for path in paths if path.is_file()]
    if paths:
        print(f"The files of an earlier run in {out_dir} are replaced.", flush=True)
    for path in paths:
        path.unlink()


@contextlib.contextmanager
def only_run_in(folders):
    """Refuse a second run in a folder while the first one writes to it. A sweep has several."""
    with contextlib.ExitStack() as locks:
        for folder in {os.path.realpath(folder): folder for folder in folders}.values():
            refusal = f"Another run writes to {folder}: wait, or give another --out_dir."
            if os.path.isdir(folder) and not distributed.rank():
                locks.enter_context(locked(folder, refusal))
        yield


STOPPING = "\nStopping after this iteration. Ctrl-C again stops at once, without saving.\n"


@contextlib.contextmanager
def stop_signals():
    """Collect requests to stop (Ctrl-C, SIGTERM, SIGHUP) in a list, so that no step is left half
    done. A second Ctrl-C stops at once."""
    asked, stops = [], [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        stops.append(signal.SIGHUP)

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1 and distributed.rank() == 0:
            with contextlib.suppress(OSError):  # nobody may read it any more
                os.write(2, STOPPING.encode())  # not print, in which a signal may have come

    old = {}
    with contextlib.suppress(ValueError):  # signals come to the main thread; a run may be in others
        old = {number: signal.signal(number, ask) for number in stops}
    try:
        yield asked
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
