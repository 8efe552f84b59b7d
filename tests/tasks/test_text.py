"""data/tasks/text.py: windows of a text, and the perplexity of one."""

import math
from dataclasses import replace

import pytest
import torch

import train
from data import IGNORE_INDEX, InputError
from data.tasks import text
from model import from_pretrained
from train import TrainConfig


def test_windows_of_a_text(tokenizer, tmp_path):
    """The windows are the whole text's ids, in order; each predicts all its ids but the first."""
    path = tmp_path / "text.txt"
    path.write_text("Tom went to the lake.\n\nIt is late. " * 9)
    ids = tokenizer.encode(path.read_text())
    windows = text.read(path, tokenizer, 15)
    assert sum((w for w, _ in windows), []) == ids
    assert {len(w) for w, _ in windows[:-1]} == {15} and 1 < len(windows[-1][0]) <= 15
    assert all(t == [*w[1:], IGNORE_INDEX] for w, t in windows)
    assert text.read(path, tokenizer, 15, 2) == windows[:2]
    left_over = text.read(path, tokenizer, len(ids) - 1)  # one id, which nothing can predict
    assert [len(w) for w, _ in left_over] == [len(ids) - 1]


def test_a_text_that_cannot_be_read(tokenizer, tmp_path):
    """It is refused by its name: missing, empty, a folder; so are windows of one token."""
    path = tmp_path / "text.txt"
    with pytest.raises(InputError, match="text.txt is missing"):
        text.read(path, tokenizer, 15)
    path.write_text("")
    with pytest.raises(InputError, match="text.txt has less than two tokens"):
        text.read(path, tokenizer, 15)
    with pytest.raises(InputError, match="--sequence_len 1"):
        text.read(path, tokenizer, 1)
    with pytest.raises(InputError, match="is a folder: give a file of UTF-8 text"):
        text.read(tmp_path, tokenizer, 15)


def test_perplexity():
    """That of a uniform guess is the number of choices."""
    assert text.perplexity(math.log(50)) == pytest.approx(50) and text.perplexity(1e4) == math.inf


def test_perplexity_of_a_file(tiny_model, tokenizer, tmp_path, monkeypatch):
    """--task text: the perplexity of a base is exp of its mean loss over all windows."""
    path = tmp_path / "some.txt"
    path.write_text("Is it one, or two?\n\nIt is two. " * 40)
    cfg = TrainConfig(
        base=str(tiny_model), data=str(path), out_dir=str(tmp_path / "out"), task="text",
        quant="none", device="cpu", reduction=4, batch_size=4, sequence_len=50, max_iters=20,
        learning_rate=1e-2,
    )
    result = train.main(replace(cfg, eval_only=True))
    read, loss_of = [], train.Transformer.loss_of
    counted = lambda *args: read.append(1) or loss_of(*args)
    monkeypatch.setattr(train.Transformer, "loss_of", counted)
    assert train.main(replace(cfg, eval_only=True))["loss"] == pytest.approx(result["loss"])
    monkeypatch.undo()
    windows = text.read(path, tokenizer, 50)
    assert len(read) == -(-len(windows) // cfg.batch_size)  # each batch once
    assert math.exp(result["loss"]) == pytest.approx(result["perplexity"])
    base = from_pretrained(tiny_model, "none", torch.float32)
    losses, count = 0.0, 0
    for ids, targets in text.read(path, tokenizer, 50):
        said = base(torch.tensor([ids]))[0].log_softmax(-1)
        losses -= sum(said[i, id].item() for i, id in enumerate(ids[1:]))
        count += len(ids) - 1
    assert result["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-4)
    trained = train.main(cfg)
    assert trained["perplexity_after"] < trained["perplexity_before"]
