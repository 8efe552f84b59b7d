"""--stream in train.py, qst.py and account.py: what a run ends in, and what is refused."""

import math

import pytest
import torch
from account import AccountConfig, memory_report, parse_args, stream_from_memory, transfer
from helpers import FIXTURES, short_run, small_base, small_config

import qst
import train
from data import InputError
from data.formats.safetensors import read_safetensors, write_safetensors
from data.settings.flags import run_main
from data.tasks.scoring import choice_logits
from model import from_pretrained
from qst import QST, SharedBase
from quant import quantize_4bit
from side import SideConfig
from train import TrainConfig


@pytest.fixture
def cfg(packed, tmp_path):
    sizes = dict(max_iters=4, batch_size=4, sequence_len=100, eval_interval=2)
    return short_run(packed, tmp_path, 30, **sizes)


def test_a_run(cfg, tmp_path):
    """train.py --stream ends in the same bytes, also where one of the two goes on with a run of the
    other; it shows no answers, which would take a pass a token."""
    runs = {}
    for name, parts in dict(whole=[False], streamed=[True], mixed=[True, False]).items():
        cfg["out_dir"] = str(tmp_path / name)
        for k, stream in enumerate(parts):
            iterations = 4 if k == len(parts) - 1 else 2
            now = cfg | dict(stream=stream, resume=k > 0, max_iters=iterations)
            result = train.main(TrainConfig(**now))
        runs[name] = (tmp_path / name / "side.safetensors").read_bytes(), result["loss_after"]
        assert bool(result["samples"]) == (not stream)
        assert result["loss_after"] < result["loss_before"]
    assert runs["whole"] == runs["streamed"] == runs["mixed"]


@pytest.mark.usefixtures("no_answers")
def test_evaluation(cfg, tmp_path):
    """--eval_only, of the base and of a side network, and MMLU's prompts: one pass a batch."""
    train.main(TrainConfig(**cfg))
    for side in ({}, dict(side=cfg["out_dir"], reduction=None)):
        settings = cfg | dict(eval_only=True, out_dir=str(tmp_path / "eval")) | side
        losses = [train.main(TrainConfig(**settings, stream=s))["loss"] for s in (False, True)]
        assert losses[0] == losses[1]


def test_choices(base):
    """Prompts with a common beginning, which a cache holds for all of them, are scored the same."""
    prompts = [[3, 4, 5, 6], [3, 4, 7], [3, 4, 5, 9, 9]]
    with torch.no_grad():
        (expected,) = choice_logits(SharedBase([base]), prompts, batch_size=2)
        stream_from_memory(base, "cpu")
        (found,) = choice_logits(SharedBase([base]), prompts, batch_size=2)
        assert torch.equal(found, expected)


