"""Many side networks on one forward pass of the frozen base: `--sweep "gate=scalar,sum seed=1,2"`.

What the base says of a batch is the same for every side network, so a sweep is as many ordinary
runs, each in a thread of its own, that share the base. One of them runs at a time. At each layer
of the base it lets all others come to the same layer; the first computes it, and the others take
the result. So no more than one hidden state is held, backward keeps it once for all, and what each
run computes is to the bit what it computes alone. Runs that ask for something else, as in
generating, compute it themselves.
"""

import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from data.files import make_writable_folder, write_json
from data.report import conclude_sweep
from data.settings import SETTINGS_FILE
from data.state import stop_signals
from quant import InputError

THREAD = threading.local()  # of a run's thread: its `number`, and the `turns` that it takes


class Turns:
    """Threads of which one runs at a time: the first of `waiting`, until it lets the others run."""

    def __init__(self, n):
        self.waiting, self.changed = list(range(n)), threading.Condition()
        self.arrived, self.meetings = set(), 0
        # A function of the base, its arguments, the keys and values then, and what it returned.
        self.last = None, (), None, None

    def take(self):
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == THREAD.number)

    def leave(self):
        with self.changed:
            self.waiting.pop(0)
            self.changed.notify_all()

    def others(self):
        """Let every other run go on until it comes here, too."""
        with self.changed:
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()
        self.take()

    def meet(self):
        """Wait until all runs are at this place."""
        meeting = self.meetings
        self.arrived.add(THREAD.number)
        while self.meetings == meeting:
            if self.arrived >= set(self.waiting):
                self.arrived, self.meetings = set(), meeting + 1
            else:
                self.others()

    def once(self, function, *args):
        """What a function of the base returns; computed once for all runs that ask for the same."""
        if torch.is_grad_enabled() or not hasattr(THREAD, "turns"):
            return function(*args)
        self.others()
        cache = args[3] if len(args) > 3 else None
        asked, given, theirs, result = self.last
        alike = asked == function and all(map(same, args[:2], given))
        if alike and was_alike(cache, theirs, args[0]):
            if cache is not None:
                vars(cache).update(vars(theirs), shared=True)
            return result
        if hasattr(cache, "shared"):  # what they write from now on is not ours
            cache.k, cache.v = cache.k.clone(), cache.v.clone()
            del cache.shared
        result = function(*args)
        self.last = function, args[:2], cache, result
        return result


def same(one, other):
    """Whether two arguments are; what follows from the first two need not be compared."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return one is other or tensors and torch.equal(one, other)


def was_alike(cache, theirs, x):
    """Whether a layer's cache holds what another one held before it took those of x (B, T, C)."""
    if cache is None or theirs is None:
        return cache is theirs
    n = cache.length
    past = lambda tensor: tensor[:, :, :n]
    begun = theirs.length - x.shape[1], theirs.max_len
    return (n, cache.max_len) == begun and (n == 0 or cache.k is theirs.k or (
        same(past(cache.k), past(theirs.k)) and same(past(cache.v), past(theirs.v))))  # fmt: skip


def meet():
    """Where all runs of a sweep begin the same; nothing in a run of its own."""
    if hasattr(THREAD, "turns"):
        THREAD.turns.meet()


def run(cfg, runs, base, run_one):
    """Train a side network for each of `runs`; write sweep.json and sweep.svg, and print a table.

    cfg: the settings as given, before what depends is filled in
    run_one: function of a run's settings that trains and returns its result
    """
    turns, results, crashes = Turns(len(runs)), {}, []

    def thread(number, name, settings):
        THREAD.number, THREAD.turns = number, turns
        turns.take()
        try:
            results[name] = run_one(settings)
        except InputError as error:
            results[name] = dict(error=str(error))
        except BaseException as error:
            crashes.append(error)
        turns.leave()

    write_json(Path(cfg.out_dir) / SETTINGS_FILE, asdict(cfg))
    threads = []
    for number, (name, settings) in enumerate(runs.items()):
        make_writable_folder(settings.out_dir, "--out_dir")
        args = number, name, settings
        called = f"sweep {number}"  # see data.run_of_sweep
        threads.append(threading.Thread(target=thread, args=args, name=called, daemon=True))
    shared = [(base, "embed"), (base, "final"), *((layer, "forward") for layer in base.layers)]
    own = [getattr(*place) for place in shared]
    for place, function in zip(shared, own):
        setattr(*place, partial(turns.once, function))
    try:
        with stop_signals():
            for one in threads:
                one.start()
            for one in threads:
                one.join()
    finally:
        for place, function in zip(shared, own):
            setattr(*place, function)
    if crashes:
        raise crashes[0]
    return conclude_sweep(cfg, runs, results)
