"""data/devices/placement.py: a base on several devices, shown with two that need no GPU."""

import pytest
import torch
from helpers import small_config
from torch._subclasses.fake_tensor import FakeTensorMode

import qst
from data import InputError
from data.devices import placement
from data.frozen.hidden import channel_statistics
from model import Transformer
from qst import add_trainable
from quant import unpack_buffers
from side import SideConfig

DEVICES = [torch.device("cpu"), torch.device("meta")]
CASES = [
    ("qst", "nf4", {}), ("qst", "nf4", dict(standardize=True, share_first=True)),
    ("qst", "none", dict(mix="released", gate="channel", final_norm=True)), ("lst", "none", {}),
    ("qst", "nf4", dict(every=3)), ("qst", "nf4", dict(read_embedding=False)),
    ("qlora", "nf4", {}), ("adapter", "none", {}), ("peqa", "int4", {}), ("full", "none", {}),
]


@pytest.mark.parametrize("family, tied", [("llama", False), ("opt", True)])
@pytest.mark.parametrize("method, quant, settings", CASES)
def test_a_step_on_two_devices(method, quant, settings, family, tied, monkeypatch):
    """Every operator of a training step finds its inputs on one device, and every parameter gets a
    gradient: torch's fake tensors refuse to mix devices as CUDA does."""
    monkeypatch.setattr(qst, "fingerprint", lambda base: None)  # meta tensors have no values
    config = small_config(family, tied=tied)
    base = Transformer(config).freeze(quant, torch.float32, placement.places(DEVICES, 3, tied))
    placement.join(base)
    model = add_trainable(base, SideConfig(method=method, reduction=4, rank=2, **settings))
    placement.follow(model)
    idx = torch.ones(2, 9, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, loss = model(idx, idx)
        loss.backward()
    unpack_buffers.clear()  # they are fake, and the next test may need them
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.device.type for p in parameters} == {"cpu", "meta"}
    assert all(p.grad is not None and p.grad.device == p.device for p in parameters)


def test_nothing_changes_on_one_device(idx):
    """With all devices the same, the loss is that of a model that was not spread, bit for bit."""
    losses = []
    for spread in (False, True):
        torch.manual_seed(0)
        model = Transformer(small_config())
        cpu = [torch.device("cpu")] * 2
        place = placement.places(cpu, 3, False) if spread else "cpu"
        base = model.freeze("nf4", torch.float32, place)
        placement.join(base)
        if spread:  # what measures the base goes from device to device, too
            channel_statistics(base, idx.tolist())
        model = add_trainable(base, SideConfig(reduction=4, rank=2))
        if spread:
            placement.follow(model)
        losses.append(model.loss(idx, idx))
    assert torch.equal(*losses)


def test_devices_of_two_kinds_are_refused(monkeypatch):
    """A CPU and a GPU in one list are a mistake, and so is a device that is not there."""
    with pytest.raises(InputError, match="cuda"):
        placement.parse("cuda:0,cuda:1" if not torch.cuda.is_available() else "cuda:1000")
    monkeypatch.setattr(placement, "pick_device", torch.device)
    with pytest.raises(InputError, match="one kind"):
        placement.parse("cpu, cuda:0")
