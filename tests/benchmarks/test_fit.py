"""What fits into a GPU: of the account's totals, the last that is not above."""

import json
from dataclasses import replace

import pytest
from helpers import small_config

from account import AccountConfig, main, memory_report, parse_args, rows
from benchmarks.fit import ALLOWANCE, OF_QST, ROWS, chosen, largest, total_of
from data import InputError
from model import PRESETS

DEEP = small_config(n_layer=12, n_embd=256, n_ffn=512, vocab_size=500, max_positions=300)
LINES = [*ROWS, *OF_QST]


@pytest.fixture
def preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", DEEP)
    return AccountConfig(preset="small", sequence_len=64)


def test_short_models_stand_for_a_deep_one(preset):
    """The total is the deep model's to the byte. fast has a side layer for each three of it."""
    lines = dict(chosen(rows(preset), preset))
    assert list(lines) == LINES
    for label, n_layer in (("qlora, checkpoint", 4), ("qst, fast", 12)):
        cfg, deep = replace(lines[label], batch_size=5), replace(DEEP, n_layer=n_layer)
        total = total_of(cfg, deep, memory_report)
        assert total(5, 64) == memory_report(cfg, deep)["total_bytes"], label


@pytest.mark.parametrize("room", [0, 99, 100, 105, 129, 131, 180, 200, 421, 1000, 5000, 10**5])
@pytest.mark.parametrize("first", [1, 3, 50])
@pytest.mark.parametrize("tokens", [1, 30, 500])
def test_the_largest(tokens, first, room):
    """The search finds what trying each number in turn finds: the total has a steep part where
    tokens are few, as a chunk of logits has, and a kink."""
    total = lambda n: 70 + n + 0.23 * min(n * tokens, 128) + 5 * max(0, n - 60)
    want = max((n for n in range(1, 3000) if total(n) <= room), default=0)
    assert largest(total, room, 3000 - 1, tokens, [first]) == want


def test_what_is_printed_fits(preset, tmp_path, capsys):
    """Each number fits, and one more does not; a method that does not fit has a sentence."""
    flags = f"--preset small --sequence_len 64 --method qlora --checkpoint --fit"
    PRESETS["small"] = replace(DEEP, n_layer=1)  # each number is counted without a deep one
    flags = f"--out_dir {tmp_path} {flags}".split()
    cfg = replace(preset, method="qlora", checkpoint=True)
    total = total_of(cfg, PRESETS["small"], memory_report)
    room = total(1, 200) + 1000
    found = main(parse_args([*flags, str((ALLOWANCE + room) / 1e9)]))
    assert json.loads((tmp_path / "fit.json").read_text()) == found
    assert "1 GB of them" in capsys.readouterr().out
    ((label, batch, length),) = (row.values() for row in found)
    assert label == "qlora, checkpoint" and batch > 1
    assert total(batch, 64) <= room < total(batch + 1, 64)
    assert total(1, length) <= room < total(1, length + 1)
    assert not any(row["length"] for row in main(parse_args([*flags, "1.001"])))
    assert "does not fit: 1 x 64 tokens need 1.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [("", "give --preset or --base"), ("--preset small --sweep seed=1,2", "neither --sweep")],
)
def test_mistakes(flags, message, preset, tmp_path, capsys):
    with pytest.raises(InputError, match=message):
        main(parse_args([*flags.split(), "--fit", "8", "--out_dir", str(tmp_path)]))
    assert not capsys.readouterr().out
