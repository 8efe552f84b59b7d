"""The table of forgetting: what it prints is what train.py measures, and it sees forgetting."""

import io
import json
import math
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import bench
import pytest
import torch
from benchmarks import forgetting
from helpers import refused, settings_of_a_short_run, sign_again, small_base

import train
from data.formats.safetensors import read_safetensors
from train import TrainConfig

FLAGS = "--windows 3 --sequence_len 96 --max_iters 12 --eval_interval 4 --every 4 " \
    "--warmup_iters 2 --device cpu --full_rate 5e-5 --held_out 0.2"
ROWS = [
    "base, NF4", "base, unquantized", "QST", "QST, side network off: bit for bit the base",
    "QLoRA, pairs beside NF4", "QLoRA, merged in fp32", "full, merged in fp32",
]


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A call on a small model, whose runs are in this process: its words, and what it printed."""
    tmp_path = tmp_path_factory.mktemp("forgetting")
    text = tmp_path / "text.txt"
    text.write_text("Tom went to the woods. He lost his little dog. The sky was blue.\n" * 40)
    data = settings_of_a_short_run(tiny_model, tmp_path)["data"]
    files = [str(tiny_model), data, str(text), "--out", str(tmp_path / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "alone", lambda function, *args: function(*args))
        patch.setattr(forgetting, "WINDOW", 48)
        patch.setattr(train, "load_task", train.load_task)  # restored at the end
        words = ["forgetting", *files, *FLAGS.split()]
        yield words, table(words)


def table(words):
    """{first cell: the others, as numbers}, and what is printed below."""
    with redirect_stdout(io.StringIO()) as printed:
        bench.main(words)
    _, _, *lines = printed.getvalue().strip().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ROWS
    below = "\n".join(line for line in lines if not line.startswith("|"))
    return {title: [float(cell) for cell in cells] for title, *cells in rows}, below


def result_of(words, name):
    return json.loads(Path(words[5], name, "result.json").read_text())


def test_the_table(made, tmp_path):
    """Before and after are those of train.py; a side network that is off gives the base; a merged
    model is the one that was trained; QLoRA and full stop at QST's gain."""
    words, (rows, below) = made
    for title, name in zip(ROWS[2:], ("qst", None, "qlora", "qlora", "full")):
        iterations, before, after, gain, old, new, ratio = rows[title]
        base = rows["base, unquantized" if name == "full" else "base, NF4"]
        assert base[1:3] == [before, before] and base[4:] == [old, old, 1]
        if name:
            result = result_of(words, name)
            assert iterations == result["best_iteration"] > 0
            assert before == pytest.approx(result["loss_before"], abs=6e-4)
            assert after == pytest.approx(result["loss_after"], abs=6e-4) and gain > 0
            assert ratio == pytest.approx(new / old, abs=2e-3)
        else:
            assert (after, gain, new, ratio) == (before, 0, old, 1)
    assert rows["QLoRA, merged in fp32"] == rows["QLoRA, pairs beside NF4"]
    target = forgetting.gain(result_of(words, "qst"))
    assert f"QST's best gain in training is {target:.3f}" in below
    for name in ("qlora", "full"):
        result = result_of(words, name)
        gains = [result["loss_before"] - loss for _, loss in result["curves"]["held out"]]
        assert max(gains[:-1]) < target and (gains[-1] >= target or result["iterations"] == 12)
        assert (gains[-1] < target) == (f"--method {name} did not reach it in 12" in below)
    assert result_of(words, "full")["iterations"] == 8  # not at the first evaluation
    read = dict(task="text", data=words[3], sequence_len=48, max_examples=3, eval_only=True)
    for title, quant in zip(ROWS, ("nf4", "none")):
        cfg = TrainConfig(base=words[1], quant=quant, out_dir=str(tmp_path / "eval"), **read)
        want = math.exp(train.main(cfg)["loss"])
        assert rows[title][4] == pytest.approx(want, abs=6e-3)


def test_a_second_call(made, tmp_path, monkeypatch):
    """It trains only what was stopped. It reads the checkpoints: forgetting is planted in one."""
    words, (rows, _) = made
    out, name = shutil.copytree(words[5], tmp_path / "runs"), "full, merged in fp32"
    (out / "qlora/result.json").unlink()
    tensors = read_safetensors(out / "full/side.safetensors")
    tensors = {key: read() + 0.3 * torch.randn(read().shape) for key, read in tensors.items()}
    sign_again(out / "full", tensors)
    trained = []
    alone = lambda function, flags: trained.append(flags) or function(flags)
    monkeypatch.setattr(forgetting, "alone", alone)
    again, _ = table([*words[:5], str(out), *words[6:]])
    assert len(trained) == 1 and str(out / "qlora") in trained[0]
    assert rows[name][-1] < 1.5 < again[name][-1]
    assert rows == again | {name: rows[name]}


def test_one_bit_is_seen():
    base, other = small_base(), small_base()
    assert forgetting.same_logits(base, other)
    weight = other.layers[1].input_layernorm.weight
    weight[0] = torch.nextafter(weight[0], weight.new_tensor(9.0))
    assert not forgetting.same_logits(base, other)


def test_mistakes(made, tmp_path):
    """Runs with other settings are not taken for those of this call."""
    words, _ = made
    refused(bench.main, [*words, "--lr_schedule", "linear"], named="must be constant")
    refused(bench.main, [*words, "--every", "0"], named="--every and --windows must be")
    refused(bench.main, words[:3], named="forgetting FOLDER FILE TEXT --out FOLDER [FLAGS]")
    with pytest.raises(SystemExit, match="--out"):
        bench.main(words[:4])
    refused(bench.main, [*words, "--seed", "5"], named="of a run with another --seed")
    refused(bench.main, [*words, "--full_rate", "3"], named="of a run with another --learning_rate")
