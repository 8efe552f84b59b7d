"""tests/lectures/qst.ipynb is written from notebook.py, whose cells run."""

import json
import re

import pytest
from helpers import ROOT, TEST_DATA, run_script
from make_notebook import SOURCE, notebook

from data.tasks import tiny

TEXT = SOURCE.read_text()
MADE = json.loads(notebook(TEXT))
CODE = ["".join(cell["source"]) for cell in MADE["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_that_of_the_script():
    """As committed: without outputs, small, and in Jupyter's format."""
    path = SOURCE.with_name("qst.ipynb")
    assert path.read_text() == notebook(TEXT), "run `python tests/lectures/make_notebook.py`"
    assert path.stat().st_size < 20_000 and (MADE["nbformat"], MADE["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in MADE["cells"]}) == len(MADE["cells"])
    for cell in MADE["cells"]:
        assert cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1])
        assert cell["cell_type"] == "markdown" or cell["outputs"] == []


def test_nothing_of_the_script_is_lost():
    """Its code is that of the cells, and no comment mark is left in a text."""
    own = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    assert own == [line for text in CODE for line in text.splitlines() if line]
    texts = ["".join(c["source"]) for c in MADE["cells"] if c["cell_type"] == "markdown"]
    assert texts[0].startswith("# QST and QLoRA") and len(texts) == TEXT.count("[markdown]\n")
    assert not [text for text in texts if re.search(r"^# %%|^# (?!QST)", text, re.M)]


def test_it_asks_for_an_address(tmp_path, monkeypatch):
    """Outside of a copy of the repository, where nothing is cloned without one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", None)
    with pytest.raises(AssertionError, match="Set REPOSITORY"):
        exec("\n".join(CODE[:2]), {})


def test_every_cell_runs(tmp_path, monkeypatch):
    """On a CPU, with few iterations: both runs, the pictures, the answers, and the account."""
    file, out = tmp_path / "stories.jsonl", tmp_path / "out"
    file.write_text("\n".join(json.dumps(record) for record in tiny.task(24, seed=1)))
    base = TEST_DATA / "models/stories260K"
    settings = dict(
        BASE=str(base) if base.is_dir() else "", FILE=str(file), OUT=str(out), EXAMPLES=20,
        ITERATIONS=4, BATCH_SIZE=2, SEQUENCE_LEN=96, BUILT_IN=dict(max_iters=1, eval_examples=4),
    )
    monkeypatch.setenv("QST_NOTEBOOK", json.dumps(settings))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    empty = dict(prompt="", expected="a", answer="")
    no_time = lambda model, tokenizer, template, asked, *args: [empty.copy() for one in asked]
    monkeypatch.setattr("data.tasks.instruct.samples", no_time)  # but for QUESTION's answers
    printed = run_script("tests/lectures/notebook.py")
    for name in ("QST", "QLoRA"):
        assert re.search(rf"^{name} +\d\.\d+ +\d\.\d+ +[\d,]+ +[\d.]+ MB +\d+ ms$", printed, re.M)
        assert re.search(rf"^{name} +[\d,.]+ MB by the account$", printed, re.M)
        assert re.search(rf"^{name}:\n.", printed, re.M)
        assert f">{name}</text>" in (out / "losses.svg").read_text()
    assert "QST, checkpoint" in (out / "timeline.svg").read_text()
    assert "The cap needs a GPU" in printed
