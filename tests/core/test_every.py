"""--every: a side network that reads every k-th layer of the base; --variant fast."""

from dataclasses import replace

import pytest
import torch
from account import AccountConfig, memory_report
from helpers import shaken, small_base, small_config

import train
from data import InputError
from data.settings.methods import FAST, layers_per_side
from model import PRESETS, positions_and_mask, rotary_table
from qst import QST
from side import SideConfig, SideNetwork
from train import TrainConfig


@pytest.mark.parametrize("read_embedding", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_side_layer_i_reads_the_state_after_base_layer_i_plus_1_times_k(every, read_embedding, idx):
    """The forward pass is QST §3.2 on these states alone, written out; h_g_0 is the embedding's,
    or 0. What is standardized is by the statistics of the states that are read."""
    base = small_base(n_layer=6)
    config = SideConfig(
        reduction=4, downsample="linear", gate="sum", mix="residual", standardize=True,
        every=every, read_embedding=read_embedding,
    )
    model = shaken(QST(base, config))
    model.calibrate(idx.tolist())
    side = model.side
    assert len(side.layers) == 6 // every
    assert len(side.downsample) == 6 // every + read_embedding

    positions, mask = positions_and_mask(idx)
    states = [base.embed_tokens(idx)]
    for layer in base.layers:
        states.append(layer(states[-1], mask, rotary_table(base.config, positions, torch.float32)))
    read = states[::every]
    plain = QST(base, replace(config, every=1))
    plain.calibrate(idx.tolist())
    h_g = torch.zeros(1)
    for i, h_f in enumerate(read):
        h_f = (h_f - plain.side.mean[i * every]) * plain.side.scale[i * every]
        if i > 0:
            rope = rotary_table(side.model_config, positions, torch.float32)
            z = h_f @ side.downsample[i - 1 + read_embedding].down.weight.T
            h_g = side.layers[i - 1](z + h_g, mask, rope)
        elif read_embedding:
            h_g = h_f @ side.downsample[0].down.weight.T
    expected = base.norm(states[-1]) + h_g @ side.upsample.weight.T
    assert torch.allclose(model.hidden(idx), expected, atol=1e-4 * expected.abs().max().item())


def test_what_does_not_fit_is_refused():
    """In a sentence that names the flag and says what to give."""
    config = small_config(n_layer=30)
    with pytest.raises(InputError, match="--every 7 does not divide 30 layers: choose one of 1, 2"):
        SideNetwork(config, SideConfig(reduction=4, every=7))
    with pytest.raises(InputError, match="--every -1 must be at least 0"):
        SideConfig(every=-1)
    with pytest.raises(InputError, match="leave out --read_embedding false"):
        SideConfig(share_first=True, read_embedding=False)


def test_as_few_steps_as_fit_but_six():
    """--every 0: the study's six steps for 30 layers; what a checkpoint says is the number."""
    found = {n: layers_per_side(0, n) for n in (3, 5, 12, 22, 24, 30, 31, 32, 40, 80)}
    assert found == {3: 1, 5: 1, 12: 2, 22: 2, 24: 4, 30: 5, 31: 1, 32: 4, 40: 5, 80: 10}
    model = QST(small_base(n_layer=12), SideConfig(reduction=4, every=0))
    assert model.side.config.every == 2 and len(model.side.layers) == 6


def test_everything_falls():
    """Of fewer steps, the parameters, the optimizer, what backward keeps, the operations."""
    cfg = AccountConfig(method="qst", batch_size=3, sequence_len=12, reduction=4)
    reports = [memory_report(replace(cfg, every=k), small_config(n_layer=6)) for k in (1, 2, 3, 6)]
    for name in ("optimizer_bytes", "activations_bytes", "total_bytes", "trainable_parameters",
                 "flops_per_token"):
        numbers = [report[name] for report in reports]
        assert numbers == sorted(set(numbers), reverse=True), name


def test_the_recipe_has_the_parameters_of_the_study():
    """623,016 on SmolLM2-135M, in six steps; LLaMA-2-70B has eight."""
    with torch.device("meta"):
        side = SideNetwork(PRESETS["smollm2-135m"], SideConfig(**FAST))
        large = SideNetwork(PRESETS["llama-2-70b"], SideConfig(**FAST))
    assert sum(p.numel() for p in side.parameters()) == 623_016 and len(large.layers) == 8


def test_fast_is_the_recipe():
    """With its optimizer and learning rate; a flag of the user's wins, also one that says what the
    paper does; and other methods do not take it."""
    real = "--base x --data y --variant fast".split()
    resolved = lambda *words: train.resolve(train.parse_args([*real, *words]))
    cfg = resolved()
    assert (cfg.optimizer, cfg.learning_rate, cfg.reduction) == ("muon", 5e-3, 8)
    assert {name: getattr(cfg, name) for name in FAST} == FAST
    words = "--learning_rate 1e-4 --optimizer adamw --gate scalar --standardize false --every 5"
    cfg = resolved(*words.split())
    assert (cfg.learning_rate, cfg.optimizer, cfg.gate) == (1e-4, "adamw", "scalar")
    assert not cfg.standardize and cfg.every == 5 and cfg.mix == "residual"
    small = train.resolve(TrainConfig(variant="fast"))  # the embedded default
    assert (small.optimizer, small.learning_rate, small.reduction) == ("muon", 1e-2, 4)
    paper = train.resolve(TrainConfig())
    assert (paper.optimizer, paper.learning_rate, paper.every) == ("adamw", 1e-2, 1)
    with pytest.raises(InputError, match="leave out --mix and --variant"):
        resolved("--method", "lst")
