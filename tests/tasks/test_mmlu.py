"""data/tasks/mmlu.py: files, prompts, the tokens of the answers, and accuracy.

With transformers, SmolLM2 (its folder in the environment variable SMOLLM2) and the real questions:
our logits of the answers are those of transformers.
"""

import json
import os
import shutil

import pytest
import torch
from helpers import FIXTURES, TEST_DATA, needs_test_data, run_script, small_base, small_config
from samples import MMLU_ROW

import train
from data import InputError
from data.formats.save import save_pretrained
from data.tasks import mmlu
from data.tasks.scoring import choice_logits, word_ids
from data.tokens.tokenizer import load_tokenizer
from model import Transformer, from_pretrained
from qst import SharedBase
from train import TrainConfig

HEADING = "The following are multiple choice questions (with answers) about  world religions.\n\n"
ASKED = 'Is it "1,5", or\ntwo lines?\nA. one\nB. two, really\nC. 3\nD. None\nAnswer:'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An MMLU folder: two subjects of two categories, with 5 shots and 6 and 3 questions."""
    root = tmp_path_factory.mktemp("mmlu") / "data"
    for split, sizes in {"dev": (5, 5), "test": (6, 3)}.items():
        (root / split).mkdir(parents=True)
        for subject, size in zip(("world_religions", "anatomy"), sizes):
            rows = [f"Q{i},a{i},b,c,d,{'ABCD'[i % 4]}\n" for i in range(1, size)]
            path = root / split / f"{subject}_{split}.csv"
            path.write_text(MMLU_ROW.format("D") + "".join(rows))
    return root.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small sentencepiece tokenizer of LLaMA's kind, to which " A" is one token."""
    import sentencepiece

    path = tmp_path_factory.mktemp("letters") / "tokenizer.model"
    lines = [f"{HEADING.strip()} Is it one, or two? {x}. {x} {x} Answer: {x}" for x in "ABCD"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe",
        vocab_size=370, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )
    return load_tokenizer(path.parent)


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory):
    """A model's folder, with that tokenizer and random weights."""
    path = tmp_path_factory.mktemp("base")
    (path / "tokenizer.model").write_bytes(tokenizer.model.serialized_model_proto())
    torch.manual_seed(0)
    config = small_config(vocab_size=tokenizer.vocab_size, max_positions=900)
    save_pretrained(Transformer(config), path)
    return path


def test_a_folder_is_read_to_the_letter(folder):
    """Quotes, commas, line breaks and "None" come through; data/ may be given or stand around."""
    questions = mmlu.read(folder, "test")
    sizes = {subject: len(some) for subject, some in questions.items()}
    assert sizes == {"anatomy": 3, "world_religions": 6}
    first, second, *_ = questions["world_religions"]
    choices = ("one", "two, really", "3", "None")
    assert first == mmlu.Question('Is it "1,5", or\ntwo lines?', choices, 3)
    assert second == mmlu.Question("Q1", ("a1", "b", "c", "d"), 1)
    assert mmlu.read(folder / "data", "test") == questions


@pytest.mark.parametrize("row, message", [
    ("a,b,c\n", "line 6 has 3 columns"), ("a,b,c,d,e,E\n", "line 6 has the answer 'E'"),
    ("a,b,c,d,e, A\n", "line 6 has the answer ' A'"), ('a,b,c,d,e,f,"A', "line 6 is not CSV"),
    ("a,b,c,d,e,AB\n", "line 6 has the answer 'AB'"), ("a,b,c,d,e,\n", "line 6 has the answer ''"),
])
def test_a_bad_row_is_refused_with_its_line(row, message, tmp_path):
    """The line is that of the file, also behind a field of several lines and a blank line."""
    (tmp_path / "test").mkdir()
    path = tmp_path / "test/anatomy_test.csv"
    path.write_text(MMLU_ROW.format("A") + MMLU_ROW.format("B") + "\n" + row)
    with pytest.raises(InputError, match=f"anatomy_test.csv, {message}"):
        mmlu.read(tmp_path, "test")


def test_a_folder_that_is_not_mmlu(tmp_path, folder):
    """The message names the file that is missing, unknown or empty."""
    with pytest.raises(InputError, match="--download"):
        mmlu.read(tmp_path, "test")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/cooking_test.csv").write_text(MMLU_ROW.format("A"))
    with pytest.raises(InputError, match="cooking_test.csv belongs to none of MMLU's 57"):
        mmlu.read(tmp_path, "test")
    (tmp_path / "test/cooking_test.csv").rename(tmp_path / "test/virology_test.csv")
    with pytest.raises(InputError, match="virology_dev.csv has 0 of the 5 shots"):
        mmlu.read_shots(folder, mmlu.read(tmp_path, "test"))
    (tmp_path / "test/virology_test.csv").write_text("\n")
    with pytest.raises(InputError, match="virology_test.csv holds no questions"):
        mmlu.read(tmp_path, "test")


