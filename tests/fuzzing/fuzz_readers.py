"""What fuzz.py mutates: for each reader small good folders, and a function that reads one.

The function reads as the project does, and looks at what it gives: an AssertionError is a defect.
"""

import functools
import json

import torch
from helpers import FIXTURES, small_base
from samples import GLUE_LINES, MMLU_ROW, oasst_tree, released_state
from fuzz_state import read_state, states

from data import Refused
from data.formats.safetensors import read_header, read_safetensors
from data.run import checkpoint
from data.tasks import glue, instruct, mmlu, mt_bench, text, tiny
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer
from model import from_pretrained, quantize_folder
from qst import QST, import_released
from side import SideConfig

TEXT = "Hello <|im_end|> wörld, 日本 12345\n\n</s>  'tis"


@functools.cache
def base(family="llama", **sizes):
    return small_base(family=family, **sizes)


def read_tensors(folder):
    for read in read_safetensors(folder / "model.safetensors").values():
        read().sum()


def read_model(folder, quant="none"):
    """A model with finite weights, which computes, quantizes and generates."""
    model = from_pretrained(folder, quant, torch.float32)
    for name, tensor in model.named_buffers():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} is not finite"
    ids = model.config.eos_id if isinstance(model.config.eos_id, list) else [model.config.eos_id]
    assert all(id is None or 0 <= id < model.config.vocab_size for id in ids)
    n = min(3, model.config.max_positions)
    model.generate(torch.zeros(1, n, dtype=torch.long), 1)


def read_and_quantize(folder):
    quantize_folder(folder, folder / "out")


def read_tokenizer(folder):
    """A tokenizer whose ids are in range, and a template that frames what someone says."""
    tokenizer = load_tokenizer(folder)
    for special in (False, True):
        ids = tokenizer.encode(TEXT, special)
        assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids)
        assert isinstance(tokenizer.decode(ids), str)
    assert all(type(id) is int and id >= 0 for id in (tokenizer.bos_id, *tokenizer.eos_ids))
    try:
        template = chat.load_template(folder)
        template.encode([{"role": "user", "content": TEXT}], tokenizer)
        template.end_ids(tokenizer)
    except Refused:
        pass
    config = folder / "config.json"
    if config.exists() and (size := json.loads(config.read_text()).get("vocab_size")):
        assert tokenizer.vocab_size <= size and max(tokenizer.eos_ids) < size


def read_side(folder):
    if any(True for _ in base().parameters()):  # a side network that was refused late is in it
        base.cache_clear()
    model = QST.from_side(base(), folder)
    assert all(p.isfinite().all() for p in model.side.state_dict().values())
    model(torch.zeros(1, 3, dtype=torch.long))


def read_signed_side(folder):
    """The same, of someone who has put the right sum on whatever is in the file."""
    true_sum = checkpoint.digest
    checkpoint.digest = lambda *_: read_header(folder / "side.safetensors")[1].get("sha256")
    try:
        read_side(folder)
    finally:
        checkpoint.digest = true_sum


def read_released(folder, family):
    model = import_released(base(family), folder)
    assert all(p.isfinite().all() for p in model.side.state_dict().values())
    model(torch.zeros(1, 3, dtype=torch.long))


def read_glue(folder, task):
    form = glue.FORMS[task]
    for name in ("train.tsv", form.dev):
        for sentences, label in glue.read(glue.files(folder, form) / name, form)[0]:
            assert 0 <= label <= (len(form.labels) - 1 if form.labels else 5), label
            assert all(isinstance(sentence, str) for sentence in sentences)


def read_mmlu(folder):
    for questions in mmlu.read(folder, "test").values():
        assert all(len(q.choices) == 4 and 0 <= q.answer < 4 for q in questions)


@functools.cache
def tokenizer():
    return load_tokenizer(FIXTURES / "tokenizers/llama3")


def read_text(folder):
    text.read(folder / "data.txt", tokenizer(), 16)


def read_instructions(folder):
    for one in instruct.read_instructions(folder / "data.jsonl")[0]:
        assert one[-1]["role"] == "assistant"
        instruct.examples(one, tokenizer(), chat.ChatTemplate(), 64)
        instruct.with_input(one[-2]).encode()


def answer_of(question_id, turns):
    """A line of the answers, as qst.py answer writes it."""
    answer = dict(question_id=question_id, answer_id="1f0c22ab", model_id="me", tstamp=1.0)
    return answer | dict(choices=[{"index": 0, "turns": turns}])


def read_questions(folder):
    for question in mt_bench.read_questions(folder / "data.jsonl"):
        mt_bench.TEMPERATURES.get(question.get("category"))
        json.dumps(answer_of(question["question_id"], question["turns"])).encode()


def read_answers(folder):
    for answer in mt_bench.answered(folder / "data.jsonl", "me"):
        assert answer["model_id"] == "me"


# --------------------------------------------------------------------------------------
# Seeds


def folder_of(path):
    kept = lambda p: p.is_file() and p.name != "expected.npz"
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if kept(p)}


def models(*names):
    return lambda work: [folder_of(FIXTURES / name) for name in names]


def tokenizers(*names):
    return lambda work: [folder_of(FIXTURES / "tokenizers" / name) for name in names]


def sentencepiece(work):
    tiny.train_tokenizer(work / "tokenizer.model")
    return [{"tokenizer.model": (work / "tokenizer.model").read_bytes()}]


