"""data/mmlu.py, data/text.py and the logits of next tokens: files, prompts, batches, accuracy.

With transformers, SmolLM2 (its folder in the environment variable SMOLLM2) and the real questions:
our logits of the answers are those of transformers.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import FIXTURES, ROOT, TEST_DATA, small_base, small_config

import train
from data import choice_logits, mmlu, text
from data.hub import save_pretrained
from data.tokenizer import load_tokenizer
from data import IGNORE_INDEX
from model import Transformer, from_pretrained
from qst import QST
from quant import InputError
from side import SideConfig

ROW = '"Is it ""1,5"", or\ntwo lines?",one,"two, really",3,None,{}\n'
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
            (root / split / f"{subject}_{split}.csv").write_text(ROW.format("D") + "".join(rows))
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
    )  # fmt: skip
    return load_tokenizer(path.parent)


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory):
    """A model's folder, with that tokenizer and random weights."""
    path = tmp_path_factory.mktemp("base")
    (path / "tokenizer.model").write_bytes(tokenizer.model.serialized_model_proto())
    torch.manual_seed(0)
    save_pretrained(Transformer(small_config(vocab_size=tokenizer.vocab_size, max_positions=900)), path)
    return path


# --------------------------------------------------------------------------------------
# Files and prompts


def test_a_folder_is_read_to_the_letter(folder):
    """Quotes, commas, line breaks and "None" come through; data/ may be given or stand around."""
    questions = mmlu.read(folder, "test")
    assert {subject: len(qs) for subject, qs in questions.items()} == {"anatomy": 3, "world_religions": 6}
    first, second, *_ = questions["world_religions"]
    assert first == mmlu.Question('Is it "1,5", or\ntwo lines?', ("one", "two, really", "3", "None"), 3)
    assert second == mmlu.Question("Q1", ("a1", "b", "c", "d"), 1)
    assert mmlu.read(folder / "data", "test") == questions


@pytest.mark.parametrize("row, told", [
    ("a,b,c\n", "line 6 has 3 columns"), ("a,b,c,d,e,E\n", "line 6 has the answer 'E'"),
    ("a,b,c,d,e, A\n", "line 6 has the answer ' A'"), ('a,b,c,d,e,f,"A', "line 6 is not CSV"),
    ("a,b,c,d,e,AB\n", "line 6 has the answer 'AB'"), ("a,b,c,d,e,\n", "line 6 has the answer ''"),
])  # fmt: skip
def test_a_bad_row_is_refused_with_its_line(row, told, tmp_path):
    """The line is that of the file, also behind a field of several lines and a blank line."""
    (tmp_path / "test").mkdir()
    path = tmp_path / "test/anatomy_test.csv"
    path.write_text(ROW.format("A") + ROW.format("B") + "\n" + row)
    with pytest.raises(InputError, match=f"anatomy_test.csv, {told}"):
        mmlu.read(tmp_path, "test")


def test_a_folder_that_is_not_mmlu(tmp_path, folder):
    with pytest.raises(InputError, match="--download"):
        mmlu.read(tmp_path, "test")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/cooking_test.csv").write_text(ROW.format("A"))
    with pytest.raises(InputError, match="cooking_test.csv is of none of MMLU's 57 subjects"):
        mmlu.read(tmp_path, "test")
    (tmp_path / "test/cooking_test.csv").rename(tmp_path / "test/virology_test.csv")
    with pytest.raises(InputError, match="virology_dev.csv has 0 questions, but 5 shots"):
        mmlu.read_shots(folder, mmlu.read(tmp_path, "test"), 5)
    (tmp_path / "test/virology_test.csv").write_text("\n")
    with pytest.raises(InputError, match="virology_test.csv holds no questions"):
        mmlu.read(tmp_path, "test")


