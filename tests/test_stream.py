"""data/stream.py: a base whose layers come from disk computes what one in memory does."""

import contextlib
import json
import math
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from account import AccountConfig, memory_report, parse_args, stream_from_memory, transfer
from benchmarks.streaming import ONE_ARENA
from conftest import (
    FAMILIES, FIXTURES, ROOT, VARIANTS, each_family, shaken, small_base, small_config,
)  # fmt: skip
from torch._subclasses.fake_tensor import FakeTensorMode

import qst
import train
from data import choice_logits, tiny
from data.hub import save_pretrained
from data.safetensors import read_safetensors, write_safetensors
from model import Transformer, from_pretrained, model_bytes, quantize_folder
from qst import QST
from quant import InputError, Linear4bit, quantize_4bit
from side import SideConfig
from train import TrainConfig

SIDES = VARIANTS | {
    name: dict(downsample=name) for name in ("linear", "lora", "maxpool", "avgpool")
} | dict(lst=dict(method="lst"))


@pytest.fixture
def packed(tiny_model, tmp_path_factory):
    """A 4-bit folder."""
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    quantize_folder(tiny_model, folder)
    return folder


def learn(model, idx, steps=2):
    """Losses and gradients of a few steps."""
    found = []
    for _ in range(steps):
        loss = model.loss(idx, idx)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()
    return found


def same(one, two):
    assert len(one) == len(two) and all(map(torch.equal, one, two))


# --------------------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_losses_and_gradients_are_the_same(side, bits, idx):
    """For every setting of the side network and every --h_f_bits, over two steps, bit for bit."""
    found = []
    for stream in (False, True):
        base = small_base()
        if stream:
            stream_from_memory(base, "cpu")
        torch.manual_seed(0)
        model = shaken(QST(base, SideConfig(**dict(reduction=2, rank=2) | side)))
        model.calibrate([[3, 4, 5]])
        model.side.save_memory(True, bits)
        found.append(learn(model, idx))
    same(*found)


@each_family
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_any_number_of_layers(layers, family, idx):
    """Odd, even, or one: the two slots take turns across the end of a pass."""
    found = []
    for stream in (False, True):
        base = small_base(**FAMILIES[family] | dict(n_layer=layers))
        if stream:
            stream_from_memory(base, "cpu")
        found.append(learn(shaken(QST(base, SideConfig(reduction=2, rank=2))), idx, steps=3))
    same(*found)


def test_a_slot_is_not_filled_while_its_layer_computes(base, idx):
    """Not even when the next copy is done before the layer begins."""
    expected = base(idx)
    stream_from_memory(base, "cpu")
    for layer in base.layers:
        layer.register_forward_pre_hook(lambda *_: base.stream.coming[2].result() and None)
    assert torch.equal(base(idx), expected) and torch.equal(base(idx), expected)


def test_the_next_layer_comes_while_one_computes(base, idx):
    """The weights of layer i + 1 are read in another thread, once layer i has begun."""
    stream_from_memory(base, "cpu")
    arrived = [threading.Event() for _ in base.layers]

    def watch(i, linear):
        source = linear.source

        def read():
            arrived[i].set()
            assert threading.current_thread() is not threading.main_thread()
            return source()

        linear.source = read

    for i, layer in enumerate(base.layers):
        watch(i, layer.mlp.down_proj)
        after = arrived[(i + 1) % len(arrived)]
        layer.mlp.register_forward_pre_hook(lambda *_, after=after: 0 / after.wait(10) or None)
        layer.register_forward_pre_hook(lambda *_, i=i: arrived[i].clear())
    base(idx)


def test_a_pass_that_breaks_off(base, idx):
    """After an error in the middle of a pass, or Ctrl-C, the next pass begins with the first layer;
    what cannot be read is said where it is needed, and can be tried again."""
    expected = base(idx)
    stream_from_memory(base, "cpu")
    hook = base.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base(idx)
    hook.remove()
    assert torch.equal(base(idx), expected)
    linear = base.layers[2].mlp.up_proj
    source, linear.source = linear.source, lambda: (_ for _ in ()).throw(InputError("gone"))
    for _ in range(2):
        with pytest.raises(InputError, match="gone"):
            base(idx)
    linear.source = source
    assert torch.equal(base(idx), expected)


