"""The memory account: on meta tensors, what a real step keeps and takes."""

import json

import pytest
import torch
from helpers import small_config
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import InputError
from data.devices.device import loss_and_kept, model_bytes, pick_dtype
from data.run.optim import make_optimizer
from data.settings.methods import METHODS, SIDE_METHODS
from data.tasks import tiny
from model import PRESETS, ModelConfig, Transformer
from qst import QST
from side import SideConfig
from train import TrainConfig, resolve
from account import (
    METHOD_ROWS, SAVINGS, AccountConfig, Live, attention_of, main, memory_report, parse_args, rows,
    settings_of_step, untrained,
)
from timeline import Timeline, thinned
from timeline import main as timeline

SMALL = dict(device="cpu", batch_size=3, sequence_len=12)
QST_STEP = SMALL | dict(method="qst", reduction=2)
COMBINATIONS = {
    "adapter": dict(),
    "linear": dict(downsample="linear"),
    "maxpool": dict(downsample="maxpool"),
    "released": dict(variant="released"),
    "fast": dict(variant="fast"),
    "third": dict(every=3),
    "third, no embedding": dict(every=3, read_embedding=False, h_f_bits=4),
    "16 bits": dict(quant="none", dtype="bf16", checkpoint=False),
    "half": dict(dtype="fp16"),
    "lora": dict(method="lora"),
    "qlora": dict(method="qlora"),
    "checkpoint": dict(method="lora", checkpoint=True),
    "adapters": dict(method="adapter"),
    "peqa": dict(method="peqa"),
    "lst": dict(method="lst"),
    "full": dict(method="full"),
    "muon": dict(method="full", optimizer="muon", dtype="bf16"),
    "muon in 8 bits": dict(optimizer="muon", optimizer_bits=8),
    "as written": dict(checkpoint=False, h_f_bits=16, chunk_loss=False),
    "4 bits": dict(h_f_bits=4, optimizer_bits=8, dtype="bf16"),
    "16 bits of h_f": dict(h_f_bits=16),
    "lst as written": dict(method="lst", checkpoint=False, h_f_bits=16),
    "linear in 4 bits": dict(downsample="linear", h_f_bits=4, optimizer_bits=8),
}


SHAPES = {"llama": {}, "grouped": dict(n_kv_head=2), "opt": dict(family="opt")}


@pytest.mark.parametrize("changes", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_account_is_that_of_a_real_step(changes, shape):
    """What a real model on the CPU keeps for backward, its gradients, optimizer states, parameters
    and floating-point operations are the account's, exactly."""
    method = changes.get("method", "qst")
    side = dict(reduction=2) if method in SIDE_METHODS else {}
    cfg = AccountConfig(**SMALL | side | dict(method=method) | changes)
    some_layers = "every" in changes or changes.get("variant") == "fast"
    config = small_config(**shape, n_layer=3 if some_layers else 2)
    report = memory_report(cfg, config)
    cfg = settings_of_step(cfg)
    dtype = pick_dtype(cfg.dtype, torch.device("cpu"))
    model = untrained(cfg, config, dtype, "cpu")
    idx = torch.zeros(cfg.batch_size, cfg.sequence_len, dtype=torch.long)
    kept = loss_and_kept(model, idx, idx)[1]
    if config.family == "opt" and dtype != torch.float32:
        # LayerNorm's mean and deviation are fp32 on meta tensors, as on CUDA; in 16 bits here.
        norms = 2 * config.n_layer + (method == "full")
        kept += norms * 2 * idx.numel() * 2 * (not cfg.checkpoint)
    assert report["activations_bytes"] == kept
    with Live() as live:
        model.loss(idx, idx).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, cfg)
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer.step()
    states = [t for state in optimizer.state.values() for n, t in state.items() if n != "step"]
    assert report["gradients_bytes"] == gradients
    assert report["optimizer_bytes"] == sum(t.nbytes for t in states)
    assert report["weights_bytes"] == model_bytes(model)
    assert report["trainable_parameters"] == sum(p.numel() for p in trained)
    assert report["flops_per_token"] == round(live.flops / idx.numel())