def test_categories():
    """57 subjects in four categories; no subject is in two."""
    sizes = {name: len(subjects.split()) for name, subjects in mmlu.CATEGORIES.items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(mmlu.CATEGORY) == 57


def test_prompt_is_hendrycks(folder):
    """The wording is hendrycks/test's, with its two spaces before the subject."""
    shots = mmlu.read(folder, "dev")["world_religions"]
    question = mmlu.Question("Who?", ("I", "you", "he", "she"), 0)
    asked = "Who?\nA. I\nB. you\nC. he\nD. she\nAnswer:"
    assert mmlu.prompt("world_religions", [], question) == HEADING + asked
    told = f"{HEADING}{ASKED} D\n\nQ1\nA. a1\nB. b\nC. c\nD. d\nAnswer: B\n\n{asked}"
    assert mmlu.prompt("world_religions", shots[:2], question) == told


def test_a_long_prompt_loses_shots_from_the_end(folder, tokenizer):
    """It keeps as many as there is room for; the question is whole, until it does not fit alone."""
    shots = mmlu.read(folder, "dev")["anatomy"]
    ids = lambda kept: [
        tokenizer.bos_id, *tokenizer.encode(mmlu.prompt("anatomy", shots[:kept], shots[3]))
    ]  # fmt: skip
    encode = lambda room: mmlu.encode("anatomy", shots, shots[3], tokenizer, room)
    assert encode(10_000) == (ids(5), 5) and encode(len(ids(5))) == (ids(5), 5)
    for kept in (4, 2, 0):
        assert encode(len(ids(kept + 1)) - 1) == (ids(kept), kept) == encode(len(ids(kept)))
    assert encode(20) == (ids(0)[:1] + ids(0)[-19:], -1)


# --------------------------------------------------------------------------------------
# The tokens of the answers


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
        spec, path, used = json.loads((tmp_path / name / "vocab.json").read_text()), tmp_path / name / "vocab.json", []
        vocab = spec
        with open(tmp_path / name / "merges.txt", "a") as file:
            file.writelines(" ".join(pair) + "\n" for pair in new)
    start = max([*vocab.values(), *used]) + 1
    vocab |= {"Ġ" + letter: start + i for i, (_, letter) in enumerate(new)}
    path.write_text(json.dumps(spec))
    return load_tokenizer(tmp_path / name), list(range(start, start + 4))


@pytest.mark.parametrize("name", ["smollm2", "opt", "llama3", "qwen2"])
def test_answers_of_byte_level_bpe(name, tmp_path, folder):
    """They are the tokens with the space in front; where these are two tokens, that is said."""
    prompt = mmlu.prompt("anatomy", [], mmlu.read(folder, "dev")["anatomy"][0])
    with pytest.raises(InputError, match='" A" one token'):
        mmlu.answer_ids(load_tokenizer(FIXTURES / "tokenizers" / name), prompt)
    tokenizer, ids = byte_level(tmp_path, name)
    assert mmlu.answer_ids(tokenizer, prompt) == ids


def test_answers_of_sentencepiece(tokenizer):
    """They are the tokens behind a text, and not what " A" alone begins with."""
    ids = mmlu.answer_ids(tokenizer, HEADING + ASKED)
    assert [tokenizer.token_bytes[i] for i in ids] == [b" A", b" B", b" C", b" D"]
    assert tokenizer.encode(HEADING + ASKED + " C") == [*tokenizer.encode(HEADING + ASKED), ids[2]]
    assert len(tokenizer.encode(" A")) == 2


# --------------------------------------------------------------------------------------
# Logits and accuracy


@pytest.mark.parametrize("family, quant, side", [
    ("llama", "nf4", False), ("opt", "none", False), ("llama", "nf4", True), ("opt", "nf4", True),
])  # fmt: skip
@pytest.mark.parametrize("shared", [0, 1, 17])
def test_batched_logits_are_those_of_one_by_one(family, quant, side, shared):
    """In any batch, behind a common beginning of any length, and in the prompts' order."""
    model = small_base(quant, family=family, n_kv_head=2 if family == "llama" else 4)
    if side:
        model = QST(model, SideConfig(reduction=4, rank=2))
        with torch.no_grad():
            model.side.alpha.fill_(0.4)
    draw = torch.Generator().manual_seed(1)
    row = lambda size: torch.randint(3, 61, (size,), generator=draw).tolist()
    prefix = row(shared)
    prompts = [prefix + row(size) for size in (9, 3, 20, 1, 14, 3, 8)]
    if shared == 17:
        prompts.append(prefix)  # nothing but what all have
    with torch.no_grad():
        one_by_one = torch.cat([model.head(model.hidden(torch.tensor([p])))[:, -1] for p in prompts])
    for batch_size in (1, 3, 100):
        logits = choice_logits(model, prompts, None, batch_size)
        torch.testing.assert_close(logits, one_by_one, atol=1e-5, rtol=1e-5)
    chosen = choice_logits(model, prompts, [7, 4, 60], 3)
    torch.testing.assert_close(chosen, one_by_one[:, [7, 4, 60]], atol=1e-5, rtol=1e-5)
    assert chosen.dtype == torch.float32 and not chosen.requires_grad
    with pytest.raises(InputError, match="longer than the model's 64 positions"):
        choice_logits(model, [[5] * 65], None, 1)


def test_accuracy_counts_every_question_the_same(folder, tokenizer, monkeypatch):
    """Over all, by category and by subject; prompts that were too long are counted."""
    base = small_base("none", vocab_size=tokenizer.vocab_size, max_positions=900)
    seen = {}

    def always_d(model, prompts, choices, batch_size, desc):
        seen[desc] = prompts
        return torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(len(prompts), 4)

    monkeypatch.setattr(mmlu, "choice_logits", always_d)
    result = mmlu.evaluate(base, tokenizer, folder)
    assert result == {
        "accuracy": 3 / 9, "accuracy_by_category": {"humanities": 2 / 6, "other": 1 / 3},
        "accuracy_by_subject": {"anatomy": 1 / 3, "world_religions": 2 / 6}, "examples": 9, "subjects": 2,
        "shortened": 0, "cut": 0,
    }  # fmt: skip
    lengths = sorted(len(p) for prompts in seen.values() for p in prompts)
    result = mmlu.evaluate(base, tokenizer, folder, sequence_len=lengths[3])
    assert (result["shortened"], result["cut"]) == (sum(n > lengths[3] for n in lengths), 0)
    result = mmlu.evaluate(base, tokenizer, folder, sequence_len=40)
    assert (result["shortened"], result["cut"]) == (0, 9)
    base.config.max_positions = 41
    mmlu.evaluate(base, tokenizer, folder)
    assert {len(p) for prompts in seen.values() for p in prompts} == {41}


def test_accuracy_of_unequal_categories():
    """A category's accuracy is over its questions, not the mean of its subjects."""
    right = {"anatomy": [True], "virology": [False] * 3, "astronomy": [True, True, False]}
    result = mmlu.summary(right)
    assert result["accuracy"] == 3 / 7 and result["accuracy_by_category"] == {"STEM": 2 / 3, "other": 1 / 4}


def test_a_sample_is_fixed_and_keeps_all_in_order(folder):
    tests = mmlu.read(folder, "test")
    drawn = mmlu.draw(tests, 5)
    assert sum(map(len, drawn.values())) == 5 and drawn == mmlu.draw(tests, 5)
    for subject, questions in drawn.items():
        assert [q for q in tests[subject] if q in questions] == questions
    assert mmlu.draw(tests, 0) == tests == mmlu.draw(tests, 99)


def test_evaluation_end_to_end(folder, tokenizer):
    """A real model's accuracy is that of its own logits, without shots and of a sample too."""
    base = small_base("nf4", vocab_size=tokenizer.vocab_size, max_positions=900)
    result = mmlu.evaluate(base, tokenizer, folder, batch_size=2)
    right = 0
    for subject, questions in mmlu.read(folder, "test").items():
        shots = mmlu.read(folder, "dev")[subject]
        for q in questions:
            prompt = mmlu.prompt(subject, shots, q)
            logits = base(torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]]))[0, -1]
            right += logits[mmlu.answer_ids(tokenizer, prompt)].argmax().item() == q.answer
    assert result["accuracy"] == right / 9 and result["shortened"] == 0
    assert mmlu.evaluate(base, tokenizer, folder, shots=0, max_examples=4)["examples"] == 4