def sharded_bin(work):
    """OPT in two files of torch.save, with their index; and in one."""
    tensors = torch.load(FIXTURES / "opt_pre/pytorch_model.bin")
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    found = folder_of(FIXTURES / "opt_pre")
    one, index = dict(found), {"weight_map": {}}
    del found["pytorch_model.bin"]
    for i, half in enumerate(halves):
        torch.save({n: t.clone() for n, t in half.items()}, work / "half")
        found[f"{i}.bin"] = (work / "half").read_bytes()
        index["weight_map"] |= dict.fromkeys(half, f"{i}.bin")
    return [one, found | {"pytorch_model.bin.index.json": json.dumps(index).encode()}]


def settings(work):
    """A tokenizer with all that settings may say of it."""
    files = folder_of(FIXTURES / "tokenizers/qwen2")
    message = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    chatml = "{% for m in messages %}" + message + "{% endfor %}"
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": chatml}
    several = config | {"chat_template": [{"name": "default", "template": chatml}]}
    ends = json.dumps({"bos_token_id": 3, "eos_token_id": [601, 602], "vocab_size": 700}).encode()
    pack = lambda settings: files | {
        "tokenizer_config.json": json.dumps(settings).encode(), "config.json": ends,
        "generation_config.json": ends,
    }
    return [pack(config), pack(several), pack(config) | {"chat_template.jinja": chatml.encode()}]


def sides(work):
    """Side checkpoints of three kinds."""
    found = []
    for changes in (dict(), dict(method="lst"), dict(n_labels=3, task="mnli", standardize=True)):
        torch.manual_seed(0)
        QST(base(), SideConfig(reduction=4, rank=4, **changes)).save_side(work)
        found.append(folder_of(work))
    return found


def released(family):
    def make(work):
        for name, content in released_state(base(family), 4, 3).items():
            torch.save(content, work / name)
        return [folder_of(work)]

    return make


def glue_files(task):
    lines = [GLUE_LINES[task][0], *GLUE_LINES[task][1:] * 3]
    found = {name: "\n".join(lines).encode() for name in ("train.tsv", glue.FORMS[task].dev)}
    return lambda work: [found]


def mrpc(work):
    rows = [f"{i % 2}\t{i}\t{i + 1}\ta{i}\tb{i}" for i in range(9)]
    corpus = "\r\n".join([GLUE_LINES["mrpc"][0], *rows]).encode()
    return [{"msr_paraphrase_train.txt": corpus, "mrpc_dev_ids.tsv": b"3\t4\n8\t9\n"}]


def lines(*records):
    return {"data.jsonl": b"\n".join(json.dumps(record).encode() for record in records) + b"\n"}


def instructions(work):
    """One file of each format."""
    turn = lambda role, text: {"role": role, "content": text}
    said = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    human = [{"from": who, "value": what} for who, what in (("human", "q"), ("gpt", "a"))]
    tree = oasst_tree()
    alpaca = {"instruction": "q", "input": "i", "output": "a"}
    return [
        lines(alpaca, alpaca), lines({"instruction": "q", "context": "c", "response": "a"}),
        lines({"messages": said}, {"messages": said[1:]}), lines({"conversations": human}),
        lines(tree),
        {"data.jsonl": json.dumps([alpaca] * 2).encode()},
    ]


QUESTION = {"question_id": 81, "category": "writing", "turns": ["Who?", "And where?"]}
QUESTIONS = QUESTION, QUESTION | {"question_id": "82"}
MMLU = {f"{split}/anatomy_{split}.csv": (MMLU_ROW.format("D") * 3).encode()
        for split in ("dev", "test")}
ANSWERS = lines(*[answer_of(i, ["a", "b"]) for i in (81, 82)])
READERS = {  # name: (work folder -> seeds, each {file: bytes}; function that reads a folder)
    "safetensors": (models("llama_rope3"), read_tensors),
    "config LLaMA": (models("llama_rope3", "llama_linear_bias_tied", "mistral"), read_model),
    "config OPT": (models("opt_350m"), read_model),
    "index.json": (models("llama_gqa"), read_model),
    "torch.save": (sharded_bin, read_model),
    "bitsandbytes": (models("bnb_llama"), lambda folder: read_model(folder, "nf4")),
    "quantize": (models("llama_rope3", "opt_350m"), read_and_quantize),
    "tokenizer.json": (tokenizers("llama3", "qwen2", "smollm2"), read_tokenizer),
    "vocab+merges": (tokenizers("opt"), read_tokenizer),
    "tokenizer.model": (sentencepiece, read_tokenizer),
    "tokenizer settings": (settings, read_tokenizer),
    "side": (sides, read_side),
    "side, signed": (sides, read_signed_side),
    "state": (states, read_state),
    "state, signed": (states, lambda folder: read_state(folder, signed=True)),
    "released LLaMA": (released("llama"), lambda folder: read_released(folder, "llama")),
    "released OPT": (released("opt"), lambda folder: read_released(folder, "opt")),
    "RTE": (glue_files("rte"), lambda folder: read_glue(folder, "rte")),
    "STS-B": (glue_files("stsb"), lambda folder: read_glue(folder, "stsb")),
    "MRPC": (mrpc, lambda folder: read_glue(folder, "mrpc")),
    "MMLU": (lambda work: [MMLU], read_mmlu),
    "text": (lambda work: [{"data.txt": TEXT.encode() * 9}], read_text),
    "instructions": (instructions, read_instructions),
    "MT-Bench questions": (lambda work: [lines(*QUESTIONS)], read_questions),
    "MT-Bench answers": (lambda work: [ANSWERS], read_answers),
}
