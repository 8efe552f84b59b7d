"""GLUE: its files, prompts for label words and for a classifier, and the metrics."""

import json
import re

import pytest
import torch
from helpers import TEST_DATA, glue_run, needs_test_data, sign_again
from samples import GLUE_LINES

import train
from data import InputError
from data.tasks import glue
from data.tasks.glue import ANSWER, FORMS
from data.tasks.metrics import METRICS, ranks
from model import from_pretrained
from qst import QST
from train import TrainConfig



@pytest.mark.parametrize("task, sentences, labels", [
    ("rte", ['He said "no.', "No."], [1, 0]), ("mrpc", ["Same.", "Same."], [1, 0]),
    ("stsb", ["A plane.", "A plane."], [5.0, 1.25]), ("cola", ["The book was read."], [1, 0]),
    ("sst2", ["it 's a charming journey ."], [1, 0]), ("qnli", ["Who?", "He did."], [1, 0]),
    ("qqp", ["How?", "How so?"], [1, 0]), ("mnli", ["A.", "B."], [1, 2]),
    ("mnli-mm", ["A.", "B."], [1, 2]),
])
def test_rows(glue_folder, task, sentences, labels):
    """Sentences and labels are found in each task's columns; quotes are text."""
    form = FORMS[task]
    rows, dropped = glue.read(glue_folder / form.folder / form.dev, form)
    assert rows[0][0] == sentences and [label for _, label in rows] == labels * 3 and dropped == 0


def test_short_lines_are_counted(tmp_path):
    """They are left out, as in QQP's own file, and not in silence."""
    (tmp_path / "dev.tsv").write_text("\n".join([*GLUE_LINES["qqp"], "2\t5\t6\tWhy\r", ""]))
    rows, dropped = glue.read(tmp_path / "dev.tsv", FORMS["qqp"])
    assert len(rows) == 2 and dropped == 1


def test_mrpc_is_split_by_its_ids(tmp_path, capsys):
    """The corpus as it is downloaded is read as train.tsv and dev.tsv, whose pairs the ids name."""
    (tmp_path / "MRPC").mkdir()
    rows = [f"{i % 2}\t{i}\t{i + 1}\ta{i}\tb{i}" for i in range(9)]
    text = "\ufeff" + "\r\n".join([GLUE_LINES["mrpc"][0], *rows]) + "\r\n"
    (tmp_path / "MRPC/msr_paraphrase_train.txt").write_bytes(text.encode())
    (tmp_path / "MRPC/mrpc_dev_ids.tsv").write_text("3\t4\n8\t9\n")
    folder = glue.files(tmp_path, FORMS["mrpc"])
    dev, train = (glue.read(folder / name, FORMS["mrpc"])[0] for name in ("dev.tsv", "train.tsv"))
    assert dev == [(["a3", "b3"], 1), (["a8", "b8"], 0)] and len(train) == 7
    glue.show(tmp_path)
    assert capsys.readouterr().out.startswith("mrpc: 7 to train on, 2 to score.")