def test_on_a_gpu_copies_and_kernels_wait_for_each_other(base, idx, monkeypatch):
    """Each copy waits for an event behind the kernels that read its slot before, and each layer for
    the event behind its copy."""
    log, lock = [], threading.Lock()

    class Queue:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            with lock:
                log.append(("event", self.name, len(log)))
                return log[-1]

        def wait_event(self, event):
            log.append(("wait", self.name, event))

    kernels = Queue("kernels")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stream_from_memory(base, "cpu")
    base.stream.copies = Queue("copies")
    fill = base.stream.fill

    def logged(i, slot, done):
        event = fill(i, slot, done)
        log.append(("filled", i, id(slot), done, event))
        return event

    base.stream.fill = logged
    for i, layer in enumerate(base.layers):
        read = lambda *_, i=i: log.append(("computes", i, base.layers[i].mlp.up_proj.weight))
        layer.register_forward_hook(read)
    base(idx), base(idx)
    base.stream.coming[2].result()
    computed = [n for n, entry in enumerate(log) if entry[0] == "computes"]
    fills = [entry for entry in log if entry[0] == "filled"]
    assert [entry[1] for entry in fills] == [0, 1, 2, 0, 1, 2, 0] and len(computed) == 6
    for k, (_, i, slot, done, event) in enumerate(fills):
        assert ("wait", "copies", done) in log
        assert k < 2 or slot == fills[k - 2][2] != fills[k - 1][2]
        if k < 6:  # its layer computes after the wait
            assert log.index(("wait", "kernels", event)) < computed[k]
        if k >= 2:  # the layer that had the slot before it was in the queue before `done`
            assert computed[k - 2] < log.index(done)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_with_the_embedding_on_the_host(tied, idx):
    """Every operator finds its inputs on one device, shown with two that need no GPU, and a batch
    goes where the layers are; the embedding stays on the host, unless it is the head."""
    config, meta = small_config(tied=tied), torch.device("meta")
    place = lambda name: "cpu" if name == "embed_tokens.weight" and not tied else meta
    base = Transformer(config).freeze("nf4", torch.float32, place)
    stream_from_memory(base, meta)
    model = QST(base, SideConfig(reduction=4, rank=2))
    assert model.device == base.device == meta
    assert base.embed_tokens.weight.device == torch.device("meta" if tied else "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        idx = torch.ones(2, 9, dtype=torch.long, device=model.device)
        model(idx, idx)[1].backward()
    assert all(p.grad.device == meta for p in model.parameters())


# --------------------------------------------------------------------------------------
# From a folder


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@each_family
def test_a_folder_is_streamed(kind, family, idx, tmp_path, capsys):
    """Ours from disk: the same steps, the same fingerprint, and one line says what a pass reads."""
    save_pretrained(small_base(kind, **FAMILIES[family]), tmp_path)
    found, prints = [], []
    for stream in (False, True):
        base = from_pretrained(tmp_path, kind, torch.float32, stream=stream)
        torch.manual_seed(0)
        model = shaken(QST(base, SideConfig(reduction=2, rank=2)))
        found.append(learn(model, idx))
        prints.append(model.fingerprint)
    same(*found)
    assert prints[0] == prints[1]
    assert f"kB a batch from {tmp_path}: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bnb_llama", "bnb_opt"])
def test_a_folder_of_bitsandbytes(name, idx):
    """What bitsandbytes has written; of OPT's layers the first has a matrix in 16 bits, which stays."""
    kind = json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
    kind = kind["bnb_4bit_quant_type"]
    whole, streamed = (
        from_pretrained(FIXTURES / name, kind, torch.float32, stream=s) for s in (False, True)
    )
    idx = idx % whole.config.vocab_size
    assert torch.equal(whole(idx), streamed(idx)) and torch.equal(whole(idx), streamed(idx))


def test_side_networks_are_interchangeable(packed, tmp_path):
    """What a streamed base has trained loads on one in memory, and the reverse."""
    bases = [from_pretrained(packed, "nf4", torch.float32, stream=s) for s in (False, True)]
    idx = torch.randint(3, 60, (2, 7))
    for one, other in (bases, bases[::-1]):
        model = shaken(QST(one, SideConfig(reduction=4, rank=2)))
        model.save_side(tmp_path / "side")
        assert torch.equal(QST.from_side(other, tmp_path / "side")(idx)[0], model(idx)[0])


def test_two_layers_are_in_memory(packed):
    """Of the weights two slots, shared by all layers; of the folder no more is mapped than what is
    being copied."""
    whole, base = (from_pretrained(packed, "nf4", torch.float32, stream=s) for s in (False, True))
    mapped = lambda: open("/proc/self/maps").read().count(str(packed))
    before, layers = mapped(), len(base.layers)
    del whole
    assert model_bytes(base.layers) < base.stream.nbytes * 2 / layers
    held = {w.codes.data_ptr() for slot in base.stream.slots for w in slot.values()}
    assert len(held) == 2 * len(base.stream.slots[0])
    base(torch.ones(1, 5, dtype=torch.long))
    base.stream.coming[2].result()
    assert mapped() < before / 4  # embedding and head
    assert {m.weight.codes.data_ptr() for m in base.modules() if isinstance(m, Linear4bit)} <= held


