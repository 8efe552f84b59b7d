"""What the frozen base says of each example, on disk: `--cache_hidden FOLDER`.

The base never changes, and so neither does what it makes of an example. The first epoch writes the
hidden states of its layers down, and the last one where there is a target. Every later epoch, and
every later run with another side network, reads them, and the base's layers are not in memory.

The layers are called as ever: `attach` puts a `HiddenCache` before their `forward`. An example is
known by its ids, whatever batch it is in. The files are memory-mapped:
    states.bin  a record for each token of each example: what `pack_hidden` makes of its states
                after layers 1 to N, or each --every-th; or what a pooling downsampler does, in 16
                bits
    last.bin    the last state at each target, in 16 bits
    sums.bin    a checksum of each example; a missing or damaged one is computed again
"""

import hashlib
import math
import re
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data import IGNORE_INDEX
from data.fields import TABLE, field, one_of, whole
from data.files import make_writable_folder, read_json, write_json
from data.fingerprint import fingerprint, of_files
from data.hidden import pack_hidden, unpack_hidden
from data.methods import step_length
from quant import BLOCK_SIZE, InputError, Linear4bit

POOLS = {"maxpool": F.max_pool1d, "avgpool": F.avg_pool1d}
PARTS = {  # of cache.json: what must be the same, in words
    "base": "of another base", "quant": "of another --quant", "dtype": "of another --dtype",
    "examples": "of other examples (data, tokenizer, template, --sequence_len, --data_seed, ...)",
    "pool": "of another pooling --downsample or --reduction", "every": "of another --every",
}  # fmt: skip
KINDS = {"every": whole(1, 1 << 16), "bits": one_of(16, 8, 4), "fingerprint": TABLE}


class Entry(NamedTuple):
    """An example: its number, its rows of states.bin and of last.bin, and where its targets are."""

    number: int
    tokens: range
    targets: range
    at: list


class Batch(NamedTuple):
    """Examples of the cache; hidden states carry it from function to function, as `batch`."""

    entries: list
    is_read: bool  # or else written
    tokens: tuple  # rows of states.bin, and where they belong: see `places`
    targets: tuple  # the same of last.bin


