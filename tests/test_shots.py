"""data/shots.py and data/glue.py: answered examples before the question, chosen by the base."""

import json
import random

import pytest
import torch
from test_glue import folder, run, tokenizer  # noqa: F401

import train
from data import glue, shots
from data.glue import ANSWER, FORMS, preamble_of
from data.shots import choose_shots, take_shots
from model import from_pretrained, quantize_folder
from qst import read_side
from quant import InputError
from train import TrainConfig


def rows_of(task, folder):  # noqa: F811
    form = FORMS[task]
    return glue.read(folder / form.folder / "train.tsv", form)[0], form


@pytest.mark.parametrize("task", FORMS)
def test_shots_stand_before_the_question(tokenizer, folder, task):  # noqa: F811
    """The first of each class in turn, with their answers."""
    rows, form = rows_of(task, folder)
    first = take_shots(rows, 3)
    assert first == rows[:3] and take_shots([rows[0], rows[2], rows[1]], 2) == rows[:2]
    before = preamble_of(first, form)
    text = tokenizer.decode(glue.prompt(rows[3][0], form, tokenizer, 500, "lm", before))
    answers = [form.words[round(label)] for _, label in first]
    asked = [form.question.format(*sentences) + ANSWER for sentences, _ in [*first, rows[3]]]
    assert text == "\n\n".join([form.heading, *map(" ".join, zip(asked, answers)), asked[-1]])


def test_too_many_shots(tokenizer, folder):  # noqa: F811
    rows, form = rows_of("sst2", folder)
    with pytest.raises(InputError, match="--shots 41 is more than the 40 examples"):
        take_shots(rows, 41)
    with pytest.raises(InputError, match="--sequence_len 60 is too short for the shots and"):
        glue.prompt(["A"], form, tokenizer, 60, "lm", preamble_of(rows[:9], form))


def test_the_best_of_many_sets_is_chosen():
    """Half of them are left after each round, with twice as many judges; none judges its own."""
    rows = [([f"sentence {i}"], i % 2) for i in range(400)]
    asked, good = [], {}

    def loss(one, judges):
        assert [label for _, label in one] in ([0, 1, 0], [1, 0, 1])
        assert not any(row in judges for row in one)
        asked.append(len(judges))
        return good.setdefault(str(one), random.Random(str(one)).random())

    chosen, found = choose_shots(rows, 3, loss, seed=1)
    assert found == min(good.values()) == good[str(chosen)] and len(good) == shots.SETS
    assert str(take_shots(rows, 3)) in good  # the file's first are tried, too
    rounds = [(16, 16), (8, 32), (4, 64), (2, 128)]
    assert len(asked) == sum(n for n, _ in rounds)
    for n, judges in rounds:
        part, asked = asked[:n], asked[n:]
        assert all(judges - 3 <= count <= judges for count in part)
    assert choose_shots(rows, 3, lambda *_: 1.0, 1) == choose_shots(rows, 3, lambda *_: 1.0, 1)


def test_a_bases_loss_after_shots(tiny_model, tokenizer, folder):  # noqa: F811
    """Of its answers among the label words, without what it prefers; infinite without room."""
    rows, form = rows_of("sst2", folder)
    base = from_pretrained(tiny_model, "none", torch.float32)
    choices = glue.word_ids(tokenizer, form.words, ANSWER)
    cfg = TrainConfig(batch_size=2, sequence_len=128)
    some, judges = rows[:2], rows[2:9]
    found = glue.loss_after(base, form, tokenizer, choices, cfg, some, judges)
    logits = []
    for sentences, _ in judges:
        text = preamble_of(some, form) + form.question.format(*sentences) + ANSWER
        idx = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        logits.append(base(idx)[0, -1, choices])
    logits = torch.stack(logits)
    log_p = (logits - logits.mean(dim=0)).log_softmax(dim=1)
    expected = -sum(log_p[i, label] for i, (_, label) in enumerate(judges)) / len(judges)
    assert found == pytest.approx(expected.item(), abs=1e-5)
    cfg.sequence_len = 40
    assert glue.loss_after(base, form, tokenizer, choices, cfg, some, judges) == float("inf")


@pytest.mark.parametrize("settings", [{}, dict(repair=2), dict(method="qlora", reduction=None),
                                      dict(stream=True)], ids=str)  # fmt: skip
def test_shots_belong_to_what_is_trained(settings, tiny_model, folder, tmp_path, monkeypatch):  # noqa: F811
    """They are chosen, not learned (here a class has one line), stand in the side checkpoint, and
    score again what the run leaves, also where the examples to choose from are gone."""
    base, out, read = tiny_model, tmp_path / "out", []
    if settings.get("stream"):
        base = tmp_path / "nf4"
        quantize_folder(tiny_model, base)
    whole = train.run_one
    monkeypatch.setattr(train, "run_one", lambda *a, **k: read.append(k["task"]) or whole(*a, **k))
    monkeypatch.setattr(glue, "choose_shots", lambda rows, *_: (rows[-1:], 0.5))  # not the first
    result = run(base, folder, out, task="sst2", shots=1, max_iters=5, **settings)
    rows, form = rows_of("sst2", folder)
    assert len({target for _, (*_, target) in read[0].train + read[0].held_out}) == 1
    assert result["config"]["head"] == "lm" and "accuracy_before" in result
    preamble = read_side(out)[0].preamble
    assert preamble == result["config"]["preamble"] == read[0].preamble
    assert preamble in [preamble_of([row], form) for row in rows]
    monkeypatch.setattr(glue, "take_shots", None)
    monkeypatch.setattr(glue, "choose_shots", None)
    given = dict(task="sst2", side=str(out), reduction=settings.get("reduction", 4))
    again = run(base, folder, tmp_path / "eval", **given, eval_only=True)
    assert again["config"]["shots"] == 1 and again["accuracy"] == result["accuracy_after"]
    longer = run(base, folder, out, task="sst2", shots=1, max_iters=7, resume=True, **settings,
                 preamble=json.loads((out / "settings.json").read_text())["preamble"])  # fmt: skip
    assert longer["iterations"] == 7


def test_shots_are_chosen_by_the_base_before_it_is_scored(tiny_model, folder, tmp_path, capsys):  # noqa: F811
    """Also where nothing is trained; the same seed chooses the same."""
    run(tiny_model, folder, tmp_path, task="sst2", shots=2, eval_only=True, score_examples=4)
    printed = capsys.readouterr().out
    assert "shots       2, the best for the base of 16 sets: loss " in printed


def test_shots_and_other_flags(tiny_model, folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    run(tiny_model, folder, out, task="sst2", shots=1, max_iters=1)
    with pytest.raises(InputError, match="--shots: --side .* has its own; leave it out"):
        run(tiny_model, folder, out, task="sst2", side=str(out), eval_only=True, shots=2)
    for wrong in (dict(task="sst2", head="classifier"), dict(task="text")):
        with pytest.raises(InputError, match="--shots 2 stand before questions"):
            run(tiny_model, folder, out, shots=2, **wrong)
    with pytest.raises(InputError, match="with which --side .* was trained, stand"):
        run(tiny_model, folder, out, task="text", side=str(out), eval_only=True)
    with pytest.raises(InputError, match="--cache_hidden is .* without .* --shots"):
        run(tiny_model, folder, out, task="sst2", shots=1, cache_hidden=str(tmp_path / "cache"))
