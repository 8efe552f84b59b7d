"""Instructions and their answers: reading the files, framing the text, making the batches.

A file is JSON (a list) or JSON lines, of either
    {"instruction": ..., "input": optional, "output": ...}
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
and the loss counts the tokens of the answers only.
"""

import json
import random
from pathlib import Path

import torch

from model import IGNORE_INDEX
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


def collate(examples, pad_id=0):
    """Pad examples on the right to one length: idx and targets, int64 (B, T).

    Causal attention never looks to the right, so no token sees the padding, and no mask is needed.
    """
    T = max(len(ids) for ids, _ in examples)
    pad = lambda row, value: row + [value] * (T - len(row))
    idx = torch.tensor([pad(ids, pad_id) for ids, _ in examples])
    targets = torch.tensor([pad(targets, IGNORE_INDEX) for _, targets in examples])
    return idx, targets


def batches(examples, batch_size, seed):
    """Yield batches for ever: each epoch in a new order, sequences of similar length together."""
    rng = random.Random(seed)
    pool = 32 * batch_size
    while True:
        order = rng.sample(examples, len(examples))
        rows = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda example: len(example[0]))
            rows += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        rng.shuffle(rows)
        for row in rows:
            yield collate(row)


def split(examples, fraction, seed, most=0):
    """Shuffle by seed, take `most` (0: all), and hold out a fraction: train, held out."""
    examples = random.Random(seed).sample(examples, len(examples))[: most or None]
    held_out = max(1, round(len(examples) * fraction))
    return examples[held_out:], examples[:held_out]
