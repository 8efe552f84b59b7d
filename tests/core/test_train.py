"""train.py: what a run leaves, how it goes on and ends, and what it refuses."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qst
import train
from data import InputError
from data.frozen.hidden import channel_statistics
from data.run.log import TrainingLog
from data.run.state import stop_signals
from data.tasks import tiny
from data.tasks.examples import Task
from model import from_pretrained
from qst import QST, SharedBase
from side import PackedInputLinear, SideConfig
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
        base=str(tiny_model), data=str(data), out_dir=str(tmp_path / "out"), reduction=4,
        max_iters=6, batch_size=8, sequence_len=100, eval_interval=3, log_interval=2,
        learning_rate=1e-2,
    )


def test_what_a_run_leaves(cfg, tmp_path):
    """result.json holds what main returns; log.csv a line an interval; both side networks load."""
    result = train.main(TrainConfig(**cfg))
    out = tmp_path / "out"
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    for name in (
        "loss_before", "loss_after", "trainable_parameters", "total_parameters",
        "tokens_per_second", "step_ms", "peak_memory_bytes", "weights_bytes", "optimizer_bytes",
        "activations_bytes", "seconds",
    ):
        assert result[name] > 0, name
    assert result["loss_after"] < result["loss_before"]
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [int(row["iteration"]) for row in rows] == [2, 3, 4, 6]
    assert [bool(row["held_out_loss"]) for row in rows] == [False, True, False, True]
    for row in rows:
        rate = train.learning_rate_at(int(row["iteration"]) - 1, train.resolve(TrainConfig(**cfg)))
        assert float(row["learning_rate"]) == pytest.approx(rate, rel=1e-3)
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(result["loss_last"], abs=1e-4)
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    for folder in (out, out / "last"):
        side = QST.from_side(base, folder).side
        assert sum(p.numel() for p in side.parameters()) == result["trainable_parameters"]
    assert not list(out.rglob("*.tmp"))


@pytest.mark.usefixtures("no_answers")
def test_a_run_from_a_side_checkpoint_names_its_start(cfg, tmp_path, capsys):
    """In what it prints and in loss.svg: it is not the base's loss."""
    first = train.main(TrainConfig(**cfg))
    assert f"{first['loss_before']:.3f} base, " in capsys.readouterr().out
    assert ">base</text>" in (tmp_path / "out/loss.svg").read_text()
    again = train.main(TrainConfig(**cfg | dict(side=cfg["out_dir"], out_dir=str(tmp_path / "2"))))
    printed = capsys.readouterr().out
    assert f"{first['loss_after']:.3f} {cfg['out_dir']}, {again['loss_after']:.3f} QST" in printed
    assert " base," not in printed
    assert f">{cfg['out_dir']}</text>" in (tmp_path / "2/loss.svg").read_text()


@pytest.mark.usefixtures("no_answers")
def test_a_result_can_be_repeated_and_plotted(cfg, tmp_path):
    """Its settings, given back, give its numbers; and it has the curves."""
    first = train.main(TrainConfig(**cfg))
    words = ["--config", f"{cfg['out_dir']}/result.json", "--out_dir", str(tmp_path / "again")]
    again = train.main(train.parse_args(words))
    assert again["loss_after"] == first["loss_after"] and again["curves"] == first["curves"]
    curves = first["curves"]
    assert [i for i, _ in curves["training"]] == [i for i, _ in curves["alpha"]] == [2, 3, 4, 6]
    assert curves["held out"][0] == (0, first["loss_before"])
    assert curves["alpha"][-1][1] < 1 and curves["gate"][-1][1] != 0.5


@pytest.mark.usefixtures("no_answers")
def test_the_loss_in_the_log_is_the_checkpoints(cfg):
    """The kept side network, loaded again, has the held-out loss that is reported."""
    result = train.main(TrainConfig(**cfg))
    settings = train.resolve(TrainConfig(**cfg))
    tokenizer = train.load_tokenizer(cfg["base"])
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    task = train.load_task(settings, tokenizer, base.config)
    untrained, trained = QST(base, SideConfig(reduction=4)), QST.from_side(base, cfg["out_dir"])
    for model, name in ((untrained, "loss_before"), (trained, "loss_after")):
        (loss,) = train.mean_loss(SharedBase([model]), task.held_out, 3)
        assert loss == pytest.approx(result[name], rel=1e-4)
    before, own = (Path(cfg["out_dir"]) / "result.json").read_bytes(), cfg["out_dir"]
    with pytest.raises(InputError, match="out has a run whose result.json this would replace"):
        evaluated = dict(base=cfg["base"], data=cfg["data"], side=own, eval_only=True, out_dir=own)
        train.main(TrainConfig(**evaluated))
    assert (Path(cfg["out_dir"]) / "result.json").read_bytes() == before


