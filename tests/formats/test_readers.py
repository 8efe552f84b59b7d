"""What comes from outside loads, or is refused in one sentence that names the file and the field.

Here is what each reader must refuse, and why; fuzzing/fuzz.py looks for what nobody has thought of.
"""

import json
import os
import time

import pytest
from helpers import FIXTURES, change, copy, is_a_sentence, refused
from mutants import RAW, VALUES, dump

import model
from data import InputError
from data.formats.fields import shown
from data.formats.files import read_json, read_records
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained


# --------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("name", ["llama_gqa", "llama_rope3", "mistral", "opt_350m"])
def test_every_field_of_a_config_by_every_type(name, tmp_path):
    """A value of any type, in the place of any field, is read as what it is, or refused by name."""
    folder = copy(FIXTURES / name, tmp_path)
    path = folder / "config.json"
    good = json.loads(path.read_text())
    before = vars(model.read_config(folder))
    for field in good:
        for value in VALUES:
            path.write_bytes(dump(good | {field: value}))
            try:
                after = vars(model.read_config(folder))
            except InputError as error:
                assert is_a_sentence(str(error), str(path)), error
                continue
            for key in before:
                kinds = {type(after[key]), type(before[key])}
                assert len(kinds) == 1 or not kinds & {bool, str}, key
                assert list not in kinds or key in ("bos_id", "eos_id"), key


@pytest.mark.parametrize("field, value", [
    ("num_attention_heads", 4.0), ("num_attention_heads", 5), ("num_key_value_heads", 3),
    ("vocab_size", "x"),
    ("hidden_size", 0), ("num_hidden_layers", -1), ("head_dim", 7), ("rope_theta", 0),
    ("rope_theta", "1e4"),
    ("tie_word_embeddings", "false"), ("eos_token_id", 48), ("eos_token_id", [2, -2]),
    ("bos_token_id", True),
    ("rms_norm_eps", 0), ("quantization_config", "x"), ("sliding_window", 0),
    ("model_type", ["llama"]),
    ("rope_scaling", {"type": "linear", "factor": 0}), ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": ["linear"]}), ("rope_scaling", {"partial_rotary_factor": 0.5}),
])
def test_a_config_that_makes_no_sense(field, value, tmp_path):
    """Sizes that do not fit, other types, and ids out of the vocabulary are refused by name."""
    folder = copy(FIXTURES / "llama_linear_bias_tied", tmp_path)
    path = change(folder / "config.json", **{field: value})
    text = refused(model.read_config, folder, named=str(path))
    assert field in text or "rope_parameters" in text


def test_layers_are_counted_before_one_is_built(tmp_path, monkeypatch):
    """A config.json with more layers than there are tensors for costs no time."""
    folder = copy(FIXTURES / "llama_rope3", tmp_path)
    monkeypatch.setattr(model, "Transformer", lambda config: pytest.fail("built"))
    for n, told in ((900, "lacks layers.2"), (1, "has layers.1"), (1000000, "num_hidden_layers")):
        change(folder / "config.json", num_hidden_layers=n)
        assert told in refused(from_pretrained, folder, named=str(folder))


# --------------------------------------------------------------------------------------
# Any file


