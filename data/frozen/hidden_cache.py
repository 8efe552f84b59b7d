"""The base's hidden states of each example, on disk: --cache_hidden FOLDER.

The base never changes, and so its hidden states of an example do not either. The first epoch writes
them. Every later epoch reads them, and so does every later run with another side network, without
the base's layers in memory. An example is known by its ids. The files are memory-mapped:
    states.bin  for each token of each example its states after layers 1 to N, or each --every-th,
                packed by `pack_hidden`; or pooled by a pooling downsampler, in 16 bits
    last.bin    the last state at each target, in 16 bits
    sums.bin    a checksum of each example; a missing or damaged example is computed again
"""

import hashlib
import math
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data import IGNORE_INDEX, InputError
from data.devices.device import device_of, to_device
from data.formats.fields import TABLE, field, one_of, whole
from data.formats.files import read_json, write_json
from data.frozen.fingerprint import fingerprint
from data.frozen.hidden import PACKED, pack_hidden, unpack_hidden
from data.settings.methods import layers_per_side
from quant import BLOCK_SIZE

POOLS = {"maxpool": F.max_pool1d, "avgpool": F.avg_pool1d}
PARTS = {  # of cache.json: what must be the same, in words
    "base": "of another base", "quant": "of another --quant", "dtype": "of another --dtype",
    "examples": "of other examples (data, tokenizer, template, --sequence_len, --data_seed, ...)",
    "repair": "of a repaired base", "layers": "of another --layers", "every": "of another --every",
    "pool": "of another pooling --downsample or --reduction", "bits": "of fewer --h_f_bits",
}
KINDS = {"every": whole(1, 1 << 16), "bits": one_of(16, 8, 4)}


class Entry(NamedTuple):
    """An example: its number, its rows of states.bin and of last.bin, and where its targets are."""

    number: int
    tokens: range
    targets: range
    at: list


