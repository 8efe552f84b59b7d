"""Files that are read: how many are open, what they leave in memory, and what ends a read."""

import errno
import os
import resource
import shutil
import time

import pytest
import torch
from helpers import FIXTURES, Forked, copy, left, short_run, small_config

import train
from data import InputError
from data.formats.files import locked
from data.formats.pickled import read_tensors
from data.formats.safetensors import read_safetensors, write_safetensors
from data.formats.save import save_pretrained
from data.tokens.tokenizer import load_tokenizer
from model import Transformer, from_pretrained, quantize_folder
from train import TrainConfig


@pytest.fixture(scope="module")
def deep(tiny_model, tmp_path_factory):
    """A model of 24 layers: {form: its folder}."""
    folder = tmp_path_factory.mktemp("deep")
    size = load_tokenizer(tiny_model).vocab_size
    model = Transformer(small_config(vocab_size=size, n_layer=24, max_positions=128))
    for form in ("plain", "pickled"):
        shutil.copytree(tiny_model, folder / form)
        save_pretrained(model, folder / form)
    (folder / "pickled/model.safetensors").unlink()
    weights = {("" if name == "lm_head.weight" else "model.") + name: tensor.detach()
               for name, tensor in model.named_parameters()}
    torch.save(weights, folder / "pickled/pytorch_model.bin")
    quantize_folder(folder / "plain", folder / "quantized")
    return {path.name: path for path in folder.iterdir()}


FORMS = {
    "plain": dict(quant="none"), "plain to nf4": dict(), "pickled": dict(quant="none"),
    "quantized": dict(), "quantized, streamed": dict(stream=True),
}


@pytest.mark.usefixtures("no_answers")
@pytest.mark.parametrize("form", FORMS)
def test_few_files_are_open(form, deep, tmp_path):
    """A model of any number of tensors loads, answers and trains with 20 more open files, fewer
    than it has layers; nothing of it stays mapped, and no file stays open."""
    folder, settings = deep[form.replace(",", "").split()[0]], FORMS[form]
    cfg = short_run(folder, tmp_path, 12, max_iters=2, eval_interval=1) | settings

    def within():
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, before + 20))
        kind, stream = settings.get("quant", "nf4"), settings.get("stream", False)
        model = from_pretrained(folder, kind, torch.float32, stream=stream)
        assert len(os.listdir("/proc/self/fd")) == before
        assert str(folder) not in open("/proc/self/maps").read()
        assert model.generate(torch.tensor([[1, 5], [1, 6]]), 2).shape == (2, 4)
        train.main(TrainConfig(**cfg))
        train.main(TrainConfig(**cfg | dict(max_iters=3, resume=True)))

    code, _, errors = Forked(within).wait()
    assert code == 0, errors


@pytest.mark.parametrize("form", ["plain", "pickled"])
def test_a_part_of_a_file_leaves_the_memory(form, tmp_path):
    """A process that reads a file of 64 MB tensor by tensor never grows by half of it."""
    tensors = {str(i): torch.ones(1 << 20) for i in range(16)}
    if form == "plain":
        write_safetensors(tmp_path / "x.safetensors", tensors)
        readers = lambda: read_safetensors(tmp_path / "x.safetensors")
    else:
        torch.save(tensors, tmp_path / "x.bin")
        readers = lambda: read_tensors(tmp_path / "x.bin")
    del tensors

    def grown():
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        before, most = resident(), 0
        for read in readers().values():
            assert (tensor := read()).sum() == 1 << 20
            most = max(most, resident() - before)
            del tensor
        assert most < 32 << 20, most

    code, _, errors = Forked(grown).wait()
    assert code == 0, errors


CHANGES = {
    "overwritten": lambda path, other: path.write_bytes(other.read_bytes()),
    "replaced": lambda path, other: os.replace(other, path),
    "cut short": lambda path, other: os.truncate(path, path.stat().st_size - 8),
    "emptied": lambda path, other: os.truncate(path, 0),
    "removed": lambda path, other: path.unlink(),
}


def changed(path, change):
    """Change a file by one of CHANGES; what takes its place has as many bytes."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + bytes(4))
    later = max(time.time_ns(), path.stat().st_mtime_ns + 1)
    os.utime(other, ns=(later, later))
    CHANGES[change](path, other)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_that_changes(suffix, change, tmp_path):
    """What was read before stays as it was; what is read after is refused by the file's name."""
    path, tensors = tmp_path / f"x.{suffix}", {name: torch.ones(9) for name in "ab"}
    if suffix == "bin":
        torch.save(tensors, path)
        readers = read_tensors(path)
    else:
        write_safetensors(path, tensors)
        readers = read_safetensors(path)
    first = readers["a"]()
    time.sleep(0.02)  # a file's time has steps
    changed(path, change)
    assert torch.equal(first, tensors["a"])
    for read in readers.values():
        with pytest.raises(InputError, match=f"x.{suffix} (was changed|is missing|cannot be read)"):
            read()


