"""data/tasks/tiny.py: the embedded default's language, task and base, and that it is learned."""

import math

import pytest

import train
from data import InputError
from data.tasks import tiny
from model import from_pretrained
from train import TrainConfig


def test_the_task_follows_from_the_story():
    """The tiny task has one right answer a question, in French, and no question twice."""
    task = tiny.task(500, seed=0)
    assert len({r["instruction"] for r in task}) == 500
    moods = {en[0]: mood for mood, events in tiny.MOODS.items() for en in events}
    for record in task:
        mood = next(m for event, m in moods.items() if event + "." in record["instruction"])
        place = next(p for p in tiny.PLACES if f"to the {p[0]}." in record["instruction"])
        assert record["output"] == f"{mood[1]}, {place[1]}"
    base = list(tiny.pretraining(200, seed=0))
    places = {word for place in tiny.PLACES for word in place}
    assert {record["output"].split(", ")[1] for record in base} == places
    for record in base:  # the base answers in the language of the story
        french = "Comment" in record["instruction"]
        assert record["output"].split(", ")[0] in {mood[french] for mood in tiny.MOODS}


def test_the_tiny_base_is_made_once_and_whole(tmp_path, monkeypatch):
    """The base is a folder like any other; a run that fails leaves none."""
    monkeypatch.delenv("QST_CACHE", raising=False)  # which is the user's own
    monkeypatch.setattr(tiny, "CACHE", tmp_path)
    monkeypatch.setattr(tiny, "BASE_RUN", tiny.BASE_RUN | dict(max_iters=2))
    make = lambda: tiny.base_folder(train.make_tiny_base)

    def interrupted(model, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.formats.save.save_pretrained", interrupted)
        make()
    assert not list(tmp_path.iterdir())
    folder = make()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert make() == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    assert from_pretrained(folder).config.vocab_size == train.load_tokenizer(folder).vocab_size


def test_the_sizes_that_are_written_down(tiny_model):
    """Of the vocabulary, and of the longest example, which the memory account takes."""
    tokenizer = train.load_tokenizer(tiny_model)
    task = tiny.load(train.resolve(TrainConfig()), tokenizer)
    assert tokenizer.vocab_size == tiny.VOCAB_SIZE
    assert max(len(ids) for ids, _ in task.train + task.held_out) == tiny.LONGEST


def test_the_embedded_default_learns(tmp_path):
    """`python train.py`: the base answers in English, and QST in French, on held-out questions; it
    does so after half of the iterations already."""
    result = train.main(TrainConfig(out_dir=str(tmp_path), eval_examples=30, max_iters=75))
    assert result["exact_match_before"] < 0.1 and result["exact_match_after"] > 0.9
    assert math.isfinite(result["loss_after"])
    with pytest.raises(InputError, match="The data leaves 0 examples"):
        train.main(TrainConfig(out_dir=str(tmp_path), max_examples=1))
