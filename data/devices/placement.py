"""--devices: the base's layers on several devices, in order, and each side layer beside its input.
A batch goes from device to device.
"""

import re

import torch
from torch.nn.attention.bias import CausalBias

from data import InputError
from data.devices.device import device_of, pick_device


def parse(names):
    """"cuda:0,cuda:1" -> torch devices."""
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise InputError(f"--devices {names}: give devices of one kind, such as cuda:0,cuda:1.")
    return devices


def places(devices, n_layer, tied):
    """A function of a weight's name, for `from_pretrained`: the embedding on the first device, the
    head on the last, unless the two are tied."""

    def place(name):
        if found := re.match(r"layers\.(\d+)", name):
            return devices[int(found[1]) * len(devices) // n_layer]
        last = name.startswith(("norm", "project_out")) or name.startswith("lm_head") and not tied
        return devices[-1 if last else 0]

    return place


def join(base):
    """Let the inputs of a base's modules follow them to their devices."""
    for module in (*base.layers, base.norm, base.project_out, base.lm_head):
        if module is not None:
            module.register_forward_pre_hook(move_inputs)


def follow(model):
    """Put each trained module on the device where it is used."""
    base, side = model.base, model.side
    for name, module in side.named_children():
        if name in ("norm", "upsample", "classifier") and [*module.parameters()]:
            module.to(device_of(base.layers[-1])).register_forward_pre_hook(move_inputs)
    every = side.config.every
    for i, layer in enumerate(base.layers[every - 1 :: every]):
        if hasattr(side, "layers"):
            side.layers[i].to(device_of(layer)).register_forward_pre_hook(move_inputs)
        if hasattr(side, "downsample"):
            side.downsample[side.n_first + i].to(device_of(layer))


def move_inputs(module, args):
    """A forward pre-hook: move a module's inputs to its device."""
    device = device_of(module)

    def move(thing):
        if isinstance(thing, torch.Tensor) and not isinstance(thing, CausalBias):  # which has none
            return thing.to(device)
        return tuple(map(move, thing)) if isinstance(thing, tuple) else thing

    return move(args)
