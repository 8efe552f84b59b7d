"""How the frozen base comes into memory, and where its hidden states come from.

Whatever yields the same hidden states can stand in for the base: its attribute `source` names an
object with a method `states` like the base's own.
"""

import re
from pathlib import Path

from data import InputError, leaf
from data.devices.device import pick_device, pick_dtype
from data.formats.files import locked, make_writable_folder
from data.settings.methods import SIDE_METHODS


def first_device(cfg):
    """The device of a batch, and the dtype that the model computes in."""
    names = leaf("placement").parse(cfg.devices) if cfg.devices else [pick_device(cfg.device)]
    return names[0], pick_dtype(cfg.dtype, names[0])


def watch(folder):
    """Return a function that refuses a base whose files are no longer what they are now."""

    def versions():  # of the weights; a run may have its --out_dir there
        files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
        files = [p for p in files if p.is_file() and not re.match(r"(side|state)\.", p.name)]
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files}

    before = versions()

    def refuse_changes():
        if versions() != before:
            raise InputError(f"{folder} was changed after this run began: begin it again.")

    return refuse_changes


def load_base(from_pretrained, cfg, folder, config, task, runs):
    """Load the base of a folder as the settings ask for it. runs: the settings of all runs"""
    device, dtype = first_device(cfg)
    if cfg.devices:  # a function of a weight's name
        devices = leaf("placement").parse(cfg.devices)
        device = leaf("placement").places(devices, config.n_layer, config.tied)
    cache, refuse_changes = None, watch(folder)
    if cfg.cache_hidden:
        make_writable_folder(cfg.cache_hidden, "--cache_hidden")
        with locked(f"{cfg.cache_hidden}/cache.lock"):  # two runs may begin it together
            cache = leaf("hidden_cache").HiddenCache(cfg, runs, folder, config, dtype, task)

    def load(device=device, stream=cfg.stream):
        base = from_pretrained(folder, cfg.quant, dtype, device, stream, cfg.layers)
        if cfg.devices:
            leaf("placement").join(base)
        refuse_changes()  # also if it is loaded again
        return base

    base = load(cache.without_layers(device), False) if cache and cache.absent else load()
    if cfg.method in SIDE_METHODS and not cfg.compile:
        leaf("prefix_cache").share_prefix(base, task.train + task.held_out)
    if cache:
        cache.attach(base, load)
    return base
