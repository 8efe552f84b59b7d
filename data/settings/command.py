"""How a command runs: an output that fails costs lines and nothing else, no printed text controls
the terminal, and a user's mistake or too little memory is one sentence."""

import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress

from data import InputError
from data.devices import distributed

# Control characters but "\n", "\t" and "\r\n"; overrides of the writing direction; and what neither
# UTF-8 nor XML can hold.
CONTROL = "[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
CONTROL += "|\r(?!\n)"
NO_MEMORY = "MemoryError|allocate memory|out of memory|bad_alloc|new thread|failed to map segment"
NO_MEMORY += "|without (setting an )?exception"  # Python's own, while it imports


def printable(text):
    """Spell what could control a terminal as an escape, with a visible backslash."""
    return re.sub(CONTROL, lambda found: ascii(found[0])[1:-1], text)


class Output:
    """A stream to a terminal, a pipe or a file. After an error, what follows goes nowhere.

    stream: None if it is closed; bars: whether tqdm may move the cursor
    lost: the error, unless it is that nobody reads any more
    """

    def __init__(self, stream, bars=False):
        # Opened, the closed stream's number is that of no other file.
        self.stream, self.bars, self.lost = stream or open(os.devnull, "w"), bars, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        moves = re.match("\r?(\n|\x1b\\[A)*", text)[0] if self.bars else ""
        text = moves + printable(text[len(moves) :])
        encoding = self.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.lost = error if type(error) is OSError else None
            with suppress(OSError, ValueError):  # also when Python ends, and flushes it again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def run(main, less):
    """See `run_main` in flags.py."""
    # Otherwise batches of many lengths leave gaps in a GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.stdin = sys.stdin or open(os.devnull)
    out, errors = Output(sys.stdout), Output(sys.stderr, bars=True)
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            if main() is None and out.lost:
                raise out.lost  # it has no result but what it prints
            return
        except KeyboardInterrupt:
            sys.exit("interrupted")
        except Exception as error:
            full = re.search(NO_MEMORY, repr(error)) and not isinstance(error, InputError)
            if not full and not isinstance(error, (InputError, OSError)):
                raise
            sentence = f"There is no more memory: {less}." if full else str(error)
        # Here the error is gone, and with it the memory that its traceback has held.
        if number := distributed.rank():  # this process's output is off
            print(f"error in process {number}: {sentence}", file=Output(sys.__stderr__))
            sys.exit(1)
    sys.exit(printable(f"error: {sentence}"))
