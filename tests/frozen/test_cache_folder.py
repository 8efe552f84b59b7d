"""data/frozen/hidden_cache.py: the folder of the cache, and what it is of."""

import errno
import os

import pytest
import torch
from helpers import change, copy

import train
from data import InputError
from data.frozen.hidden_cache import HiddenCache
from data.tasks.examples import Task
from train import TrainConfig


@pytest.fixture
def cached(cfg, tmp_path):
    return cfg | dict(max_iters=4, cache_hidden=str(tmp_path / "cache"))


def test_another_config_is_another_base(cached, tiny_model, tmp_path):
    """The same weights with other settings have other hidden states."""
    train.main(TrainConfig(**cached))
    cached["base"] = str(copy(tiny_model, tmp_path))
    train.main(TrainConfig(**cached))
    change(tmp_path / tiny_model.name / "config.json", rope_theta=500.0)
    with pytest.raises(InputError, match="cache is of another base: give another folder"):
        train.main(TrainConfig(**cached))


def test_an_example_that_is_longer_than_a_batch(cached, tmp_path):
    """Ids that end with zeros are those of a shorter example, padded: where a batch has no room for
    all that is kept of them, it is computed."""
    cfg, none = train.resolve(TrainConfig(**cached)), -100
    (tmp_path / "cache").mkdir()
    task = Task([([5, 6, 0], [6, none, 7]), ([5, 6], [6, none])], [])
    about = cfg, [cfg], cfg.base, train.read_config(cfg.base), torch.float32, task
    cache = HiddenCache(*about)
    entries, (rows, at), (_, targets) = cache.look_up(torch.tensor([[5, 6, 0, 0]]))
    assert [list(entries[0].tokens), list(rows), at.tolist()] == [[0, 1, 2]] * 3
    assert targets.tolist() == [0, 2]
    assert cache.look_up(torch.tensor([[5, 6]])) is None


def test_a_file_without_room(cached, tmp_path, monkeypatch):
    """The room is taken before a map is written to, which would kill the process on a full disk."""
    taken = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: taken.append(args[1:]))
    train.main(TrainConfig(**cached))
    sizes = [(tmp_path / "cache" / f"{n}.bin").stat().st_size for n in ("states", "last", "sums")]
    assert taken == [(0, size) for size in sizes]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="states.bin cannot have .*No space.*folder with room"):
        train.main(TrainConfig(**cached))
