"""Checks of the other eight pieces: the side network, and its training."""

from functools import partial

import reference
import torch
from checks import check_of, expect, expect_like, expect_near

from data import IGNORE_INDEX


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@check_of("low_rank", "write the shapes in a row: (..., C), (..., rank), (..., c).")
def check_low_rank(low_rank):
    h_f, down, up = draw(2, 5, 32), draw(4, 32, seed=1), draw(8, 4, seed=2)
    silu, nothing = torch.nn.SiLU(), torch.nn.Identity()
    plain = reference.low_rank(h_f, down, up, nothing)
    expect_near("with SiLU, z", low_rank(h_f, down, up, silu),
                reference.low_rank(h_f, down, up, silu), [
        ("the nonlinearity is missing.", plain),
        ("the nonlinearity is behind both matrices, and must be between them.", silu(plain)),
        ("the nonlinearity is before both matrices, and must be between them.",
         reference.low_rank(silu(h_f), down, up, nothing))])
    expect_near("without a nonlinearity, z", low_rank(h_f, down, up, nothing), plain)


@check_of("pooling", "what are the neighbours of channel 5 if `reduction` is 4? 4, 6 and 7.")
def check_pooling(pooling):
    h_f = draw(2, 6, 32) - 1
    apart = h_f.view(2, 6, 4, 8).transpose(2, 3).reshape(2, 6, 32)
    for kind, other in (("maxpool", "avgpool"), ("avgpool", "maxpool")):
        expect_near(f'with "{kind}", z', pooling(h_f, 4, kind),
                    reference.pooling(h_f, 4, kind), [
            ("channels that are 8 apart are pooled, and not neighbours.",
             reference.pooling(apart, 4, kind)),
            (f'"{kind}" gives what "{other}" must give.', reference.pooling(h_f, 4, other)),
            ("the largest magnitude is taken, and not the maximum.",
             reference.pooling(h_f.abs(), 4, kind))])


@check_of("gate", "with a large gamma, beta is near 1: which of z and h_g must be left then?")
def check_gate(gate):
    z, h_g, gamma = draw(2, 5, 8), draw(2, 5, 8, seed=1), torch.tensor(0.8, requires_grad=True)
    found, right = gate(z, h_g, gamma), reference.gate(z, h_g, gamma)
    raw = reference.gate(z, h_g, torch.logit(gamma.detach()))
    expect_near("the mix", found, right, [
        ("the weights of z and h_g are swapped: beta belongs to h_g.",
         reference.gate(h_g, z, gamma)),
        ("gamma itself is the weight, and beta = sigmoid(gamma) must be.", raw),
        ("z and h_g are added without weights.", z + h_g),
        ("1 - beta is missing: z has the weight 1.",
         right + z - reference.gate(z, torch.zeros_like(z), gamma))])
    expect(found.requires_grad, "gamma gets no gradient: compute with the tensor, not its item().")
    grads = [torch.autograd.grad(out.square().sum(), gamma)[0] for out in (found, right)]
    expect_near("the gradient of gamma", *grads, tolerance=1e-4)
    expect_near("with gamma = 50, the mix", gate(z, h_g, torch.tensor(50.0)), h_g)


@check_of("side_step", "write down for i = 1 which entry of each of the three lists belongs to it. "
          "Two have N entries, and one has N + 1.")
