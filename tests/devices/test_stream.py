"""data/devices/stream.py: a base whose layers come from disk computes what one in memory does."""

import contextlib
import json
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from account import stream_from_memory
from benchmarks.streaming import ONE_ARENA
from helpers import (
    FAMILIES, FIXTURES, ROOT, VARIANTS, each_family, shaken, small_base, small_config,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from data import InputError
from data.devices.device import model_bytes
from data.formats.save import save_pretrained
from model import Transformer, from_pretrained
from qst import QST
from quant import Linear4bit
from side import SideConfig

SIDES = VARIANTS | {
    name: dict(downsample=name) for name in ("linear", "lora", "maxpool", "avgpool")
} | dict(lst=dict(method="lst"))


def learn(model, idx, steps=2):
    """Losses and gradients of a few steps."""
    found = []
    for _ in range(steps):
        loss = model.loss(idx, idx)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
    return found


def same(one, two):
    assert len(one) == len(two) and all(map(torch.equal, one, two))


# --------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_losses_and_gradients_are_the_same(side, bits, idx):
    """For every setting of the side network and every --h_f_bits, over two steps, bit for bit."""
    found = []
    for stream in (False, True):
        base = small_base()
        if stream:
            stream_from_memory(base, "cpu")
        torch.manual_seed(0)
        model = shaken(QST(base, SideConfig(**dict(reduction=2, rank=2) | side)))
        model.calibrate([[3, 4, 5]])
        model.side.save_memory(True, bits)
        found.append(learn(model, idx))
    same(*found)


@each_family
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_any_number_of_layers(layers, family, idx):
    """Odd, even, or one: the two slots take turns across the end of a pass."""
    found = []
    for stream in (False, True):
        base = small_base(**FAMILIES[family] | dict(n_layer=layers))
        if stream:
            stream_from_memory(base, "cpu")
        found.append(learn(shaken(QST(base, SideConfig(reduction=2, rank=2))), idx, steps=3))
    same(*found)


def test_a_slot_is_not_filled_while_its_layer_computes(base, idx):
    """Not even when the next copy is done before the layer begins."""
    expected = base(idx)
    stream_from_memory(base, "cpu")
    for layer in base.layers:
        wait = lambda *_: base.stream.coming[2].result() and None
        layer.input_layernorm.register_forward_pre_hook(wait)
    assert torch.equal(base(idx), expected) and torch.equal(base(idx), expected)


def test_the_next_layer_comes_while_one_computes(base, idx):
    """The weights of layer i + 1 are read in another thread, once layer i has begun."""
    stream_from_memory(base, "cpu")
    arrived = [threading.Event() for _ in base.layers]

    def watch(i, linear):
        source = linear.source

        def read():
            arrived[i].set()
            assert threading.current_thread() is not threading.main_thread()
            return source()

        linear.source = read

    for i, layer in enumerate(base.layers):
        watch(i, layer.mlp.down_proj)
        after = arrived[(i + 1) % len(arrived)]
        layer.mlp.register_forward_pre_hook(lambda *_, after=after: 0 / after.wait(10) or None)
        layer.register_forward_pre_hook(lambda *_, i=i: arrived[i].clear())
    base(idx)


def test_a_pass_that_breaks_off(base, idx):
    """After an error in the middle of a pass, or Ctrl-C, the next pass begins with the first layer;
    what cannot be read is said where it is needed, and can be tried again."""
    expected = base(idx)
    stream_from_memory(base, "cpu")
    hook = base.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base(idx)
    hook.remove()
    assert torch.equal(base(idx), expected)
    linear = base.layers[2].mlp.up_proj
    source, linear.source = linear.source, lambda: (_ for _ in ()).throw(InputError("gone"))
    for _ in range(2):
        with pytest.raises(InputError, match="gone"):
            base(idx)
    linear.source = source
    assert torch.equal(base(idx), expected)


def test_on_a_gpu_copies_and_kernels_wait_for_each_other(base, idx, monkeypatch):
    """Each copy waits for an event behind the kernels that read its slot before, and each layer for
    the event behind its copy."""
    log, lock = [], threading.Lock()

    class Queue:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            with lock:
                log.append(("event", self.name, len(log)))
                return log[-1]

        def wait_event(self, event):
            log.append(("wait", self.name, event))

    kernels = Queue("kernels")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stream_from_memory(base, "cpu")
    base.stream.copies = Queue("copies")
    fill = base.stream.fill

    def logged(i, slot, done):
        event = fill(i, slot, done)
        log.append(("filled", i, id(slot), done, event))
        return event

    base.stream.fill = logged
    for i, layer in enumerate(base.layers):
        read = lambda *_, i=i: log.append(("computes", i, base.layers[i].mlp.up_proj.weight))
        layer.register_forward_hook(read)
    base(idx), base(idx)
    base.stream.coming[2].result()
    computed = [n for n, entry in enumerate(log) if entry[0] == "computes"]
    fills = [entry for entry in log if entry[0] == "filled"]
    assert [entry[1] for entry in fills] == [0, 1, 2, 0, 1, 2, 0] and len(computed) == 6
    for k, (_, i, slot, done, event) in enumerate(fills):
        assert ("wait", "copies", done) in log
        assert k < 2 or slot == fills[k - 2][2] != fills[k - 1][2]
        if k < 6:  # its layer computes after the wait
            assert log.index(("wait", "kernels", event)) < computed[k]
        if k >= 2:  # the layer that had the slot before it was in the queue before `done`
            assert computed[k - 2] < log.index(done)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_with_the_embedding_on_the_host(tied, idx):
    """Every operator finds its inputs on one device, shown with two that need no GPU, and a batch
    goes where the layers are; the embedding stays on the host, unless it is the head."""
    config, meta = small_config(tied=tied), torch.device("meta")
    place = lambda name: "cpu" if name == "embed_tokens.weight" and not tied else meta
    base = Transformer(config).freeze("nf4", torch.float32, place)
    stream_from_memory(base, meta)
    model = QST(base, SideConfig(reduction=4, rank=2))
    assert model.device == base.device == meta
    assert base.embed_tokens.weight.device == torch.device("meta" if tied else "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        idx = torch.ones(2, 9, dtype=torch.long, device=model.device)
        model(idx, idx)[1].backward()
    assert all(p.grad.device == meta for p in model.parameters())


# --------------------------------------------------------------------------------------
# From a folder


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@each_family
def test_a_folder_is_streamed(kind, family, idx, tmp_path, capsys):
    """Ours from disk: the same steps, the same fingerprint, and one line says what a pass reads."""
    save_pretrained(small_base(kind, **FAMILIES[family]), tmp_path)
    found, prints = [], []
    for stream in (False, True):
        base = from_pretrained(tmp_path, kind, torch.float32, stream=stream)
        torch.manual_seed(0)
        model = shaken(QST(base, SideConfig(reduction=2, rank=2)))
        found.append(learn(model, idx))
        prints.append(model.fingerprint)
    same(*found)
    assert prints[0] == prints[1]
    assert f"kB a batch from {tmp_path}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bnb_llama", "bnb_opt"])