@pytest.mark.parametrize("rank, said", [(0, 1), (1, 0)])
def test_a_stop_is_said_once_and_needs_no_reader(rank, said, monkeypatch):
    """By the first process, to the first signal; and a stderr that is closed loses nothing."""
    written = []

    def write(number, text):
        written.append(number)
        raise BrokenPipeError

    monkeypatch.setattr("data.run.state.os.write", write)
    monkeypatch.setattr("data.run.state.distributed.rank", lambda: rank)
    with stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert len(asked) == 2 and len(written) == said


@pytest.mark.usefixtures("no_answers")
def test_the_best_is_kept_and_scored(cfg, tmp_path, monkeypatch):
    """Of three evaluations on held-out examples, the best in the middle, out_dir and the score have
    the side network of that one, last/ that of the last one, and the result their losses."""
    losses, seen, scored, task = iter([4.0, 3.0, 1.0, 2.0]), [], [], []
    values = lambda model: [p.detach().clone() for p in model.parameters()]

    def mean_loss(beside, examples, *args):
        (model,) = beside.models
        assert examples == task[0].held_out[:3] != task[0].train[:3]
        seen.append(values(model))
        return [next(losses)]

    load_task = train.load_task
    score = lambda beside: [scored.append(values(model)) or {} for model in beside.models]
    load = lambda *args: task.append(replace(load_task(*args), score=score)) or task[0]
    monkeypatch.setattr(train, "mean_loss", mean_loss)
    monkeypatch.setattr(train, "load_task", load)
    result = train.main(TrainConfig(**cfg | dict(eval_interval=2, eval_examples=3)))
    names = "loss_before", "loss_after", "loss_last", "best_iteration"
    assert [result[name] for name in names] == [4.0, 1.0, 2.0, 4]
    assert result["examples"] == 3 < len(task[0].held_out)
    base, out = from_pretrained(cfg["base"], "nf4", torch.float32), tmp_path / "out"
    kept, last = (values(QST.from_side(base, folder)) for folder in (out, out / "last"))
    same = lambda one, two: all(map(torch.equal, one, two))
    assert same(kept, seen[2]) and same(scored[-1], seen[2])
    assert same(last, seen[3]) and not same(last, kept)


def test_a_model_is_made_as_the_settings_say(base):
    """Its channels are measured on texts to train on, 64 at most, and memory is saved as asked."""
    examples = [([3 + i % 50] * 5, [7] * 5) for i in range(80)]
    cfg = TrainConfig(standardize=True, reduction=4, h_f_bits=8, checkpoint=True, chunk_loss=False)
    model = train.make_model(train.resolve(cfg), base, Task(examples[:70], examples[70:]))
    mean, variance = channel_statistics(base, [ids for ids, _ in examples[:64]])
    assert torch.allclose(model.side.mean, mean.float(), atol=1e-5)
    assert torch.allclose(model.side.scale, variance.float().rsqrt(), rtol=1e-3)
    bits = {m.bits for m in model.side.modules() if isinstance(m, PackedInputLinear)}
    assert bits == {8} and model.side.checkpoint and not model.chunk_loss


@pytest.mark.usefixtures("no_answers")
def test_a_result_has_the_settings_of_its_side_network(cfg, tmp_path):
    """With --side they are those of the side network, in evaluation and in training, and settings
    from a result give the same run; flags that say otherwise are refused."""
    train.main(TrainConfig(**cfg | dict(rank=2, downsample="lora", variant="fast", max_iters=1)))
    about = json.loads((tmp_path / "out/side.json").read_text())["config"]
    more = dict(side=cfg["out_dir"], out_dir=str(tmp_path / "more"), max_iters=1)
    for eval_only in (True, False):
        config = train.main(TrainConfig(**cfg | more | dict(eval_only=eval_only)))["config"]
        assert {name: config[name] for name in about} == about | dict(task="instruct")
        assert (config["rank"], config["reduction"], config["gate"]) == (2, 4, "sum")
        assert not config["downsample_norm"]
        assert train.resolve(TrainConfig(**config)) == TrainConfig(**config)
    for other in (dict(reduction=2), dict(variant="released"), dict(gate="channel")):
        with pytest.raises(InputError, match=f"--{next(iter(other))} is fixed by --side"):
            train.main(TrainConfig(**cfg | more | other))