@pytest.mark.parametrize("text, message", [
    ("sentence\tlabel\nfine\t2\n", "line 2: the label '2' is not 0, 1"),
    ("index\tsentence1\n", 'no column "sentence"'), ("sentence\tlabel\n", "holds no examples"),
    (None, "is missing"),
])
def test_bad_files_are_named(tmp_path, text, message):
    """The sentence names the file, and the line, the column or what else is wrong."""
    if text is not None:
        (tmp_path / "dev.tsv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        glue.read(tmp_path / "dev.tsv", FORMS["sst2"])
    assert str(tmp_path / "dev.tsv") in str(error.value)


def test_metrics():
    """By hand: 3 of 4 right, precision 1 and recall 2/3, and ranks of ties."""
    predicted, labels = torch.tensor([[1.0, 0, 0, 1], [1, 0, 1, 1]]).double()
    assert METRICS["accuracy"](predicted, labels) == 0.75
    assert METRICS["f1"](predicted, labels) == pytest.approx(0.8)
    assert METRICS["matthews"](predicted, labels) == pytest.approx(2 / 12**0.5)
    assert METRICS["matthews"](torch.ones(4).double(), labels) == 0
    a, b = torch.tensor([[1.0, 2, 2, 4], [1, 8, 9, 100]]).double()
    assert ranks(a).tolist() == [1, 2.5, 2.5, 4]
    assert METRICS["spearman"](a, b) == pytest.approx(0.9486833)
    assert METRICS["pearson"](a, b) == pytest.approx(169.5 / (4.75 * 6665) ** 0.5)


@pytest.mark.parametrize("name", ["pearson", "spearman", "matthews"])
@pytest.mark.parametrize("value, other", [(0.1, 0.7), (0.1, 0.1), (-3.3, 0.7)])
def test_a_constant_correlates_with_nothing(name, value, other):
    """The mean of nine times 0.1 is rounded in fp64, which must not count as a variance."""
    one, two = (torch.full((9,), each, dtype=torch.float64) for each in (value, other))
    assert one.mean() != value and two.mean() != other
    varied = torch.arange(9.0).double()
    assert METRICS[name](one, two) == METRICS[name](one, varied) == METRICS[name](varied, two) == 0


def test_metrics_match_scipy():
    """The correlations, with ties, are those that scipy computes. Skipped without scipy."""
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).double().mul(3).round()
    assert METRICS["pearson"](a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert METRICS["spearman"](a, b) == pytest.approx(stats.spearmanr(a, b)[0])


@pytest.mark.parametrize("task", FORMS)
def test_prompts(tokenizer, task):
    """For --head lm: the whole question. For a classifier: a bos token before each sentence."""
    form = FORMS[task]
    sentences = ["The sky was blue", "It was late"][: len(form.columns) - 1]
    asked = glue.prompt(sentences, form, tokenizer, 500, glue.preamble_of([], form))
    assert asked[0] == tokenizer.bos_id
    whole = f"{form.heading}\n\n{form.question.format(*sentences)}{ANSWER}"
    assert tokenizer.decode(asked) == whole
    bare = [id for text in sentences for id in [tokenizer.bos_id, *tokenizer.encode(text)]]
    assert glue.prompt(sentences, form, tokenizer, 500, None) == bare


@pytest.mark.parametrize("preamble", ["", None])
def test_long_prompts_lose_the_longer_sentences_end(tokenizer, preamble):
    """The shorter sentence and the question stay whole; without room for them it is refused."""
    sentences = ["The sky was blue " * 40, "It was late"]
    ids = glue.prompt(sentences, FORMS["rte"], tokenizer, 60, preamble)
    text = tokenizer.decode(ids)
    assert 40 < len(ids) <= 60 and "The sky was blue The sky" in text and "It was late" in text
    assert text.endswith(ANSWER) == (preamble is not None)
    with pytest.raises(InputError, match="--sequence_len 5 is too short"):
        glue.prompt(sentences, FORMS["rte"], tokenizer, 5, "")


def test_long_prompts_of_byte_tokens_keep_what_fits(tokenizer):
    """A character that is four tokens is not cut off four times."""
    texts = ["\U0001f9ff" * 60, "It was late"]
    ids = glue.prompt(texts, FORMS["rte"], tokenizer, 120, None)
    assert 115 < len(ids) <= 120 and "It was late" in tokenizer.decode(ids)


def test_ratings_with_label_words(tiny_model, glue_folder, tmp_path, monkeypatch):
    """STS-B's rating is the expectation over the label words; the nearest word is the target."""
    words = ("bear", "cat", "lake", "mill", "park", "toy")  # this tokenizer spells numbers out
    monkeypatch.setitem(FORMS, "stsb", FORMS["stsb"]._replace(words=words))
    result = glue_run(tiny_model, glue_folder, tmp_path, task="stsb", head="lm", max_iters=100)
    assert result["pearson_after"] > 0.99 > result["pearson_before"]
    assert result["loss_after"] < 0.1


@pytest.mark.parametrize("task, head, metric", [
    ("sst2", "lm", "accuracy"), ("rte", None, "accuracy"), ("mnli", None, "accuracy"),
    ("stsb", None, "pearson"), ("qqp", None, "f1"), ("cola", None, "matthews"),
])
def test_a_task_is_learned_and_scored_again(tiny_model, glue_folder, tmp_path, task, head, metric):
    """Training fits two lines, and the saved side network has the score of the run."""
    out = tmp_path / "out"
    result = glue_run(tiny_model, glue_folder, out, task=task, head=head, max_iters=80)
    assert result[f"{metric}_after"] == pytest.approx(1, abs=1e-3) and result["examples"] == 6
    assert (f"{metric}_before" in result) == (head == "lm")
    again = dict(task=task, side=str(out), eval_only=True)
    again = glue_run(tiny_model, glue_folder, tmp_path / "eval", **again)
    assert train.resolve(TrainConfig(**again["config"])) == TrainConfig(**again["config"])
    assert again[metric] == pytest.approx(result[f"{metric}_after"]) and again["examples"] == 6
    assert json.loads((tmp_path / "eval/result.json").read_text())[metric] == again[metric]
    side = QST.from_side(from_pretrained(tiny_model, "nf4", torch.float32), out).side
    labels = 0 if head else len(FORMS[task].labels) or 1
    assert side.config.n_labels == labels and (side.classifier is not None) == bool(labels)


@pytest.mark.parametrize("task, shown", [
    ("sst2", r"accuracy +\d+\.\d% base \(6 examples; always the most frequent class: 50.0%\)"),
    ("qqp", r"f1 +\d+\.\d% base \(6 examples\)"),
    ("cola", r"matthews +-?\d+\.\d% base \(6 examples; always the most frequent class: 0.0%\)"),
])
def test_a_metric_has_its_own_yardstick(tiny_model, glue_folder, tmp_path, task, shown, capsys):
    """Accuracy is shown beside the largest class's, and Matthews' correlation beside 0."""
    result = glue_run(tiny_model, glue_folder, tmp_path, task=task, eval_only=True)
    printed = capsys.readouterr().out
    assert re.search(shown, printed), printed
    assert ("majority_class" in result) == (task != "cola")
    assert printed.count("most frequent") == 1


def test_a_wrong_folder_says_what_was_looked_for(tmp_path):
    """Each file that would do."""
    for folder in (tmp_path, tmp_path / "no"):
        with pytest.raises(InputError) as error:
            glue.show(folder)
        said = str(error.value)
        assert f"{folder} has none of" in said and "RTE/dev.tsv" in said
        assert "MNLI/dev_matched.tsv" in said and "MNLI/dev_mismatched.tsv" in said


def test_the_base_is_scored_with_label_words(tiny_model, glue_folder, tmp_path):
    """--eval_only without --side scores the base with label words, and keeps to the limits."""
    four = dict(task="sst2", eval_only=True, score_examples=4)
    result = glue_run(tiny_model, glue_folder, tmp_path, **four)
    assert result["examples"] == 4 and result["majority_class"] == 0.5
    assert result["trainable_parameters"] == 0


def test_a_classifier_is_of_its_task(tiny_model, glue_folder, tmp_path):
    """Another number of labels is refused, and so are as many of another task, in scoring and in
    training; both halves of MNLI have the same, and words are free."""
    out, on = tmp_path / "out", dict(side=str(tmp_path / "out"), max_iters=1)
    train_one = lambda **of: glue_run(tiny_model, glue_folder, out, max_iters=1, **of)
    again = lambda **of: glue_run(tiny_model, glue_folder, tmp_path / "again", **on | of)
    train_one(task="rte")
    for eval_only in (True, False):
        with pytest.raises(InputError, match="is a classifier for --task rte, and not mrpc"):
            again(task="mrpc", eval_only=eval_only)
    config = json.loads((out / "side.json").read_text())["config"]
    sign_again(out, config=config | dict(task="mnli"))
    with pytest.raises(InputError, match="has 2 labels, and --task mnli 3"):
        again(task="mnli", eval_only=True)
    train_one(task="mnli")
    assert again(task="mnli-mm", eval_only=True)["examples"] == 6
    train_one(task="rte", head="lm")
    assert again(task="mrpc", eval_only=True)["examples"] == 6


@needs_test_data
@pytest.mark.parametrize("task, train_rows, dev_rows", [
    ("rte", 2490, 277), ("mrpc", 3668, 408), ("cola", 8551, 1043), ("sst2", 12000, 872)
])
def test_the_benchmarks_own_files(task, train_rows, dev_rows):
    """GLUE's sizes, and no line is left out."""
    form = FORMS[task]
    for name, rows in (("train.tsv", train_rows), (form.dev, dev_rows)):
        found, dropped = glue.read(TEST_DATA / "data/glue" / form.folder / name, form)
        assert dropped == 0 and len(found) == rows