def test_categories():
    """57 subjects in four categories; no subject is in two."""
    sizes = {name: len(subjects) for name, subjects in mmlu.CATEGORIES.items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(mmlu.CATEGORY) == 57


def test_prompt_is_hendrycks(folder):
    """The wording is hendrycks/test's, with its two spaces before the subject."""
    shots = mmlu.read(folder, "dev")["world_religions"]
    question = mmlu.Question("Who?", ("I", "you", "he", "she"), 0)
    asked = "Who?\nA. I\nB. you\nC. he\nD. she\nAnswer:"
    assert mmlu.prompt("world_religions", [], question) == HEADING + asked
    text = f"{HEADING}{ASKED} D\n\nQ1\nA. a1\nB. b\nC. c\nD. d\nAnswer: B\n\n{asked}"
    assert mmlu.prompt("world_religions", shots[:2], question) == text


def test_a_long_prompt_loses_shots_from_the_end(folder, tokenizer):
    """It keeps as many as there is room for; the question is whole, until it does not fit alone."""
    shots = mmlu.read(folder, "dev")["anatomy"]
    ids = lambda kept: [
        tokenizer.bos_id, *tokenizer.encode(mmlu.prompt("anatomy", shots[:kept], shots[3]))
    ]
    encode = lambda room: mmlu.encode("anatomy", shots, shots[3], tokenizer, room)
    assert encode(10_000) == (ids(5), 5) and encode(len(ids(5))) == (ids(5), 5)
    for kept in (4, 2, 0):
        assert encode(len(ids(kept + 1)) - 1) == (ids(kept), kept) == encode(len(ids(kept)))
    assert encode(20) == (ids(0)[:1] + ids(0)[-19:], -1)


def byte_level(tmp_path, name):
    """A committed tokenizer of some kind, to which " A" to " D" were added by a merge each."""
    shutil.copytree(FIXTURES / "tokenizers" / name, tmp_path / name)
    new = [("Ġ", letter) for letter in "ABCD"]
    path = tmp_path / name / "tokenizer.json"
    if path.exists():
        spec = json.loads(path.read_text())
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        merges += [list(pair) if isinstance(merges[0], list) else " ".join(pair) for pair in new]
        used = [token["id"] for token in spec["added_tokens"]]
    else:
        path, used = tmp_path / name / "vocab.json", []
        spec = vocab = json.loads(path.read_text())
        with open(tmp_path / name / "merges.txt", "a") as file:
            file.writelines(" ".join(pair) + "\n" for pair in new)
    start = max([*vocab.values(), *used]) + 1
    vocab |= {"Ġ" + letter: start + i for i, (_, letter) in enumerate(new)}
    path.write_text(json.dumps(spec))
    return load_tokenizer(tmp_path / name), list(range(start, start + 4))


def letter_ids(tokenizer, prompt):
    return word_ids(tokenizer, mmlu.LETTERS, prompt)


@pytest.mark.parametrize("name", ["smollm2", "opt", "llama3", "qwen2"])
def test_answers_of_byte_level_bpe(name, tmp_path, folder):
    """They are the tokens with the space in front; where these are two tokens, that is said."""
    prompt = mmlu.prompt("anatomy", [], mmlu.read(folder, "dev")["anatomy"][0])
    with pytest.raises(InputError, match="begins several of A, B, C, D alike"):
        letter_ids(load_tokenizer(FIXTURES / "tokenizers" / name), prompt)
    tokenizer, ids = byte_level(tmp_path, name)
    assert letter_ids(tokenizer, prompt) == ids


def test_answers_of_sentencepiece(tokenizer):
    """They are the tokens behind a text, and not what " A" alone begins with."""
    ids = letter_ids(tokenizer, HEADING + ASKED)
    assert [tokenizer.token_bytes[i] for i in ids] == [b" A", b" B", b" C", b" D"]
    assert tokenizer.encode(HEADING + ASKED + " C") == [*tokenizer.encode(HEADING + ASKED), ids[2]]
    assert len(tokenizer.encode(" A")) == 2


def test_accuracy_counts_every_question_the_same(folder, tokenizer, monkeypatch):
    """Over all, by category and by subject; prompts that were too long are counted."""
    base = small_base("none", vocab_size=tokenizer.vocab_size, max_positions=900)
    seen = {}

    def always_d(models, prompts, choices, batch_size, desc):
        seen[desc] = prompts
        return [torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(len(prompts), 4)]

    monkeypatch.setattr(mmlu, "choice_logits", always_d)
    (result,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder)
    assert result == {
        "accuracy": 3 / 9, "accuracy_by_category": {"humanities": 2 / 6, "other": 1 / 3},
        "accuracy_by_subject": {"anatomy": 1 / 3, "world_religions": 2 / 6}, "examples": 9,
        "shortened": 0, "cut": 0,
    }
    lengths = sorted(len(p) for prompts in seen.values() for p in prompts)
    (result,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder, sequence_len=lengths[3])
    assert (result["shortened"], result["cut"]) == (sum(n > lengths[3] for n in lengths), 0)
    (result,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder, sequence_len=40)
    assert (result["shortened"], result["cut"]) == (0, 9)
    base.config.max_positions = 41
    mmlu.evaluate(SharedBase([base]), tokenizer, folder)
    assert {len(p) for prompts in seen.values() for p in prompts} == {41}


def test_accuracy_of_unequal_categories():
    """A category's accuracy is over its questions, not the mean of its subjects."""
    right = {"anatomy": [True], "virology": [False] * 3, "astronomy": [True, True, False]}
    result = mmlu.summary(right)
    assert result["accuracy"] == 3 / 7
    assert result["accuracy_by_category"] == {"STEM": 2 / 3, "other": 1 / 4}


def test_a_sample_is_fixed_and_keeps_all_in_order(folder):
    """Two draws are alike; each subject keeps its order; 0, or more than there are, is all."""
    tests = mmlu.read(folder, "test")
    drawn = mmlu.draw(tests, 5)
    assert sum(map(len, drawn.values())) == 5 and drawn == mmlu.draw(tests, 5)
    for subject, questions in drawn.items():
        assert [q for q in tests[subject] if q in questions] == questions
    assert mmlu.draw(tests, 0) == tests == mmlu.draw(tests, 99)


def test_evaluation_end_to_end(folder, tokenizer):
    """A real model's accuracy is that of its own logits, and so is the accuracy of a sample."""
    base = small_base("nf4", vocab_size=tokenizer.vocab_size, max_positions=900)
    (result,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder, batch_size=2)
    right = 0
    for subject, questions in mmlu.read(folder, "test").items():
        shots = mmlu.read(folder, "dev")[subject]
        for q in questions:
            prompt = mmlu.prompt(subject, shots, q)
            logits = base(torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]]))[0, -1]
            right += logits[letter_ids(tokenizer, prompt)].argmax().item() == q.answer
    assert result["accuracy"] == right / 9 and result["shortened"] == 0
    (few,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder, max_examples=4)
    assert few["examples"] == 4


