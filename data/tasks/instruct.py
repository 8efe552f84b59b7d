"""Instructions and conversations: reading the files, making ids and targets.

A file is JSON (a list) or JSON lines, in any of these formats; `python
data/tasks/instruct.py --help` says where such files come from.
    Alpaca      {"instruction": ..., "input": optional, "output": ...}
    Dolly       {"instruction": ..., "context": optional, "response": ...}
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
    ShareGPT    {"conversations": [{"from": "system" | "human" | "gpt", "value": ...}, ...]}
    OASST1      {"prompt": {"role", "text", "rank", "replies": [...]}}, a tree a line; or flat, a
                message a line, {"message_id", "parent_id", "role", "text", "rank", ...}

Each becomes a conversation, a list of {"role": "system" | "user" | "assistant", "content": ...},
whose last message is an answer. An Alpaca question keeps its "input" beside its "content". How a
conversation is framed for the model, its chat template says: see chat.py. The loss counts the
tokens of all answers, and of nothing else.
"""

import sys
from itertools import chain
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from data import IGNORE_INDEX, InputError, Refused
from data.devices import distributed
from data.formats.fields import HALF, LIST, TABLE, TEXT
from data.formats.files import read_records
from data.generate.sampling import pad_left
from data.tasks.examples import Task, split
from data.tasks.oasst import best_path, check_message, grow_trees
from data.tokens.chat import load_template, prompt_that_fits


# --------------------------------------------------------------------------------------
# Records of every format -> conversations

ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant",
}


def conversation(record):
    """Make a conversation of a record; `Refused` says what is wrong with it.

    [] for a tree of OASST1 that is not finished, or has no answer.
    """
    if not isinstance(record, dict):
        raise Refused("is not an object")
    if "messages" in record:
        return checked(record["messages"], "messages", "role", "content")
    if "conversations" in record:
        return checked(record["conversations"], "conversations", "from", "value")
    if isinstance(record.get("prompt"), dict):
        check_message(record)
        if record.get("tree_state") not in (None, "ready_for_export"):
            return []
        path = best_path(record["prompt"])
        return checked(path, "prompt", "role", "text") if path else []
    return checked(question_and_answer(record), "", "role", "content")


def question_and_answer(record):
    """The two messages of an Alpaca record, or of a Dolly record, which has names of its own."""
    if "instruction" not in record:
        raise Refused(
            'has no "instruction" (as Alpaca and Dolly), "messages", "conversations" (ShareGPT) or'
            ' tree in "prompt" (OASST1)'
        )
    dolly = "response" in record and "output" not in record
    input, output = ("context", "response") if dolly else ("input", "output")
    for name in ("instruction", output):
        if not isinstance(record.get(name), str):
            raise Refused(f'has no text in "{name}"')
    question = {"role": "user", "content": record["instruction"], "input": record.get(input)}
    if question["input"] is not None and not isinstance(question["input"], str):
        raise Refused(f'has something that is not text in "{input}"')
    return [question, {"role": "assistant", "content": record[output]}]


def checked(messages, field, role, content):
    """Bring messages to our names, and check them.

    What precedes the first question, other than a system message, and what follows the last answer
    is cut off: ShareGPT's files have been split into pieces that begin and end anywhere.
    """
    if not LIST.fits(messages):
        raise Refused(f'has no list in "{field}"')
    made = []
    for message in messages:
        named = TABLE.fits(message) and TEXT.fits(message.get(role)) and message[role] in ROLES
        if not named or not isinstance(message.get(content), str):
            raise Refused("has a message without a known role and text")
        made.append({"role": ROLES[message[role]], "content": whole_text(message[content])})
        if input := message.get("input"):
            if not isinstance(input, str):
                raise Refused('has a message with something that is not text in "input"')
            made[-1]["input"] = whole_text(input)
    answers = [i for i, message in enumerate(made) if message["role"] == "assistant"]
    others = [i for i, message in enumerate(made) if message["role"] != "assistant"]
    made = made[others[0] : answers[-1] + 1] if others and answers else []
    if not made:
        raise Refused("has no question with an answer")
    for before, message in zip([{"role": None}, *made], made):
        if message["role"] == "assistant" and before["role"] != "user":
            raise Refused("has an answer that follows no question")
        if message["role"] == "assistant" and not message["content"].strip():
            raise Refused("has an empty answer")
    return made


def whole_text(text):
    """A text without halves of surrogate pairs, which JSON may hold, and nothing else may."""
    return HALF.sub("?", text)


def read_instructions(path, check=None):
    """Read and check a file: a list of conversations.

    check: raises `Refused` on a conversation that the model's template cannot frame
    """
    records, made = read_records(path), []
    if isinstance(records[0][1], dict) and "message_id" in records[0][1]:
        records = grow_trees(records, path)
    for where, record in records:
        try:
            one = conversation(record)
            if one and check:
                check(one)
        except Refused as error:
            raise InputError(f"{path}, {where} {error}: mend or remove it.") from None
        made += [one] if one else []
    if not made:
        raise InputError(f"{path} holds no instructions.")
    return made


