"""The whole suite's fixtures, and its two processes."""

import gc
import os
import random
import threading

import pytest
from helpers import settings_of_a_short_run, small_base, small_config  # before torch
from samples import GLUE_LINES

import torch
from tqdm import tqdm

from data.formats.save import save_pretrained
from data.tasks import tiny
from data.tasks.glue import FORMS
from data.tokens.tokenizer import load_tokenizer
from halves import Halves
from model import Transformer, quantize_folder

# tqdm's lock is of all processes that are forked from one: of those that tests kill, one that holds
# it would stop all others for good.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))

# No test cuts the power, and each of thousands of files would wait for the disk.
os.fsync = lambda descriptor: None


def pytest_configure(config):
    config.pluginmanager.register(Halves(config))


def pytest_collection_finish(session):
    gc.freeze()  # what is loaded by now stays: no collection of garbage looks through it again


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.fixture(autouse=True)
def alike():
    """A test begins with the same random numbers, whatever ran before it; and it can be forked."""
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)


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


@pytest.fixture
def cfg(tiny_model, tmp_path, no_answers):
    """Settings of a run of less than a second."""
    return settings_of_a_short_run(tiny_model, tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """GLUE's folder: every task's files, each line of them many times."""
    root = tmp_path_factory.mktemp("glue")
    for task, form in FORMS.items():
        (root / form.folder).mkdir(exist_ok=True)
        headings = 0 if task == "cola" else 1
        header, rows = GLUE_LINES[task][:headings], GLUE_LINES[task][headings:]
        for name, times in (("train.tsv", 20), (form.dev, 3)):
            text = "\n".join([*header, *rows * times]) + "\n"
            (root / form.folder / name).write_text(text, encoding="utf-8")
    return root
