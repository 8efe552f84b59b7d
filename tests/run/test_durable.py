"""What a loss of power leaves: the recorded system calls of saving, replayed with any of them lost.

A file's content is on the disk once it was flushed (fsync). Renames are once their folder was; of
the last three after that, any may be lost.
"""

import contextlib
import os
import stat
from itertools import product
from pathlib import Path

import pytest
from helpers import left

import train
from data import InputError
from data.run import checkpoint, resume, run
from data.run.state import FILES
from train import TrainConfig


@contextlib.contextmanager
def recorded(out_dir):
    """What the process asks of the disk, in order, and which file it has saved: ("flush", path,
    content), ("rename", from, to, content), ("folder", path), ("saved", path, content)."""
    made, fsync, replace, paths = [], os.fsync, os.replace, {}
    opened, save_state, save_side = os.open, run.save_state, checkpoint.write

    def flush(number):
        about = os.fstat(number)
        if stat.S_ISDIR(about.st_mode):
            made.append(("folder", paths[number]))
        else:
            path = next(p for p in out_dir.rglob("*") if p.stat().st_ino == about.st_ino)
            made.append(("flush", path, path.read_bytes()))
        fsync(number)

    def rename(old, new):
        made.append(("rename", Path(old), Path(new), Path(old).read_bytes()))
        replace(old, new)

    def open_(path, *args, **options):
        number = opened(path, *args, **options)
        paths[number] = Path(path)
        return number

    def noted(save, name):
        def save_and_note(folder, *args):
            save(folder, *args)
            made.append(("saved", folder / name, (folder / name).read_bytes()))
        return save_and_note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        patch.setattr(os, "replace", rename)
        patch.setattr(os, "open", open_)
        patch.setattr(run, "save_state", noted(save_state, FILES[0]))
        patch.setattr(checkpoint, "write", noted(save_side, checkpoint.WEIGHTS))
        yield made


def disks(calls):
    """Yield what may be on the disk after each call: {path: content}, and what was saved."""
    for end in range(len(calls) + 1):
        done = calls[:end]
        flushed = {}  # the place of each folder's last flush
        for i, call in enumerate(done):
            if call[0] == "folder":
                flushed[call[1]] = i
        renames = [i for i, call in enumerate(done) if call[0] == "rename"]
        unsure = [i for i in renames if i > flushed.get(done[i][2].parent, -1)][-3:]
        saved = {call[1]: call[2] for call in done if call[0] == "saved"}
        for kept in product((True, False), repeat=len(unsure)):
            lost = {i for i, stays in zip(unsure, kept) if not stays}
            for half in (0, 1):  # of what was not flushed, nothing or half may be there
                disk, whole = {}, {}
                for i, call in enumerate(done):
                    if call[0] == "flush":
                        whole[call[1]] = call[2]
                    elif call[0] == "rename" and i not in lost:
                        _, old, new, content = call
                        torn = content[: half * len(content) // 2]
                        disk[new] = disk.pop(old) if old in disk else whole.pop(old, torn)
                yield disk, saved


def found(place, path):
    """The content of the file that the reader of a state or of a side network takes; None if there
    is none."""
    folder = (place / path).parent
    if path.name == FILES[0]:
        chosen = resume.load_state(folder)[1]
    else:
        chosen = place / path if (place / path).exists() else None
        chosen and checkpoint.load(folder)
    return chosen and chosen.read_bytes()


def losses(calls, out_dir, folder):
    """The disks on which what was saved, or what came after it, is not found; and the others."""
    bad, good, seen = [], {}, set()
    for disk, saved in disks(calls):
        disk = {path.relative_to(out_dir): content for path, content in disk.items()}
        key = frozenset(disk.items())
        if (key, frozenset(saved.items())) in seen:
            continue
        seen.add((key, frozenset(saved.items())))
        place = folder / str(len(seen))
        place.mkdir(parents=True)
        for path, content in disk.items():
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_bytes(content)
        try:
            for path in {call[1] for call in calls if call[0] == "saved"}:
                versions = [None, *(call[2] for call in calls if call[:2] == ("saved", path))]
                known = versions.index(found(place, path.relative_to(out_dir)))
                assert known >= versions.index(saved.get(path))
            good[key] = place
        except (InputError, AssertionError):
            bad.append(place)
    return bad, list(good.values())


def test_a_loss_of_power_loses_nothing_that_was_saved(cfg, tmp_path):
    """Whatever is lost, the newest state that was saved is found whole, or a later one; and the run
    ends from there as if nothing had happened. Without one of the two flushes it would not."""
    cfg |= dict(max_iters=12, eval_interval=4)
    out_dir = Path(cfg["out_dir"])
    with recorded(out_dir) as made:
        train.main(TrainConfig(**cfg))
    expected = left(out_dir)
    assert [call[1].name for call in made if call[0] == "saved"].count(FILES[0]) == 3
    bad, good = losses(made, out_dir, tmp_path / "disks")
    assert not bad and len(good) > 10
    for kind in ("flush", "folder"):
        left_out = [call for call in made if call[0] != kind]
        assert losses(left_out, out_dir, tmp_path / kind)[0]
    for place in good[::4]:
        train.main(TrainConfig(**cfg | dict(out_dir=str(place), resume=True)))
        assert left(place) == expected