@pytest.mark.usefixtures("no_answers")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_a_run_counts(dtype, cfg, monkeypatch):
    """The tokens of all batches of an iteration; and steps left out, which end a run only where ten
    of them are in a row. In fp16 alone the loss is scaled."""
    sent, counted, stepped = [], [], TrainingLog.stepped

    def step(runs, batches, iteration, models):
        assert runs[0].scaler.is_enabled() == (dtype == "fp16")
        sent.append(sum(idx.numel() for idx, *_ in batches))
        runs[0].learning_rate = 1.0
        return [(torch.tensor(1.0), torch.tensor(len(sent) % 9 == 0))]

    def count(log, loss, taken, tokens, *more):
        counted.append(tokens)
        return stepped(log, loss, taken, tokens, *more)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(TrainingLog, "stepped", count)
    more = dict(dtype=dtype, max_iters=24, eval_interval=12, gradient_accumulation_steps=3)
    assert train.main(TrainConfig(**cfg | more))["skipped_iterations"] == 22
    assert counted == sent and len(sent) == 24


@pytest.mark.usefixtures("no_answers")
def test_half_precision(cfg):
    """Training computes in bf16 and fp16 too, to nearly the same loss."""
    losses = {}
    for dtype in ("fp32", "bf16", "fp16"):
        losses[dtype] = train.main(TrainConfig(**cfg | dict(dtype=dtype)))["loss_after"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.usefixtures("no_answers")
def test_ctrl_c_saves(cfg, tmp_path, monkeypatch, capsys):
    """Interrupting, while a step is computed, leaves side networks that load, a result, and a line
    that says how to go on."""
    step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    result = train.main(TrainConfig(**cfg))
    out = tmp_path / "out"
    assert result["interrupted"] and result["iterations"] == 4 and result["best_iteration"] == 3
    assert result["loss_after"] == result["loss_last"] < result["loss_before"]
    assert "Stopped after iteration 4: continue with --resume." in capsys.readouterr().out
    base = from_pretrained(cfg["base"], "nf4", torch.float32)
    for folder in (out, out / "last"):
        QST.from_side(base, folder)
    assert json.loads((out / "result.json").read_text())["interrupted"]


@pytest.mark.usefixtures("no_answers")
@pytest.mark.parametrize("changes, message", [
    (dict(reduction=3), "--reduction 3"), (dict(sequence_len=500), "500 tokens .* 128 positions"),
    (dict(quant="int5"), "--method qst needs .* --quant nf4 or fp4 or none, and not int5"),
    (dict(dtype="fp8"), "--dtype .fp8."), (dict(max_examples=1), "leaves 0 examples"),
    (dict(sequence_len=5), "leaves 0 examples"),
])
def test_settings_that_do_not_fit(changes, message, cfg):
    """What does not fit the base or the data is refused with the flag's name."""
    with pytest.raises(InputError, match=message):
        train.main(TrainConfig(**cfg | changes))


def test_an_empty_data_file(cfg, tmp_path):
    """It is refused by its name."""
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl holds no instructions"):
        train.main(TrainConfig(**cfg | dict(data=str(tmp_path / "empty.jsonl"))))


@pytest.mark.usefixtures("no_answers")
def test_generating_from_a_run(cfg, tiny_model, capsys):
    """qst.py answers with the side network, and without one goes on with the text."""
    train.main(TrainConfig(**cfg))
    flags = ["--base", str(tiny_model), "--prompt", tiny.EXAMPLE, "--max_new_tokens", "5"]
    capsys.readouterr()
    qst.main([*flags, "--side", cfg["out_dir"]])
    assert not capsys.readouterr().out.startswith(tiny.EXAMPLE[:3])
    qst.main(flags)
    assert capsys.readouterr().out.startswith(tiny.EXAMPLE)
    with pytest.raises(InputError, match="another base: quant nf4 there and none here"):
        qst.main([*flags, "--side", cfg["out_dir"], "--quant", "none"])
