"""Training, generating and saving on a GPU; the device and the dry run are test_gpu.py's."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    DEVICE, DRY, GPU, ROOT, each_dtype, needs_gpu, needs_gpu_or_dry_run, shaken, short_run,
    small_base,
)

import train
from data.devices.device import to_device
from data.frozen.prefix_cache import share_prefix
from data.run.log import TrainingLog
from data.run.run import Run
from data.tasks.examples import collate
from model import from_pretrained
from qst import QST, add_trainable
from side import SideConfig
from train import TrainConfig

pytestmark = needs_gpu_or_dry_run
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
METHODS = {
    "qst": {}, "qst, few bits": dict(h_f_bits=4, checkpoint=True), "qst, 8 bits": dict(h_f_bits=8),
    "qlora": dict(method="qlora", reduction=None), "lst": dict(method="lst"),
    "peqa": dict(method="peqa", reduction=None), "full": dict(method="full", reduction=None),
    "prefix": dict(prefix=12), "muon": dict(optimizer="muon"),
    "8-bit AdamW": dict(optimizer_bits=8),
    "8-bit Muon": dict(optimizer="muon", optimizer_bits=8, weight_decay=0.1),
}


@pytest.fixture
def cfg(tiny_model, tmp_path):
    """Settings of a run of seconds, on a real folder and file."""
    more = dict(rank=4, log_interval=2, warmup_iters=2, device=str(DEVICE))
    return short_run(tiny_model, tmp_path, 60, **more)


@contextlib.contextmanager
def no_waiting():
    """Any wait of the host for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_step(changes, dtype, prefix=0):
    """A model on the device, and a function that makes a step of train.py with it. prefix: number
    of tokens with which all rows begin"""
    settings = dict(base="any", data="any", reduction=4, rank=4, sequence_len=24, batch_size=4)
    cfg = train.resolve(TrainConfig(**settings | dict(learning_rate=1e-2) | changes))
    base = small_base(cfg.quant).to(DEVICE)
    for module in base.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name in ("weight", "bias"):
                setattr(module, name, buffer.to(dtype))
    model = train.prepare(add_trainable(base, train.side_config(cfg)), cfg)
    run = Run(model, cfg)
    enabled = dtype == torch.float16
    run.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=16.0, enabled=enabled)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(3, 61, (4, 24), generator=generator)
    if prefix:
        idx[:, :prefix] = idx[0, :prefix]
        share_prefix(base, [(row.tolist(), []) for row in idx])
        assert len(base.source.ids) >= prefix
    targets = idx.masked_fill(idx % 5 == 0, -100)
    step = lambda: train.train_step([run], [(idx, targets, 1.0)], 1)[0]
    return model, step


@each_dtype
@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_a_step_does_not_wait(changes, dtype):
    """From the batch on the CPU to the optimizer's step the host never waits for the GPU."""
    if changes.get("method") == "full" and dtype == torch.float16:
        pytest.skip("weights in 16 bits cannot learn in fp16")
    prefix = changes.get("prefix", 0)
    changes = {name: value for name, value in changes.items() if name != "prefix"}
    model, step = small_step(changes, dtype, prefix)
    step()  # kernels are compiled, and memory is allocated
    with no_waiting() if GPU else contextlib.nullcontext():
        results = [step() for _ in range(3)]
    losses = [loss.item() for loss, taken in results if taken]
    assert len(losses) == 3 and losses[2] < losses[0]


@needs_gpu
def test_a_wait_is_seen():
    """The test above notices one."""
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=DEVICE).item()


def test_a_logged_step_waits_only_when_it_is_due(cfg):
    """`stepped` reads losses at the interval and not between."""
    log = TrainingLog(None, train.resolve(TrainConfig(**cfg | dict(log_interval=4))), DEVICE)
    loss, taken = torch.ones((), device=DEVICE), torch.ones((), dtype=torch.bool, device=DEVICE)
    log.start, log.bar = 0.0, SimpleNamespace(update=lambda: None)
    with no_waiting() if GPU else contextlib.nullcontext():
        read = [log.stepped(loss, taken, 1, False) for _ in range(3)]
    assert read == [not GPU] * 3
    assert log.stepped(loss, taken, 1, False) and log.loss == 1