def test_four_times_the_memory(tmp_path):
    """A model trains in a process whose addresses have room for a quarter of its weights, in which
    the same without --stream does not even load."""
    script = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import resource
        from benchmarks import streaming
        from benchmarks.common import resident
        from model import ModelConfig
        from quant import InputError
        config = ModelConfig(100, n_layer=64, n_head=8, n_embd=1024, n_ffn=2816)
        small = ModelConfig(100, n_layer=2, n_head=1, n_embd=128, n_ffn=128)
        streaming.FLAGS += " --sequence_len 8"
        streaming.write_random({str(tmp_path / "small")!r}, small)
        streaming.trainer({str(tmp_path / "small")!r}, stream=True)()  # torch has what it needs
        quarter = streaming.write_random({str(tmp_path)!r}, config) // 4
        most = resident("VmSize") + quarter
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        step = streaming.trainer({str(tmp_path)!r}, stream=True)
        losses = [step() for _ in range(2)]
        assert losses[1] != losses[0], losses
        try:
            streaming.trainer({str(tmp_path)!r}, stream=False)
        except InputError as error:
            print(quarter, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True,
        env={"OMP_NUM_THREADS": "1"} | ONE_ARENA, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Cannot allocate memory" in done.stdout.splitlines()[-1]


# --------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def cfg(packed, tmp_path):
    data = tmp_path / "stories.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(30, seed=1)))
    return dict(
        base=str(packed), data=str(data), out_dir=str(tmp_path / "out"), reduction=4, max_iters=4,
        batch_size=4, sequence_len=100, eval_interval=2, learning_rate=1e-2, device="cpu",
    )  # fmt: skip


def test_a_run(cfg, tmp_path):
    """train.py --stream ends in the same bytes, also where one of the two goes on with a run of the
    other; it shows no answers, which would take a pass a token."""
    runs = {}
    for name, parts in dict(whole=[False], streamed=[True], mixed=[True, False]).items():
        folder = cfg["out_dir"] = str(tmp_path / name)
        for k, stream in enumerate(parts):
            iterations = 4 if k == len(parts) - 1 else 2
            now = cfg | dict(stream=stream, resume=k > 0, max_iters=iterations)
            result = train.main(TrainConfig(**now))
        runs[name] = (tmp_path / name / "side.safetensors").read_bytes(), result["loss_after"]
        assert bool(result["samples"]) == (not stream)
        assert result["loss_after"] < result["loss_before"]
    assert runs["whole"] == runs["streamed"] == runs["mixed"]


def test_evaluation(cfg, tmp_path):
    """--eval_only, of the base and of a side network, and MMLU's kind of prompts: one pass a batch."""
    train.main(TrainConfig(**cfg))
    for side in ({}, dict(side=cfg["out_dir"], reduction=None)):
        settings = cfg | dict(eval_only=True, out_dir=str(tmp_path / "eval")) | side
        losses = [train.main(TrainConfig(**settings, stream=s))["loss"] for s in (False, True)]
        assert losses[0] == losses[1]


def test_choices(base):
    """Prompts with a common beginning, which a cache holds for all of them, are scored the same."""
    prompts = [[3, 4, 5, 6], [3, 4, 7], [3, 4, 5, 9, 9]]
    with torch.no_grad():
        expected = choice_logits(base, prompts, batch_size=2)
        stream_from_memory(base, "cpu")
        assert torch.equal(choice_logits(base, prompts, batch_size=2), expected)


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
    (dict(method="qlora", reduction=None), "--stream is of --method qst and lst, and not of qlora"),
    (dict(devices="cpu,cpu"), "neither for --devices"),
    (dict(base="", data=""), "--stream needs a --base"),
    (dict(quant="fp4"), "is already quantized to nf4: give --quant nf4"),
])  # fmt: skip
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


def test_in_base_methods_are_refused(base):
    stream_from_memory(base, "cpu")
    with pytest.raises(InputError, match="whose backward reads no weight of the base; that of --me"):
        qst.tune(base, SideConfig(method="qlora"))


def test_one_answer_is_refused(packed, base, tmp_path):
    """Before a model is read; one token is no more than a pass."""
    (tmp_path / "q").write_text('{"question_id": 1, "category": "a", "turns": ["Who?"]}')
    ask = ["answer", "--questions", str(tmp_path / "q"), "--out", str(tmp_path / "a")]
    for command in (["chat"], ["--prompt", "Who?"], ask):
        name = command[:1] if command[0] in qst.COMMANDS else []
        with pytest.raises(InputError, match="reads all weights anew for every token"):
            qst.main([*name, "--base", str(packed), "--stream", *command[len(name) :]])
    with pytest.raises(InputError, match="give --prompt, or --batch"):
        qst.main(["--base", str(packed)])
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
    )  # fmt: skip
    said = transfer(report, cfg)  # 3 s to read; 0.096 s to compute; 3 s are 9 TFLOP, 1,000 tokens
    assert "6.00 GB: 3.00 s" in said and "computes 0.10 s" in said and "from 1,000 tokens" in said