READ = {  # file: (a folder that has it, the function that reads it there)
    "config.json": ("llama_gqa", from_pretrained),
    "model.safetensors": ("mistral", from_pretrained),
    "model.safetensors.index.json": ("llama_gqa", from_pretrained),
    "model-00002-of-00005.safetensors": ("llama_gqa", from_pretrained),
    "pytorch_model.bin": ("opt_pre", from_pretrained),
    "tokenizer.model": ("tokenizers/opt", load_tokenizer),
    "tokenizer.json": ("tokenizers/qwen2", load_tokenizer),
    "merges.txt": ("tokenizers/opt", load_tokenizer),
    "tokenizer_config.json": ("tokenizers/qwen2", load_tokenizer),
    "vocab.json": ("tokenizers/opt", load_tokenizer),
    "generation_config.json": ("tokenizers/opt", load_tokenizer),
    "chat_template.jinja": ("mistral", chat.load_template),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_is_refused(name, tmp_path):
    """A device never ends, a pipe never begins, a folder is no file; a link to a file is one."""
    source, read = READ[name]
    folder = copy(FIXTURES / source, tmp_path)
    path, kept = folder / name, tmp_path / "elsewhere"
    if path.exists():
        path.rename(kept)
        path.symlink_to(kept)
        read(folder)
        path.unlink()
    for make in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path), path.mkdir):
        make()
        refused(read, folder, named=str(path))
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", READ)
def test_a_pointer_of_git_lfs(name, tmp_path):
    """What a clone without git-lfs leaves in a file's place is told from a damaged file."""
    source, read = READ[name]
    path = copy(FIXTURES / source, tmp_path) / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n")
    told = refused(read, path.parent, named=f"{path} is a git-lfs pointer")
    assert "run `git lfs pull`" in told


@pytest.mark.parametrize("text, told", [
    ("[" * 100000, "nested too deep"), ('{"a": NaN}', "NaN is not a JSON number"),
    ('{"a": 1e999}', "too large"),
    ('{"a": -Infinity}', "Infinity"), ('{"a": 1, "a": 2}', "'a' occurs twice"),
    ("[1]", "not a JSON object"),
    ('{"a": ' + "1" * 5000 + "}", "digits"), ("\xff", "utf-8"),
])
def test_json_that_is_none(text, told, tmp_path):
    """JSON is what the standard says; Python's reader takes more, and ends in other errors."""
    path = tmp_path / "some.json"
    path.write_bytes(text.encode("latin-1"))
    assert told in refused(read_json, path, named=str(path))


def test_a_name_that_occurs_twice_is_found_in_no_time(tmp_path):
    """The last name of 100,000 occurs twice: the search for it takes no quadratic time."""
    path, names = tmp_path / "some.json", [*range(100_000), 99_999]
    path.write_text("{" + ", ".join(f'"{name}": 1' for name in names) + "}")
    start = time.monotonic()
    assert "'99999' occurs twice" in refused(read_json, path, named=str(path))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content, told", [
    (b"PAR1\x15\x04", "is Parquet: save it as JSON or CSV"), (b"PK\3\4", "a zip or .xlsx"),
    (b"\x1f\x8b\x08", "a gzip archive: unpack it"), ("[]".encode("utf-16"), "save it as UTF-8"),
    (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    (b'{"a": 1}\n\n{"a": 1},\n', "line 3 is not JSON (Extra data: column 9 (char 8))"),
    (b'{"a": 1,\n"b": 2,}\n', "as a whole is not JSON"), (b"\xe9", "is not UTF-8 text"),
])
def test_data_of_another_form(content, told, tmp_path):
    """A newcomer is told what a file is, what to do with it, and where its first mistake is."""
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    assert told in refused(read_records, path, named=str(path))


def test_an_object_over_several_lines(tmp_path):
    """It is one record, like a list of one; a record on each line is not mistaken for it."""
    path, record = tmp_path / "some.json", {"a": {"b": 1}, "c": ["}"]}
    for text, where in (
        (json.dumps(record, indent=1), ["entry 1"]), (json.dumps([record]), ["entry 1"]),
        ("\ufeff\r\n" + json.dumps(record) + "\r\n" + json.dumps(record), ["line 2", "line 3"]),
    ):
        path.write_bytes(text.encode())
        assert read_records(path) == [(place, record) for place in where]


def test_messages_are_short():
    """Of a value from a file a message shows 80 characters, none of which moves the cursor."""
    values = [v for v in VALUES if not str(v).startswith(RAW)]
    for value in [*values, "\x1b[2J" * 9, {"a": "b" * 10**6}]:
        assert len(shown(value)) <= 80 and shown(value).isprintable()
