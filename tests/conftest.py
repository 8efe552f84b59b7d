"""What the tests share: the path, small models, and where the oracles are."""

import contextlib
import gc
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

# Of models this small two threads compute no faster, and where there is other work they wait for
# each other; set before torch is loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).parent.parent
ROOMS = [str(path.parent) for path in sorted(ROOT.glob("tests/*/test_*.py"))]  # tests share samples
sys.path[:0] = [str(ROOT), *dict.fromkeys(ROOMS)]

from data.run.run import Run  # noqa: E402
from data.settings.methods import FAST, RELEASED  # noqa: E402
from data.tasks import tiny  # noqa: E402
from model import ModelConfig, Transformer, quantize_folder  # noqa: E402
from halves import Halves  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
# More of the same that is too large or not ours to keep here: models, tokenizers, benchmarks.
TEST_DATA = Path(os.environ.get("QST_TEST_DATA") or "/nowhere")
needs_test_data = pytest.mark.skipif(not TEST_DATA.is_dir(), reason="needs QST_TEST_DATA=FOLDER")
FAMILIES = {"llama": {}, "grouped": dict(n_kv_head=2), "opt": dict(family="opt")}
VARIANTS = {  # of the side network, for a reduction of one's own
    "paper": {}, "released": RELEASED, "fast": {k: FAST[k] for k in FAST if k != "reduction"},
    "residual": dict(mix="residual"), "sum": dict(gate="sum"),
    "standardize": dict(standardize=True), "third": dict(every=3, standardize=True),
    "third, no embedding": dict(every=3, read_embedding=False),
}
each_family = pytest.mark.parametrize("family", FAMILIES)

# tqdm's lock is of all processes that are forked from one: of those that tests kill, one that holds
# it would stop all others for good.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


def pytest_configure(config):
    config.pluginmanager.register(Halves(config))


def pytest_collection_finish(session):
    gc.freeze()  # what is loaded by now stays: no collection of garbage looks through it again


def pytest_unconfigure(config):
    gc.unfreeze()


def small_config(family="llama", **changes):
    sizes = dict(vocab_size=61, n_layer=3, n_head=4, n_embd=32, n_ffn=48, max_positions=64)
    opt = dict(attention_bias=True, mlp_bias=True, tied=True) if family == "opt" else {}
    return ModelConfig(**(sizes | opt | dict(family=family, bos_id=1, eos_id=2) | changes))


def small_base(quant="nf4", seed=0, **changes):
    """A frozen model with random weights, which are not all small."""
    torch.manual_seed(seed)
    model = Transformer(small_config(**changes))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.freeze(quant, torch.float32)


def shaken(model, seed=1):
    """Move every parameter of the side network away from its start."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def run_of(loss_of, optimizer, scaler, cfg, rate):
    """A `Beside` and a `Run` with a function of (idx, targets) in place of a model, and a constant
    learning rate."""
    models = SimpleNamespace(compute=lambda idx: [idx], device=torch.device("cpu"), compiled=False)
    run = Run.__new__(Run)
    run.model, run.losses = SimpleNamespace(loss_of=loss_of), []
    run.optimizer, run.scaler = optimizer, scaler
    constant = dict(warmup_iters=0, max_iters=9, lr_schedule="constant")
    run.cfg = replace(cfg, learning_rate=rate, **constant)
    return models, run


def say(*lines):
    """"role: text" lines as messages."""
    return [dict(zip(("role", "content"), line.split(": ", 1))) for line in lines]


def run_script(script, *words, cwd=ROOT):
    """Run a script of the repository as `python` does, but in this process, where torch is loaded
    already. Returns what it prints; a mistake is a SystemExit with its message."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(cwd)
        patch.setattr("sys.argv", [str(ROOT / script), *words])
        patch.setattr("sys.path", list(sys.path))
        patch.setattr("sys.stdin", io.StringIO())
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def command(*args):
    """Run a script of the repository as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def short_run(base, tmp_path, records, **settings):
    """Settings of a run of a second or two, on a folder and a file of stories."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(records, seed=1)))
    shared = dict(reduction=4, max_iters=8, batch_size=8, eval_interval=4, learning_rate=1e-2)
    files = dict(base=str(base), data=str(data), out_dir=str(tmp_path / "out"))
    return shared | files | dict(sequence_len=96, device="cpu") | settings


def copy_folder(name, tmp_path, **config):
    """A copy of a fixture with some of its config.json changed (None: taken out)."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    settings = {k: v for k, v in settings.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def sign_again(folder, tensors=None, **changes):
    """Rewrite a side checkpoint with other tensors or settings, and with the right checksum."""
    from data.formats.safetensors import read_header, read_safetensors, write_safetensors
    from data.run.checkpoint import digest

    path = folder / "side.safetensors"
    text = json.dumps(json.loads(read_header(path)[1]["side"]) | changes)
    tensors = tensors or {name: read().clone() for name, read in read_safetensors(path).items()}
    write_safetensors(path, tensors, {"side": text, "sha256": digest(text, tensors)})


@pytest.fixture
def base():
    return small_base()


@pytest.fixture
def idx():
    return torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_answers(monkeypatch):
    """Leave out the three answers that a run shows: most of the time of a short one."""
    monkeypatch.setattr("data.tasks.instruct.samples", lambda *args: [])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder as from the Hub: an untrained LLaMA and the embedded default's tokenizer."""
    from data.formats.save import save_pretrained
    from data.tokens.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny.train_tokenizer(folder / "tokenizer.model")
    torch.manual_seed(0)
    size = load_tokenizer(folder).vocab_size
    save_pretrained(Transformer(small_config(vocab_size=size, max_positions=128)), folder)
    return folder


@pytest.fixture
def packed(tiny_model, tmp_path_factory):
    """The same in 4 bits, anew for each test."""
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    quantize_folder(tiny_model, folder)
    return folder