def check_side_step(side_step):
    tables = [draw(8, 32, seed=i) / 6 for i in range(4)]
    downsample = [lambda h, m=m: h @ m.T for m in tables]
    layers = [lambda x, k=k: x + torch.sin(x * k) for k in (1.0, 2.0, 3.0)]
    gamma, h_f, h_g = torch.tensor([-2.0, 0.5, 2.0]), draw(2, 5, 32), draw(2, 5, 8, seed=9)
    gate, right = reference.gate, partial(reference.side_step, gate=reference.gate, h_g=h_g)
    lists = dict(downsample=downsample, gamma=gamma, layers=layers)
    for i in (1, 2, 3):
        with_ = lambda i=i, **other: right(i, h_f, **lists | other)
        expected, back = with_(), [None] * i + [downsample[i - 1]]
        z = downsample[i](h_f)
        found = side_step(i, h_f, h_g, downsample, gate, gamma, layers)
        expect_near(f"h_g_{i}", found, expected, [
            ("downsample_{i-1} is used: downsample[0] is the embedding's.",
             with_(downsample=back)),
            ("gamma of another layer is used: gamma_i is gamma[i - 1].",
             with_(gamma=gamma.roll(-1))),
            ("layer_{i+1} is used: layer_i is layers[i - 1].", with_(layers=layers[1:] * 3)),
            ("gamma_{i+1} and layer_{i+1} are used: both lists begin with 1's.",
             with_(gamma=gamma.roll(-1), layers=layers[1:] * 3)),
            ("h_g is added to the layer's result: the layer has its own residual connection.",
             expected + h_g),
            ("the layer is missing: this is the gate's result.", gate(z, h_g, gamma[i - 1])),
            ("the gate is behind the layer, and must be in front of it.",
             gate(layers[i - 1](z), h_g, gamma[i - 1])),
            ("the gate is missing: the layer gets z + h_g.", layers[i - 1](z + h_g)),
            ("z and h_g are swapped in the gate.", layers[i - 1](gate(h_g, z, gamma[i - 1])))])


@check_of("mix", "which bits must come out at alpha = 1, where training starts? In bf16, the "
          "number just below 1 is 0.996: where must 1 - alpha be computed?")
def check_mix(mix):
    h_f, h_g, table = draw(2, 5, 32), draw(2, 5, 8, seed=1), draw(32, 8, seed=2)
    upsample, alpha = lambda h: h @ table.to(h.dtype).T, torch.tensor(0.7, requires_grad=True)
    right = partial(reference.mix, h_f, h_g, upsample=upsample)
    found = mix(h_f, h_g, alpha, upsample)
    expect_near("h", found, right(alpha), [
        ("the weights are swapped: alpha belongs to h_f.", right(1 - alpha)),
        ("alpha is the weight itself: there is no sigmoid here.", right(torch.sigmoid(alpha))),
        ("h_f and upsample(h_g) are added without weights.", h_f + upsample(h_g)),
        ("1 - alpha is missing: upsample(h_g) has the weight 1.", alpha * h_f + upsample(h_g))])
    expect(found.requires_grad, "alpha gets no gradient: compute with the tensor, not its item().")
    equal = torch.equal(mix(h_f, h_g, torch.tensor(1.0), upsample), h_f)
    expect(equal, "at alpha = 1 the result is not h_f bit for bit.")
    expect_near("at alpha = 1.5, h", mix(h_f, h_g, torch.tensor(1.5), upsample),
                right(torch.tensor(1.5)))
    zero, alpha = torch.zeros_like(h_f).bfloat16(), torch.tensor(0.999)
    half = mix(zero, h_g.bfloat16(), alpha, upsample)
    expect_like("in bf16, h", half, zero)
    expect(half.abs().max() > 0, "in bf16, an alpha of 0.999 is rounded to 1, and the side network "
           "is lost: subtract in fp32, and cast 1 - alpha.")


@check_of("answer_loss", "count by hand: how many of the targets are not -100?")
def check_loss(answer_loss):
    logits, targets = draw(3, 6, 11), torch.arange(18).view(3, 6) % 11
    targets[0, :5] = targets[1, :2] = IGNORE_INDEX
    right, n = reference.answer_loss, 18 - 7
    rows = [right(row, target) for row, target in zip(logits, targets)]
    expect_near("the loss", answer_loss(logits, targets), right(logits, targets), [
        ("the sum is divided by all positions, and must be by those that count.",
         right(logits, targets) * n / 18),
        ("the losses are added, and not averaged.", right(logits, targets) * n),
        ("targets are shifted once more: targets[b, t] belongs to logits[b, t] already.",
         right(logits[:, :-1], targets[:, 1:])),
        ("each sequence has the same weight, and each token that counts must have.",
         sum(rows) / 3)])
    expect_near("of logits in bf16, the loss", answer_loss(logits.bfloat16(), targets),
                right(logits.bfloat16(), targets), tolerance=1e-6)


class Steps(torch.optim.SGD):
    """SGD that counts its steps."""

    taken = 0

    def step(self):
        self.taken += 1
        return super().step()


