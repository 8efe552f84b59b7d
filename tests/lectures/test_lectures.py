"""tests/lectures/README.md: every command runs, and prints what the page shows."""

import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, run_script

PAGE = (ROOT / "tests/lectures/README.md").read_text()
STEPS = re.findall(r"```console\n\$ (.*?)\n(.*?)```\n(.*?)(?=```console|\n## |\Z)", PAGE, re.S)
SHORT = {"gates": ["--max_iters", "10"], "downsamplers": ["--max_iters", "2"], "gradients": []}
SHORT = {view: [*words, "--batch_size", "4"] for view, words in SHORT.items()}  # the longer ones
LEARNED = "gates", "downsamplers", "gradients"  # whose losses differ between machines


def run(command, place):
    """What a command prints; quant.py, whose operators are defined only once, in a process of its
    own."""
    _, script, *words = shlex.split(command)
    if script == "-c":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(words[0], {})
        return printed.getvalue()
    if script != "quant.py":
        words += [] if script.endswith("model.py") else ["--out_dir", str(place)]
        return run_script(script, *words, *SHORT.get(words[0] if words else "", ()))
    done = subprocess.run(
        [sys.executable, str(ROOT / script)], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command, shown, below", STEPS, ids=[step[0][7:40] for step in STEPS])
def test_a_step_prints_what_is_shown(command, shown, below, tmp_path):
    """Each line, to the last digit, or where something has learned but for the numbers; a question
    and its answer stand below it, and the pictures are drawn."""
    printed = run(command, tmp_path)
    learned = any(word in command for word in LEARNED)
    number = "#" if learned else r"\g<0>"
    plain = lambda line: re.sub(r"-?\d[\d.,]*", number, " ".join(line.split()))
    lines = {plain(line) for line in printed.splitlines()}
    for line in map(plain, shown.splitlines()):
        assert line in lines, f"{line} is not in\n{printed}"
    assert re.search(r"\*\*\d+\.\*\* \w", below) and "<details>" in below
    for picture in re.findall(r"\(../pictures/(\w+\.svg)\)", below):
        assert list(tmp_path.rglob(picture)) and (ROOT / "tests/pictures" / picture).exists()


def test_the_page():
    """Three lectures of three steps or more, on at most 150 lines."""
    lectures = PAGE.split("\n## ")[1:]
    assert len(lectures) == 3 and len(PAGE.split("\n")) <= 151
    commands = [lecture.count("```console") for lecture in lectures]
    assert commands == [lecture.count("<details>") for lecture in lectures]
    assert min(commands) >= 3 and sum(commands) == len(STEPS)