def test_the_total_is_the_sum():
    """The parts add up to the total, and the transient part is positive."""
    report = memory_report(AccountConfig(**QST_STEP), small_config())
    parts = ("weights", "gradients", "optimizer", "activations", "transient")
    assert report["total_bytes"] == sum(report[f"{part}_bytes"] for part in parts)
    assert report["transient_bytes"] > 3 * 12 * 61 * 4  # the logits' gradient


@pytest.mark.parametrize("device, bits", [("cuda", 16), ("cuda", 32), ("cpu", 32)])
def test_attention_keeps_what_a_fused_kernel_keeps(device, bits):
    """Queries, keys, values and output, and one fp32 number a query; no (T, T) matrix."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    make = lambda: torch.zeros(2, 4, 50, 8, device="meta", dtype=dtype, requires_grad=True)
    q, k, v = make(), make(), make()
    kept = {}
    keep = lambda t: kept.setdefault(t.untyped_storage()._cdata, t)
    with attention_of(device), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=False)
    least = 4 * q.nbytes + 2 * 4 * 50 * 4
    assert y.shape == q.shape
    # The kernels add a seed of random numbers, and the memory-efficient one rounds T up to 64.
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert least <= total <= least + 2 * 4 * 14 * 4 + 32


def test_the_plain_formula_can_be_counted():
    """On the device "meta", attention keeps a (T, T) matrix a head, and more than on a GPU."""
    settings = QST_STEP | dict(sequence_len=64, checkpoint=False)
    fused, plain = (
        memory_report(AccountConfig(**settings | dict(device=device)), small_config())
        for device in ("cuda", "meta")
    )
    matrices = 3 * small_config().n_layer * small_config().n_head * 64 * 64 * 2
    assert plain["activations_bytes"] > fused["activations_bytes"] + matrices / 2


def test_narrow_heads_are_padded_on_cuda():
    """Flash attention takes widths of a multiple of 8: OPT-1.3B's side network has 4."""
    q = torch.zeros(2, 4, 50, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with attention_of("cuda"):
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True, enable_gqa=False)
    assert y.shape == q.shape and y.untyped_storage().nbytes() == 2 * q.nbytes


def test_live_bytes():
    """A storage counts from the operator that makes it until nobody holds it; a view is nothing."""
    x = torch.zeros(100, device="meta")
    with Live() as live:
        y = x + 1
        z = y.view(10, 10)
        assert live.now == 400
        z.add_(1)
        del y
        assert live.now == 400
        del z
        assert live.now == 0
        (x * 2) * 3
    assert (live.now, live.peak) == (0, 800)


def test_floating_point_operations():
    """They are those that torch's FlopCounterMode counts, 4-bit layers included, and those of the
    CPU's attention, which it does not know: QST's base has a forward pass and no backward."""
    config = small_config(n_embd=64, n_ffn=96)
    model = QST(Transformer(config).freeze("nf4", torch.float32), SideConfig(reduction=8))
    idx = torch.zeros(3, 12, dtype=torch.long)
    model.chunk_loss = False  # FlopCounterMode cannot look into it
    with Live() as live, FlopCounterMode(display=False) as products:
        model.loss(idx, idx).backward()
    one = 2 * 3 * 12 * 12 * config.n_layer  # a product with the (T, T) matrices, a channel of width
    attention = one * (2 * 64 + (2 + 5) * 8)  # forward has two such products, and backward five
    assert live.flops == products.get_total_flops() + attention
    weights = config.n_layer * (4 * 64 * 64 + 3 * 64 * 96)
    assert 2 * weights < live.flops / idx.numel() < 4 * weights


@pytest.fixture
def small(monkeypatch):
    """A preset that takes no time."""
    shape = small_config(n_layer=2, n_embd=256, n_ffn=512, vocab_size=500)
    monkeypatch.setitem(PRESETS, "small", shape)


def test_all_methods(small, tmp_path, capsys):
    """A line for each method, with its numbers in plan.json; no weights are needed."""
    flags = f"--preset small --batch_size 2 --sequence_len 64 --out_dir {tmp_path}"
    rows = main(parse_args(flags.split()))
    assert json.loads((tmp_path / "plan.json").read_text()) == rows
    printed = capsys.readouterr().out
    assert {row["method"] for row in rows} == set(METHOD_ROWS) == set(METHODS)
    for row in rows:
        assert row["method"] in printed and f"{row['total_bytes'] / 1e6:.2f}" in printed
    totals = {row["method"]: row["total_bytes"] for row in rows if not row["checkpoint"]}
    assert totals["qst"] < totals["qlora"] < totals["lora"]
    fast = main(parse_args([*flags.split(), "--variant", "fast"]))  # which other methods leave out
    assert [a["label"] for a, b in zip(rows, fast, strict=True) if a != b] == [
        "qst", "qst, checkpoint"
    ]