class HiddenCache:
    """The cache of what the base in a folder says of a task's examples, in --cache_hidden.

    runs: settings of all the side networks that are to read it; the rest is the same for all
    """

    def __init__(self, cfg, runs, folder, config, dtype, task):
        self.folder, self.config = Path(cfg.cache_hidden), config
        self.half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        make_writable_folder(self.folder, "--cache_hidden")
        examples = targets_by_ids(task.train + task.held_out[: cfg.eval_examples])
        form, *others = {(run.downsample, run.reduction, run.standardize) for run in runs}
        pools = not others and form[0] in POOLS and not form[2]
        own = dict(
            base=of_files(folder), quant=cfg.quant, dtype=str(dtype),
            examples=hashlib.sha256(repr(examples).encode()).hexdigest(),
            pool=[*form[:2]] if pools else None,
            every=math.gcd(*(step_length(run.every, config.n_layer) for run in runs)),
            bits=16 if pools else max(run.h_f_bits for run in runs),
        )  # fmt: skip
        path = self.folder / "cache.json"
        self.about = read_json(path, optional=True) or own
        if self.about is own:  # nobody knows what other files here are of
            (self.folder / "sums.bin").unlink(missing_ok=True)
        for name, kind in KINDS.items() if self.about is not own else ():
            field(path, self.about, name, kind)
        for name, message in PARTS.items():
            known = self.about.get(name)
            enough = name == "pool" and known is None or name == "every" and not own[name] % known
            if known != own[name] and not enough:
                raise InputError(f"--cache_hidden {self.folder} is {message}: give another folder.")
        self.every, self.bits, pool = (self.about[name] for name in ("every", "bits", "pool"))
        self.pool, self.width = pool and POOLS[pool[0]], config.n_embd // (pool[1] if pool else 1)
        self.fill = -self.width % BLOCK_SIZE if self.bits < 16 else 0  # to whole blocks
        token = pack_hidden(torch.zeros(1, self.width + self.fill, dtype=self.half), self.bits)
        self.forms = [(part.dtype, part.shape[1:]) for part in token]
        n = config.n_layer // self.every
        token = np.dtype([("", "u1", (n, part.nbytes)) for part in token])
        last = np.dtype(("u1", 2 * config.n_embd))

        self.entries, tokens, targets = {}, 0, 0
        for ids, (n, at) in examples.items():
            rows = range(tokens, tokens + n), range(targets, targets + len(at))
            self.entries[ids] = Entry(len(self.entries), *rows, at)
            tokens, targets = rows[0].stop, rows[1].stop
        self.check_room(tokens * token.itemsize + targets * last.itemsize, cfg.cache_limit_gb)
        self.states = self.map("states.bin", token, tokens)
        self.last = self.map("last.bin", last, targets)
        self.sums = self.map("sums.bin", np.dtype("u4"), len(examples))
        self.checked = set()  # numbers of examples whose checksum was right
        self.absent = bool(self.sums.all())  # the base's matrices, which nobody needs

    def check_room(self, nbytes, limit):
        there = [path.stat().st_blocks * 512 for path in self.folder.glob("*.bin")]
        free = shutil.disk_usage(self.folder).free + sum(there)
        if nbytes > min(free, 1e9 * limit):
            whose = "the disk has" if free < 1e9 * limit else "--cache_limit_gb is"
            raise InputError(
                f"--cache_hidden needs {nbytes / 1e9:.3g} GB, and {whose} "
                f"{min(free / 1e9, limit):.3g}: --h_f_bits 4, a pooling --downsample or fewer "
                "--max_examples need less."
            )

    def map(self, name, dtype, n):
        """A file as an array of n; what is new in it are zeros, which take no room yet."""
        with open(self.folder / name, "ab") as file:
            file.truncate(n * dtype.itemsize)
        return np.memmap(self.folder / name, dtype, "r+", shape=(n,))

    def attach(self, load, device):
        """Load the base, without its layers if they are not needed, and stand before its functions.

        load: function of a device, or of one that gives each tensor's, that loads the base
        """
        n, size = (self.sums > 0).sum(), (self.states.nbytes + self.last.nbytes) / 1e9
        n, bits = f"{n:,} of {len(self.sums):,}", self.bits
        print(f"cache       {self.folder}: {n} examples in {bits} bits, {size:.2f} GB")
        self.load = lambda: load(device)
        large = re.compile(r"layers\..*proj\.weight")
        without = lambda name: "meta" if large.fullmatch(name) else device
        self.base = base = load(without if self.absent else device)
        if not self.absent:
            self.about["fingerprint"] = fingerprint(base)
            write_json(self.folder / "cache.json", self.about)
        base.known_fingerprint = self.about["fingerprint"]
        base.embed, base.final = partial(self.embed, base.embed), partial(self.final, base.final)
        self.compute_with(base.layers)
        for i, layer in enumerate(base.layers):
            layer.forward = partial(self.layer, i)
        return base

    def compute_with(self, layers):
        self.layers, self.forwards = layers, [layer.forward for layer in layers]

    def embed(self, forward, idx, positions):
        """Look the batch up. The embedding itself is no work, and not kept."""
        entries = [self.entries.get(key(row)) for row in idx.cpu().numpy()]
        known = all(entry and len(entry.tokens) <= idx.shape[1] for entry in entries)
        self.base.is_read = known and all(map(self.whole, entries))
        x = forward(idx, positions)
        x.batch = known and Batch(
            entries, self.base.is_read,
            places([e.tokens for e in entries], [range(len(e.tokens)) for e in entries], idx),
            places([e.targets for e in entries], [e.at for e in entries], idx),
        )  # fmt: skip
        return x

    def layer(self, i, x, mask=None, rope=None, cache=None):
        """What a layer makes of a batch: read, or computed and, of known examples, written."""
        batch = cache is None and mask is None and x.batch
        number, rest = divmod(i + 1, self.every)
        if batch and batch.is_read:
            h = x if rest else self.read(number - 1, x)
        else:
            if self.absent:  # and what is asked is not in the cache
                self.compute_with(self.load().layers)
                self.absent = False
            h = self.forwards[i](x, mask, rope, cache)
            if batch and not rest:
                self.write(number - 1, h, batch)
        h.batch = batch
        return h

    def final(self, forward, x):
        """The last state; of a batch that is read, it has zeros where there is no target."""
        if not x.batch:
            return forward(x)
        rows, at = x.batch.targets
        if x.batch.is_read:
            h = torch.zeros_like(x)
            last = torch.from_numpy(self.last[rows]).to(x.device).view(self.half)
            h.view(-1, x.shape[-1])[at] = last.to(x.dtype)
            return h
        h = forward(x)
        self.last[rows] = as_bytes(h.flatten(0, 1)[at].to(self.half))
        for entry in x.batch.entries:
            self.sums[entry.number] = self.sum(entry)
        first = self.layers is self.base.layers  # what was loaded again, stays
        if first and self.sums.all() and not hasattr(self.base, "stream"):
            for module in self.layers.modules():
                if isinstance(module, (Linear4bit, nn.Linear)):
                    module.to("meta")
            self.absent = True
        return h

    def write(self, i, h, batch):
        """Keep the i-th state of a batch, h (B, T, C)."""
        rows, at = batch.tokens
        state = h.flatten(0, 1)[at]
        state = self.pool(state, self.about["pool"][1]) if self.pool else state
        state = F.pad(state.to(self.half) if self.bits == 16 else state, (0, self.fill))
        for name, part in zip(self.states.dtype.names, pack_hidden(state, self.bits)):
            self.states[name][rows, i] = as_bytes(part).reshape(len(rows), -1)

    def read(self, i, x):
        """The i-th state that is kept, like x (B, T, C), with zeros where a row is padded."""
        (rows, at), (B, T, C), packed = x.batch.tokens, x.shape, []
        for name, (dtype, shape) in zip(self.states.dtype.names, self.forms):
            part = torch.from_numpy(self.states[name][rows, i]).to(x.device)
            padded = part.new_zeros(B * T, part.shape[1]).index_copy_(0, at, part)
            packed.append(padded.view(dtype).reshape(-1, *shape))
        width = self.width + self.fill
        h = unpack_hidden(packed, torch.Size([B * T, width]), self.bits, x.dtype)
        h = h[:, : self.width].to(x.dtype)
        if self.pool:  # neighbours that are all alike have this as their mean and largest
            h = h.repeat_interleave(C // width, dim=-1)
        h = h.reshape(x.shape)
        if self.bits < 16 and not self.fill:
            h.packed = {self.bits: packed}  # see `pack_once`
        return h

    def sum(self, entry):
        """An example's checksum; 0 is for one that is not there."""
        return zlib.crc32(self.last[entry.targets], zlib.crc32(self.states[entry.tokens])) or 1

    def whole(self, entry):
        """Whether an example is in the cache, undamaged; if so, looked at once."""
        if entry.number not in self.checked and self.sums[entry.number] == self.sum(entry):
            self.checked.add(entry.number)
        return entry.number in self.checked


def places(rows, at, idx):
    """For each row of a batch idx (B, T), rows of a file and where in it they belong -> all rows of
    the file, and their places in the flat batch, (n,) each."""
    at = [i * idx.shape[1] + np.array(some, int) for i, some in enumerate(at)]
    return np.concatenate(rows).astype(int), torch.tensor(np.concatenate(at), device=idx.device)


def as_bytes(tensor):
    return tensor.contiguous().cpu().view(torch.uint8).numpy()


def key(ids):
    """What an example is known by: its ids as bytes, without the zeros that padding adds."""
    return np.trim_zeros(np.asarray(ids, np.int64), "b").tobytes()


def targets_by_ids(examples):
    """{ids: (tokens, positions of targets)}, one for all examples with the same ids."""
    found = {}
    for ids, targets in examples:
        tokens, at = found.get(key(ids), (0, []))
        new = [i for i, target in enumerate(targets) if target != IGNORE_INDEX]
        found[key(ids)] = max(tokens, len(ids)), sorted({*at, *new})
    return found
