"""--compile: how many graphs, and that they compute the same."""

from dataclasses import replace

import pytest
import torch
from helpers import shaken, small_base
from torch._dynamo.utils import counters

from data.settings.methods import FAST
from qst import SharedBase, add_trainable
from quant import unpack_buffers
from side import SideConfig

RUNS = {
    "paper": SideConfig(reduction=4, rank=2), "qlora": SideConfig(method="qlora", rank=2),
    "fast": SideConfig(**FAST | dict(reduction=4, rank=2, every=1)),
}


@pytest.fixture
def graphs(monkeypatch):
    """What Dynamo hands to a compiler: the number of nodes of each graph, none of them compiled."""
    found = []

    def backend(graph, inputs):
        found.append(len(graph.graph.nodes))
        for node in graph.graph.nodes:  # inductor takes what attention keeps for whole tensors
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                assert all(arg.meta["example_value"].is_contiguous() for arg in node.args[:2])
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=backend, **how))
    torch._dynamo.reset()
    counters.clear()
    unpack_buffers.clear()
    yield found
    torch._dynamo.reset()


def compiled(name, checkpoint, n_layer):
    base = small_base(n_layer=n_layer, n_embd=64)  # whole blocks: nothing is padded
    model = shaken(add_trainable(base, replace(RUNS[name])))
    if name == "qlora":
        base.checkpoint = checkpoint
    else:
        model.side.save_memory(checkpoint, 8)
    return model, SharedBase([model], compiled=True)


def check(name, checkpoint, n_layer, graphs, *shapes):
    """One graph, of all layers, for all lengths and batches."""
    model, shared = compiled(name, checkpoint, n_layer)
    for shape in ((2, 19), (2, 24), (5, 17), *shapes):
        h = shared.compute(idx := torch.randint(3, 61, shape))[0]
        assert len(graphs) == 1 + (shape in shapes), (shape, graphs)
        torch.testing.assert_close(h, model.hidden(idx))
    assert not counters["graph_break"] and counters["frames"]["total"] == len(graphs)
    assert min(graphs) > 50 * n_layer  # nodes


@pytest.mark.parametrize("name, checkpoint", [
    ("paper", False), ("fast", True), ("qlora", False), ("qlora", True),
])
def test_one_graph(name, checkpoint, graphs):
    """With and without recomputing. Only a batch of 1 has a graph of its own."""
    check(name, checkpoint, 2, graphs, *[(1, 21)] * (name == "fast" and checkpoint))


def test_one_graph_for_many_layers(graphs):
    """Dynamo compiles a piece of code anew 8 times at most: a part that each layer has, and that
    is compiled alone, would not be from the ninth on."""
    check("paper", True, 9, graphs)
