"""Instructions and their answers: reading the files, framing the text, making the batches.

A file is JSON (a list) or JSON lines, of either
    {"instruction": ..., "input": optional, "output": ...}
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
and the loss counts the tokens of the answers only.
"""

import json
from pathlib import Path

from data import Task, split
from model import IGNORE_INDEX, pad_left
from quant import InputError


def frame(instruction, input=""):
    """Put an instruction into the frame that the answer follows."""
    middle = f"\n\n### Input:\n{input}" if input else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def turns(record):
    """Cut a record into [(text, is it an answer?), ...]; raises ValueError that says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    if "messages" not in record:
        for field in ("instruction", "output"):
            if not isinstance(record.get(field), str):
                raise ValueError(f'has no text in "{field}"')
        if not isinstance(record.get("input") or "", str):
            raise ValueError('has something that is not text in "input"')
        parts = [(frame(record["instruction"], record.get("input")), False), (record["output"], True)]
    else:
        parts, system = [], ""
        if not isinstance(record["messages"], list):
            raise ValueError('has no list in "messages"')
        for message in record["messages"]:
            role, content = (
                (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            )
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError("has a message without a known role and text")
            if role == "system":
                system = content + "\n\n"
            elif role == "user":
                parts.append((system + frame(content), False))
                system = ""
            else:
                parts.append((content, True))
    if not any(answer and text.strip() for text, answer in parts):
        raise ValueError("has an empty answer")
    return parts


def read_records(path):
    """Read a file of either kind: [(where it stands, for messages, and the record), ...]."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give --data a .json or .jsonl file.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give --data a .json or .jsonl file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}).") from None
    where = "as a list"
    try:
        if text.lstrip().startswith("["):
            records = [(f"entry {i}", record) for i, record in enumerate(json.loads(text), 1)]
        else:
            records = []
            for i, line in enumerate(text.split("\n"), 1):
                where = f"line {i}"
                if line.strip():
                    records.append((where, json.loads(line)))
    except ValueError as error:
        raise InputError(f"{path}, {where} is not JSON ({error}).") from None
    if not records:
        raise InputError(f"{path} holds no instructions.")
    return records


def read_instructions(path):
    """Read and check a file: a list of records, each cut into its `turns`."""
    examples = []
    for where, record in read_records(path):
        try:
            examples.append(turns(record))
        except ValueError as error:
            raise InputError(f"{path}, {where} {error}: mend or remove it.") from None
    return examples


def encode(parts, tokenizer, sequence_len):
    """Turn one example into ids and targets of equal length, at most `sequence_len`.

    Targets are the ids that follow, or IGNORE_INDEX where that is not part of an answer. Each
    answer ends with the end token. None if the prompts alone fill the sequence.
    """
    ids, inside = [tokenizer.bos_id], [False]
    for text, answer in parts:
        new = tokenizer.encode(text) + [tokenizer.eos_id] * answer
        ids += new
        inside += [answer] * len(new)
    ids, inside = ids[: sequence_len + 1], inside[: sequence_len + 1]
    if not any(inside):
        return None
    return ids[:-1], [id if on else IGNORE_INDEX for id, on in zip(ids[1:], inside[1:])]


def encode_prompt(parts, tokenizer):
    """The ids of all that comes before the last answer."""
    last = max(i for i, (_, answer) in enumerate(parts) if answer)
    ids = [tokenizer.bos_id]
    for text, answer in parts[:last]:
        ids += tokenizer.encode(text) + [tokenizer.eos_id] * answer
    return ids


def prompt_text(parts):
    """The last question, without its frame, to show to people."""
    text = [text for text, answer in parts if not answer][-1]
    return text.removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n")


def answers(model, tokenizer, prompts, batch_size=64, most=64):
    """Greedy answers, of at most `most` tokens, to prompts of ids."""
    found = []
    for start in range(0, len(prompts), batch_size):
        idx, keep = pad_left(prompts[start : start + batch_size], device=model.device)
        room = min(most, model.config.max_positions - idx.shape[1])
        out = model.generate(idx, room, eos_id=tokenizer.eos_ids, keep=keep)
        found += [tokenizer.decode(row[idx.shape[1] :].tolist()).strip() for row in out]
    return found


def encode_all(examples, tokenizer, cfg, name):
    """The examples that leave room for an answer, and how many do not."""
    made = [(parts, encode(parts, tokenizer, cfg.sequence_len)) for parts in examples]
    kept = [(parts, pair) for parts, pair in made if pair]
    lost = len(made) - len(kept)
    note = f"{lost} {name} examples left out: the prompt alone fills {cfg.sequence_len} tokens"
    return kept, [note] * bool(lost)


def make_task(examples, tokenizer, cfg, score):
    """Split and encode: `Task`. score: function of a model and the held-out (parts, pair)"""
    train, held_out = ([], examples) if cfg.eval_only else split(examples, cfg.held_out, cfg.seed, cfg.max_examples)
    train, lost = encode_all(train, tokenizer, cfg, "training")
    held_out, lost_too = encode_all(held_out, tokenizer, cfg, "held-out")
    return Task(
        [pair for _, pair in train], [pair for _, pair in held_out],
        lambda model: score(model, held_out), notes=lost + lost_too,
    )  # fmt: skip


def samples(model, tokenizer, held_out):
    """Questions, expected and greedy answers: [{"prompt", "expected", "answer"}, ...]."""
    found = answers(model, tokenizer, [encode_prompt(parts, tokenizer) for parts, _ in held_out])
    return [
        dict(prompt=prompt_text(parts), expected=parts[-1][0].strip(), answer=answer)
        for (parts, _), answer in zip(held_out, found)
    ]


def load(cfg, tokenizer):
    """Read a file of instructions: `Task`, which shows a few answers and has no metric."""
    score = lambda model, held_out: {"samples": samples(model, tokenizer, held_out[:3])}
    return make_task(read_instructions(cfg.data), tokenizer, cfg, score)
