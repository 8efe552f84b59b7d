"""How the frozen base comes into memory, and where its hidden states come from.

Whatever gives the same states can stand in for the base: `base.source` has `states` like the base's
own. Layers may come from the disk in turn (--stream), or stand on several devices (--devices).
"""

from functools import partial

import torch

from data.devices import placement
from data.devices.choose import pick_device, pick_dtype
from data.frozen import prefix_cache, repair
from data.frozen.hidden_cache import HiddenCache
from data.settings.methods import SIDE_METHODS


def first_device(cfg):
    """Where a batch goes, and the dtype that is computed in."""
    device = placement.parse(cfg.devices)[0] if cfg.devices else pick_device(cfg.device)
    return device, pick_dtype(cfg.dtype, device)


def load_base(from_pretrained, cfg, folder, config, task, runs):
    """The base of a folder, as a run's settings ask for it. runs: the settings of all runs"""
    device, dtype = first_device(cfg)
    if cfg.devices:  # a function of a tensor's name
        device = placement.places(placement.parse(cfg.devices), config.n_layer, config.tied)
    load = partial(from_pretrained, folder, cfg.quant, dtype)
    whole = partial(load, device, cfg.stream)
    cache = HiddenCache(cfg, runs, folder, config, dtype, task) if cfg.cache_hidden else None
    base = load(cache.without_layers(device)) if cache and cache.absent else whole()
    if cfg.devices:
        placement.join(base)
    if cfg.method in SIDE_METHODS and not cfg.compile:
        prefix_cache.attach(base, task.train + task.held_out)
    if cache:
        cache.attach(base, whole)
    if cfg.repair and not cfg.side:
        torch.manual_seed(cfg.data_seed)
        repair.mend(base, folder, [ids for ids, _ in task.train], cfg.repair)
    return base
