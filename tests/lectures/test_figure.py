"""tests/lectures/FIGURE.md: its picture, its numbers, and how often a step reads the base."""

import re
from itertools import groupby

import pytest
import torch
from figure import (
    COUNTED, MODELS, ON_DEVICE, PAGE, READ_ONCE, READ_TWICE, STREAMED, compute, flags_of, page_of,
    ratios, read_page,
)
from helpers import ROOT, moved, run_script, small_config, tuned
from quant import Quantized4bit

ROWS = read_page()
COLUMNS = {model: page_of(model, ROWS) for model in MODELS}


def test_the_picture_is_of_the_page(tmp_path):
    run_script("tests/lectures/figure.py", "--out_dir", str(tmp_path))
    drawn = (tmp_path / "figure.svg").read_text()
    assert drawn == (ROOT / "tests/pictures/figure.svg").read_text()
    for column in COLUMNS.values():
        for number in (n for pair in column.values() for n in pair if n and pair[1]):
            assert f">{number:g}<" in drawn or f">{number:g}, a count" in drawn


@pytest.mark.parametrize("bar", ["QLoRA", "QST of the paper"])
def test_the_page_has_the_account_of_today(bar, tmp_path):
    """The two bars of 7B that take a second each."""
    words = "python tests/account.py --preset llama-2-7b --out_dir".split()
    printed = run_script(words[1], *words[2:], str(tmp_path), *flags_of(ROWS)[bar].split())
    total, *_, flops = re.search(r"([\d.]+) +[\d,]+ +([\d.]+)  ", printed).groups()
    assert COLUMNS["7B"][bar] == (float(total), float(flops))


def test_other_pages_say_the_same():
    """The account's totals of 70B, in the pages that hold them too."""
    pages = {name: (ROOT / f"tests/{name}.md").read_text() for name in
             ("RESULTS", "MEMORY", "FEATURES")}
    for name, bar in (("RESULTS", "QLoRA"), ("RESULTS", "QLoRA, checkpoint"), ("RESULTS", "QST"),
                      ("MEMORY", "QST of the paper"), ("MEMORY", "QST, all savings"),
                      ("FEATURES", "QST, streamed")):
        assert f"| {COLUMNS['70B'][bar][0]:.2f} |" in pages[name], bar
    assert f"reads {COLUMNS['70B'][READ_ONCE][0]:.2f} GB" in pages["FEATURES"]


def test_the_page_divides_as_it_says():
    """Its factors are those of its bars, and what is counted from others fits them."""
    for name, pair in zip(("without", "with"), ratios(COLUMNS["70B"]).values()):
        cells = [float(cell) for cell in ROWS[f"{name} checkpointing"]]
        assert cells == [round(number, 2) for number in pair]
    for column in COLUMNS.values():
        assert column["QST of the paper"][0] > column["QLoRA, checkpoint"][0] > column["QST"][0]
        less = column[ON_DEVICE][0] - column[STREAMED][0]
        for whole, streamed in (("QLoRA, checkpoint", COUNTED), ("QST", "QST, streamed")):
            assert column[whole][0] - column[streamed][0] == pytest.approx(less, abs=0.021)
        assert column[READ_TWICE][0] == pytest.approx(2 * column[READ_ONCE][0], abs=0.011)
    text = PAGE.read_text()
    for bar in ("QLoRA", "QLoRA, checkpoint", "QST", "QST of the paper"):
        assert f"{COLUMNS['70B'][bar][0]:.2f}" in text.split("## Every bar")[0], bar


def test_a_small_model_is_counted_as_the_page_says():
    """All layers but two, and the embedding, leave the device; QLoRA's bar is less by as much."""
    config = small_config(n_layer=6, n_embd=64, n_ffn=128)
    column = compute("--preset llama-2-7b --sequence_len 32".split(), flags_of(ROWS), config)
    assert set(column) == set(COLUMNS["7B"]) - {"paper's QLoRA", "paper's QST"}
    (base, _), (left, _), (moved_bytes, _) = (
        column[n] for n in (ON_DEVICE, STREAMED, READ_ONCE)
    )
    embedding = 2 * config.vocab_size * config.n_embd  # in bf16
    assert base - left == moved_bytes * 4 // 6 + embedding
    total, flops = column["QLoRA, checkpoint"]
    assert column[COUNTED] == (total - (base - left), flops)


READS = {  # name: settings, base recomputed, how often a layer comes and is unpacked
    "QST": ("qst", False, 1, 1), "QLoRA": ("qlora", False, 2, 2),
    "QLoRA, checkpoint": ("qlora", True, 2, 3),
}


@pytest.mark.parametrize("name", READS)
def test_how_often_a_step_needs_a_layer(name, monkeypatch):
    """Once with QST. QLoRA needs it again in backward, where recomputing and differentiating it are
    one visit, so it could come twice, but for the last layer, which is there already."""
    method, checkpoint, visits, unpacked = READS[name]
    model, seen = moved(tuned(method)), []
    model.base.checkpoint = checkpoint
    layer = {id(m): int(n.split(".")[1]) for n, m in model.base.named_modules()
             if isinstance(m, Quantized4bit)}

    def noted(function):
        def call(weight, *args):
            seen.append((layer[id(weight)], id(weight)))
            return function(weight, *args)
        return call

    for use in ("product", "unpack"):  # forward, and backward
        monkeypatch.setattr(Quantized4bit, use, noted(getattr(Quantized4bit, use)))
    idx = torch.arange(12).view(2, 6)
    model(idx, idx)[1].backward()
    n_layer, n_weights = len(model.base.layers), len(layer)
    came = [number for number, _ in groupby(seen, key=lambda pair: pair[0])]
    assert len(came) == visits * n_layer - (visits - 1)
    most = max(seen.count(pair) for pair in set(seen))
    assert most == unpacked and len(set(seen)) == n_weights
