"""What the frozen base says of each example, on disk: `--cache_hidden FOLDER`.

The base never changes, and so neither does what it makes of an example. The first epoch writes the
hidden states of its layers down, and the last one where there is a target. Every later epoch, and
every later run with another side network, reads them, and the base's layers are not in memory.

They are asked as ever: `attach` puts a `HiddenCache` before their `forward`. An example is known by
its ids, whatever batch it is in. The file states.bin has of each, one after the other,
    the states of layers 1 to N, or of each --every-th, (tokens, C) in 16, 8 or 4 bits; or of a
        pooling downsampler (tokens, C / reduction), what it makes of them, in 16 bits
    the last state, (targets, C) in 16 bits
and sums.bin a checksum of each example; a missing or damaged one is computed again.
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
from data.files import make_writable_folder, read_json, write_json
from data.fingerprint import fingerprint
from data.hidden import pack_hidden, unpack_hidden
from data.methods import step_length
from quant import BLOCK_SIZE, InputError, Linear4bit

POOLS = {"maxpool": F.max_pool1d, "avgpool": F.avg_pool1d}
PARTS = {  # of cache.json: what must be the same, in words
    "base": "of another base", "quant": "of another --quant", "dtype": "of another --dtype",
    "examples": "of other examples (data, tokenizer, template, --sequence_len, --data_seed, ...)",
    "pool": "of another pooling --downsample or --reduction", "every": "of another --every",
}  # fmt: skip


class Entry(NamedTuple):
    """An example: its number, tokens, positions of targets, and first and last byte in the file."""

    number: int
    tokens: int
    targets: list
    start: int
    stop: int


class HiddenCache:
    """The cache of what the base in a folder says of a task's examples, in --cache_hidden.

    runs: settings of all the side networks that are to read it, of which cfg is one or their like
    """

    def __init__(self, cfg, runs, folder, config, dtype, task):
        self.folder, self.config = Path(cfg.cache_hidden), config
        self.half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        make_writable_folder(self.folder, "--cache_hidden")
        examples = targets_by_ids(task.train + task.held_out[: cfg.eval_examples])
        forms = {(run.downsample, run.reduction, run.standardize) for run in runs}
        pools = len(forms) == 1 and cfg.downsample in POOLS and not cfg.standardize
        every = math.gcd(*(step_length(run.every, config.n_layer) for run in runs))
        own = dict(
            base=signature(folder), quant=cfg.quant, dtype=str(dtype),
            examples=hashlib.sha256(repr(examples).encode()).hexdigest(),
            pool=[cfg.downsample, cfg.reduction] if pools else None, every=every,
            bits=16 if pools else cfg.h_f_bits,
        )  # fmt: skip
        self.about = read_json(self.folder / "cache.json", optional=True) or own
        for name, message in PARTS.items():
            known = self.about.get(name)
            enough = name == "pool" and known is None or name == "every" and not own[name] % known
            if known != own[name] and not enough:
                raise InputError(f"--cache_hidden {self.folder} is {message}: give another folder.")
        pool, self.bits = self.about["pool"], self.about["bits"]
        self.pool, self.width = pool and POOLS[pool[0]], config.n_embd // (pool[1] if pool else 1)
        self.every = self.about["every"]
        self.entries, start = {}, 0
        for ids, (tokens, targets) in examples.items():
            states = config.n_layer // self.every * self.size(tokens)
            stop = start + states + 2 * config.n_embd * len(targets)
            self.entries[ids] = Entry(len(self.entries), tokens, targets, start, stop)
            start = stop
        self.check_room(start, cfg.cache_limit_gb)
        self.sums = self.map("sums.bin", np.uint32, len(examples))
        self.bytes = self.map("states.bin", np.uint8, start)
        self.absent = bool(self.sums.all())  # the base's matrices, which nobody needs

    def check_room(self, nbytes, limit):
        path = self.folder / "states.bin"
        free = shutil.disk_usage(self.folder).free + (path.exists() and path.stat().st_blocks * 512)
        if nbytes > min(free, 1e9 * limit):
            whose = "the disk has" if free < 1e9 * limit else "--cache_limit_gb is"
            raise InputError(
                f"--cache_hidden needs {nbytes / 1e9:.3g} GB, and {whose} "
                f"{min(free / 1e9, limit):.3g}: --h_f_bits 4, a pooling --downsample or fewer "
                "--max_examples need less."
            )

    def map(self, name, dtype, n):
        """A file as an array; what is new in it are zeros, which take no room yet."""
        with open(self.folder / name, "ab") as file:
            file.truncate(n * np.dtype(dtype).itemsize)
        return np.memmap(self.folder / name, dtype, "r+")

    def parts(self, n):
        """Dtypes and shapes of what `pack_hidden` makes of n numbers."""
        blocks = -(-n // BLOCK_SIZE)
        return {
            16: [(self.half, (n,))],
            8: [(torch.int8, (blocks, BLOCK_SIZE)), (torch.float32, (blocks, 1))],
            4: [(torch.uint8, (-(-n // 2),)), (torch.float32, (blocks,))],
        }[self.bits]

    def size(self, tokens):
        """Bytes of a state of so many tokens."""
        parts = self.parts(tokens * self.width)
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)

    def attach(self, load, device):
        """Load the base, without its layers if they are not needed, and stand before its functions.

        load: function of a device, or of one that gives each tensor's, that loads the base
        """
        n, size = f"{(self.sums > 0).sum():,} of {len(self.sums):,}", f"{len(self.bytes) / 1e9:.2f}"
        print(f"cache       {self.folder}: {n} examples in {self.bits} bits, {size} GB")
        self.load = lambda: load(device)
        large = re.compile(r"layers\..*proj\.weight")
        without = lambda name: "meta" if large.fullmatch(name) else device
        self.base = base = load(without if self.absent else device)
        if not self.absent:
            self.about["fingerprint"] = fingerprint(base)
            write_json(self.folder / "cache.json", self.about)
        base.known_fingerprint = self.about["fingerprint"]
        base.embed, base.final = partial(self.embed, base.embed), partial(self.final, base.final)
        self.attach_layers()
        return base

    def attach_layers(self):
        self.forwards = [layer.forward for layer in self.base.layers]
        for i, layer in enumerate(self.base.layers):
            layer.forward = partial(self.layer, i)

    def restore(self):
        """Load the base's layers again: something is asked that is not in the cache."""
        self.base.layers, self.absent = self.load().layers, False
        self.attach_layers()

    def embed(self, forward, idx, positions):
        """Look the batch up. The embedding itself is no work, and not kept."""
        ids = [key(row) for row in idx.cpu().numpy()]
        self.rows = [self.entries[one] for one in ids] if self.entries.keys() >= set(ids) else None
        self.reading = self.rows is not None and all(map(self.whole, self.rows))
        self.base.is_read = self.reading
        return forward(idx, positions)

    def layer(self, i, x, mask=None, rope=None, cache=None):
        """What a layer makes of a batch: read, or computed and, of known examples, written."""
        if cache is not None or mask is not None:
            self.rows = None
        number, rest = divmod(i + 1, self.every)
        if self.rows is not None and self.reading:
            return x if rest else self.read(number - 1, x)
        if self.absent:
            self.restore()
        h = self.forwards[i](x, mask, rope, cache)
        for row, entry in zip(h, self.rows or ()) if not rest else ():
            state = row[: entry.tokens]
            if self.pool:
                state = self.pool(state, self.about["pool"][1])
            state = state.to(self.half) if self.bits == 16 else state
            start = entry.start + (number - 1) * self.size(entry.tokens)
            self.write(start, pack_hidden(state, self.bits))
        return h

    def final(self, forward, x):
        """The last state; of a batch that is read, it has zeros where there is no target."""
        if self.rows is None:
            return forward(x)
        h = torch.zeros_like(x) if self.reading else forward(x)
        for row, entry in zip(h, self.rows):
            start = entry.stop - 2 * self.config.n_embd * len(entry.targets)
            if self.reading:
                last = self.tensor(start, entry.stop, x.device).view(self.half)
                row[entry.targets] = last.view(len(entry.targets), -1).to(x.dtype)
            else:
                self.write(start, [row[entry.targets].to(self.half)])
                self.sums[entry.number] = self.sum(entry)
        if not self.reading and self.sums.all() and not hasattr(self.base, "stream"):
            for module in self.base.layers.modules():
                if isinstance(module, (Linear4bit, nn.Linear)):
                    module.to("meta")
            self.absent = True
        return h

    def read(self, i, x):
        """The i-th state that is kept, like x (B, T, C), with zeros where a row is padded."""
        h = torch.zeros_like(x)
        for row, entry in zip(h, self.rows):
            start = entry.start + i * self.size(entry.tokens)
            shape = torch.Size([entry.tokens, self.width])
            packed, n = [], shape.numel()
            for dtype, shape_of_part in self.parts(n):
                stop = start + dtype.itemsize * math.prod(shape_of_part)
                packed.append(self.tensor(start, stop, x.device).view(dtype).view(shape_of_part))
                start = stop
            if self.bits == 16:
                packed = [packed[0].view(shape)]
            state = unpack_hidden(packed, shape, self.bits, x.dtype).to(x.dtype)
            if self.pool:  # neighbours that are all alike have this as their mean and largest
                state = state.repeat_interleave(x.shape[-1] // self.width, dim=-1)
            row[: entry.tokens] = state
        return h

    def tensor(self, start, stop, device):
        """A copy of some bytes, uint8, on a device."""
        return torch.from_numpy(self.bytes[start:stop].copy()).to(device)

    def write(self, start, tensors):
        for tensor in tensors:
            part = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy()
            self.bytes[start : start + len(part)] = part
            start += len(part)

    def sum(self, entry):
        """An example's checksum; 0 is for one that is not there."""
        return zlib.crc32(self.bytes[entry.start : entry.stop]) or 1

    def whole(self, entry):
        """Whether an example is in the cache, undamaged."""
        return self.sums[entry.number] == self.sum(entry)


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


def signature(folder):
    """A hash of a model's files: their sizes, and 16 MB of each, evenly spread."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "config.json":
            size = path.stat().st_size
            found.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for i in range(4096):
                    file.seek(size * i // 4096)
                    found.update(file.read(4096))
    return found.hexdigest()
