"""The project's own code passes all checks, and wrong code, such as students write, fails each with
a message that names the mistake. Read this file after you have built your own."""

import re
import runpy
from functools import partial
from pathlib import Path

import checks_quant  # noqa: F401  these two fill CHECKS
import checks_side  # noqa: F401
import numpy as np
import pytest
import reference
import wrong
from checks import CHECKS, HINTS, problem
from helpers import curves
from plug import PIECES
from real import CASES, pieces_with, run_real

import quant
import side
import train
from data import InputError

script = runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="script")


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_the_projects_own_code_passes(number):
    piece = PIECES[number]
    function = getattr(reference, piece)
    assert problem(piece, partial(CHECKS[piece], function)) is None
    for name, *case in CASES:
        if name == piece:
            assert problem(piece, partial(run_real, function, piece, *case)) is None, case



WRONG = [  # a wrong function, the piece that it stands for, and a part of the message
    ("even_levels", "nf4_codebook", "evenly spaced"),
    ("no_zero", "nf4_codebook", "no level is exactly 0"),
    ("not_divided", "nf4_codebook", "largest level is 1.848"),
    ("eight_below", "nf4_codebook", "7 levels are above 0 and 8 below"),
    ("in_fp64", "nf4_codebook", "is float64, and must be float32"),
    ("largest_value", "quantize_blocks", "largest value of a block, and not the largest magnitude"),
    ("level_below", "quantize_blocks", "the level below its value, and not of the nearest"),
    ("one_scale", "quantize_blocks", r"absmax has the shape \(1,\), and must have \(6,\)"),
    ("zero_by_zero", "quantize_blocks", "in a block of zeros"),
    ("a_bit_more", "quantize_blocks", "is something added to absmax"),
    ("sorted_search", "quantize_blocks", "this code book is not sorted"),
    ("int64_codes", "quantize_blocks", "codes is int64, and must be uint8"),
    ("low_half_first", "pack_codes", "in the low four bits, and must be in the high"),
    ("only_pairs", "pack_codes", r"65 codes has the shape \(32,\), and must have \(33,\)"),
    ("nothing_subtracted", "double_quantize", "not subtracted before"),
    ("blocks_of_64", "double_quantize", r"has the shape \(10,\).* blocks here have 256 values"),
    ("smallest_subtracted", "double_quantize", "the smallest absmax, and must be the mean"),
    ("halves_swapped", "dequantize", "each pair of weights is swapped"),
    ("no_offset", "dequantize", "offset is not added"),
    ("one_too_many", "dequantize", r"has the shape \(40002,\), and must have \(40001,\)"),
    ("KeepsX", "FrozenLinear", "x is kept for backward"),
    ("KeepsW", "FrozenLinear", "unpacked W is kept for backward"),
    ("Transposed", "FrozenLinear", "grad times the transpose of W"),
    ("NoBias", "FrozenLinear", "y has no bias"),
    ("activation_behind", "low_rank", "behind both matrices"),
    ("untransposed", "low_rank", "it stops with RuntimeError"),
    ("far_channels", "pooling", "8 apart are pooled, and not neighbours"),
    ("gate_swapped", "gate", "swapped: beta belongs to h_g"),
    ("no_sigmoid", "gate", r"beta = sigmoid\(gamma\) must be"),
    ("constant_gate", "gate", "gamma gets no gradient"),
    ("counted_from_0", "side_step", r"downsample_\{i-1\} is used"),
    ("next_gamma", "side_step", "gamma of another layer"),
    ("one_more_residual", "side_step", "its own residual connection"),
    ("mix_swapped", "mix", "alpha belongs to h_f"),
    ("as_released", "mix", "there is no sigmoid here"),
    ("rounded_alpha", "mix", "subtract in fp32"),
    ("all_positions", "answer_loss", "divided by all positions"),
    ("shifted_again", "answer_loss", "shifted once more"),
    ("in_16_bits", "answer_loss", "bf16, the loss is bfloat16, and must be float32"),
    ("gradients_left", "training_step", "gradients are left"),
    ("step_per_batch", "training_step", "takes 2 steps for 2 batches"),
    ("no_shares", "training_step", "share is ignored"),
    ("no_factor", "training_step", "factor is ignored"),
    ("never_clipped", "training_step", "are not clipped"),
    ("diverges", "newton_schulz", "does not converge"),
    ("too_few_steps", "newton_schulz", "singular values are between"),
    ("zero_by_its_norm", "newton_schulz", "a zero matrix becomes NaN"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_code_fails_with_its_mistake(number):
    """And with the piece's name and hint."""
    name, piece, part = WRONG[number]
    message = problem(piece, partial(CHECKS[piece], getattr(wrong, name)))
    assert message and re.search(part, message), (name, message)
    assert message.startswith(f"{piece}: ") and message.endswith(HINTS[piece])


def test_training_with_the_pieces_is_training(cfg, tmp_path):
    """A run with the pieces in place calls all but the pooling, and has the losses of a run without
    them; nothing stays in place afterwards."""
    before = [vars(module).copy() for module in (quant, side, train)]
    settings = cfg | dict(optimizer="muon", max_iters=4, gradient_accumulation_steps=2)
    losses, calls = [], None
    for name in ("without", "with"):
        own = train.TrainConfig(**settings | dict(out_dir=str(tmp_path / name)))
        if name == "with":
            _, calls = script["run"](own, reference)
        else:
            train.main(own)
        losses.append(curves(own.out_dir))
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert {piece for piece in PIECES if not calls[piece]} == {"pooling"}
    assert [vars(module).copy() for module in (quant, side, train)] == before


def test_training_with_empty_pieces_is_refused():
    """By their names; --sweep is refused too."""
    def gate():
        raise NotImplementedError

    with pytest.raises(InputError, match="not written yet: gate. Run"):
        script["run"](train.TrainConfig(), pieces_with("gate", gate))
    with pytest.raises(InputError, match="--sweep trains several"):
        script["run"](train.TrainConfig(sweep="seed=1,2"), reference)