def test_the_command_line(folder):
    """It shows the counts and the first prompt, and says where MMLU comes from."""
    run = lambda *words: subprocess.run(
        [sys.executable, str(ROOT / "data/mmlu.py"), *words], capture_output=True, text=True, cwd=folder
    )
    shown = run("--data", ".").stdout
    assert "    6 world_religions (humanities)" in shown and "9 questions in 2 of the 57" in shown
    assert shown.strip().endswith(ASKED)
    assert "huggingface.co/datasets/cais/mmlu" in run("--help").stdout.replace("\n", "")
    wrong = run("--data", "nowhere")
    assert wrong.returncode and wrong.stderr.startswith("error: ") and "nowhere" in wrong.stderr


@pytest.mark.skipif(
    not (TEST_DATA.is_dir() and os.environ.get("SMOLLM2")), reason="needs SMOLLM2=FOLDER and the questions"
)
def test_logits_are_those_of_transformers():
    """Ten real questions of five subjects, 5 shots: transformers' logits of the letters, fp32."""
    transformers = pytest.importorskip("transformers")
    where, questions = os.environ["SMOLLM2"], TEST_DATA / "data/mmlu"
    tokenizer, ours = load_tokenizer(where), from_pretrained(where, "none", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    library = transformers.AutoTokenizer.from_pretrained(where)
    encode = lambda text: library(text, add_special_tokens=False).input_ids
    tests = {subject: some[:10] for subject, some in mmlu.read(questions, "test").items()}
    for subject, shots in mmlu.read_shots(questions, tests, 5).items():
        some = tests[subject]
        logits, _ = mmlu.answer_logits(ours, tokenizer, subject, shots, some, 2048, 4)
        for q, row in zip(some, logits):
            ids = encode(mmlu.prompt(subject, shots, q))
            with torch.no_grad():
                last = theirs(torch.tensor([[tokenizer.bos_id, *ids]])).logits[0, -1]
            expected = last[[encode(f"Answer: {letter}")[-1] for letter in "ABCD"]]
            torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------
# Plain text


def test_windows_of_a_text(tokenizer, tmp_path):
    """The windows are the whole text's ids, in order; each predicts all of its ids but the first."""
    path = tmp_path / "text.txt"
    path.write_text("Is it one, or two?\n\nIt is two. " * 9)
    ids = tokenizer.encode(path.read_text())
    windows = text.read(path, tokenizer, 15)
    assert sum((w for w, _ in windows), []) == ids
    assert {len(w) for w, _ in windows[:-1]} == {15} and 1 < len(windows[-1][0]) <= 15
    assert all(t == [*w[1:], IGNORE_INDEX] for w, t in windows)
    assert text.read(path, tokenizer, 15, 2) == windows[:2]
    left_over = text.read(path, tokenizer, len(ids) - 1)  # one id, which nothing can predict
    assert [len(w) for w, _ in left_over] == [len(ids) - 1]


def test_a_text_that_cannot_be_read(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(InputError, match="text.txt is missing"):
        text.read(path, tokenizer, 15)
    path.write_text("")
    with pytest.raises(InputError, match="text.txt has less than two tokens"):
        text.read(path, tokenizer, 15)
    with pytest.raises(InputError, match="--sequence_len 1"):
        text.read(path, tokenizer, 1)
    with pytest.raises(InputError, match="is a folder: give --data a file of UTF-8 text"):
        text.read(tmp_path, tokenizer, 15)


def test_perplexity():
    """That of a uniform guess is the number of choices."""
    assert text.perplexity(math.log(50)) == pytest.approx(50) and text.perplexity(1e4) == math.inf


# --------------------------------------------------------------------------------------
# As tasks of train.py


def settings(base_folder, data, out, **changes):
    return train.TrainConfig(**dict(
        base=str(base_folder), data=str(data), out_dir=str(out), reduction=4, rank=4, max_iters=3,
        sequence_len=300, batch_size=4, device="cpu", quant="none",
    ) | changes)  # fmt: skip


def test_mmlu_is_scored_before_and_after_instructions(base_folder, folder, tokenizer, tmp_path):
    """Training is on --instructions, the score MMLU's; --eval_only gives the same again."""
    path = tmp_path / "some.json"
    path.write_text(json.dumps([{"instruction": f"Say {i}", "output": "A B C"} for i in range(30)]))
    cfg = settings(base_folder, folder, tmp_path / "out", task="mmlu", instructions=str(path))
    result = train.main(cfg)
    assert result["examples"] == 9 and 0 <= result["accuracy_before"] <= 1
    again = train.main(settings(
        base_folder, folder, tmp_path / "eval", task="mmlu", eval_only=True, side=cfg.out_dir
    ))  # fmt: skip
    assert again["accuracy"] == result["accuracy_after"] and "loss" not in again
    base = from_pretrained(base_folder, "none", torch.float32)
    assert mmlu.evaluate(base, tokenizer, folder, sequence_len=300)["accuracy"] == result["accuracy_before"]
    with pytest.raises(InputError, match="--task mmlu trains on --instructions"):
        train.main(settings(base_folder, folder, tmp_path / "no", task="mmlu"))


def test_perplexity_of_a_file(base_folder, tokenizer, tmp_path):
    """--task text: the perplexity of a base is exp of its mean loss over all windows."""
    path = tmp_path / "some.txt"
    path.write_text("Is it one, or two?\n\nIt is two. " * 40)
    cfg = settings(base_folder, path, tmp_path / "eval", task="text", sequence_len=50, eval_only=True)
    result = train.main(cfg)
    base = from_pretrained(base_folder, "none", torch.float32)
    losses, count = 0.0, 0
    for ids, targets in text.read(path, tokenizer, 50):
        said = base(torch.tensor([ids]))[0].log_softmax(-1)
        losses -= sum(said[i, id].item() for i, id in enumerate(ids[1:]))
        count += len(ids) - 1
    assert result["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-4)
    trained = train.main(replace(cfg, eval_only=False, out_dir=str(tmp_path / "out"), max_iters=20, learning_rate=1e-2))
    assert trained["perplexity_after"] < trained["perplexity_before"]
