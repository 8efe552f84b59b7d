"""The optimizer: learning rates, groups, accumulated gradients, and AdamW in 8 bits."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import small_base

import train
from data import InputError
from data.run.adamw8bit import AdamW8bit, decode, encode
from data.run.muon import Muon, Muon8bit, orthogonalize
from data.run.optim import make_optimizer
from data.run.resume import load_moments
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


def test_adamw_in_8_bits():
    """Its steps are AdamW's within a few percent, decay and the groups' learning rates included."""
    torch.manual_seed(0)
    target, start = torch.randn(40, 30), torch.randn(40, 30)
    values = []
    for make in (torch.optim.AdamW, AdamW8bit):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([dict(params=[p], weight_decay=0.1)], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            ((p - target) ** 2 * torch.linspace(1e-2, 1, 30)).sum().backward()
            optimizer.step()
        values.append(p.detach() - start)
    assert values[0].abs().mean() > 0.5
    assert (values[1] - values[0]).norm() < 0.05 * values[0].norm()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_adamw_in_8_bits_is_near_adamw(seed):
    """On a regression it ends 0.15 to 0.17 from AdamW's weights. With bitsandbytes' AdamW8bit it is
    0.21 to 0.23, with the root in a signed code book 0.32 to 0.38."""
    torch.manual_seed(0)
    inputs, right, ends = torch.randn(512, 64), torch.randn(64, 32), []
    for make in (torch.optim.AdamW, AdamW8bit):
        torch.manual_seed(seed)
        p = torch.nn.Parameter(0.1 * torch.randn(64, 32))
        optimizer, draw = make([dict(params=[p], weight_decay=0.0)], lr=1e-3), torch.Generator()
        draw.manual_seed(seed)
        for _ in range(300):
            some = inputs[torch.randint(0, 512, (32,), generator=draw)]
            p.grad = None
            (some @ p - some @ right).square().mean().backward()
            optimizer.step()
        ends.append(p.detach())
    assert (ends[1] - ends[0]).norm() < 0.19


def test_the_8_bit_moments_never_divide_by_zero():
    """A gradient a millionth of its block's largest takes a step as AdamW's, and not a leap."""
    p = torch.nn.Parameter(torch.zeros(256))
    optimizer = AdamW8bit([dict(params=[p])], lr=0.01)
    for i in range(20):
        p.grad = torch.full((256,), 1e-9)
        p.grad[0] = 1.0 if i % 2 else -0.9
        optimizer.step()
    assert p.isfinite().all() and p.abs().max() < 20 * 0.01 * 1.1
    assert (optimizer.state[p]["unsigned_root"] > 0).all()


def test_8_bit_moments_are_loaded_as_such():
    """torch's own load_state_dict would make fp32 of them, four times as large."""
    made = []
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(300))
        made.append((p, AdamW8bit([dict(params=[p])], lr=0.01)))
    (p, optimizer), (again, loaded) = made
    p.grad = torch.randn(300)
    optimizer.step()
    load_moments(loaded, {"0": optimizer.state_dict()["state"][0]}, "state")
    for name, moment in optimizer.state[p].items():
        kept = loaded.state[again][name]
        assert kept == moment if name == "step" else torch.equal(kept, moment)
    assert loaded.state[again]["mean"].dtype == torch.uint8


def test_an_earlier_root_is_loaded():
    """It had a signed code book and another name. It is the same root in today's code book."""
    root, p = torch.rand(10, 30).add_(0.01), torch.nn.Parameter(torch.ones(10, 30))
    state = {"step": 7}
    encode(state, "mean", root - 0.5)
    encode(state, "root", root)
    assert set(state) == {"step", "mean", "mean_absmax", "root", "root_absmax"}
    optimizer = AdamW8bit([dict(params=[p])], lr=0.01)
    load_moments(optimizer, {"0": state}, "state")
    loaded = optimizer.state[p]
    assert torch.equal(loaded["mean"], state["mean"]) and loaded["step"] == 7
    assert set(loaded) == {"step", "mean", "mean_absmax", "unsigned_root", "unsigned_root_absmax"}
    earlier = decode(state, "root", p)
    assert torch.allclose(earlier, root, atol=0.008)
    assert torch.allclose(decode(loaded, "unsigned_root", p), earlier, atol=0.004)
    with pytest.raises(InputError, match="the moments of parameter 0 are not of this optimizer"):
        load_moments(optimizer, {"0": state | {"root": state["root"][1:]}}, "state")


def test_the_levels_of_a_moment():
    """Muon's momentum has even steps, of which one is 0; a root is never 0, the divisor."""
    state, momentum = {}, torch.tensor([-127.0, -64.2, 0, 0.9, 127])
    encode(state, "momentum", momentum)
    assert torch.allclose(decode(state, "momentum", momentum), momentum.round())
    assert state["momentum"].tolist() == [1, 64, 128, 129, 255]
    root = torch.tensor([0.0, 0.3, 1, 100, 255]) ** 2
    encode(state, "unsigned_root", root)
    expected = torch.tensor([1.0, 1, 1, 100, 255]) ** 2
    assert torch.allclose(decode(state, "unsigned_root", root), expected)


@pytest.mark.parametrize("make", [AdamW8bit, Muon8bit])
def test_moments_in_8_bits_on_meta_tensors(make):
    """Without values, a step keeps what it keeps with them."""
    kept = []
    for device in ("cpu", "meta"):
        matrix, vector = (torch.nn.Parameter(torch.ones(n, device=device)) for n in ((40, 9), (5,)))
        optimizer = make([dict(params=[matrix], muon=True), dict(params=[vector], muon=False)], 0.1)
        for _ in range(2):
            matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
            optimizer.step()
        kept.append([(name, value.shape, value.dtype) for p in (matrix, vector)
                     for name, value in optimizer.state[p].items() if name != "step"])
    assert kept[0] == kept[1] and len(kept[0]) == (8 if make is AdamW8bit else 6)


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
