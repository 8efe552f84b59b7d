"""The optimizer: learning rates, groups, accumulated gradients, and Muon."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import small_base

import train
from data.run.adamw8bit import AdamW8bit
from data.run.muon import Muon, Muon8bit, orthogonalize
from data.run.optim import make_optimizer
from data.run.run import Run
from qst import QST, add_trainable
from side import SideConfig
from train import TrainConfig


def run_of(loss_of, optimizer, scaler, cfg, rate):
    """A `SharedBase` and a `Run` with a function of (idx, targets) as model, and a constant
    learning rate."""
    models = SimpleNamespace(compute=lambda idx: [idx], device=torch.device("cpu"), compiled=False)
    run = Run.__new__(Run)
    run.model, run.losses = SimpleNamespace(loss_of=loss_of), []
    run.optimizer, run.scaler = optimizer, scaler
    constant = dict(warmup_iters=0, max_iters=9, lr_schedule="constant")
    run.cfg = replace(cfg, learning_rate=rate, **constant)
    return models, run


def test_learning_rate():
    """A linear warm-up, then the schedule, which ends just above 0."""
    rates = {}
    for schedule in ("constant", "linear", "cosine"):
        cfg = TrainConfig(lr_schedule=schedule, learning_rate=1.0, max_iters=110, warmup_iters=10)
        rates[schedule] = [train.learning_rate_at(i, cfg) for i in range(110)]
        assert rates[schedule][:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
        assert rates[schedule][10] == 1
    assert rates["constant"][109] == 1
    assert rates["linear"][60] == pytest.approx(0.5) and rates["linear"][109] == pytest.approx(0.01)
    assert rates["cosine"][60] == pytest.approx(0.5) and 0 < rates["cosine"][109] < 0.001


def test_optimizer_groups():
    """Matrices decay, vectors and gates do not, and alpha has its own learning rate."""
    model = QST(small_base(), SideConfig(reduction=4, downsample_norm=True, gate="channel"))
    cfg = train.resolve(TrainConfig(weight_decay=0.1, alpha_lr_factor=25.0))
    optimizer = make_optimizer(model, cfg)
    groups = {(g["factor"], g["weight_decay"]): g["params"] for g in optimizer.param_groups}
    assert set(groups) == {(1, 0.1), (1, 0), (25, 0)}
    assert all(p.dim() == 2 for p in groups[1, 0.1])
    assert [id(p) for p in groups[25, 0]] == [id(model.side.alpha)]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer, bits, kind", [
    ("adamw", 32, torch.optim.AdamW), ("adamw", 8, AdamW8bit), ("muon", 32, Muon),
    ("muon", 8, Muon8bit),
])
def test_each_optimizer_gets_its_settings(optimizer, bits, kind):
    """The betas are those of the flags. Muon takes matrices that multiply states, and so neither
    vectors nor the embedding nor the head."""
    model = add_trainable(small_base("none"), SideConfig(method="full"))
    cfg = TrainConfig(optimizer=optimizer, optimizer_bits=bits, beta1=0.8, beta2=0.97)
    made = make_optimizer(model, train.resolve(cfg))
    assert type(made) is kind
    assert {group["betas"] for group in made.param_groups} == {(0.8, 0.97)}
    chosen = {id(p) for group in made.param_groups for p in group["params"] if group["muon"]}
    wanted = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    assert chosen == (wanted if optimizer == "muon" else set())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Two parts, accumulated, give the step that the whole batch gives, every token weighing the
    same."""
    idx = torch.randint(3, 61, (8, 10), generator=torch.Generator().manual_seed(0))
    after = []
    for sizes in ([8], [6, 2]):
        torch.manual_seed(0)
        model = QST(small_base(), SideConfig(reduction=4))
        cfg = train.resolve(TrainConfig())
        optimizer = make_optimizer(model, cfg)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        batches = [(part, part, len(part) / 8) for part in idx.split(sizes)]
        for _ in range(3):
            models, run = run_of(model.loss, optimizer, scaler, cfg, 1e-3)
            ((loss, taken),) = train.train_step([run], batches, 1, models)
            assert taken
        after.append([loss, *[p.detach().clone() for p in model.parameters()]])
    for one, two in zip(*after):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(two), atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("grad_clip", [0.0, 0.01, 100.0])
