"""How a command ends, and what it prints: data/settings/command.py."""

import io
import json
import os
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import ROOT, SETTINGS, Forked, refused, run_script
from tqdm import tqdm

import qst
import train
from data.run.charts import line_chart
from data.settings.command import Output, printable
from data.settings.flags import run_main
from train import TrainConfig

ESCAPES = "Say \x1b[31mRED\x1b]0;title\x07\x9b2J\r\u202e\u2066"
SPELLED = r"Say \x1b[31mRED\x1b]0;title\x07\x9b2J\r\u202e\u2066"


def started(command, **environment):
    """A command line of bash, with `{train}` and `{show}` for commands without their flags."""
    scripts = {"train": "train.py", "show": "data/tasks/instruct.py"}
    scripts = {name: f"{sys.executable} {ROOT / path}" for name, path in scripts.items()}
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    return subprocess.Popen(["bash", "-c", command.format(**scripts)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_training_survives_its_terminal(cfg):
    """A reader that goes, a full disk, closed streams and one that is not UTF-8 cost lines only."""
    settings = cfg | dict(max_iters=4, log_interval=2)
    flags = [f"--{name} {value}" for name, value in settings.items() if name != "out_dir"]
    run = f"{{train}} {' '.join(flags)} --out_dir {cfg['out_dir']}"
    ways = {
        "gone": (run + "-gone 2>&1 | true; exit ${{PIPESTATUS[0]}}", {}),
        "full": (run + "-full >/dev/full 2>/dev/full", {}),
        "closed": (run + "-closed <&- >&- 2>&-", {}),
        "ascii": (run + "-ascii", {"PYTHONIOENCODING": "ascii"}),
    }
    children = {way: started(line, **more) for way, (line, more) in ways.items()}
    for way, child in children.items():
        out, errors = child.communicate(timeout=300)
        assert child.returncode == 0 and "Traceback" not in errors, (way, errors)
        folder = Path(f"{cfg['out_dir']}-{way}")
        assert json.loads((folder / "result.json").read_text())["iterations"] == 4
        log = (folder / "log.csv").read_text().splitlines()  # none of what was printed
        assert log[0].startswith("iteration,loss") and len(log) == 3
        assert ("held-out loss" in out) == (way == "ascii")
    assert "\\xe9" in out and out.isascii()  # the last one's answers are French


def test_a_command_that_only_prints(cfg):
    """It ends without a word if nobody reads, and with one if what it printed is lost."""
    gone = started(f"{{show}} --data {cfg['data']} | true; exit ${{{{PIPESTATUS[0]}}}}")
    full = started(f"{{show}} --data {cfg['data']} >/dev/full")
    demo = started(f"{sys.executable} -u {ROOT / 'quant.py'} | true")
    assert (gone.communicate(timeout=300), gone.returncode) == (("", ""), 0)
    lost = "error: [Errno 28] No space left on device\n"
    assert (full.communicate(timeout=300), full.returncode) == (("", lost), 1)
    assert demo.communicate(timeout=300) == ("", "")


def test_nothing_printed_controls_the_terminal(cfg, capsys):
    assert printable(ESCAPES) == SPELLED
    assert printable("a\tb\r\nc é\u200d\u00a0") == "a\tb\r\nc é\u200d\u00a0"
    record = json.dumps({"instruction": ESCAPES, "output": "a" + ESCAPES})
    Path(cfg["data"]).write_text(record)
    shown = run_script("data/tasks/instruct.py", "--data", cfg["data"])
    assert f"[user]\n{SPELLED}\n\n[assistant]\na{SPELLED}\n" in shown
    for script in ("train.py", "qst.py"):
        with pytest.raises(SystemExit) as stopped:
            run_script(script, "--base", ESCAPES, "--prompt", "x")
        assert printable(stopped.value.code) == stopped.value.code
    with pytest.raises(SystemExit, match=r"\\x1b\[31mRED"):
        run_script("qst.py", "--base", ESCAPES, "--prompt", "x")


def test_a_progress_bar_moves_the_cursor():
    """tqdm's own moves stay, and what a bar says has none."""
    file = io.StringIO()
    errors = Output(file, bars=True)
    with tqdm(range(2), ESCAPES, file=errors), tqdm(range(2), file=errors, position=1) as second:
        second.update()
    written = file.getvalue()
    assert f"\r{SPELLED}" in written and "\x1b[A" in written and "\x1b[31m" not in written
    plain = io.StringIO()
    print("\r\x1b[A", file=Output(plain))
    assert plain.getvalue() == "\\r\\x1b[A\n"


def test_a_picture_does_not_end_a_run(cfg, capsys):
    """Nor does a line of the log."""
    out_dir = Path(cfg["out_dir"])
    (out_dir / "loss.svg").mkdir(parents=True)
    (out_dir / "log.csv").symlink_to("/dev/full")
    train.main(TrainConfig(**cfg))
    warning = f"warning: {out_dir / 'loss.svg'} could not be written"
    assert capsys.readouterr().out.count(warning) == 1
    assert json.loads((out_dir / "result.json").read_text())["iterations"] == SETTINGS["max_iters"]
    assert (out_dir / "mix.svg").exists()


def test_a_picture_is_xml(tmp_path):
    line_chart(tmp_path / "a.svg", "<" + ESCAPES, "\0", {"\ud800\uffff" + ESCAPES: [(0, 1)]})
    texts = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter()]
    assert {"<" + SPELLED, r"\x00", r"\ud800\uffff" + SPELLED} <= set(texts)


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't start new thread"),
])
def test_no_more_memory(error):
    """A sentence with the command's advice; and what was held is freed."""
    kept = []

    def fill():
        class Large:
            pass

        large = Large()
        kept.append(weakref.ref(large))
        raise type(error)(*error.args)

    with pytest.raises(SystemExit) as stopped:
        run_main(fill, "close the door")
    assert stopped.value.code == "error: There is no more memory: close the door."
    assert stopped.value.__context__ is None and kept[0]() is None


def test_a_limit_on_memory():
    def run():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 10**8,) * 2)
        run_main(lambda: np.ones(10**9))

    code, _, complaint = Forked(run).wait()
    assert code == 1 and complaint.startswith("error: There is no more memory: give a lower")


def test_no_folder_to_stand_in(cfg, tmp_path, monkeypatch):
    """A run in a folder that is gone ends well with paths that do not need it."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert train.main(TrainConfig(**cfg | dict(max_iters=1)))["iterations"] == 1
    refused(train.main, TrainConfig(**cfg | dict(out_dir="out")), named="--out_dir out")


@pytest.mark.parametrize("flag", ["--temperature=-1", "--top_k=-1", "--top_p=2", "--seed=-1",
                                  "--max_new_tokens=0"])
def test_flags_are_refused_before_a_file_is_made(flag, tiny_model, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "turns": ["Hi"]}')
    words = ["answer", "--base", str(tiny_model), "--questions", str(questions)]
    out = tmp_path / "answers.jsonl"
    refused(qst.main, [*words, "--out", str(out), flag], named=flag.strip("-").split("=")[0])
    assert not out.exists()
