"""train.py and the command lines: the loop, what a run leaves, and the user's mistakes."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, small_base

import qst
import train
from data import tiny
from data.chat import ChatTemplate
from data.hub import save_pretrained
from data.report import activation_bytes
from data.settings import run
from model import from_pretrained
from qst import QST
from quant import InputError
from side import SideConfig
from train import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stories.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in tiny.task(60, seed=1)))
    return path


@pytest.fixture
def cfg(tiny_model, data, tmp_path):
    """A short run on a real folder and file."""
    return dict(
        base=str(tiny_model), data=str(data), out_dir=str(tmp_path / "out"), reduction=4, max_iters=6,
        batch_size=8, sequence_len=100, eval_interval=3, log_interval=2, learning_rate=1e-2,
    )  # fmt: skip


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kwargs
    )


def test_what_a_run_leaves(cfg, tmp_path):
    """result.json holds what main returns; log.csv a line an interval; both side networks load."""
    result = train.main(TrainConfig(**cfg))
    out = tmp_path / "out"
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    for name in (
        "loss_before", "loss_after", "trainable_parameters", "total_parameters", "tokens_per_second",
        "step_ms", "peak_memory_bytes", "weights_bytes", "optimizer_bytes", "activations_bytes",
        "seconds",
    ):  # fmt: skip
        assert result[name] > 0, name
    assert result["loss_after"] < result["loss_before"]
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [int(row["iteration"]) for row in rows] == [2, 3, 4, 6]
    assert [bool(row["held_out_loss"]) for row in rows] == [False, True, False, True]
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(result["loss_last"], abs=1e-4)
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    for folder in (out, out / "last"):
        side = QST.from_side(base, folder).side
        assert sum(p.numel() for p in side.parameters()) == result["trainable_parameters"]
    assert not list(out.rglob("*.tmp"))


def test_a_result_tells_the_settings_of_its_side_network(cfg, tmp_path):
    """With --side they are those of the side network, in evaluation and in training, and the settings
    that are told give the same run; flags that say otherwise are refused."""
    train.main(TrainConfig(**cfg | dict(rank=2, downsample="lora", variant="fast", max_iters=1)))
    about = json.loads((tmp_path / "out/side.json").read_text())["config"]
    more = dict(side=cfg["out_dir"], out_dir=str(tmp_path / "more"), max_iters=1)
    for eval_only in (True, False):
        told = train.main(TrainConfig(**cfg | more | dict(eval_only=eval_only)))["config"]
        assert {name: told[name] for name in about} == about | dict(task="instruct")
        assert told["rank"] == 2 and told["reduction"] == 4 and told["gate"] == "sum" and not told["final_norm"]
        assert train.resolve(TrainConfig(**told)) == TrainConfig(**told)
    for other in (dict(reduction=2), dict(variant="released"), dict(gate="channel")):
        with pytest.raises(InputError, match=f"--{next(iter(other))}: --side .* has its own"):
            train.main(TrainConfig(**cfg | more | other))


def test_the_loss_in_the_log_is_the_checkpoints(cfg):
    """The kept side network, loaded again, has the held-out loss that is reported."""
    result = train.main(TrainConfig(**cfg))
    settings = train.resolve(TrainConfig(**cfg))
    tokenizer = train.load_tokenizer(cfg["base"])
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    task = train.load_task(settings, tokenizer, ChatTemplate(), base.config)
    loss = lambda model: train.mean_loss(model, task.held_out, 3)
    assert loss(QST.from_side(base, cfg["out_dir"])) == pytest.approx(result["loss_after"], rel=1e-4)
    assert loss(QST(base, SideConfig(reduction=4))) == pytest.approx(result["loss_before"], rel=1e-4)


def test_a_run_is_repeatable(cfg):
    """The same seed gives the same losses; another seed, others."""
    losses = [train.main(TrainConfig(**cfg | dict(seed=seed)))["loss_last"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Two halves, accumulated, give the step that the whole batch gives."""
    idx = torch.randint(3, 61, (8, 10), generator=torch.Generator().manual_seed(0))
    after = []
    for pieces in (1, 2):
        torch.manual_seed(0)
        model = QST(small_base(), SideConfig(reduction=4))
        cfg = train.resolve(TrainConfig(gradient_accumulation_steps=pieces))
        optimizer = train.make_optimizer(model, cfg)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        batches = iter([(part, part) for part in idx.chunk(pieces)] * 3)
        for iteration in range(3):
            loss, tokens = train.train_step(
                model.loss, optimizer, scaler, batches, torch.device("cpu"), iteration, cfg
            )
            assert tokens == 80
        after.append([loss, *[p.detach().clone() for p in model.parameters()]])
    for one, two in zip(*after):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(two), atol=1e-4)


