"""What several files of tests share: paths, settings, small models and runs, and how to compare.

Of files that come from outside there are examples in samples.py; fixtures are in conftest.py.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Of models this small two threads compute no faster, and where there is other work they wait for
# each other; set before torch is loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
ROOMS = [str(path.parent) for path in sorted(ROOT.glob("tests/*/test_*.py"))]  # with their tools
sys.path[:0] = [str(ROOT), *dict.fromkeys(ROOMS)]

import train  # noqa: E402
from data import InputError  # noqa: E402
from data.formats.safetensors import (  # noqa: E402
    read_header, read_safetensors, write_safetensors,
)
from data.run.checkpoint import digest  # noqa: E402
from data.settings.methods import FAST, RELEASED  # noqa: E402
from data.tasks import tiny  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from mutants import dump  # noqa: E402
from qst import add_trainable  # noqa: E402
from side import METHODS, SideConfig  # noqa: E402
from train import TrainConfig  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
# More of the same that is too large or not ours to keep here: models, tokenizers, benchmarks.
TEST_DATA = Path(os.environ.get("QST_TEST_DATA") or "/nowhere")
needs_test_data = pytest.mark.skipif(not TEST_DATA.is_dir(), reason="needs QST_TEST_DATA=FOLDER")

# What needs a GPU; with QST_GPU_DRY_RUN=1 it runs on the CPU, where it can.
GPU = torch.cuda.is_available()
DRY = not GPU and os.environ.get("QST_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU, also in a dry run")
needs_gpu_or_dry_run = pytest.mark.skipif(not GPU and not DRY, reason="needs a GPU")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

FAMILIES = {"llama": {}, "qwen3": dict(n_kv_head=2, qk_norm=True), "opt": dict(family="opt")}
VARIANTS = {  # of the side network, for a reduction of one's own
    "paper": {}, "released": RELEASED, "fast": {k: FAST[k] for k in FAST if k != "reduction"},
    "residual": dict(mix="residual"), "sum": dict(gate="sum"),
    "standardize": dict(standardize=True), "third": dict(every=3, standardize=True),
    "third, no embedding": dict(every=3, read_embedding=False),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
# A method's --quant.
KINDS = {method: kinds[0] for method, kinds in METHODS.items()} | {"peqa": "int4-16"}

# Of runs of less than a second.
SETTINGS = dict(
    reduction=4, rank=2, sequence_len=96, batch_size=4, max_iters=16, eval_interval=4,
    log_interval=2, warmup_iters=2, learning_rate=1e-2, held_out=1 / 9, device="cpu",
)
WITHOUT_SIDE = dict(reduction=None)
METHOD_RUNS = [
    dict(method="qst"), dict(method="qst", optimizer_bits=8, gradient_accumulation_steps=2),
    dict(method="qst", optimizer="muon", variant="fast"), dict(method="lst"),
    dict(method="qst", optimizer="muon", optimizer_bits=8),
    dict(method="qlora") | WITHOUT_SIDE, dict(method="lora") | WITHOUT_SIDE,
    dict(method="adapter") | WITHOUT_SIDE, dict(method="peqa", learning_rate=1e-4) | WITHOUT_SIDE,
    dict(method="full", learning_rate=1e-3, dtype="bf16") | WITHOUT_SIDE,
    dict(method="qst", dtype="fp16"),
]


# --------------------------------------------------------------------------------------
# Models


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


def tuned(method, family="llama", kind=None, **settings):
    """A small base with what a method trains."""
    base = small_base(kind or KINDS[method], **FAMILIES[family])
    torch.manual_seed(2)
    return add_trainable(base, SideConfig(**dict(method=method, reduction=4, rank=4) | settings))


def moved(model, seed=1):
    """Move what learns away from its start, and scales and whole models only a little."""
    if model.side.config.method not in ("peqa", "full"):
        return shaken(model, seed)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return model


# --------------------------------------------------------------------------------------
# Runs


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


class Forked:
    """A function in a process of its own, a fork of this one, where torch is loaded already: it
    ends as `python` would with it, and what it has printed and its exit code are kept."""

    def __init__(self, function):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        self.pid = os.fork()
        if self.pid == 0:
            self.be_it(function)

    def be_it(self, function):
        code = 1
        try:
            for number, file in enumerate(self.files, start=1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            function()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code, file=sys.stderr) if isinstance(end.code, str) else None
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self, seconds=120):
        """Its exit code, and what it has printed to stdout and to stderr; it is killed if it takes
        longer."""
        end = time.monotonic() + seconds
        while not self.ended():
            time.sleep(0.005) if time.monotonic() < end else self.kill()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for file in self.files:
            file.seek(0)
        return code, *(file.read() for file in self.files)

    def ended(self):
        """Whether it has, before anyone waits for it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_forked(script, *words):
    """Run a script in a `Forked` process, as a user does."""

    def run():
        sys.argv[:] = [str(ROOT / script), *map(str, words)]
        os.chdir(ROOT)
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return Forked(run)


