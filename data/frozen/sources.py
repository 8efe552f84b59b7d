"""How the frozen base comes into memory, and where its hidden states come from.

Whatever yields the same hidden states can stand in for the base: its attribute `source` names an
object with a method `states` like the base's own.
"""

from os.path import commonprefix
from pathlib import Path

import torch

from data import InputError, leaf
from data.devices.device import pick_device, pick_dtype
from data.formats.files import locked, make_writable_folder
from data.settings.methods import SIDE_METHODS

SHORTEST_PREFIX = 8  # tokens, and a tenth of an example: a shorter prefix saves no time


def first_device(cfg):
    """The device of a batch, and the dtype that the model computes in."""
    names = leaf("placement").parse(cfg.devices) if cfg.devices else [pick_device(cfg.device)]
    return names[0], pick_dtype(cfg.dtype, names[0])


def share_prefix(base, examples):
    """Compute the examples' common prefix once, if it is long enough; returns the base."""
    lengths = [len(ids) for ids, _ in examples] or [1]
    prefix = commonprefix([ids for ids, _ in examples])[: min(lengths) - 1]  # one of each is left
    if len(prefix) >= max(SHORTEST_PREFIX, sum(lengths) / len(lengths) / 10):
        base.source = leaf("prefix_cache").PrefixCache(base, prefix)
    return base


def load_base(from_pretrained, cfg, folder, config, task, runs):
    """Load the base of a folder as the settings ask for it. runs: the settings of all runs"""
    device, dtype = first_device(cfg)
    if cfg.devices:  # a function of a weight's name
        devices = leaf("placement").parse(cfg.devices)
        device = leaf("placement").places(devices, config.n_layer, config.tied)
    cache = None
    versions = lambda: {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(folder).iterdir()
        if path.suffix in (".safetensors", ".bin") and path.is_file()
    }
    before = versions()
    if cfg.cache_hidden:
        make_writable_folder(cfg.cache_hidden, "--cache_hidden")
        with locked(f"{cfg.cache_hidden}/cache.lock"):  # two runs may begin it together
            cache = leaf("hidden_cache").HiddenCache(cfg, runs, folder, config, dtype, task)

    def load(device=device, stream=cfg.stream):
        base = from_pretrained(folder, cfg.quant, dtype, device, stream)
        if cfg.devices:
            leaf("placement").join(base)
        if cfg.repair and not cfg.side:
            torch.manual_seed(cfg.data_seed)
            prompts = [ids for ids, _ in task.train]
            leaf("repair").mend(base, folder, prompts, cfg.repair, cache and cache.repair_file)
        if versions() != before:  # also if it is loaded again
            raise InputError(f"{folder} was changed after this run began: begin it again.")
        return base

    base = load(cache.without_layers(device), False) if cache and cache.absent else load()
    if cfg.method in SIDE_METHODS and not cfg.compile:
        share_prefix(base, task.train + task.held_out)
    if cache:
        cache.attach(base, load)
    return base