class HiddenCache:
    """runs: settings of all side networks that will read it; cfg: what is the same for all
    folder: of the base
    """

    is_read = False  # whether the last states came from the disk

    def __init__(self, cfg, runs, folder, config, dtype, task):
        self.folder = Path(cfg.cache_hidden)
        self.half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        examples = targets_by_ids(task.train + task.held_out[: cfg.eval_examples])
        form, *others = {(run.downsample, run.reduction, run.standardize) for run in runs}
        pools = not others and form[0] in POOLS and not form[2]
        own = dict(
            base=of_files(folder), quant=cfg.quant, dtype=str(dtype), repair=None,
            examples=hashlib.sha256(repr(examples).encode()).hexdigest(),
            pool=[*form[:2]] if pools else None, layers=cfg.layers or None,
            every=math.gcd(*(layers_per_side(run.every, config.n_layer) for run in runs)),
            bits=16 if pools else max(run.h_f_bits for run in runs),
        )
        path = self.folder / "cache.json"
        self.about = read_json(path, optional=True) or own
        for name, kind in KINDS.items():
            field(path, self.about, name, kind)
        for name, message in PARTS.items():
            known = self.about.get(name)
            enough = name == "pool" and known is None or name == "every" and not own[name] % known
            enough |= name == "bits" and known >= max(run.h_f_bits for run in runs)
            if known != own[name] and not enough:
                raise InputError(f"--cache_hidden {self.folder} is {message}: give another folder.")
        self.every, self.bits, pool = (self.about[name] for name in ("every", "bits", "pool"))
        self.pool, self.width = pool and POOLS[pool[0]], config.n_embd // (pool[1] if pool else 1)
        self.fill = -self.width % BLOCK_SIZE if self.bits < 16 else 0  # to whole blocks
        token = pack_hidden(torch.zeros(1, self.width + self.fill, dtype=self.half), self.bits)
        self.forms = [(part.dtype, part.shape[1:]) for part in token]
        self.n = config.n_layer // self.every
        token = np.dtype([("", "u1", (self.n, part.nbytes)) for part in token])
        last = np.dtype(("u1", 2 * config.n_embd))

        self.entries, tokens, targets = {}, 0, 0
        for ids, (n, at) in examples.items():
            rows = range(tokens, tokens + n), range(targets, targets + len(at))
            self.entries[ids] = Entry(len(self.entries), *rows, at)
            tokens, targets = rows[0].stop, rows[1].stop
        size = (tokens * token.itemsize + targets * last.itemsize) / 1e9
        if size > cfg.cache_limit_gb:
            needs = f"{size:.3g} GB, and --cache_limit_gb is {cfg.cache_limit_gb:.3g}"
            do = "--h_f_bits 4 or fewer --max_examples need less"
            raise InputError(f"--cache_hidden needs {needs}: {do}.")
        if self.about is own:  # nobody knows what other files here are of
            (self.folder / "sums.bin").unlink(missing_ok=True)
            write_json(path, own)  # before a file has its form; `attach` adds the fingerprint
        self.tokens = self.map("states.bin", token, tokens)
        self.last = self.map("last.bin", last, targets)
        self.sums = self.map("sums.bin", np.dtype("u4"), len(examples))
        self.checked = set()  # numbers of examples whose checksum was right
        self.absent = bool(self.sums.all())  # the base's matrices, which nobody needs

    def map(self, name, dtype, n):
        """Map a file as an array of n. New records are zeros."""
        path, size = self.folder / name, n * dtype.itemsize
        try:
            with open(path, "ab") as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a map of a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            why = f"cannot have {size / 1e9:.3g} GB ({error.strerror})"
            raise InputError(f"{path} {why}: give --cache_hidden a folder with room.") from None
        return np.memmap(path, dtype, "r+", shape=(n,))

    def without_layers(self, device):
        """A function of a weight's name: its device, or "meta" for the layers' matrices."""
        large = re.compile(r"layers\..*proj\.weight")
        place = device if callable(device) else lambda name: device
        return lambda name: "meta" if large.fullmatch(name) else place(name)

    def attach(self, base, load):
        """Become the source of a base. load: function that loads it with its layers"""
        n, size = (self.sums > 0).sum(), (self.tokens.nbytes + self.last.nbytes) / 1e9
        n, bits = f"{n:,} of {len(self.sums):,}", self.bits
        print(f"cache       {self.folder}: {n} examples in {bits} bits, {size:.2f} GB")
        if not self.absent:
            self.about["fingerprint"] = fingerprint(base)
            write_json(self.folder / "cache.json", self.about)
        base.known_fingerprint = field(self.folder / "cache.json", self.about, "fingerprint", TABLE)
        self.base, self.load, self.computed, base.source = base, load, base.source or base, self

    def states(self, idx, keep=None, cache=None, every=1):
        """Read the states of a batch; or compute them, and write those of known examples."""
        step, rest = divmod(every, self.every)
        batch = None if keep is not None or cache or rest else self.look_up(idx)
        self.is_read = bool(batch) and all(map(self.whole, batch[0]))
        if self.is_read:
            yield from self.read(batch, idx, step)
            return
        if self.absent:
            self.base.layers, self.absent = self.load().layers, False
        if batch:
            yield from self.written(batch, idx, step)
        else:
            yield from self.computed.states(idx, keep, cache, every)

    def look_up(self, idx):
        """A batch's examples, and the `places` of their states and last states; None if unknown."""
        entries = [self.entries.get(key(row)) for row in idx.cpu().numpy()]
        if not all(entry and len(entry.tokens) <= idx.shape[1] for entry in entries):
            return None
        tokens = places([e.tokens for e in entries], [range(len(e.tokens)) for e in entries], idx)
        return entries, tokens, places([e.targets for e in entries], [e.at for e in entries], idx)

    def read(self, batch, idx, step):
        """Yield the states from the disk; the embedding is computed."""
        x = next(self.base.states(idx))
        yield x
        for i in range(step - 1, self.n, step):
            device = device_of(self.base.layers[(i + 1) * self.every - 1])
            yield self.read_state(i, batch[1], x.shape, x.dtype, device)
        rows, at = batch[2]
        h = x.new_zeros(x.shape, device=device)  # where there is no target
        last = to_device(torch.from_numpy(self.last[rows]), device).view(self.half)
        h.view(-1, x.shape[-1])[to_device(at, device)] = last.to(x.dtype)
        yield h

    def written(self, batch, idx, step):
        """Yield the states from the base, each after it is written."""
        entries, (rows, at), (last_rows, last_at) = batch
        states = self.computed.states(idx, None, None, self.every)
        yield next(states)
        for i in range(self.n):
            h = next(states)
            state = h.flatten(0, 1)[at]
            state = self.pool(state, self.about["pool"][1]) if self.pool else state
            state = F.pad(state.to(self.half) if self.bits == 16 else state, (0, self.fill))
            for name, part in zip(self.tokens.dtype.names, pack_hidden(state, self.bits)):
                self.tokens[name][rows, i] = as_bytes(part).reshape(len(rows), -1)
            if (i + 1) % step == 0:
                yield h
        h = next(states)
        self.last[last_rows] = as_bytes(h.flatten(0, 1)[last_at].to(self.half))
        for entry in entries:
            self.sums[entry.number] = self.sum(entry)
        yield h

    def read_state(self, i, tokens, shape, dtype, device):
        """The i-th state that is stored, (B, T, C), with zeros where a row is padded."""
        rows, at = tokens[0], to_device(tokens[1], device)
        (B, T, C), packed = shape, []
        for name, (kind, form) in zip(self.tokens.dtype.names, self.forms):
            part = to_device(torch.from_numpy(self.tokens[name][rows, i]), device)
            padded = part.new_zeros(B * T, part.shape[1]).index_copy_(0, at, part)
            packed.append(padded.view(kind).reshape(-1, *form))
        width = self.width + self.fill
        h = unpack_hidden(packed, torch.Size([B * T, width]), self.bits, dtype)[:, : self.width]
        if self.pool:  # neighbours that are all alike have this as their mean and largest
            h = h.repeat_interleave(C // width, dim=-1)
        h = h.reshape(shape).to(dtype)
        if self.bits < 16 and not self.fill:
            PACKED[h] = {self.bits: packed}
        return h

    def sum(self, entry):
        """An example's checksum; 0 means that it is not there."""
        return zlib.crc32(self.last[entry.targets], zlib.crc32(self.tokens[entry.tokens])) or 1

    def whole(self, entry):
        """Whether an example is in the cache and undamaged. It is checked once."""
        if entry.number not in self.checked and self.sums[entry.number] == self.sum(entry):
            self.checked.add(entry.number)
        return entry.number in self.checked


def places(rows, at, idx):
    """All rows of a file that a batch idx (B, T) needs, and their places in the flat batch: (n,)
    each. rows, at: for each row of the batch its rows of the file, and their positions in it"""
    at = [i * idx.shape[1] + np.array(some, int) for i, some in enumerate(at)]
    return np.concatenate(rows).astype(int), torch.tensor(np.concatenate(at))


def as_bytes(tensor):
    return tensor.contiguous().cpu().view(torch.uint8).numpy()


def key(ids):
    """An example's ids as bytes, without the zeros that padding adds."""
    return np.trim_zeros(np.asarray(ids, np.int64), "b").tobytes()


def targets_by_ids(examples):
    """{ids: (tokens, positions of targets)}, one for all examples with the same ids."""
    found = {}
    for ids, targets in examples:
        tokens, at = found.get(key(ids), (0, []))
        new = [i for i, target in enumerate(targets) if target != IGNORE_INDEX]
        found[key(ids)] = max(tokens, len(ids)), sorted({*at, *new})
    return found


def of_files(folder):
    """A hash of a model's files: their sizes, and of each at most 16 MB, evenly spread."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "config.json":
            found.update(f"{path.name} {(size := path.stat().st_size)} ".encode())
            with open(path, "rb") as file:
                for i in range(n := min(size // 4096 + 1, 4096)):
                    file.seek(size * i // n)
                    found.update(file.read(4096))
    return found.hexdigest()