def test_big_endian_numbers_are_refused(tmp_path, monkeypatch):
    """torch.load would turn the bytes of its map, and we read those of the file."""
    monkeypatch.setattr("sys.byteorder", "big")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    monkeypatch.undo()
    with pytest.raises(InputError, match="big-endian"):
        read_tensors(tmp_path / "x.bin")


@pytest.mark.usefixtures("no_answers")
@pytest.mark.parametrize("change", ["overwritten", "emptied"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_base_that_changes_while_a_run_reads_it(stream, change, packed, tmp_path, monkeypatch):
    """The run ends with a sentence, at the next evaluation or with --stream before. With the file
    back, --resume continues from the last evaluation as if nothing had happened."""
    cfg = short_run(packed, tmp_path, 30, max_iters=6, eval_interval=2, batch_size=4, stream=stream)
    train.main(TrainConfig(**cfg | dict(out_dir=str(tmp_path / "alone"))))
    weights, step, count = packed / "model.safetensors", train.train_step, []
    shutil.copy2(weights, tmp_path / "kept")

    def changing(*args):
        count.append(1)
        if len(count) == 4:
            changed(weights, change)
        return step(*args)

    monkeypatch.setattr(train, "train_step", changing)
    when = "model.safetensors was changed while it was read" if stream else "after this run began"
    with pytest.raises(InputError, match=when):
        train.main(TrainConfig(**cfg))
    shutil.copy2(tmp_path / "kept", weights)
    train.main(TrainConfig(**cfg | dict(resume=True)))
    assert len(count) == 4 + 4
    assert left(cfg["out_dir"])[0] == left(tmp_path / "alone")[0]


def test_a_base_that_changes_while_it_is_loaded(tmp_path, tiny_model, monkeypatch):
    """It is read more than once: with a full cache of hidden states, whose runs have no layers,
    again to answer after training."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    cfg = short_run(base, tmp_path, 20, max_iters=6, cache_hidden=str(tmp_path / "cache"))
    train.main(TrainConfig(**cfg))
    load, loads = train.from_pretrained, []

    def changing(*args):
        loads.append(1)
        if len(loads) == 2:
            changed(base / "model.safetensors", "overwritten")
        return load(*args)

    monkeypatch.setattr(train, "from_pretrained", changing)
    monkeypatch.setattr("data.tasks.instruct.samples", ask_the_base)
    with pytest.raises(InputError, match=f"{base} was changed after this run began"):
        train.main(TrainConfig(**cfg))
    assert len(loads) == 2


def ask_the_base(model, *args):
    model.generate(torch.tensor([[1, 5, 9]]), 1)
    return []


def test_one_at_a_time(tmp_path):
    """Who comes second waits for a lock, or is refused; a process that is killed has none."""
    path, there = tmp_path / "x.lock", tmp_path / "there"

    def holding(seconds):
        with locked(path):
            there.write_text("")
            time.sleep(seconds)
            there.unlink()

    first = Forked(lambda: holding(0.5))
    while not there.exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="busy"), locked(path, "busy"):
        pass
    with locked(path):
        assert not there.exists()
    assert first.wait()[0] == 0
    first = Forked(lambda: holding(100))
    while not there.exists():
        time.sleep(0.01)
    first.kill()
    first.wait()
    with locked(path, "busy"):
        pass


def test_fixtures_are_read_without_maps():
    """Shards, too: what is loaded holds no file."""
    from_pretrained(FIXTURES / "llama_gqa", "none", torch.float32)
    assert str(FIXTURES) not in open("/proc/self/maps").read()


def test_a_file_system_without_locks(monkeypatch, tmp_path, capsys):
    """It says so in a line and goes on; an error of the body is not taken for a lock."""
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with pytest.raises(BlockingIOError, match="mine"), locked(tmp_path, "busy"):
        raise BlockingIOError("mine")
    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path, "busy"):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_other_files_beside_the_weights(cfg, tiny_model, tmp_path):
    """What is no file, or a pointer that nobody reads, does not stop a run."""
    folder = copy(tiny_model, tmp_path)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "old.bin").symlink_to("nowhere")
    (folder / "x.safetensors").mkdir()
    assert train.main(TrainConfig(**cfg | dict(base=str(folder), max_iters=1)))["loss_after"] > 0


def test_a_strided_tensor_of_a_bin_is_read_from_the_file(tmp_path):
    """Its values are the file's, and not those of a file that has changed since."""
    path, x = tmp_path / "x.bin", torch.arange(6.0).view(2, 3)
    torch.save({"t": x.T, "e": torch.ones(1, 2).expand(3, 2)}, path)
    found = read_tensors(path)
    assert found["t"]().equal(x.T) and found["e"]().equal(torch.ones(3, 2))
    os.utime(path, ns=(1, 1))
    for read in found.values():
        with pytest.raises(InputError, match="x.bin was changed while it was read"):
            read()