def test_the_gradient_is_clipped_to_its_own_norm(grad_clip, scaled):
    """A gradient that is longer than the limit is cut to it, before fp16's scale or after it alike;
    a limit of 0 cuts nothing; and a step is as long as its group's learning rate says."""
    p, x = torch.nn.Parameter(torch.zeros(2)), torch.tensor([3.0, 4.0])  # a gradient of length 5
    optimizer = torch.optim.SGD([dict(params=[p], factor=2.0)], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    cfg = TrainConfig(grad_clip=grad_clip)
    for steps in (1, 2):
        models, run = run_of(lambda x, _: (p * x).sum(), optimizer, scaler, cfg, 0.1)
        train.train_step([run], [(x, x, 1.0)], 1, models)
        expected = -0.1 * 2 * x * min(1, (grad_clip or 5) / 5)
        assert torch.allclose(p, steps * expected, rtol=1e-4)


@pytest.mark.parametrize("loss_of", [
    lambda p: p.sqrt().sum(), lambda p: p.sum() + float("inf"), lambda p: p.sum() * float("nan")
])
def test_a_step_needs_a_finite_loss_and_a_finite_gradient(loss_of):
    """Where either is infinite the step is left out; the next one is taken."""
    p, x = torch.nn.Parameter(torch.zeros(2)), torch.zeros(2)
    optimizer = torch.optim.AdamW([dict(params=[p], factor=1.0)], lr=1.0, fused=True)
    scaler, cfg = torch.amp.GradScaler("cpu", enabled=False), TrainConfig()
    for loss, good in ((loss_of, False), (torch.sum, True)):
        models, run = run_of(lambda *_: loss(p), optimizer, scaler, cfg, 0.1)
        ((_, taken),) = train.train_step([run], [(x, x, 1.0)], 1, models)
        assert bool(taken) == good and p.ne(0).all() == good and p.grad is None


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_orthogonalizing(shape):
    """Singular values of any size come near 1, and the directions that they belong to stay."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    (x,) = orthogonalize((u * torch.logspace(-1, 1, 12) @ v).unsqueeze(0))
    turned = u.T @ x @ v.T
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-4)
    assert 0.65 < turned.diag().min() and turned.diag().max() < 1.25


def in_127_steps(momentum):
    step = momentum.abs().max().clamp(min=1e-9) / 127
    return (momentum / step).round() * step


@pytest.mark.parametrize("make, adamw, kept", [
    (partial(Muon, fused=True), torch.optim.AdamW, torch.clone),
    (Muon8bit, AdamW8bit, in_127_steps),
], ids=["32 bits", "8 bits"])
def test_muons_steps(make, adamw, kept):
    """A matrix decays and moves by 0.2 sqrt(its longer side) times the rate, along the gradient and
    0.95 of the momentum, which has it already; a vector takes AdamW's step, and no matrix does.
    In 8 bits the next step reads a rounded momentum."""
    draw = torch.Generator().manual_seed(0)
    p, vector = (torch.nn.Parameter(torch.randn(n, generator=draw)) for n in ((6, 9), (5,)))
    copy = torch.nn.Parameter(vector.detach().clone())
    groups = [dict(params=[p], muon=True), dict(params=[vector], muon=False)]
    optimizer = make([group | dict(weight_decay=0.1) for group in groups], lr=0.02)
    adamw = adamw([dict(params=[copy], weight_decay=0.1)], lr=0.02)
    expected, momentum = p.detach().clone(), torch.zeros(6, 9)
    for _ in range(3):
        p.grad, vector.grad = torch.randn(6, 9, generator=draw), torch.randn(5, generator=draw)
        copy.grad = vector.grad.clone()
        momentum = 0.95 * kept(momentum) + p.grad
        step = 0.2 * 3 * orthogonalize((p.grad + 0.95 * momentum).unsqueeze(0)).squeeze(0)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * step
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(p.detach(), expected)
        torch.testing.assert_close(vector, copy)


@pytest.mark.parametrize("make", [partial(Muon, fused=True), Muon8bit], ids=["32 bits", "8 bits"])
def test_muon_under_the_scale_of_fp16(make):
    """It takes the steps that it takes without one, and none where the gradient is not finite."""
    x, ends = torch.randn(6, 9), []
    for scaler in (torch.amp.GradScaler("cpu", enabled=scaled) for scaled in (False, True)):
        matrix, vector = torch.nn.Parameter(torch.zeros(6, 9)), torch.nn.Parameter(torch.zeros(5))
        groups = [dict(params=[p], muon=p is matrix, factor=1.0) for p in (matrix, vector)]
        loss_of = lambda x, _: (matrix * x).sum() + vector.sum()
        models, run = run_of(loss_of, make(groups, lr=1.0), scaler, TrainConfig(), 0.1)
        for scale, good in ((1, True), (float("inf"), False), (-3, True)):
            ((_, taken),) = train.train_step([run], [(scale * x, x, 1.0)], 1, models)
            assert bool(taken) == good
        ends.append((matrix, vector))
    torch.testing.assert_close(*ends)
    assert all(p.ne(0).all() for p in ends[0])