def test_learning_rate():
    """A linear warm-up, then the schedule, which ends just above 0."""
    rates = {}
    for schedule in train.SCHEDULES:
        cfg = TrainConfig(lr_schedule=schedule, learning_rate=1.0, max_iters=110, warmup_iters=10)
        rates[schedule] = [train.learning_rate_at(i, cfg) for i in range(110)]
        assert rates[schedule][:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
        assert rates[schedule][10] == 1
    assert rates["constant"][109] == 1
    assert rates["linear"][60] == pytest.approx(0.5) and rates["linear"][109] == pytest.approx(0.01)
    assert rates["cosine"][60] == pytest.approx(0.5) and 0 < rates["cosine"][109] < 0.001


def test_optimizer_groups():
    """Matrices decay, vectors and gates do not, and alpha has its own learning rate."""
    model = QST(small_base(), SideConfig(reduction=4, downsample_norm=True, gate="channel"))
    cfg = train.resolve(TrainConfig(weight_decay=0.1, alpha_lr_factor=25.0))
    optimizer = train.make_optimizer(model, cfg)
    groups = {(g["factor"], g["weight_decay"]): g["params"] for g in optimizer.param_groups}
    assert set(groups) == {(1, 0.1), (1, 0), (25, 0)}
    assert all(p.dim() == 2 for p in groups[1, 0.1])
    assert [id(p) for p in groups[25, 0]] == [id(model.side.alpha)]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_activation_bytes_counts_each_storage_once():
    """Two uses of one saved tensor count once; weights count not at all."""
    weight = torch.nn.Parameter(torch.randn(8, 8))

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def loss(self, idx, targets):
            h = idx @ self.weight
            return (h * h).sum() + (h * 2).sin().sum()

    x = torch.randn(4, 8)
    # kept: x for the weight's gradient, h twice for the square, and 2 h for the sine
    assert activation_bytes(Square(), x, None) == 3 * 4 * 8 * 4


def test_ctrl_c_saves(cfg, tmp_path, monkeypatch, capsys):
    """Interrupting leaves a side network that loads, a result, and a line that says where."""
    step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    result = train.main(TrainConfig(**cfg))
    out = tmp_path / "out"
    assert result["interrupted"] and result["iterations"] == result["best_iteration"] == 2
    assert result["loss_after"] == result["loss_last"] < result["loss_before"]
    assert f"Interrupted. The side network as it is now: {out / 'last'}" in capsys.readouterr().out
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    for folder in (out, out / "last"):
        QST.from_side(base, folder)
    assert json.loads((out / "result.json").read_text())["interrupted"]


def test_a_loss_that_is_not_finite_stops_the_run(cfg):
    with pytest.raises(InputError, match="--learning_rate.* No side network is kept"):
        train.main(TrainConfig(**cfg | dict(learning_rate=1e30, grad_clip=0.0, warmup_iters=0)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype, cfg):
    """Training computes in bf16 and fp16 too, to nearly the same loss."""
    reference = train.main(TrainConfig(**cfg))
    result = train.main(TrainConfig(**cfg | dict(dtype=dtype)))
    assert result["loss_after"] == pytest.approx(reference["loss_after"], rel=0.02)


def test_every_field_is_a_flag():
    """`--name value` and `--name=value` both work, and booleans need no value."""
    cfg = train.parse_args(
        ["--max_iters", "7", "--learning_rate=1e-3", "--compile", "--final_norm=false", "--base=a=b"]
    )
    assert (cfg.max_iters, cfg.learning_rate, cfg.compile, cfg.final_norm) == (7, 1e-3, True, False)
    assert cfg.base == "a=b" and cfg.rank == 16
    shown = command("train.py", "--help")
    assert shown.returncode == 0
    for f in fields(TrainConfig):
        assert (f"--{f.name} " in shown.stdout) == f.metadata["flag"]


def test_the_help_of_data_leads_somewhere():
    """Each file that it names has a --help, which says where its data comes from."""
    named = re.findall(r"data/\w+\.py", TrainConfig.__dataclass_fields__["data"].metadata["help"])
    for script in named:
        assert "where it comes from" in command(script, "--help").stdout, script
    assert len(named) == 3


def test_defaults_are_the_papers():
    cfg = train.resolve(TrainConfig(base="x", data="y"))
    assert (cfg.reduction, cfg.rank, cfg.downsample, cfg.quant) == (16, 16, "adapter", "nf4")
    assert (cfg.learning_rate, cfg.lr_schedule, cfg.sequence_len) == (2e-4, "constant", 384)


@pytest.mark.parametrize("args, told", [
    (["train.py", "--lerning_rate", "1"], "--lerning_rate"),
    (["train.py", "--max_iters", "many"], "--max_iters"),
    (["train.py", "--compile=perhaps"], "--compile"),
    (["train.py", "--base", "/nowhere", "--data", "x"], "/nowhere is not a folder"),
    (["train.py", "--base", "/nowhere"], "--base needs --data"),
    (["train.py", "--data", "x"], "--data needs --base"),
    (["train.py", "--preset", "opt-125m"], "--preset"), (["train.py", "--plan"], "--plan"),
    (["train.py", "--batch_size", "0"], "--batch_size 0"),
    (["train.py", "--held_out", "1.5"], "--held_out 1.5"),
    (["train.py", "--threads", "1000"], "--threads 1000"),
    (["train.py", "--learning_rate=-1"], "--learning_rate -1"),
    (["train.py", "--max_examples=1"], "The data leaves 0 examples"),
    (["train.py", "--beta1", "1.5"], "--beta1 1.5"),
    (["train.py", "--downsample", "sum"], "--downsample sum"),
    (["train.py", "--lr_schedule", "up"], "--lr_schedule up"),
    (["train.py", "--device", "gpu"], "--device gpu"),
    (["train.py", "--out_dir", str(ROOT / "LICENSE")], "LICENSE cannot be written to"),
    (["qst.py", "--base", "/nowhere", "--prompt", "x"], "/nowhere is not a folder"),
    (["qst.py", "--base", "/nowhere", "--prompt", "x", "--temprature=1"], "--temprature=1"),
])  # fmt: skip
def test_mistakes_on_the_command_line(args, told):
    """One sentence that names the flag or the file."""
    script, *flags = args
    main = (lambda: train.main(train.parse_args(flags))) if script == "train.py" else lambda: qst.main(flags)
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert told in stopped.value.code and "\n" not in stopped.value.code


def test_a_mistake_shows_no_traceback():
    """The same from outside: a line on stderr and a failing exit code."""
    for args in (["train.py", "--base", "/nowhere", "--data", "x"], ["qst.py", "--promt", "x"]):
        done = command(*args)
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert len(done.stderr.strip().split("\n")) == 1


@pytest.mark.parametrize("changes, told", [
    (dict(reduction=3), "--reduction 3"), (dict(sequence_len=500), "500 tokens .* 128 positions"),
    (dict(quant="int5"), "--method qst needs a base with --quant nf4 or fp4 or none, and not int5"), (dict(dtype="fp8"), "--dtype fp8"),
    (dict(max_examples=1), "leaves 0 examples"),
    (dict(sequence_len=5), "leaves 0 examples"),
])  # fmt: skip
def test_settings_that_do_not_fit(changes, told, cfg):
    with pytest.raises(InputError, match=told):
        train.main(TrainConfig(**cfg | changes))


def test_an_empty_data_file(cfg, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl holds no instructions"):
        train.main(TrainConfig(**cfg | dict(data=str(tmp_path / "empty.jsonl"))))


def test_generating_from_a_run(cfg, tiny_model):
    """qst.py answers with the side network, and without one goes on with the text."""
    train.main(TrainConfig(**cfg))
    flags = ["--base", tiny_model, "--prompt", tiny.EXAMPLE, "--max_new_tokens", 5]
    with_side = command("qst.py", *flags, "--side", cfg["out_dir"])
    alone = command("qst.py", *flags)
    assert with_side.returncode == alone.returncode == 0, with_side.stderr + alone.stderr
    assert alone.stdout.startswith(tiny.EXAMPLE) and not with_side.stdout.startswith("Leo")
    wrong = command("qst.py", *flags, "--side", cfg["out_dir"], "--quant", "none")
    assert "another base: quant nf4 there and none here" in wrong.stderr


def test_the_tiny_base_is_made_once_and_whole(tmp_path, monkeypatch):
    """The base is a folder like any other; a run that fails leaves none."""
    monkeypatch.setattr(tiny, "CACHE", tmp_path)
    monkeypatch.setattr(tiny, "BASE_RUN", tiny.BASE_RUN | dict(max_iters=2))
    make = lambda save=save_pretrained: tiny.base_folder(train.train_tiny_base, save)

    def interrupted(model, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(interrupted)
    assert not list(tmp_path.iterdir())
    folder = make()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert make() == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert from_pretrained(folder).config.vocab_size == train.load_tokenizer(folder).vocab_size


def test_the_embedded_default_learns(tmp_path):
    """`python train.py`: the base answers in English, and QST in French, on held-out questions."""
    result = train.main(TrainConfig(out_dir=str(tmp_path)))
    assert result["exact_match_before"] < 0.1 and result["exact_match_after"] > 0.9
    assert math.isfinite(result["loss_after"])


def test_a_variant_is_one_flag():
    """--variant sets what the architecture's own flags leave at the paper's values."""
    cfg = train.resolve(train.parse_args(["--variant", "fast", "--mix", "released"]))
    assert (cfg.mix, cfg.gate, cfg.standardize) == ("released", "sum", True)
    assert train.resolve(train.parse_args(["--variant", "released"])).final_norm
    with pytest.raises(InputError, match="--variant best is unknown: choose paper, released, fast"):
        train.resolve(train.parse_args(["--variant", "best"]))