# --------------------------------------------------------------------------------------
# Conversations -> ids and targets


def encode(conversation, tokenizer, template, sequence_len):
    """Turn a conversation into ids and targets of equal length, at most `sequence_len`.

    Targets are the ids that follow, or IGNORE_INDEX where that is not part of an answer. Each
    answer ends with the end token. None if the prompts alone fill the sequence.
    """
    ids, inside = template.encode(conversation, tokenizer)
    ids, inside = ids[: sequence_len + 1], inside[: sequence_len + 1]
    if not any(inside):
        return None
    return ids[:-1], [id if on else IGNORE_INDEX for id, on in zip(ids[1:], inside[1:])]


def prompt_text(conversation):
    """The last question, to show to people."""
    question = [message for message in conversation if message["role"] == "user"][-1]
    return "\n\n".join(filter(None, (question["content"], question.get("input"))))


# --------------------------------------------------------------------------------------
# The task


def answers(model, tokenizer, template, conversations, batch_size=64):
    """Greedy answers, of at most 64 tokens, to the last question of each conversation; what is too
    long for the model is shortened from the front."""
    found, positions = [], model.config.max_positions
    most = positions - min(64, positions // 4)  # ids of a prompt
    starts = distributed.split(range(0, len(conversations), batch_size))
    for start in tqdm(starts, "answers", unit="batch", leave=False, delay=2):
        part = conversations[start : start + batch_size]
        prompts = [prompt_that_fits(one[:-1], tokenizer, template, most)[0][-most:] for one in part]
        idx, keep = pad_left(prompts, device=model.device)
        new = min(64, positions - idx.shape[1])
        out = model.generate(idx, new, eos_id=template.end_ids(tokenizer), keep=keep)
        found.append([tokenizer.decode(row[idx.shape[1] :].tolist()).strip() for row in out])
    return list(chain.from_iterable(distributed.join(found)))


def samples(model, tokenizer, template, conversations):
    """Questions, with the expected answers and the model's."""
    found = answers(model, tokenizer, template, conversations)
    return [
        dict(prompt=prompt_text(one), expected=one[-1]["content"].strip(), answer=answer)
        for one, answer in zip(conversations, found)
    ]


def make_task(conversations, tokenizer, template, cfg, score, example="YOUR QUESTION"):
    """Split and encode: `Task`. score: function of a model and the held-out conversations"""
    train, held_out = split(conversations, cfg.held_out, cfg.data_seed, cfg.max_examples)
    if cfg.eval_only:
        train, held_out = [], train + held_out
    kept, notes = [], []
    for name, half in (("training", train), ("held-out", held_out)):
        pairs = [(one, encode(one, tokenizer, template, cfg.sequence_len)) for one in half]
        kept.append([(one, pair) for one, pair in pairs if pair])
        if lost := len(half) - len(kept[-1]):
            why = f"the prompt alone fills {cfg.sequence_len} tokens"
            notes.append(f"{lost} {name} examples left out: {why}")
    train, held_out = kept
    return Task(
        [pair for _, pair in train], [pair for _, pair in held_out],
        lambda models: [score(model, [one for one, _ in held_out]) for model in models.models],
        notes=notes,
        samples=lambda model: samples(model, tokenizer, template, [one for one, _ in held_out[:1]]),
        example=example,
    )


def load(cfg, tokenizer):
    """Read a file of instructions: `Task`, which shows three answers and has no metric."""
    template = load_template(tokenizer.folder)

    def score(model, held_out):
        """Three answers, to read; none of a sweep, nor of a base that a token reads whole."""
        shown = held_out[:3] if not (cfg.sweep or cfg.stream) else []
        return {"samples": samples(model, tokenizer, template, shown)}

    return make_task(read_instructions(cfg.data, template.check), tokenizer, template, cfg, score)


# --------------------------------------------------------------------------------------
# The command line


def show(path):
    """Read a file of instructions as train.py does, and show what is there.

    ShareGPT has no home of its own; its usual file is ShareGPT_V3_unfiltered_cleaned_split.json of
    anon8231489123/ShareGPT_Vicuna_unfiltered, among the data sets of the Hugging Face Hub."""
    conversations = read_instructions(path)
    answers = sum(message["role"] == "assistant" for one in conversations for message in one)
    print(f"{len(conversations)} conversations with {answers} answers. The first:")
    for message in conversations[0]:
        print(f"\n[{message['role']}]\n{message['content']}")
        if "input" in message:
            print(f"[input]\n{message['input']}")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "Alpaca", "Dolly", "OASST1")
