"""Tokenizers, templates, benchmarks and instructions: what each reader must refuse, and why."""

import json
import time

import pytest
import torch
from helpers import FIXTURES, change, copy, refused, small_base
from samples import GLUE_LINES, put, released_state
from mutants import dump

from data.tasks import glue, instruct, mt_bench
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer
from qst import import_released

TOKENIZERS = FIXTURES / "tokenizers"
ALPACA = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [
    "two", -2, [1, "2"], [[1]], 1e300, {"content": ["x"]}, True, [2**64]
])
def test_ends_that_are_no_ids(file, value, tmp_path):
    """A token or an id of another type, or out of range, is refused by its file and field."""
    folder = copy(TOKENIZERS / "qwen2", tmp_path)
    field = "eos_token" if file == "tokenizer_config.json" else "eos_token_id"
    (folder / file).touch()
    (folder / file).write_bytes((folder / file).read_bytes() or b"{}")
    path = change(folder / file, **{field: value})
    assert field in refused(load_tokenizer, folder, named=str(path))


@pytest.mark.parametrize("named, broken", [
    ("model.vocab['!']", put("model", "vocab", "!", value=0.5)),
    ("same id", put("model", "vocab", "!", value=7)),
    ("model.vocab['!']", put("model", "vocab", "!", value=-1)),
    ("merge 1", put("model", "merges", 0, value=7)),
    ("merge 1", put("model", "merges", 0, value=[["a"], {}])),
    ("ignore_merges", put("model", "ignore_merges", value="no")),
    ("unk_token", put("model", "unk_token", value=[])),
    ("added_tokens", put("added_tokens", value={"a": 1})),
    ("added_tokens", put("added_tokens", 0, value="x")),
    ("content", put("added_tokens", 0, "content", value="")),
    ("special", put("added_tokens", 0, "special", value="no")),
    ("contradicts another", put("added_tokens", 0, "id", value=5)),
    ("use_regex", put("pre_tokenizer", "pretokenizers", 1, "use_regex", value=10**9)),
    ("letters", put("added_tokens", 4, "content", value="a" * 10**6)),
])
def test_a_tokenizer_of_other_types(named, broken, tmp_path):
    """Ids are different whole numbers, merges pairs of tokens, and no setting is taken as true."""
    folder = copy(TOKENIZERS / "qwen2", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    broken(spec)
    (folder / "tokenizer.json").write_bytes(dump(spec))
    assert named in refused(load_tokenizer, folder, named=str(folder))


def test_merges_that_are_cut_off(tmp_path):
    """Tokens that the rest of merges.txt would make are not taken for special tokens."""
    folder = copy(TOKENIZERS / "opt", tmp_path)
    text = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(text[: len(text) // 2]), encoding="utf-8")
    assert "has no merge" in refused(load_tokenizer, folder, named=str(folder / "merges.txt"))


def test_a_tokenizer_larger_than_its_model(tmp_path):
    """An id without an embedding would be an index out of range, hours later."""
    folder = copy(TOKENIZERS / "qwen2", tmp_path)
    size = load_tokenizer(folder).vocab_size
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    load_tokenizer(folder)
    change(folder / "config.json", vocab_size=size - 1)
    assert "vocab_size" in refused(load_tokenizer, folder, named=str(folder))
    change(folder / "config.json", vocab_size=size, eos_token_id=size)
    assert "vocab_size" in refused(load_tokenizer, folder, named=str(folder))


def test_a_sentencepiece_piece_that_is_no_text(tiny_model, tmp_path):
    """A piece that is not UTF-8, and a file that is empty, are refused by the file's name."""
    path, content = tmp_path / "tokenizer.model", (tiny_model / "tokenizer.model").read_bytes()
    for text in (content.replace("é".encode(), b"\xff\xff"), b"", content[: len(content) // 2]):
        path.write_bytes(text)
        refused(load_tokenizer, tmp_path, named=str(path))


@pytest.mark.parametrize("template", [
    7, {"a": "b"}, ["x"], [{"name": ["default"], "template": "x"}], [{}]
])
def test_a_chat_template_of_other_types(template, tmp_path):
    """A template is a text, or a list of named ones."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template}))
    refused(chat.load_template, tmp_path, named=str(path))


# --------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("rating", ["nan", "inf", "-1", "5.01", "1e0", "٣", "1_0", ""])
def test_ratings_out_of_range(rating, tmp_path):
    """STS-B's ratings are numbers from 0 to 5; Python's `float` reads more than that."""
    rows = [GLUE_LINES["stsb"][0], GLUE_LINES["stsb"][1].replace("5.000", rating)]
    (tmp_path / "dev.tsv").write_text("\n".join(rows))
    refused(glue.read, tmp_path / "dev.tsv", glue.FORMS["stsb"], named="line 2")


@pytest.mark.parametrize("corpus, ids", [
    ("", ""), (GLUE_LINES["mrpc"][0], "7\t8"), ("a\tb\n1\t2", "2"),
    ("\n".join(GLUE_LINES["mrpc"]), "")
])
def test_mrpc_without_examples(corpus, ids, tmp_path):
    """A corpus that holds none of the pairs that its list names is refused."""
    (tmp_path / "msr_paraphrase_train.txt").write_text(corpus)
    (tmp_path / "mrpc_dev_ids.tsv").write_text(ids)
    refused(glue.read, tmp_path / "dev.tsv", glue.FORMS["mrpc"], named=str(tmp_path))
    assert not list(tmp_path.glob("*dev.tsv")) and not list(tmp_path.glob("train.tsv"))


def tree(**reply):
    reply = dict(role="assistant", text="a") | reply
    return {"prompt": {"role": "prompter", "text": "q", "replies": [reply]}}


RECORDS = {
    "known role (line 1: ['user'])": [{"messages": [{"role": ["user"], "content": "x"}]}],
    "input or context that is not text (line 1: 0)": [ALPACA | {"input": 0}],
    "not text (line 1: [1])": [{"messages": [{"role": "user", "content": "x", "input": [1]}]}],
    '"rank" that is not a number': [tree(rank=[1])],
    '"deleted" that is not true or false (line 1: \'no\')': [tree(deleted="no")],
    '"replies"': [{"prompt": {"role": "prompter", "text": "q", "replies": {"a": 1}}}],
    '"tree_state"': [{"prompt": {"role": "prompter", "text": "q"}, "tree_state": ["x"]}],
}


@pytest.mark.parametrize("told", RECORDS)
def test_records_of_other_types(told, tmp_path):
    """Roles, ids, ranks and flags may be anything; no message is lost, or taken, because of it."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS[told])))
    assert told in refused(instruct.read_instructions, path, named=str(path))


def test_halves_of_surrogate_pairs(tmp_path):
    """JSON can spell half a character, and web texts have it; what is read can be shown."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"instruction": "a\ud800", "input": "\udfff", "output": "b\udc00b"}))
    ((one,), _) = instruct.read_instructions(path)
    assert [m["content"] for m in one] == ["a?", "b?b"] and one[0]["input"] == "?"


def test_a_long_conversation_is_read_in_no_time(tmp_path):
    """A hundred thousand messages before the first question are cut off at once."""
    answer, question = {"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}
    turns = [answer] * 200_000 + [question, answer]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": turns}))
    start = time.monotonic()
    assert len(instruct.read_instructions(path)[0][0]) == 2
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("record", [
    {"question_id": [1]}, {"question_id": True}, {"question_id": "\ud800"}, {"turns": [1]},
    {"category": []}, {"question_id": 7},
])
def test_questions_of_other_types(record, tmp_path):
    """A question's id is a number or a text, of no other question, and its turns are texts."""
    good = {"question_id": 7, "category": "writing", "turns": ["q"]}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"question_id": 8} | record))
    refused(mt_bench.read_questions, path, named="line 2")


@pytest.mark.parametrize("line", [
    '{"question_id": [1], "model_id": "me", "choices": 1}', '{"question_id": ' + "[" * 99999, "7"
])
def test_answers_of_other_types(line, tmp_path):
    """What is not an answer is refused, and left as it is."""
    path = tmp_path / "me.jsonl"
    path.write_text(line + "\n")
    refused(mt_bench.answered, path, "me", named=str(path))
    assert path.read_text() == line + "\n"


# --------------------------------------------------------------------------------------
# The authors' files


@pytest.mark.parametrize("file, content", [
    ("qst_z_parameters.pt", 7), ("qst_z_parameters.pt", [torch.zeros(8)]),
    ("qst_z_parameters.pt", {0: torch.zeros(8)}),
    ("qst_z_parameters.pt", {str(i): torch.zeros(8 + i) for i in range(3)}),
    ("lm_head_z_path.pt", {"a": 1}),
    ("qst_z_parameters.pt", {str(i): torch.zeros(0) for i in range(3)}),
    ("lm_head_z_path.pt", torch.full((32,), torch.nan)),
    ("lm_head_z_path.pt", torch.zeros(32, dtype=torch.uint8)),
    ("qst_downsample_parameters.pt", {"0.adapter_A.weight": torch.tensor(1.0)}),
])
def test_released_files_of_other_types(file, content, tmp_path):
    """Each of the six files may hold anything; what is no checkpoint is refused by the folder."""
    base = small_base()
    for name, state in released_state(base, 4, 3).items():
        torch.save(content if name == file else state, tmp_path / name)
    refused(import_released, base, tmp_path, named=str(tmp_path))
