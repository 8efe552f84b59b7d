"""Machines that are not here: other GPUs, other systems, full or read-only folders, pretended."""

import contextlib
import json
import math
import os
import random
import signal
import stat
import threading
import time

import pytest
from tqdm import tqdm

import train
from data import InputError
from data.formats.files import write_json
from data.tasks import tiny
from model import from_pretrained, quantize_folder


def short_recipe(monkeypatch, folder):
    monkeypatch.delenv("QST_CACHE", raising=False)  # which is the user's own
    monkeypatch.setattr(tiny, "BASE_RUN", tiny.BASE_RUN | dict(max_iters=1))
    monkeypatch.setattr(tiny, "CACHE", folder)


def make():
    return tiny.base_folder(train.make_tiny_base)


def test_two_first_runs_at_once_both_end_well(monkeypatch, tmp_path):
    """Whoever is second takes the base of the first."""
    short_recipe(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # as if each thread were a process
    both_are_here, made, original = threading.Barrier(2), [], tiny.train_tokenizer

    def train_tokenizer(path):
        both_are_here.wait(60)
        original(path)

    monkeypatch.setattr(tiny, "train_tokenizer", train_tokenizer)
    threads = [threading.Thread(target=lambda: made.append(make())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(made) == 2 and made[0] == made[1]
    assert [path.name for path in tmp_path.iterdir()] == [made[0].name]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    """The message names QST_CACHE, which names another folder."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    short_recipe(monkeypatch, blocked / "cache")
    with pytest.raises(InputError, match="QST_CACHE"):
        make()
    monkeypatch.setenv("QST_CACHE", str(tmp_path / "chosen"))
    assert make().parent == tmp_path / "chosen"


def test_quantizing_overwrites_nothing(tiny_model):
    """Neither its source nor another folder with something in it."""
    before = (tiny_model / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        quantize_folder(tiny_model, tiny_model)
    with pytest.raises(InputError, match="is not empty"):
        quantize_folder(tiny_model, tiny_model / "no folder" / "..")
    assert (tiny_model / "model.safetensors").read_bytes() == before


def test_json_has_no_nan(tmp_path):
    """What is no number becomes null, at any depth."""
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "d")}]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, "d"]}]}


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    """A file that cannot be written whole leaves the old one, and no other."""
    write_json(tmp_path / "x.json", {"old": 1})
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_json(tmp_path / "x.json", {"new": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_there_after_a_power_cut(tmp_path, monkeypatch):
    """It is flushed before it gets its name, and its folder after."""
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda n: calls.append(stat.S_ISDIR(os.fstat(n).st_mode)))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("name") or replace(*paths))
    write_json(tmp_path / "x.json", {"a": 1})
    assert calls == [False, "name", True]


def test_making_the_base_killed_at_random(monkeypatch, tmp_path):
    """After each kill there is no base, or a whole one; and the next run makes or takes it."""
    short_recipe(monkeypatch, tmp_path / "whole")
    start = time.monotonic()
    make()
    takes, rng = time.monotonic() - start, random.Random(0)
    tmp_path /= "killed"
    tmp_path.mkdir()
    monkeypatch.setattr(tiny, "CACHE", tmp_path)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                make()
            os._exit(0)
        time.sleep(rng.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for folder in tmp_path.iterdir():
            if "." not in folder.name:  # what ends in a number is of a process that did not finish
                from_pretrained(folder)
    assert from_pretrained(make()).config.n_layer == tiny.BASE["n_layer"]


def test_who_is_killed_leaves_no_lock():
    """A forked process that dies while it draws a bar stops nobody else's bars."""
    locks = tqdm.get_lock().locks  # of processes, and of threads
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        tqdm.get_lock().acquire()
        os.write(theirs, b"held")
        time.sleep(60)
    assert os.read(ours, 4) == b"held"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0), os.close(ours), os.close(theirs)
    for lock in locks:
        assert lock.acquire(timeout=5)
        lock.release()
