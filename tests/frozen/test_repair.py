"""--repair: closed-form low-rank branches that mend what 4 bits broke."""

import pytest
import torch
from account import AccountConfig, memory_report
from helpers import FIXTURES, each_family, shaken, small_config

import train
from data import InputError
from data.formats.safetensors import read_header
from data.formats.save import save_pretrained
from data.frozen import repair
from data.frozen.fingerprint import differences, fingerprint
from model import Transformer, from_pretrained
from qst import QST, add_trainable
from quant import Linear4bit
from side import SideConfig
from train import TrainConfig

TEXTS = [[1, *range(3 + i, 30 + 2 * i)] for i in range(6)]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "base")


def write(folder, family="llama"):
    torch.manual_seed(0)
    model = Transformer(small_config(family))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    save_pretrained(model, folder)
    return folder


def repaired(folder, rank=8):
    base = from_pretrained(folder, "nf4", torch.float32)
    repair.mend(base, folder, TEXTS, rank)
    return base


def test_the_branch_is_the_best_of_its_rank():
    """What is left of the error, as inputs of the channels' sizes see it, is what the discarded
    singular values of E diag(s) say; unweighted, more is left."""
    torch.manual_seed(0)
    error, size = torch.randn(40, 60), torch.rand(60) ** 4
    size[7] = 0
    down, up = repair.low_rank_part(error, size, 12)
    assert down.shape == (12, 60) and up.shape == (40, 12) and down.isfinite().all()
    left = ((error - up @ down) * size).norm()
    S = torch.linalg.svdvals(error * size)
    best = S[12:].norm()
    assert best * 0.999 < left < best * 1.02  # a randomized SVD with 16 vectors more
    down, up = repair.low_rank_part(error, torch.ones(60), 12)
    assert ((error - up @ down) * size).norm() > 1.5 * left
    down, up = repair.low_rank_part(error, size + 0.1, 40)
    assert torch.allclose(up @ down, error, atol=1e-4)


@each_family
def test_a_repaired_base_is_nearer(family, tmp_path):
    """Each layer's output on texts that it was not mended for is nearer to the unquantized model's,
    and with all ranks it is that but for 16 bits; on which the branches are kept."""
    folder = write(tmp_path, "opt" if family == "opt" else "llama")
    plain, idx = from_pretrained(folder, "none", torch.float32), torch.randint(3, 61, (4, 20))
    left = [(from_pretrained(folder, "nf4", torch.float32)(idx) - plain(idx)).norm().item()]
    for rank in (4, 16, 32):
        base = repaired(folder, rank)
        left.append((base(idx) - plain(idx)).norm().item())
        kinds = {b.dtype for m in base.modules() if isinstance(m, repair.LowRank)
                 for b in m.buffers()}
        assert kinds == {torch.bfloat16}
    assert left == sorted(left, reverse=True) and left[-1] < 0.02 * left[0], left


def test_padding_does_not_count(folder):
    """The inputs' sizes are of the texts' tokens alone: texts one by one give what they give
    together, as far as a layer's own size goes."""
    sizes = []
    for texts in (TEXTS[:1], TEXTS[:1] + TEXTS[-1:], TEXTS[-1:]):
        base, seen = from_pretrained(folder, "nf4", torch.float32), []
        part = lambda error, size, rank: seen.append(size) or nothing(error, rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repair, "low_rank_part", part)
            repair.mend(base, folder, texts, 2)
        sizes.append(seen[0].square())
    n, m = len(TEXTS[0]), len(TEXTS[-1])
    assert torch.allclose(sizes[1], (n * sizes[0] + m * sizes[2]) / (n + m), rtol=1e-4)


def nothing(error, rank):
    return torch.zeros(rank, error.shape[1]), torch.zeros(len(error), rank)


