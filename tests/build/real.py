"""The project's own tests, for each piece those that use it."""

from functools import partial
from types import SimpleNamespace

import reference
import test_optimizer
import test_qst
import test_quant
import test_side
import torch
from helpers import small_base
from plug import PIECES, plugged

from data.run.muon import Muon

FP32, BF16 = torch.float32, torch.bfloat16
BYTES = [(test_quant.test_bytes_equal_bitsandbytes, name, "nf4")
         for name in ("normal", "odd", "zeros")]
EQUATIONS = test_side.test_the_forward_pass_is_the_papers_equations
ONLY_ALPHA = (test_qst.test_at_step_0_only_alpha_has_a_gradient,)
SIZE = test_quant.test_the_size_of_weights_does_not_matter

TESTS = {  # of a piece: tests with their arguments
    "nf4_codebook": [(test_quant.test_nf4_is_derived_from_normal_quantiles,),
                     (test_quant.test_error_on_normal_weights,)],
    "quantize_blocks": [*BYTES, (SIZE, -80, False, "nf4"),
                        (test_quant.test_error_on_normal_weights,)],
    "pack_codes": BYTES,
    "double_quantize": [(test_quant.test_absmax_codes_are_the_nearest,),
                        (test_quant.test_bits_per_weight,), (SIZE, -80, True, "nf4")],
    "dequantize": [(test_quant.test_reads_bitsandbytes, name, kind, scale, dtype)
                   for name in ("normal", "odd") for kind in ("nf4", "fp4")
                   for scale in ("single", "double") for dtype in (FP32, BF16)],
    "FrozenLinear": [*((test_quant.test_linear, (33, 130), bias, dtype)
                       for bias in (True, False) for dtype in (FP32, BF16)),
                     (test_quant.test_layers_share_the_scratch_buffer,),
                     (test_quant.test_backward_keeps_no_input,)],
    "low_rank": [(EQUATIONS, "lora"), (EQUATIONS, "adapter")],
    "pooling": [(EQUATIONS, "maxpool"), (EQUATIONS, "avgpool")],
    "gate": [(EQUATIONS, "linear"), ONLY_ALPHA],
    "side_step": [(EQUATIONS, "adapter"), ONLY_ALPHA,
                  (test_qst.test_the_base_is_frozen_and_keeps_nothing,)],
    "mix": [(EQUATIONS, "lora"), ONLY_ALPHA,
            *((test_qst.test_training_starts_exactly_at_the_base, family, "paper")
              for family in ("llama", "opt")),
            (test_side.test_a_factor_near_0_is_not_lost_in_bf16,)],
    "answer_loss": [(test_qst.test_loss_counts_the_targets_only,),
                    (test_qst.test_master_weights_stay_in_fp32, BF16)],
    "training_step": [(test_optimizer.test_accumulated_gradients_are_those_of_the_whole_batch,),
                      *((test_optimizer.test_the_gradient_is_clipped_to_its_own_norm, clip, False)
                        for clip in (0.0, 0.01, 100.0))],
    "newton_schulz": [*((test_optimizer.test_orthogonalizing, shape)
                        for shape in ((12, 40), (40, 12))),
                      (test_optimizer.test_muons_steps, partial(Muon, fused=True),
                       torch.optim.AdamW, torch.clone)],
}
CASES = [(piece, *case) for piece in PIECES for case in TESTS[piece]]


def name_of(number):
    piece, test, *_ = CASES[number]
    return f"{piece}-{test.__name__}-{number}"


def pieces_with(piece, function):
    """All pieces: one, and the project's own for the others."""
    own = {name: getattr(reference, name) for name in PIECES}
    return SimpleNamespace(**own | {piece: function})


def run_real(function, piece, test, *args):
    """Run a test of the project with a piece in its place."""
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    given = dict(zip([name for name in names if name not in ("base", "idx")], args, strict=True))
    with plugged(pieces_with(piece, function)):
        if "base" in names:
            given["base"] = small_base()
        if "idx" in names:
            given["idx"] = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        try:
            test(**given)
        except AssertionError as error:
            what = " ".join(test.__doc__.split())
            line = (str(error).strip() or "assertion").splitlines()[0]
            place = f"the project's {test.__module__}.py::{test.__name__}"
            raise AssertionError(f"{place} fails ({line}). It asks: {what}") from None
