"""Exercise 2: a gate for each token.

The paper's gate is one number a layer, the same for every token. Let each token choose: add "token"
to GATES in side.py, and give such a `SideNetwork` a `gates`, an nn.ModuleList with an `nn.Linear`
from the side's width to 1 for each layer, weight and bias 0. Then in `step`

    beta_i = sigmoid(gates[i - 1](h_g_{i-1}))     (B, T, 1)

and the rest is as it was. Here i counts from 1, as in the paper and in `step`. Why does it start
where the paper's gate starts?

    python train.py --gate token
"""

import pytest
import torch
from helpers import shaken, small_base

from qst import QST
from side import GATES, SideConfig

pytestmark = pytest.mark.skipif("token" not in GATES, reason='GATES has no "token" yet')


def make(gate):
    torch.manual_seed(0)
    return QST(small_base(), SideConfig(reduction=4, rank=4, gate=gate))


def test_it_starts_as_the_papers(idx):
    """With weights and biases of 0, every gate is a half; so the side networks compute the same."""
    token, scalar = make("token"), make("scalar")
    for gate in token.side.gates:
        assert gate.weight.abs().max() == 0 and gate.bias.abs().max() == 0
    missing, unexpected = token.side.load_state_dict(scalar.side.state_dict(), strict=False)
    assert set(unexpected) <= {"gamma"} and all(name.startswith("gates.") for name in missing)
    for model in (token, scalar):
        model.side.alpha.data.fill_(0.5)
    assert torch.allclose(token(idx)[0], scalar(idx)[0], atol=1e-5)


@torch.no_grad()
def test_every_token_has_its_own():
    """A step is layer((1 - beta) * z + beta * h_g), with beta from each token's h_g; and so with
    recomputing."""
    side = shaken(make("token")).side
    h_f, h_g = torch.randn(2, 5, 32), torch.randn(2, 5, 8)
    for i in (1, 2, 3):
        beta = torch.sigmoid(h_g @ side.gates[i - 1].weight.T + side.gates[i - 1].bias)
        assert beta.shape == (2, 5, 1) and beta.std() > 0.01
        mixed = (1 - beta) * side.downsample[i](h_f) + beta * h_g
        assert torch.allclose(side.step(i, h_f, h_g), side.layers[i - 1](mixed), atol=1e-5)


def test_it_learns_and_generates(idx, tmp_path):
    """Each gate has a gradient, also where steps are recomputed; with caches the same is generated;
    and it is saved."""
    model = shaken(make("token"))
    grads = []
    for checkpoint in (False, True):
        model.side.save_memory(checkpoint, 16)
        model.zero_grad()
        model.loss(idx, idx).backward()
        grads.append([gate.weight.grad.clone() for gate in model.side.gates])
    assert all(grad.abs().max() > 0 for grad in grads[0])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*grads))
    new = model.generate(idx[:1], max_new_tokens=5)
    for n in range(idx.shape[1], new.shape[1]):
        assert model(new[:, :n])[0][0, -1].argmax() == new[0, n]
    model.save_side(tmp_path)
    assert torch.equal(QST.from_side(small_base(), tmp_path)(idx)[0], model(idx)[0])