def test_a_folder_of_bitsandbytes(name, idx):
    """What bitsandbytes has written; of OPT's layers one matrix is in 16 bits, and stays."""
    kind = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    kind = kind["bnb_4bit_quant_type"]
    whole, streamed = (
        from_pretrained(FIXTURES / name, kind, torch.float32, stream=s) for s in (False, True)
    )
    idx = idx % whole.config.vocab_size
    assert torch.equal(whole(idx), streamed(idx)) and torch.equal(whole(idx), streamed(idx))


def test_side_networks_are_interchangeable(packed, tmp_path):
    """What a streamed base has trained loads on one in memory, and the reverse."""
    bases = [from_pretrained(packed, "nf4", torch.float32, stream=s) for s in (False, True)]
    idx = torch.randint(3, 60, (2, 7))
    for one, other in (bases, bases[::-1]):
        model = shaken(QST(one, SideConfig(reduction=4, rank=2)))
        model.save_side(tmp_path / "side")
        assert torch.equal(QST.from_side(other, tmp_path / "side")(idx)[0], model(idx)[0])


def test_two_layers_are_in_memory(packed):
    """Of the weights two slots, shared by all layers."""
    base = from_pretrained(packed, "nf4", torch.float32, stream=True)
    layers = len(base.layers)
    assert model_bytes(base.layers) < base.stream.nbytes * 2 / layers
    held = {w.codes.data_ptr() for slot in base.stream.slots for w in slot.values()}
    assert len(held) == 2 * len(base.stream.slots[0])
    base(torch.ones(1, 5, dtype=torch.long))
    base.stream.coming[2].result()
    assert {m.weight.codes.data_ptr() for m in base.modules() if isinstance(m, Linear4bit)} <= held


def test_four_times_the_memory(tmp_path):
    """A model trains in a process whose addresses have room for a quarter of its weights, in which
    the same without --stream does not even load."""
    script = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import resource
        from benchmarks import streaming
        from benchmarks.common import resident
        from model import ModelConfig
        from quant import InputError
        config = ModelConfig(100, n_layer=48, n_head=6, n_embd=768, n_ffn=2048)
        streaming.FLAGS += " --sequence_len 8"
        streaming.write_random({str(tmp_path / "small")!r}, streaming.SMALL)
        streaming.trainer({str(tmp_path / "small")!r}, stream=True)()  # torch has what it needs
        quarter = streaming.write_random({str(tmp_path)!r}, config) // 4
        most = resident("VmSize") + quarter
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        step = streaming.trainer({str(tmp_path)!r}, stream=True)
        assert 2 < step() < 20
        try:
            streaming.trainer({str(tmp_path)!r}, stream=False)
        except InputError as error:
            print(quarter, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        env={"OMP_NUM_THREADS": "1"} | ONE_ARENA, cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Cannot allocate memory" in done.stdout.splitlines()[-1]
