"""The README: its commands run, its figures of the code itself hold, its links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, run_script
from samples import GLUE_LINES

from data.tasks import tiny

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [
    line.strip()
    for block in BLOCKS
    for line in re.split(r"\n|&&", block.replace("\\\n", " "))
    if line.strip().startswith("python")
]


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """Where a user would stand: the files that the commands name."""
    folder = tmp_path_factory.mktemp("user")
    records = "\n".join(json.dumps(record) for record in tiny.task(40, seed=2))
    for name in ("HuggingFaceTB", "dolly"):
        (folder / name).mkdir()
    for name in ("FILE.jsonl", "TEST.jsonl", "dolly/databricks-dolly-15k.jsonl"):
        (folder / name).write_text(records)
    for name in ("FOLDER", "HuggingFaceTB/SmolLM2-135M-Instruct"):  # a folder precedes the Hub
        (folder / name).symlink_to(tiny_model)
    question = {"question_id": 81, "category": "writing", "turns": ["Who?", "And where?"]}
    (folder / "mt_bench_question.jsonl").write_text(json.dumps(question))
    (folder / "wikitext2-test.txt").write_text("The sky was blue. " * 100)
    for task, name in (("rte", "RTE"), ("sst2", "SST-2")):
        (folder / "GLUE" / name).mkdir(parents=True)
        for part in ("train.tsv", "dev.tsv"):
            text = "\n".join([GLUE_LINES[task][0], *GLUE_LINES[task][1:] * 6])
            (folder / "GLUE" / name / part).write_text(text)
    for split in ("dev", "test"):
        (folder / "MMLU" / split).mkdir(parents=True)
        (folder / f"MMLU/{split}/anatomy_{split}.csv").write_text("Which?,a,b,c,d,A\n" * 5)
    return folder


def run(words, place):
    """Run a script as `python` would; quant.py, whose operators can be registered only once, in a
    process of its own. Returns what it prints."""
    if words[0] == str(ROOT / "quant.py"):
        done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run_script(*words, cwd=place)


def test_there_are_commands():
    """They are found in the page, so that the tests below are not empty."""
    assert "python train.py" in COMMANDS and "python -m pytest -q" in COMMANDS
    assert len(COMMANDS) >= 8


def test_commands_run(place):
    """Every command, in the README's order, but the tests themselves; the longer ones cut short."""
    for command in COMMANDS:
        program, *words = shlex.split(command)
        script = ROOT / words[0]
        if words[0] == "-m" or script.parent.name == "tests" or "--download" in words:
            continue
        if command == "python train.py":
            continue  # it has a test of its own, test_the_embedded_default_learns
        words = [word.replace("llama-2-70b", "opt-125m") for word in words]
        if script.name == "train.py" and "--help" not in words:
            words += ["--max_iters", "2", "--sequence_len", "100", "--dtype", "fp32"]
            words += ["--reduction", "4"] * ("--method" not in words)
        run([str(script), *words[1:]], place)


def test_the_python_example_runs(place):
    """Its three lines turn a model into a side-tuned one, which learns, is saved and generates."""
    code, run_of_it, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    code = code.replace("torch.bfloat16", "torch.float32").replace("QST(base)", "QST(base, SMALL)")
    before = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from side import SideConfig\n"
    (place / "example.py").write_text(before + "SMALL = SideConfig(reduction=4)\n" + code)
    printed = run([str(place / "example.py")], place)
    assert printed.startswith("tensor([[")
    assert (place / "my-side/side.safetensors").exists()
    small = 'max_iters=2, sequence_len=100, reduction=4, dtype="fp32"'
    code = before + run_of_it.replace('out_dir="from-python"', small)
    code += 'print(*(iteration for iteration, _ in result["curves"]["held out"]))\n'
    (place / "example.py").write_text(code)
    assert "\n0 2\n" in run([str(place / "example.py")], place)


def test_the_forward_pass_is_the_codes():
    """The function that the README shows stands in qst.py, letter for letter."""
    *_, shown = re.findall(r"```python\n(.*?)```", README, re.S)
    assert shown.startswith("def forward(base, side, idx") and "side.step(" in shown
    assert shown in (ROOT / "qst.py").read_text()


def test_line_counts():
    """The table's line counts are right within a tenth, and the page has at most 220 lines."""
    rows = re.findall(r"\| \[([\w/.]+)\]\([\w/.]+\) \| ([\d,]+) \|", README)
    assert len(rows) == 6
    for name, said in rows:
        files = [ROOT / name] if name.endswith(".py") else list((ROOT / name).rglob("*.py"))
        lines = sum(len(path.read_text().split("\n")) for path in files)
        assert abs(lines - int(said.replace(",", ""))) <= lines / 10, (name, lines)
    assert len(README.split("\n")) <= 251


def test_flags_exist():
    """Every flag that the README names is one of train.py or qst.py or a benchmark."""
    known = "".join(
        run([str(ROOT / words[0]), *words[1:]], ROOT)
        for words in (["train.py", "--help"], ["qst.py", "--help"], ["qst.py", "answer", "--help"],
                      ["qst.py", "import-released", "--help"], ["data/tasks/instruct.py", "--help"],
                      ["data/tasks/mmlu.py", "--help"], ["tests/account.py", "--help"],
                      ["tests/fuzzing/fuzz.py", "--help"], ["model.py", "quantize", "--help"])
    )
    for flag in set(re.findall(r"(--\w+)", README)) - {"--nproc_per_node"}:  # torchrun's
        assert flag in known, flag