@check_of("training_step", "five things in order: gradients of every batch, the limit of their "
          "norm, the learning rates, one step, and no gradients left.")
def check_step(training_step):
    values, x, y = (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])), draw(2), draw(2, seed=1)

    def after(step, batches, clip, times=1, factor=2.0, rate=0.1):
        p, q = (torch.nn.Parameter(v.clone()) for v in values)
        groups = [dict(params=[p], factor=1.0), dict(params=[q], factor=factor)]
        optimizer = Steps(groups, lr=123.0, fused=True)
        loss_of = lambda idx, targets: ((p - idx) * (q - targets)).sum()
        for _ in range(times):
            optimizer.taken = 0
            loss = step(loss_of, optimizer, batches, rate, clip)
        return torch.cat([p, q]).detach(), loss, optimizer, [p, q]

    one, two = [(x, y, 1.0)], [(x, y, 0.25), (y, x, 0.75)]
    right = partial(after, reference.training_step)
    for batches, clip in ((one, 0), (one, 0.5), (two, 0), (two, 0.5)):
        expected, loss_right, *_ = right(batches, clip)
        found, loss, optimizer, parameters = after(training_step, batches, clip)
        n, steps = len(batches), optimizer.taken
        expect(steps > 0, "the optimizer takes no step.")
        expect(steps == 1, f"the optimizer takes {steps} steps for {n} batches: it must take one, "
               "with the gradients of all.")
        shares = [(*pair, 1.0) for *pair, _ in batches]
        expect_near(f"with {n} batches and grad_clip = {clip}, the parameters", found, expected, [
            ("the optimizer's own learning rate is used, and not the given one.",
             right(batches, clip, rate=123.0)[0]),
            ('a group\'s factor is ignored: its rate is learning_rate * group["factor"].',
             right(batches, clip, factor=1.0)[0]),
            ("share is ignored: multiply each batch's loss by it.", right(shares, clip)[0]),
            ("grad_clip = 0 must mean no limit.", torch.cat(values)),
            ("only the last batch counts: gradients are cleared in between.",
             right(batches[-1:], clip)[0]),
            ("the gradients are not clipped.", right(batches, 0)[0])])
        left = any(p.grad is not None and p.grad.any() for p in parameters)
        expect(not left, "gradients are left for the next step: clear them.")
        expect(loss is not None, "it returns nothing, and must return the loss.")
        expect_near("the loss", torch.as_tensor(loss), loss_right, [
            ("the loss is that of the last batch, and must be the sum of all with their shares.",
             reference_loss(values, batches[-1]))])
        expect(not torch.as_tensor(loss).requires_grad, "the loss has a graph: detach it.")
    expect_near("after three steps, the parameters", after(training_step, two, 0, 3)[0],
                right(two, 0, 3)[0])


def reference_loss(values, batch):
    (p, q), (x, y, share) = values, batch
    return ((p - x) * (q - y)).sum() * share


@check_of("newton_schulz", "one singular value s goes to a s + b s^3 + c s^5: try it on s = 0.01, "
          "1 and 5. Which s does it need to begin with?")
def check_newton_schulz(newton_schulz):
    for shape in ((12, 40), (40, 12), (8, 8)):
        matrix = draw(*shape) * 10
        found, right = newton_schulz(matrix.clone()), reference.newton_schulz(matrix)
        expect_like(f"of a {shape} matrix, the result", found, right)
        s = torch.linalg.svdvals(found) if found.isfinite().all() else torch.tensor([torch.inf])
        low, high = s.min().item(), s.max().item()
        expect(high < 1e3, "it does not converge: divide by the norm first, and check the signs.")
        sizes = f"singular values are between {low:.2g} and {high:.2g}, and must be near 1"
        expect(shape[0] == shape[1] or (0.65 < low and high < 1.25), f"{sizes}: are the norm, the "
               "coefficients and the number of steps right?")
        expect_near("the matrix", found, right, tolerance=1e-3)
    zeros = newton_schulz(torch.zeros(3, 5))
    expect(zeros.isfinite().all(), "a zero matrix becomes NaN, and the first gradients are zero.")