def test_the_command_line(folder):
    """It shows the counts and the first prompt, and says where MMLU comes from."""
    run = lambda *words: run_script("data/tasks/mmlu.py", *words, cwd=folder)
    shown = run("--data", ".")
    assert shown.startswith("9 questions in 2 of the 57 subjects")
    assert shown.strip().endswith(ASKED)
    assert "huggingface.co/datasets/cais/mmlu" in run("--help").replace("\n", "")
    with pytest.raises(SystemExit, match="^error: .*nowhere"):
        run("--data", "nowhere")


@needs_test_data
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="needs SMOLLM2=FOLDER")
def test_logits_are_those_of_transformers():
    """Ten real questions of five subjects, 5 shots: transformers' logits of the letters, fp32."""
    transformers = pytest.importorskip("transformers")
    where, questions = os.environ["SMOLLM2"], TEST_DATA / "data/mmlu"
    tokenizer, ours = load_tokenizer(where), from_pretrained(where, "none", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    library = transformers.AutoTokenizer.from_pretrained(where)
    encode = lambda text: library(text, add_special_tokens=False).input_ids
    tests = {subject: some[:10] for subject, some in mmlu.read(questions, "test").items()}
    for subject, shots in mmlu.read_shots(questions, tests).items():
        some = tests[subject]
        prompts = [mmlu.encode(subject, shots, q, tokenizer, 2048)[0] for q in some]
        letters = letter_ids(tokenizer, mmlu.prompt(subject, shots, some[0]))
        (logits,) = choice_logits(SharedBase([ours]), prompts, letters, 4)
        for q, row in zip(some, logits, strict=True):
            ids = encode(mmlu.prompt(subject, shots, q))
            with torch.no_grad():
                last = theirs(torch.tensor([[tokenizer.bos_id, *ids]])).logits[0, -1]
            expected = last[[encode(f"Answer: {letter}")[-1] for letter in "ABCD"]]
            torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)


def test_mmlu_before_and_after_instructions(base_folder, folder, tokenizer, tmp_path, capsys):
    """Training is on --instructions, the score MMLU's; --eval_only gives the same again."""
    path = tmp_path / "some.json"
    records = [{"instruction": f"Say {i}", "output": "A B C" * (i < 30)} for i in range(31)]
    path.write_text(json.dumps(records))
    common = dict(base=str(base_folder), data=str(folder), task="mmlu", quant="none", device="cpu")
    common |= dict(batch_size=4, sequence_len=300)
    out = str(tmp_path / "out")
    learns = dict(reduction=4, rank=4, max_iters=3, instructions=str(path))
    result = train.main(TrainConfig(out_dir=out, **learns, **common))
    assert f"{path}: 1 of 31 records left out: each has an empty" in capsys.readouterr().out
    assert result["examples"] == 9 and 0 <= result["accuracy_before"] <= 1
    scores = dict(out_dir=str(tmp_path / "eval"), side=out, eval_only=True)
    again = train.main(TrainConfig(**scores, **common))
    assert again["accuracy"] == result["accuracy_after"] and "loss" not in again
    base = from_pretrained(base_folder, "none", torch.float32)
    (before,) = mmlu.evaluate(SharedBase([base]), tokenizer, folder, sequence_len=300)
    assert before["accuracy"] == result["accuracy_before"]
    with pytest.raises(InputError, match="--task mmlu trains on --instructions"):
        train.main(TrainConfig(out_dir=str(tmp_path / "no"), **common))