@each_dtype
def test_the_loss_is_the_cpus(dtype):
    """Loss and gradients are the CPU's, up to the rounding of the dtype."""
    near = {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.02}[dtype]
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = shaken(QST(small_base(), SideConfig(reduction=4))).to(device)
        for layer in (model.base.embed_tokens, model.base.lm_head):
            layer.weight = layer.weight.to(torch.float32 if device.type == "cpu" else dtype)
        idx, targets = collate([(list(range(5, 25)), list(range(6, 26)))] * 3)
        loss = model.loss(to_device(idx, device), targets)
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu().float() for p in model.side.parameters()])
        found.append((loss.item(), grads))
    (loss, grads), (other, others) = found
    assert other == pytest.approx(loss, rel=near)
    assert (others - grads).norm() <= 3 * near * grads.norm()


def run(*words):
    words = list(map(str, words))
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


@each_dtype
def test_the_embedded_default_learns(dtype, tmp_path):
    """`python train.py` answers more than nine of ten as expected, in every dtype."""
    flags = ["--dtype", NAMES[dtype], "--device", DEVICE.type, "--out_dir", tmp_path / "out"]
    flags += ["--max_iters", 2, "--eval_examples", 8] * DRY
    done = run("train.py", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert DRY or result["exact_match_after"] > 0.9
    assert not result["skipped_iterations"] or dtype == torch.float16


@pytest.mark.parametrize("changes", [{}, dict(dtype="fp16"), dict(optimizer="muon", variant="fast"),
                                     dict(optimizer_bits=8, h_f_bits=4)], ids=str)
def test_resume(changes, cfg, tmp_path):
    """A run that has ended on the GPU goes on there, to about the loss of one without an end; and
    on the CPU too."""
    whole = train.main(TrainConfig(**cfg | changes))
    parts = cfg | changes | dict(out_dir=str(tmp_path / "parts"))
    train.main(TrainConfig(**parts | dict(max_iters=4)))
    result = train.main(TrainConfig(**parts | dict(resume=True)))
    assert result["iterations"] == 8
    assert result["loss_last"] == pytest.approx(whole["loss_last"], rel=0.02)
    on_the_cpu = TrainConfig(**parts | dict(resume=True, device="cpu", max_iters=9))
    assert train.main(on_the_cpu)["iterations"] == 9


def test_compile(cfg, tmp_path):
    """--compile changes no loss by more than rounding."""
    losses = []
    for compiled in (False, True):
        changes = dict(compile=compiled, dtype="fp32", out_dir=str(tmp_path / str(compiled)))
        losses.append(train.main(TrainConfig(**cfg | changes))["loss_last"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_generation_is_the_cpus():
    """In fp32 the tokens are those that the CPU chooses: of prompts with and without padding."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = shaken(QST(small_base(), SideConfig(reduction=4))).to(device)
        idx = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(0)).to(device)
        keep = torch.ones_like(idx)
        keep[0, :4] = 0
        found.append([model.generate(idx, 20).cpu(), model.generate(idx, 20, keep=keep).cpu()])
    for here, there in zip(*found):
        assert torch.equal(here, there)


@each_dtype
def test_saved_on_one_device_and_loaded_on_the_other(dtype, tiny_model, tmp_path):
    """The side network has the same bytes after the way from the GPU to the CPU and back."""
    places = [DEVICE, torch.device("cpu"), DEVICE]
    model = QST(from_pretrained(tiny_model, "nf4", dtype, DEVICE), SideConfig(reduction=4))
    shaken(model.side)
    expected = {name: tensor.cpu() for name, tensor in model.side.state_dict().items()}
    for number, device in enumerate(places):
        model.save_side(tmp_path / str(number))
        base = from_pretrained(tiny_model, "nf4", dtype, device)
        model = QST.from_side(base, tmp_path / str(number))
        for name, tensor in model.side.state_dict().items():
            assert tensor.device.type == device.type and torch.equal(tensor.cpu(), expected[name])


def test_a_dtype_is_kept_throughout(cfg):
    """No operator of a step promotes a hidden state of 16 bits to 32."""
    model, _ = small_step({}, torch.bfloat16)
    seen = []
    for module in (*model.base.layers, *model.side.layers):
        module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    idx = torch.ones(1, 8, dtype=torch.long)
    model.loss(idx.to(DEVICE), idx)
    assert len(seen) == 6 and set(seen) == {torch.bfloat16}