def test_without_a_flag_it_is_the_embedded_default(tmp_path, capsys):
    """Its shape, batch and settings, on a CPU, as a run has them; --savings shows each on it. (The
    lines of all methods are in tests/lectures/3-memory.md.)"""
    rows = main(parse_args(["--method", "qst", "--out_dir", str(tmp_path)]))
    assert "step of the embedded default, 32 x 47 tokens" in capsys.readouterr().out
    saved = main(parse_args(["--savings", "--out_dir", str(tmp_path)]))
    totals = [row["total_bytes"] for row in saved]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(SAVINGS)
    cfg = resolve(TrainConfig())
    model = untrained(cfg, ModelConfig(tiny.VOCAB_SIZE, **tiny.BASE), torch.float32, "cpu")
    (qst,) = [row for row in rows if row["label"] == "qst"]
    assert qst["weights_bytes"] == model_bytes(model)
    idx = torch.zeros(32, tiny.LONGEST, dtype=torch.long)
    assert qst["activations_bytes"] == loss_and_kept(model, idx, idx)[1]


def test_the_live_bytes_through_a_step(tmp_path, capsys):
    """They begin and end with what is there always, and their largest is the account's peak; what
    is drawn of them keeps it."""
    cfg, live = AccountConfig(**QST_STEP | dict(method="qlora", reduction=None)), Timeline()
    report = memory_report(cfg, small_config(), live)
    assert live.points[0] == (0, 0) and live.points[-1][1] == 0
    most = report["activations_bytes"] + report["transient_bytes"]
    for points in (live.points, thinned(live.points, 5), thinned(live.points)):
        assert max(now for _, now in points) == most
        assert [flops for flops, _ in points] == sorted(flops for flops, _ in points)
    assert len(thinned(live.points, 5)) <= 12
    timeline(parse_args(["--out_dir", str(tmp_path)]))
    assert "QLoRA, checkpoint" in capsys.readouterr().out
    assert (tmp_path / "timeline.svg").read_text().count("<polyline") == 5


def test_the_shape_of_a_folder(tmp_path):
    """With --base, the shape is that of the folder's config.json; weights need not be there."""
    fields = dict(
        model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
        hidden_act="silu",
    )
    (tmp_path / "config.json").write_text(json.dumps(fields))
    flags = f"--base {tmp_path} --method qst --reduction 4 --sequence_len 64 --out_dir {tmp_path}"
    assert main(parse_args(flags.split()))
    with pytest.raises(InputError, match="--preset and --base both tell"):
        main(parse_args([*flags.split(), "--preset", "opt-125m"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--preset llama-9", "choose smollm2-135m, "),
        ("--preset opt-125m --side x", "leave out --side"),
        ("--preset opt-125m --method lora --savings", "--savings is for --method qst and lst"),
        ("--preset opt-1.3b --sequence_len 4096", "2048 positions"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    """A mistake is one sentence that says what to do, with no table begun."""
    with pytest.raises(InputError, match=message):
        main(parse_args([*flags.split(), "--out_dir", str(tmp_path)]))
    assert not capsys.readouterr().out


def test_seventy_billion_in_seconds():
    """The account of LLaMA-2-70B's step takes seconds, and no memory to speak of: its weights are
    the paper's (36 GB), and a little more."""
    cfg = AccountConfig(method="qst", preset="llama-2-70b", batch_size=16, sequence_len=384)
    report = memory_report(cfg)
    assert 36e9 < report["weights_bytes"] < 38e9


def test_each_line_is_of_its_method(small):
    """LST's line has linear downsamplers and no alpha, as a run of it."""
    lines = dict(rows(parse_args(["--preset", "small", "--sequence_len", "64"])))
    alone = memory_report(AccountConfig(preset="small", method="lst", sequence_len=64))
    assert memory_report(lines["lst, checkpoint"]) == alone
    assert alone != memory_report(lines["qst, checkpoint"])