def short_run(base, tmp_path, records, **settings):
    """Settings of a run of a second or two, on a folder and a file of stories."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(records, seed=1)))
    shared = dict(reduction=4, max_iters=8, batch_size=8, eval_interval=4, learning_rate=1e-2)
    files = dict(base=str(base), data=str(data), out_dir=str(tmp_path / "out"))
    return shared | files | dict(sequence_len=96, device="cpu") | settings


def settings_of_a_short_run(tiny_model, tmp_path):
    """Settings of a run of less than a second."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in tiny.task(36, seed=1)))
    return SETTINGS | dict(base=str(tiny_model), data=str(data), out_dir=str(tmp_path / "out"))


def glue_run(tiny_model, folder, out, **changes):
    """Train on a task of GLUE, and return the result."""
    settings = dict(
        base=str(tiny_model), data=str(folder), out_dir=str(out), reduction=4, rank=4,
        max_iters=40, batch_size=8, learning_rate=2e-2, sequence_len=100, warmup_iters=2,
        device="cpu", eval_interval=20,
    )
    return train.main(TrainConfig(**settings | changes))


def left(out_dir):
    """What a run has made: the bytes of its tensors, and its log without times."""
    log = (Path(out_dir) / "log.csv").read_text().splitlines()
    tensors = [(Path(out_dir) / name).read_bytes() for name in
               ("side.safetensors", "last/side.safetensors")]
    return tensors, [line.split(",")[:4] for line in log]


def curves(out_dir):
    """The losses in a run's log, of training and held out; NaN where there is none."""
    rows = (Path(out_dir) / "log.csv").read_text().splitlines()[1:]
    return np.array([float(cell or "nan") for row in rows for cell in row.split(",")[1:3]])


# --------------------------------------------------------------------------------------
# Files


def say(*lines):
    """"role: text" lines as messages."""
    return [dict(zip(("role", "content"), line.split(": ", 1))) for line in lines]


def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / source.name, dirs_exist_ok=True)


def change(path, **values):
    """Replace fields of a JSON file, and return the file."""
    path.write_bytes(dump(json.loads(path.read_bytes()) | values))
    return path


def refused(call, *args, named=""):
    """The sentence that refuses: of one line, not long, and with a name in it."""
    with pytest.raises(InputError) as caught:
        call(*args)
    text = str(caught.value)
    assert is_a_sentence(text, named), text
    return text


def is_a_sentence(text, named):
    return text.isprintable() and len(text) < 600 and named in text


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
    path = folder / "side.safetensors"
    text = json.dumps(json.loads(read_header(path)[1]["side"]) | changes)
    tensors = tensors or {name: read().clone() for name, read in read_safetensors(path).items()}
    write_safetensors(path, tensors, {"side": text, "sha256": digest(text, tensors)})
