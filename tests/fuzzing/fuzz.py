"""Mutants of every file that comes from outside: each must load, or be refused in one sentence.

    python tests/fuzzing/fuzz.py [--seconds 60] [--mutants N] [--only NAME] [--seed N] [--number N]

A mutant is a small good folder (fuzz_readers.py) with one to three things changed (mutants.py):
bytes, lines, values of JSON by values of every type, tensors by other objects, files by folders,
pipes and devices. The reader, --seed and the number decide which; --number reads that one alone,
with its traceback. A defect is

    any other error than `InputError`, and a process that dies, or takes more than SECONDS
    a message of several lines, or a long one, or one without the name of the folder
    much more memory than the files are large
    something that was loaded and is not what it must be, such as a NaN or an id out of range

Prints a table, and of each kind of defect the shortest example; exits with 1 if there are any.
"""

import argparse
import json
import math
import os
import random
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[:2]]
import helpers  # noqa: E402, F401, which finds the project and the tests
from fuzz_readers import READERS  # noqa: E402
from mutants import mutant, write  # noqa: E402

from data import InputError  # noqa: E402

SECONDS, MEGABYTES, LETTERS = 10, 100, 700  # the most of a mutant's time, memory and message

# --------------------------------------------------------------------------------------
# Reading mutants, in a process of its own, which may die


def peak_memory():
    """Set the peak of this process's memory back, and return what it was, in bytes; 0: no Linux."""
    try:
        found = next(row for row in open("/proc/self/status") if row.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        return int(found.split()[1]) * 1024
    except OSError:
        return 0


def outcome(read, folder, size):
    """What becomes of a mutant: "refused", "loaded", or the defect, in words."""
    peak_memory()
    before = peak_memory()
    try:
        read(folder)
        found = "loaded"
    except InputError as error:
        text = str(error)
        right = text.isprintable() and len(text) <= LETTERS and str(folder) in text
        found = "refused" if right else f"message {text[:LETTERS]!r}"
    except BaseException as error:  # the defects that are looked for
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        found = f"{type(error).__name__} at {place}: {str(error)[:100]!r}"
    more = peak_memory() - before
    if more > (MEGABYTES << 20) + 20 * size and found in ("loaded", "refused"):
        found = f"memory, {more >> 20} MB for {size} bytes"
    return found


def read_mutants(name, seeds, seed, start, folder, pipe):
    """Read mutants from number `start` on, until someone ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # its own is shared, and would stay locked after a kill
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    torch.set_num_threads(1)
    if Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (3 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(start, 1 << 30):
        files, told = mutant(seeds, random.Random(f"{seed} {name} {number}"))
        os.write(pipe, (json.dumps([number, told[:500], None]) + "\n").encode())
        write(folder, files)
        found = outcome(READERS[name][1], folder, sum(map(len, files.values())))
        os.write(pipe, (json.dumps([number, told[:500], found]) + "\n").encode())


def fuzz(name, seconds, seed, room, most=math.inf):
    """Read mutants for some seconds, or as many as `most`: [(number, what was done, what became of
    it), ...]."""
    room.mkdir()
    seeds, found, start = READERS[name][0](room), [], 0
    for files in seeds:  # which must load
        write(room / "mutant", files)
        READERS[name][1](room / "mutant")
    end = time.monotonic() + seconds
    going_on = lambda: time.monotonic() < end and len(found) < most
    while going_on():
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            try:
                read_mutants(name, seeds, seed, start, room / "mutant", theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        last, text = [start, "", "begin"], b""
        while going_on() or last[2] is None:
            if not select.select([ours], [], [], SECONDS)[0]:
                break  # it hangs
            if not (part := os.read(ours, 1 << 16)):
                break  # it died
            *rows, text = (text + part).split(b"\n")
            for last in map(json.loads, rows):
                found += [last] if last[2] else []
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(ours)
        if last[2] is None:
            found.append([*last[:2], f"it hangs or died, {os.waitstatus_to_exitcode(status)}"])
        start = last[0] + 1
    return found if most == math.inf else found[:most]


def run(seconds, names, seed, most=math.inf):
    """Fuzz readers in turn, and print: the number of defects."""
    print(f"{'reader':20} mutants  refused   loaded  defects")
    defects, sums = {}, [0] * 4
    with tempfile.TemporaryDirectory() as room:
        for name in names:
            folder = Path(room) / name.replace(" ", "-")
            found = fuzz(name, seconds / len(names), seed, folder, most)
            ends = [end for *_, end in found]
            row = [len(ends), ends.count("refused"), ends.count("loaded")]
            row.append(row[0] - row[1] - row[2])
            sums = [a + b for a, b in zip(sums, row)]
            print(f"{name:20}" + "".join(f"{n:8} " for n in row), flush=True)
            for number, told, end in found:
                if end not in ("refused", "loaded"):
                    kind = name, end.split(":")[0][:40]
                    defects.setdefault(kind, []).append((told, number, end))
    print(f"{'all':20}" + "".join(f"{n:8} " for n in sums))
    for (name, _), examples in defects.items():
        told, number, end = min(examples, key=lambda example: len(example[0]))
        print(f'\n{len(examples)} times in "{name}", such as --number {number}')
        print(f"    {told}\n    {end}")
    return sums[3]


def main(argv=None):
    as_it_stands = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mutants", type=int, help="of each reader, however long they take")
    parser.add_argument("--only", choices=READERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int)
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(READERS)
    if args.number is None:
        seconds, most = (math.inf, args.mutants) if args.mutants else (args.seconds, math.inf)
        return min(1, run(seconds, names, args.seed, most))
    with tempfile.TemporaryDirectory() as room:
        seeds = READERS[args.only][0](Path(room))
        files, told = mutant(seeds, random.Random(f"{args.seed} {args.only} {args.number}"))
        print(told, flush=True)
        write(Path(room) / "mutant", files)
        READERS[args.only][1](Path(room) / "mutant")
    return 0


if __name__ == "__main__":
    sys.exit(main())