@pytest.mark.parametrize("method", ["qst", "lst", "adapter"])
def test_it_is_kept_with_the_side_checkpoint(method, folder, tmp_path, idx):
    """A fresh 4-bit base with the checkpoint computes what the repaired one did, and generates it;
    the base counts as the same, repaired or not; nothing of the repair learns."""
    base = repaired(folder)
    expected = base(idx)
    fresh = from_pretrained(folder, "nf4", torch.float32)
    assert not differences(fingerprint(base), fingerprint(fresh))
    model = add_trainable(base, SideConfig(method=method, reduction=4, rank=8, repair=8))
    if method != "lst":  # training starts at the repaired base
        assert torch.allclose(model(idx)[0], expected, atol=2e-5)
    assert not any("branch" in name or "repair" in name for name, _ in model.named_parameters())
    shaken(model).save_side(tmp_path / "side")
    again = QST.from_side(fresh, tmp_path / "side")
    assert torch.equal(again(idx)[0], model(idx)[0])
    assert torch.equal(again.generate(idx, 5, 0.0), model.generate(idx, 5, 0.0))
    kept = [n for n in read_header(tmp_path / "side/side.safetensors")[0] if "repair" in n]
    assert len(kept) == 2 * 3 * 7


def test_the_settings_decide(folder, idx):
    """A base that was repaired is not, beside a side network whose settings have no repair: what is
    saved is what was computed."""
    plain = from_pretrained(folder, "nf4", torch.float32)(idx)
    model = QST(repaired(folder), SideConfig(reduction=4))
    assert torch.equal(model(idx)[0], plain) and "repair" not in " ".join(model.side.state_dict())


@pytest.mark.parametrize("method", ["qst", "adapter"])
def test_the_account_counts_it(method):
    """16 bits a number, of each linear layer rank * (in + out)."""
    config = small_config()
    reduction = dict(reduction=4) if method == "qst" else {}
    cfg = dict(method=method, quant="nf4", batch_size=2, sequence_len=9, rank=8) | reduction
    with_it, without = (memory_report(AccountConfig(**cfg, repair=n), config) for n in (8, 0))
    added = 3 * 8 * (4 * 64 + 3 * 80) * 2
    assert with_it["weights_bytes"] - without["weights_bytes"] == added
    assert with_it["trainable_parameters"] == without["trainable_parameters"]


def test_a_run(tiny_model, tmp_path, no_answers, capsys):
    """train.py mends the base with its first training examples before all else; --side needs no
    calibration, and goes on with the same base; --eval_only alone has no examples."""
    rows = [f'{{"instruction": "Say {i}", "output": "{i} it is"}}' for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    cfg = dict(base=str(tiny_model), data=str(tmp_path / "data.jsonl"), reduction=4, max_iters=2,
               batch_size=4, sequence_len=100, dtype="fp32", threads=1)
    run = lambda **more: train.main(TrainConfig(**cfg | more))
    plain = run(out_dir=str(tmp_path / "plain"))
    mended = run(out_dir=str(tmp_path / "mended"), repair=8)
    again = run(out_dir=str(tmp_path / "again"), repair=8)
    assert mended["loss_before"] != plain["loss_before"]
    assert mended["loss_after"] == again["loss_after"]  # the SVD is drawn by --seed
    assert mended["weights_bytes"] > plain["weights_bytes"]
    del cfg["reduction"]
    done = run(side=str(tmp_path / "mended"), eval_only=True, out_dir=str(tmp_path / "eval"))
    assert done["config"]["repair"] == 8
    for flags, message in (
        (dict(eval_only=True, repair=8), "--repair needs training examples"),
        (dict(quant="none", repair=8), "--repair corrects a 4-bit base: give --quant nf4"),
        (dict(method="lora", repair=8), "--repair is for --method"),
        (dict(repair=64), "--repair 64 is more than layers.0.self_attn.q_proj has, 32: give less"),
    ):
        with pytest.raises(InputError, match=message):
            run(**flags)
    with pytest.raises(InputError, match="is in 4 bits: --repair needs the weights before that"):
        repaired(FIXTURES / "bnb_llama")