def test_prompts_of_a_file(packed, tmp_path, capsys):
    """--batch answers every line as one batch; streamed or not, the answers are the same, and those
    that each prompt has alone."""
    lines = ["Tom went to the lake.", "", "Leo?", "Who won the race?"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    base = from_pretrained(packed, "nf4", torch.float32)
    QST(base, SideConfig(reduction=4)).save_side(tmp_path / "side")
    common = ["--base", str(packed), "--max_new_tokens", "6", "--device", "cpu"]
    for more in ([], ["--side", str(tmp_path / "side")]):
        answers = []
        for stream in ([], ["--stream"]):
            qst.main([*common, *more, "--batch", str(tmp_path / "prompts.txt"), *stream])
            out = capsys.readouterr().out
            answers.append(out.partition("\n")[2] if stream else out)
        assert answers[0] == answers[1] and answers[0].count("\n\n") >= 3
        qst.main([*common, *more, "--prompt", "Who won the race?"])
        alone = capsys.readouterr().out.strip()
        assert alone and alone in answers[0]
        assert ("> Leo?\n" in answers[0]) == bool(more)


@pytest.mark.parametrize("changes, message", [
    (dict(method="qlora", reduction=None), "--stream is for --method qst and lst, not for qlora"),
    (dict(devices="cpu,cpu"), "without --devices"),
    (dict(compile=True), "without .* --compile"),
    (dict(base="", data=""), "--stream needs --base"),
    (dict(quant="fp4"), "is already nf4: give --quant nf4"),
])
def test_what_cannot_be_streamed(changes, message, cfg):
    with pytest.raises(InputError, match=message):
        train.main(TrainConfig(**cfg | dict(stream=True) | changes))


def test_16_bits_are_refused(tiny_model, tmp_path):
    """With the command that makes 4 bits of them; and so are layers that are not alike."""
    with pytest.raises(InputError, match=f"model.py quantize {tiny_model} {tiny_model}-nf4"):
        from_pretrained(tiny_model, "nf4", torch.float32, stream=True)
    base = small_base()
    linear = base.layers[1].mlp.up_proj
    linear.weight = quantize_4bit(linear.weight.dequantize(), double_quant=False)
    with pytest.raises(InputError, match="not all layers are quantized alike"):
        stream_from_memory(base, "cpu")
    with pytest.raises(InputError, match="not for mps"):
        from_pretrained(FIXTURES / "bnb_llama", "nf4", torch.float32, "mps", stream=True)


def test_no_more_memory():
    """Where a CPU, or a limit on the process, has no more: a sentence that names --stream."""
    with pytest.raises(SystemExit, match="no more memory: .*--stream"):
        run_main(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="another"):
        run_main(lambda: exec('raise RuntimeError("another")'))


def test_in_base_methods_are_refused(base):
    stream_from_memory(base, "cpu")
    with pytest.raises(InputError, match="whose backward reads no weight of the base; not for"):
        qst.add_trainable(base, SideConfig(method="qlora"))


def test_one_answer_is_refused(packed, base, tmp_path):
    """Before a model is read; one token is no more than a pass."""
    (tmp_path / "q").write_text('{"question_id": 1, "category": "a", "turns": ["Who?"]}')
    ask = ["answer", "--questions", str(tmp_path / "q"), "--out", str(tmp_path / "a")]
    for command in (["chat"], ["--prompt", "Who?"], ask):
        name = command[:1] if command[0] in qst.COMMANDS else []
        with pytest.raises(InputError, match="reads all weights anew for every token"):
            qst.main([*name, "--base", str(packed), "--stream", *command[len(name) :]])
    with pytest.raises(InputError, match="give one of --prompt, and --batch"):
        qst.main(["--base", str(packed)])
    with pytest.raises(InputError, match="--prompt is empty"):
        qst.main(["--base", str(packed), "--prompt", ""])
    stream_from_memory(base, "cpu")
    one = torch.ones(1, 3, dtype=torch.long)
    assert base.generate(one, 1).shape == (1, 4)
    with pytest.raises(InputError, match="for every token"):
        base.generate(one, 2)


def test_a_damaged_folder(packed):
    """Cut short, or gone in the middle of a run: a sentence that names the file."""
    base = from_pretrained(packed, "nf4", torch.float32, stream=True)
    path, idx = packed / "model.safetensors", torch.ones(1, 5, dtype=torch.long)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        base(idx), base(idx)
    path.write_bytes(content[:-7])
    with pytest.raises(InputError, match="is damaged"):
        from_pretrained(packed, "nf4", torch.float32, stream=True)
    path.write_bytes(content)
    tensors = {name: read().clone() for name, read in read_safetensors(path).items()}
    tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"].fill_(math.nan)
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight has NaN"):
        from_pretrained(packed, "nf4", torch.float32, stream=True)


# --------------------------------------------------------------------------------------
# The account


def test_the_account(tmp_path, capsys):
    """On the device are two layers and neither the others nor the embedding; a step that makes its
    gradients has no more than one that accumulates them."""
    config = small_config(n_layer=6)
    settings = dict(device="cpu", batch_size=3, sequence_len=12, method="qst", reduction=2)
    whole, streamed = (
        memory_report(AccountConfig(**settings, stream=s), config) for s in (False, True)
    )
    base = small_base(n_layer=6)
    stream_from_memory(base, "cpu")
    embedding = base.embed_tokens.weight.nbytes
    left = base.stream.nbytes * 4 // 6 + embedding
    assert streamed["streamed_bytes"] == base.stream.nbytes
    assert whole["weights_bytes"] - streamed["weights_bytes"] == left
    assert whole["total_bytes"] - streamed["total_bytes"] == left
    assert streamed["unaccumulated_bytes"] <= streamed["total_bytes"]
    cfg = parse_args("--gb_per_s 2 --tflops 3 --batch_size 4 --sequence_len 8".split())
    report = dict(
        streamed_bytes=6_000_000_000, forward_flops_per_token=9e9, unaccumulated_bytes=5e9
    )
    said = transfer(report, cfg)  # 3 s to read; 0.096 s to compute; 3 s are 9 TFLOP, 1,000 tokens
    assert "6.00 GB: 3.00 s" in said and "computes 0.10 s" in said and "from 1,000 tokens" in said
