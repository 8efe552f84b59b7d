"""What one training step costs: bytes above the model, seconds, its loss."""

import time

import torch

from account import parse_args, settings_of_step
from benchmarks.common import forget_peak, resident
from data.run.optim import make_optimizer
from data.tasks.examples import Task
from model import ModelConfig, from_pretrained
from train import make_model

MODEL = ModelConfig(32000, n_layer=12, n_head=12, n_embd=768, n_ffn=2048)  # a LLaMA
STEP = "--method qst --device cpu --batch_size 4 --sequence_len 256"  # what flags may override
AS_WRITTEN = "--checkpoint false --h_f_bits 16 --chunk_loss false"
FEW_BITS = "--h_f_bits 4 --optimizer_bits 8"


def parse_step(flags):
    """The settings of a step; flags: those of train.py, in one string."""
    return parse_args([*STEP.split(), *flags.split()])


def ours(cfg, folder):
    """A model, and its loss as a function of the ids, each of which is its own target."""
    base = from_pretrained(folder, cfg.quant, torch.float32)
    model = make_model(cfg, base, Task([], []))
    return model, lambda idx: model.loss(idx, idx)


def measure(make, cfg, folder):
    """`costs` of a step of the model in a folder, and the trainable parameters. make: as `ours`"""
    cfg = settings_of_step(cfg)
    model, loss_of = make(cfg, folder)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return *costs(model, loss_of, cfg), trainable


def costs(model, loss_of, cfg):
    """Bytes by which the process grows in two steps (or forward passes, if nothing learns), the
    processor's seconds for the second, and the loss of the first.

    loss_of: function of ids (B, T)
    """
    learns = any(p.requires_grad for p in model.parameters())
    optimizer = make_optimizer(model, cfg) if learns else None
    torch.manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (cfg.batch_size, cfg.sequence_len))

    def propagate(idx):
        with torch.set_grad_enabled(learns):
            loss = loss_of(idx)
        if learns:
            loss.backward()
        return loss.item()

    propagate(idx[:1, :16])  # torch has loaded what it needs
    model.zero_grad(set_to_none=True)
    before, losses = forget_peak(), []
    for _ in range(2):  # the second accumulates, beside the optimizer's moments
        start = time.process_time()
        losses.append(propagate(idx))
        if learns:
            optimizer.step()
    return resident("VmHWM") - before, time.process_time() - start, losses[0]
