"""Exercise 4: LST from two flags.

Ladder side tuning (arXiv 2206.06522) came before QST: a side network with linear downsamplers that
predicts from its own state alone. `--method lst` also stores the base unquantized, and is 8 times
narrower; leave that aside. Which two flags of `--method qst` make its side network? Write them
below; then find in side.py where `--method lst` does the same.
"""

import pytest
import torch
from helpers import small_base

import train
from qst import QST
from side import SideConfig

FLAGS = ""  # your two flags, such as "--gate channel --final_norm"

pytestmark = pytest.mark.skipif(not FLAGS, reason="FLAGS is empty yet")


def test_two_flags_are_lst(idx):
    """With the same seed, side network and predictions are those of --method lst."""
    words = FLAGS.split()
    assert sum(word.startswith("--") for word in words) == 2 and "--method" not in FLAGS
    cfg = train.resolve(train.parse_args(words))
    models = []
    for settings in (vars(train.side_config(cfg)), dict(method="lst")):
        torch.manual_seed(0)
        models.append(QST(small_base(), SideConfig(**settings | dict(reduction=4))))
    mine, lst = models
    assert mine.side.config.method == "qst"
    own, theirs = mine.side.state_dict(), lst.side.state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}
    assert torch.equal(mine(idx)[0], lst(idx)[0])
