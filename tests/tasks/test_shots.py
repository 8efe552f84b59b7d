"""data/tasks/glue.py, --shots: answered examples before each question."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers import glue_run

import train
from data import InputError
from data.tasks import glue
from data.tasks.glue import ANSWER, FORMS, preamble_of, take_shots
from qst import read_side
from train import TrainConfig


def rows_of(task, glue_folder):
    form = FORMS[task]
    return glue.read(glue_folder / form.folder / "train.tsv", form)[0], form


@pytest.mark.parametrize("task", FORMS)
def test_shots_stand_before_the_question(tokenizer, glue_folder, task):
    """The first of each class in turn, with their answers."""
    rows, form = rows_of(task, glue_folder)
    first = take_shots(rows, 3)
    assert first == rows[:3] and take_shots([rows[0], rows[2], rows[1]], 2) == rows[:2]
    before = preamble_of(first, form)
    text = tokenizer.decode(glue.prompt(rows[3][0], form, tokenizer, 500, before))
    answers = [form.words[round(label)] for _, label in first]
    asked = [form.question.format(*sentences) + ANSWER for sentences, _ in [*first, rows[3]]]
    assert text == "\n\n".join([form.heading, *map(" ".join, zip(asked, answers)), asked[-1]])


def test_a_preamble_tells_its_task():
    """Of two tasks that are asked in other words none begins as the other does."""
    headings = {form.heading for task, form in FORMS.items() if task != "mnli-mm"}
    assert len(headings) == len(FORMS) - 1
    assert not any(one != two and one.startswith(two) for one in headings for two in headings)


def test_too_many_shots(tokenizer, glue_folder):
    rows, form = rows_of("sst2", glue_folder)
    with pytest.raises(InputError, match="--shots 41 is more than the 40 examples"):
        take_shots(rows, 41)
    with pytest.raises(InputError, match="--sequence_len 60 is too short .* fewer --shots"):
        glue.prompt(["A"], form, tokenizer, 60, preamble_of(rows[:9], form))


def test_shots_belong_to_what_is_trained(tiny_model, glue_folder, tmp_path, monkeypatch):
    """They are not trained on: here a class has one line. The checkpoint has them, and is scored
    with them where train.tsv is gone or another; a new run takes those of its data."""
    data, out, read, load = tmp_path / "data", tmp_path / "out", [], glue.load
    shutil.copytree(glue_folder, data)
    monkeypatch.setattr(glue, "load", lambda *args: read.append(load(*args)) or read[-1])
    result = glue_run(tiny_model, data, out, task="sst2", shots=1, max_iters=5)
    rows, form = rows_of("sst2", glue_folder)
    assert len({target for _, (*_, target) in read[0].train + read[0].held_out}) == 1
    assert result["config"]["head"] == "lm" and "accuracy_before" in result
    preamble = read_side(out)[0].preamble
    assert preamble == result["config"]["preamble"] == preamble_of(rows[:1], form)
    (data / "SST-2" / "train.tsv").unlink()
    scored = dict(task="sst2", side=str(out), eval_only=True)
    again = glue_run(tiny_model, data, tmp_path / "eval", **scored)
    assert again["config"]["shots"] == 1 and again["accuracy"] == result["accuracy_after"]
    other = "sentence\tlabel\n" + "Mia went to the lake\t1\nIt was cold\t0\n" * 9
    (data / "SST-2" / "train.tsv").write_text(other)
    glue_run(tiny_model, data, tmp_path / "eval", **scored)
    assert read[-1].preamble == preamble
    anew = replace(TrainConfig(**result["config"]), out_dir=str(tmp_path / "anew"), max_iters=1)
    train.main(anew)
    assert "Mia went to the lake" in read[-1].preamble != preamble


def test_a_side_checkpoint_goes_on_with_another_task(tiny_model, glue_folder, tmp_path):
    """The new checkpoint has that task's preamble; the run continues, and can be run again."""
    first, out = tmp_path / "first", tmp_path / "out"
    glue_run(tiny_model, glue_folder, first, task="sst2", shots=1, max_iters=2)
    settings = dict(task="rte", side=str(first), max_iters=2)
    result = glue_run(tiny_model, glue_folder, out, **settings)
    preamble = read_side(out)[0].preamble
    rows, form = rows_of("rte", glue_folder)
    assert preamble == result["config"]["preamble"] == preamble_of(rows[:1], form)
    given = json.loads((out / "settings.json").read_text()) | dict(resume=True, max_iters=3)
    assert train.main(TrainConfig(**given))["iterations"] == 3
    again = replace(TrainConfig(**result["config"]), out_dir=str(tmp_path / "again"))
    assert train.main(again)["loss_after"] == result["loss_after"]


def test_shots_and_other_flags(tiny_model, glue_folder, tmp_path):
    out = tmp_path / "out"
    glue_run(tiny_model, glue_folder, out, task="sst2", shots=1, max_iters=1)
    with pytest.raises(InputError, match="--shots is fixed by --side .*: remove the flag"):
        glue_run(tiny_model, glue_folder, out, task="sst2", side=str(out), eval_only=True, shots=2)
    for wrong in (dict(task="sst2", head="classifier"), dict(task="text")):
        with pytest.raises(InputError, match="--shots 2 needs a GLUE --task"):
            glue_run(tiny_model, glue_folder, out, shots=2, **wrong)
    with pytest.raises(InputError, match="of --side .* needs a GLUE --task"):
        glue_run(tiny_model, glue_folder, out, task="text", side=str(out), eval_only=True)
