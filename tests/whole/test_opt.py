"""A small random OPT, in the files of the real ones, goes through every command."""

import json
import shutil

import pytest
import torch
from helpers import FIXTURES, TEST_DATA, small_config
from samples import GLUE_LINES, MMLU_ROW

import model
import qst
import train
from data.formats.save import save_pretrained
from data.tokens.tokenizer import load_tokenizer
from model import Transformer, from_pretrained
from train import TrainConfig

REAL = TEST_DATA / "tokenizers/opt"  # OPT's own vocabulary, where it is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.json, model.safetensors, vocab.json and merges.txt."""
    path = tmp_path_factory.mktemp("opt") / "model"
    path.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy((REAL if REAL.is_dir() else FIXTURES / "tokenizers/opt") / name, path / name)
    size = max(json.loads((path / "vocab.json").read_text(encoding="utf-8")).values()) + 1
    torch.manual_seed(0)
    config = small_config("opt", vocab_size=size, max_positions=600, n_embd=64, bos_id=2)
    save_pretrained(Transformer(config), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One file or folder for each task."""
    root = tmp_path_factory.mktemp("data")
    records = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(30)]
    (root / "instruct.json").write_text(json.dumps(records))
    (root / "text.txt").write_text("The sky was blue, and it was late. " * 200)
    (root / "rte").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        head, *lines = GLUE_LINES["rte"]
        (root / "rte" / name).write_text("\n".join([head, *lines * 10]))
    for split in ("dev", "test"):
        (root / "mmlu" / split).mkdir(parents=True)
        (root / f"mmlu/{split}/anatomy_{split}.csv").write_text(MMLU_ROW.format("D") * 5)
    question = {"question_id": 81, "category": "writing", "turns": ["Who?", "And where?"]}
    (root / "questions.jsonl").write_text(json.dumps(question))
    return root


def settings(folder, data, out, **changes):
    return TrainConfig(**dict(
        base=str(folder), data=str(data), out_dir=str(out), reduction=4, rank=4, max_iters=2,
        batch_size=4, sequence_len=200, eval_interval=1, device="cpu",
    ) | changes)


TASKS = {"instruct": "instruct.json", "text": "text.txt", "rte": "rte"}
if REAL.is_dir():  # the small vocabulary has no token for " A"
    TASKS["mmlu"] = "mmlu"


@pytest.mark.parametrize("task", TASKS)
def test_training_and_evaluation(folder, data, tmp_path, task):
    """Every task trains, and its side network is scored again."""
    more = dict(instructions=str(data / "instruct.json"), sequence_len=500)
    more = more if task == "mmlu" else {}
    cfg = settings(folder, data / TASKS[task], tmp_path / "out", task=task, **more)
    result = train.main(cfg)
    assert result["iterations"] == 2 and result["loss_after"] < result["loss_before"]
    again = train.main(settings(
        folder, data / TASKS[task], tmp_path / "eval", task=task, side=cfg.out_dir, eval_only=True,
        sequence_len=cfg.sequence_len,
    ))
    for name in {"accuracy"} & set(again):
        assert again[name] == result[f"{name}_after"]


def test_quantizing_and_talking(folder, data, tmp_path, capsys, monkeypatch):
    """quantize, --prompt, chat and answer: from the 4-bit folder, with a side network."""
    four_bits = str(tmp_path / "nf4")
    model.main(["quantize", str(folder), four_bits])
    train.main(settings(four_bits, data / "instruct.json", tmp_path / "out"))
    base, again = (from_pretrained(path, "nf4", torch.float32) for path in (folder, four_bits))
    idx = torch.tensor([load_tokenizer(four_bits).encode("The sky was blue")])
    assert torch.equal(base(idx), again(idx))
    flags = ["--base", four_bits, "--side", str(tmp_path / "out"), "--max_new_tokens", "5"]
    capsys.readouterr()
    qst.main([*flags, "--prompt", "Who?"])
    said = capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda *_, turns=iter(["Who?", "/exit"]): next(turns))
    qst.main(["chat", *flags])
    assert said.strip() in capsys.readouterr().out
    out = tmp_path / "answers.jsonl"
    qst.main(["answer", *flags, "--questions", str(data / "questions.jsonl"), "--out", str(out)])
    assert len(json.loads(out.read_text())["choices"][0]["turns"]) == 2
