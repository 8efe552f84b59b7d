"""Several processes, started by torchrun: data/devices/distributed.py."""

import json
import os
import random
import re
import shutil
import signal
import socket
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SETTINGS, Forked, small_base

import train
from data import InputError
from data.devices import distributed
from data.formats.save import save_pretrained
from data.run.run import Run
from data.settings.flags import run_main
from data.tasks import tiny
from data.tasks.examples import Task, count_targets, iteration_batches
from qst import QST
from side import SideConfig
from train import TrainConfig

RATES = dict(max_iters=9, eval_interval=3, log_interval=1)


@pytest.fixture
def cfg(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(43, seed=1)))
    return SETTINGS | RATES | dict(base=str(tiny_model), data=str(data))


def torchrun(cfg, processes=2, **changes):
    """What `torchrun` does; train.py has processes of its own."""
    words = [f"--nproc_per_node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += [str(ROOT / "train.py"), *(f"--{name}={v}" for name, v in (cfg | changes).items())]
    sets = lambda: os.environ.update(OMP_NUM_THREADS="1")
    return Forked(lambda: (sets(), import_module("torch.distributed.run").main(words)))


def two_at_once(cfg, other={}):
    """The two processes that torchrun would start, without torchrun, which ends one after the
    other's death itself. other: what the second one has other settings of"""
    with socket.create_server(("localhost", 0)) as free:
        here = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))

    def run(rank):
        os.environ.update(here, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        run_main(lambda: train.main(TrainConfig(**cfg | other if rank else cfg)))

    return [Forked(lambda: run(rank)) for rank in range(2)]


def numbers(out_dir):
    lines = (Path(out_dir) / "log.csv").read_text().splitlines()[1:]
    return [[float(cell or 0) for cell in line.split(",")[:3]] for line in lines]


def test_two_processes_are_one(cfg, tmp_path):
    """Two of 4 sequences learn what one of 8 does, evaluate and score the same examples, to fp32
    rounding; the first alone prints and writes. One that dies ends the other soon, with a sentence,
    and the two go on from what was kept."""
    text, two_dir = tmp_path / "text.txt", tmp_path / "two"
    text.write_text(" ".join(tiny.story(random.Random(i), 0)[0] for i in range(300)))
    cfg |= dict(task="text", data=str(text), sequence_len=48)
    first, second = two_at_once(cfg | dict(out_dir=str(two_dir), max_iters=10**6))
    while not (two_dir / "state.safetensors").exists() and not first.ended():
        time.sleep(0.005)
    second.kill()
    code, printed, complaints = first.wait(60)
    assert code == 1 and "held-out loss" not in printed
    assert "error: Another process of this run has ended" in complaints
    assert second.wait() == (-signal.SIGKILL, "", "")
    train.read_side(two_dir)  # what was kept is whole
    kept = len(numbers(two_dir))
    cfg["max_iters"] = kept - kept % RATES["eval_interval"] + 6
    code, printed, complaints = torchrun(cfg, out_dir=two_dir, resume=True).wait()
    assert code == 0, complaints
    assert printed.count("held-out loss") == 1
    with pytest.raises(InputError, match="another --nproc_per_node, 2 and not 1: give the same"):
        train.main(TrainConfig(**cfg | dict(out_dir=str(two_dir), resume=True, max_iters=99)))
    one = train.main(TrainConfig(**cfg | dict(batch_size=8, out_dir=str(tmp_path / "one"))))
    for ours, theirs in zip(numbers(tmp_path / "one"), numbers(two_dir), strict=True):
        assert ours == pytest.approx(theirs, abs=3e-4)
    two = json.loads((two_dir / "result.json").read_text())
    assert two["loss_after"] == pytest.approx(one["loss_after"], abs=1e-4)
    assert two["perplexity_after"] == pytest.approx(one["perplexity_after"], rel=1e-4)


@pytest.mark.parametrize("what, told", [
    ("seed", "--seed is 2 in process 1, and 1337 in process 0"),
    ("reduction", "--reduction is 2 in process 1, and 4 in process 0"),
    ("batch_size", "--batch_size is 0 in process 1, and 4 in process 0"),
    ("out_dir", "--out_dir is '.*/second' in process 1, and '.*/out' in process 0"),
    ("data", r"The data \(examples, tokens, checksum\) is \[43, .* and \[43, "),
    ("max_examples", "--max_examples is 40 in process 1, and 0 in process 0"),
    ("base", "The checksum of the base is '.*' in process 1, and '.*' in process 0"),
    ("no base", "--base is '' in process 1, and 'given' in process 0"),
])
def test_processes_that_differ_are_refused(what, told, cfg, tmp_path):
    """Both end before the first step with one sentence that says in what they differ. The data and
    the base are compared by what is in them."""
    cfg |= dict(out_dir=str(tmp_path / "out"))
    values = dict(seed=2, reduction=2, batch_size=0, max_examples=40)
    other = {what: values.get(what, str(tmp_path / "second"))}
    if what == "no base":
        other = dict(base="", data="")
    if what == "data":  # as many tokens, one of them another
        text = Path(cfg["data"]).read_text()
        Path(other["data"]).write_text(text.replace("lost", "found", 1))
    if what == "base":
        base = train.from_pretrained(cfg["base"], "none", torch.float32)
        base.layers[0].self_attn.q_proj.weight.neg_()
        shutil.copytree(cfg["base"], other["base"])
        save_pretrained(base, other["base"])
    ends = [process.wait(60) for process in two_at_once(cfg, other)]
    sentences = [end[2].strip().split("\n")[-1] for end in ends]
    assert sentences[1] == sentences[0].replace("error:", "error in process 1:")
    assert re.search(f"error: {told}.*: give all processes the same", sentences[0])
    assert [end[0] for end in ends] == [1, 1] and not (tmp_path / "out/log.csv").exists()


def test_other_side_networks_are_refused(cfg, tmp_path):
    """Also those to evaluate, of the same settings and of the same name in another folder."""
    for seed in (1, 2):
        train.main(TrainConfig(**cfg | dict(max_iters=1, out_dir=str(tmp_path / f"{seed}"))))
        cfg |= dict(seed=7)
    cfg = {name: cfg[name] for name in ("base", "data", "sequence_len", "device")}
    cfg |= dict(eval_only=True, side=str(tmp_path / "1"), out_dir=str(tmp_path / "eval"))
    ends = [each.wait(60) for each in two_at_once(cfg, dict(side=str(tmp_path / "2")))]
    assert all("The checksum of the weights to train is [" in end[2] for end in ends), ends


def test_a_stopped_process_is_waited_for_only_so_long(cfg, tmp_path, monkeypatch):
    """The other one ends with a sentence, and so does the stopped one if it goes on."""
    monkeypatch.setattr(distributed, "PATIENCE", 0.05)
    cfg |= dict(out_dir=str(tmp_path), max_iters=10**6)
    first, second = two_at_once(cfg)
    while not (tmp_path / "state.safetensors").exists() and not first.ended():
        time.sleep(0.005)
    second.kill(signal.SIGSTOP)
    code, _, complaints = first.wait(60)
    second.kill(signal.SIGCONT)
    for code, _, complaints in ((code, _, complaints), second.wait(60)):
        assert code == 1 and "Traceback" not in complaints
        assert "Another process of this run has ended, or is silent for 0.05 minutes" in complaints


def test_a_silent_process_is_waited_for(monkeypatch):
    """For half an hour, in which the first one may make the built-in example's base; the sentence
    says as much."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    begin = lambda backend, timeout: given.update({backend: timeout})
    monkeypatch.setattr(distributed.distributed, "init_process_group", begin)
    distributed.start(torch.device("cpu"), TrainConfig())
    assert given == {"gloo": timedelta(minutes=30)}
    with pytest.raises(InputError, match=r"silent for 30 minutes \(Timed out\): read its message"):
        with distributed.others_alive():
            raise RuntimeError("[../gloo/x.cc:81] Timed out\nException raised from")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_process_stops_all(number, cfg, tmp_path):
    cfg |= dict(out_dir=str(tmp_path), max_iters=10**6)
    processes = two_at_once(cfg)
    while not (tmp_path / "state.safetensors").exists() and not processes[0].ended():
        time.sleep(0.005)
    processes[1].kill(number)
    ends = [process.wait(60) for process in processes]
    assert [code for code, *_ in ends] == [0, 0] and "continue with --resume" in ends[0][1]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_token_is_in_one_process_and_weighs_the_same(size, monkeypatch):
    """The processes' batches together are the global ones, and the shares of all add up to 1, also
    in an epoch's last batch, of which there may be too little for all."""
    examples = [(list(range(n)), [-100] * (n // 2) + list(range(n - n // 2))) for n in range(3, 20)]
    monkeypatch.setattr(distributed, "size", lambda: size)
    found = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        rows = iteration_batches(examples, 2, 3, seed=1)
        found.append([next(rows) for _ in range(6)])
    for iteration in zip(*found):
        batches = [batch for process in iteration for batch in process]
        weighing = [batch for batch in batches if batch[2]]
        assert sum(share for *_, share in batches) == pytest.approx(1)
        targets = sum(count_targets(targets) for _, targets, _ in weighing)
        for _, own, share in weighing:
            assert share == pytest.approx(count_targets(own) / targets)
        assert all(len(idx) for idx, *_ in batches)
    assert max(len(idx) for process in found for parts in process for idx, *_ in parts) == 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_list_is_split_and_joined(size, monkeypatch):
    """Each item is in the part of one process; what the parts give comes back in their order."""
    monkeypatch.setattr(distributed, "size", lambda: size)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        parts.append(distributed.split(list(range(7))))
    assert sorted(sum(parts, [])) == list(range(7))
    gather = lambda into, own: into.__setitem__(slice(None), parts)
    monkeypatch.setattr(distributed.distributed, "all_gather_object", gather)
    assert distributed.join(parts[-1]) == list(range(7))


def test_what_travels_is_summed(monkeypatch):
    """Tensors of any shape and dtype become their sums over the processes, each by itself."""
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed.distributed, "all_reduce", lambda flat: flat.mul_(3))
    tensors = [torch.tensor(2.0), torch.randn(2, 3), torch.arange(4).half()]
    expected = [3 * tensor for tensor in tensors]
    distributed.sum_(tensors)
    assert all(map(torch.equal, tensors, expected))


def test_the_first_process_alone_writes_the_state(tmp_path, monkeypatch):
    """Two that replace one file could leave the state of neither."""
    cfg = train.resolve(TrainConfig(out_dir=str(tmp_path)))
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        run = Run(QST(small_base(), SideConfig(reduction=4)), cfg)
        run.keep_files(Task([], []), {}, False, "")
        run.log.held_out_loss, run.learning_rate = 1.0, 1e-3
        monkeypatch.setattr(run.log, "write", lambda *args: None)
        run.write(save=True)
        assert (tmp_path / "state.safetensors").exists() == (rank == 0)


def gradients(model, batches):
    """Of the loss of an iteration, as `train_step` forms them."""
    model.zero_grad()
    for idx, targets, share in batches:
        (model.loss(idx, targets) * share).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_batches_of_an_iteration_are_one_batch(base):
    """Four batches of 2 have the gradient of one of 8, to fp32 rounding, whatever the lengths of
    the answers are."""
    model = QST(base, SideConfig(reduction=4, rank=2))
    model.side.alpha.data.fill_(0.5)
    asked = lambda n: [-100] * (n - 2 - n % 5) + [7] * (1 + n % 5)
    examples = [(list(range(1, n)), asked(n)) for n in range(9, 25)]
    small, large = (
        next(iteration_batches(examples[:8], size, steps, seed=1))
        for size, steps in ((2, 4), (8, 1))
    )
    shares = [share for *_, share in small]
    assert max(shares) > 1.5 * min(shares)
    for ours, theirs in zip(gradients(model, small), gradients(model, large)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
