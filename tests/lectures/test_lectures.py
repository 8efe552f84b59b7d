"""The three lectures: every command runs, and prints what the page shows; each fills 45 minutes;
and the solutions of the exercises solve them."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from halves import FOLDER
from helpers import ROOT, run_script

from data import TASKS
from side import DOWNSAMPLERS, GATES

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "tests/lectures").glob("[1-3]-*"))}
PARTS = [(page, *part.split("\n\n", 1))  # (page, heading, text)
         for page, text in PAGES.items() for part in text.split("\n## ")[1:]]
CONSOLE = re.compile(r"```console\n\$ (.*?)\n(.*?)\n```\n", re.S)
STEPS = [(heading, text) for _, heading, text in PARTS if "```console" in text]
# Commands whose losses differ between machines, and what makes them shorter here.
LEARNED = {"gates": ["--max_iters", "10"], "downsamplers": ["--max_iters", "2"], "gradients": []}
PRINTED = {}  # program: (what it prints, the folder of its pictures); some stand in several steps


def run(program, folder):
    """What a program prints; `python -c` runs in the tests' own process, as scripts do."""
    _, script, *words = shlex.split(program)
    if script == "-c":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(words[0], {})
        return printed.getvalue()
    short = LEARNED.get(words[0] if words else "")
    words += [] if short is None else [*short, "--batch_size", "4"]
    words += [] if script == "model.py" else ["--out_dir", str(folder)]
    return run_script(script, *words).replace(str(folder), "out")


@pytest.mark.parametrize("heading, text", STEPS, ids=[heading for heading, _ in STEPS])
def test_a_step_prints_what_is_shown(heading, text, tmp_path_factory):
    """The whole output of the command: to the last digit, or where something has learned, but for
    the numbers. Its picture is drawn."""
    ((command, shown),) = CONSOLE.findall(text)
    program, _, pipe = command.partition(" | ")
    if program not in PRINTED:
        folder = tmp_path_factory.mktemp("out")
        PRINTED[program] = run(program, folder), folder
    printed, folder = PRINTED[program]
    if pipe:
        done = subprocess.run(pipe, shell=True, input=printed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    if any(word in program for word in LEARNED):
        plain = lambda text: {re.sub(r"-?\d[\d.,]*", "#", " ".join(line.split()))
                              for line in text.splitlines()}
    else:
        plain = lambda text: [line.rstrip() for line in text.rstrip().splitlines()]
    assert plain(printed) == plain(shown)
    for picture in re.findall(r"\(../pictures/(\w+\.svg)\)", text):
        assert (folder / picture).exists() and (ROOT / "tests/pictures" / picture).exists()


def minutes(text):
    """The minutes of a part, and how many of them are for discussion."""
    spent = re.match(r"\*\*(\d+) minutes(?:, (\d+) of them discussion)?\.\*\*\n\nAim: ", text)
    return int(spent[1]), int(spent[2] or 0)


@pytest.mark.parametrize("page", PAGES)
def test_a_lecture_fills_45_minutes(page):
    """With an opening, an activity and a closing; README.md has the same plan."""
    parts = [(heading, text) for own, heading, text in PARTS if own == page]
    assert sum(minutes(text)[0] for _, text in parts) == 45
    assert (parts[0][0], parts[-1][0]) == ("Opening", "Closing")
    assert sum(heading.startswith("Activity: ") for heading, _ in parts) == 1
    rows = re.findall(r"^\|( \d.*)\|$", (ROOT / "tests/lectures/README.md").read_text(), re.M)
    column = [row.split("|")[list(PAGES).index(page)].strip() for row in rows]
    plan = [minutes(text) for _, text in parts]
    assert [cell for cell in column if cell] == [
        f"{n} ({talk}) {heading}" if talk else f"{n} {heading}"
        for (n, talk), (heading, _) in zip(plan, parts)
    ]


@pytest.mark.parametrize("page, heading, text", PARTS, ids=[f"{p[0]}: {p[1]}" for p in PARTS])
def test_a_part_is_complete(page, heading, text):
    """3 to 6 sentences to say; below a command a question, its answer folded."""
    said = re.search(r"\n\nSay:\n\n((?:- .*\n)+)", text + "\n")[1]
    assert 3 <= said.count("\n") <= 6
    spent, talk = minutes(text)
    order = [text.find(part) for part in ("Say:", "```console", "**Question.** ", "<details>")]
    if heading in ("Opening", "Closing"):
        assert order[1:] == [-1] * 3 and not talk
    else:
        assert order == sorted(order) and min(order) > 0 and 0 < talk < spent


def solve(root):
    """Apply the diffs of SOLUTIONS.md to the files in `root`."""
    page = (ROOT / "tests/exercises/SOLUTIONS.md").read_text()
    for diff in re.findall(r"```diff\n(.*?)```", page, re.S):
        for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.S | re.M):
            text = (root / name).read_text() if (root / name).exists() else ""
            for hunk in hunks.split("@@\n"):
                lines = hunk.splitlines(keepends=True)
                old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
                assert text.count(old) == 1 if text else not old, f"{name} has not once: {old}"
                text = text.replace(old, new) if text else new
            (root / name).write_text(text)


def test_the_solutions_solve_the_exercises(tmp_path):
    """All six, in a copy: nothing fails, and nothing is left to solve."""
    marks = ['FLAGS = ""', "# your part", "# your part"]
    files = [ROOT / f"tests/exercises/test_exercise_{n}.py" for n in (4, 5, 6)]
    done = [mark not in path.read_text() for mark, path in zip(marks, files)]
    if any(done) or len(DOWNSAMPLERS) > 5 or "token" in GATES or "csv" in TASKS:
        pytest.skip("an exercise is solved here already")
    ignore = shutil.ignore_patterns("__pycache__", "cache", "*.md")
    for folder in ("data", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    solve(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/exercises"]
    own = {name: value for name, value in os.environ.items() if name != FOLDER}
    run = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"^\d+ passed in", run.stdout, re.M), run.stdout
