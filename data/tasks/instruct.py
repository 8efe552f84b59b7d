"""Instructions and conversations: reads the files, and makes ids and targets.

A file is a JSON list or JSON lines, in one of these formats
    Alpaca      {"instruction": ..., "input": optional, "output": ..., "history": optional pairs}
    Dolly       {"instruction": ..., "context": optional, "response": ...}
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
    ShareGPT    {"conversations": [{"from": "system" | "human" | "gpt", "value": ...}, ...]}
    OASST1      trees or messages: see oasst.py

Each record becomes a conversation, a list of {"role": "system" | "user" | "assistant",
"content": ...} that ends with an answer. An Alpaca question keeps its "input" beside "content".
The chat template makes ids of it: see chat.py. The loss counts only the tokens of the answers.
"""

import sys
from itertools import chain, pairwise, takewhile
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from data import IGNORE_INDEX, InputError, Refused, leaf
from data.devices import distributed
from data.formats.fields import HALF, LIST, TABLE, TEXT
from data.formats.files import read_records
from data.generate.sampling import pad_left
from data.tasks.examples import Task, split
from data.tokens.chat import load_template, prompt_that_fits, with_input

ROLES = {"system": "system", "assistant": "assistant", "gpt": "assistant"}
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
NAMES = ("role", "from"), ("content", "value", "text")  # of a message's fields


def conversation(record):
    """Turn a record into a conversation. `Refused` gives the reason if it is not possible.

    Returns [] for a tree of OASST1 that is not finished or has no answer.
    """
    if not isinstance(record, dict):
        raise Refused("is not an object")
    for field in ("messages", "conversations"):
        if field in record:
            return checked(record[field], field, record.get("system"))
    if isinstance(record.get("prompt"), dict):
        path = leaf("oasst").best_path(record)
        return checked(path, "prompt") if path else []
    return checked(question_and_answer(record), "", record.get("system"))


def question_and_answer(record):
    """Turn a record of Alpaca or Dolly, and the turns of its "history", into messages."""
    if "instruction" not in record:
        raise Refused('has no "instruction", "messages", "conversations" or tree in "prompt"')
    dolly = "response" in record and "output" not in record
    input, output = ("context", "response") if dolly else ("input", "output")
    for name in ("instruction", output):
        if not isinstance(record.get(name), str):
            raise Refused(f'has no text in "{name}"')
    question = {"role": "user", "content": record["instruction"], "input": record.get(input)}
    if question["input"] is not None and not isinstance(question["input"], str):
        raise Refused(f'has something that is not text in "{input}"')
    turns = record.get("history") or []
    if not (LIST.fits(turns) and all(LIST.fits(turn) and len(turn) == 2 for turn in turns)):
        raise Refused('has no pairs of texts in "history"')
    past = [dict(role=r, content=t) for turn in turns for r, t in zip(("user", "assistant"), turn)]
    return [*past, question, {"role": "assistant", "content": record[output]}]


def checked(messages, field, system=None):
    """Check messages, after a text `system`, and give fields and roles this project's names.

    Answers before the first question and questions after the last answer are cut off: ShareGPT's
    conversations have been split anywhere.
    """
    if not LIST.fits(messages):
        raise Refused(f'has no list in "{field}"')
    made = []
    for message in [{"role": "system", "content": system}] * bool(system) + messages:
        message = message if TABLE.fits(message) else {}
        role, text = (next((message[n] for n in names if n in message), None) for names in NAMES)
        if not (TEXT.fits(role) and role in ROLES and isinstance(text, str)):
            raise Refused("has a message without a known role and text")
        # JSON may spell halves of surrogate pairs, which cannot be encoded.
        made.append({"role": ROLES[role], "content": HALF.sub("?", text)})
        if input := message.get("input"):
            if not isinstance(input, str):
                raise Refused('has a message with something that is not text in "input"')
            made[-1]["input"] = HALF.sub("?", input)
    is_answer = lambda message: message["role"] == "assistant"
    start = sum(1 for _ in takewhile(lambda message: message["role"] != "user", made))
    made = [one for one in made[:start] if not is_answer(one)] + made[start:]
    while made and not is_answer(made[-1]):
        made.pop()
    if not made:
        raise Refused("has no question with an answer")
    for before, message in pairwise(made):
        if is_answer(message) and before["role"] != "user":
            raise Refused("has an answer that follows no question")
        if is_answer(message) and not message["content"].strip():
            raise Refused("has an empty answer")
    return made


def read_instructions(path, check=None):
    """Read and check a file, and return a list of conversations.

    check: raises `Refused` for a conversation that does not fit into the model's chat template
    """
    records, made = read_records(path), []
    if isinstance(records[0][1], dict) and "message_id" in records[0][1]:
        records = leaf("oasst").grow_trees(records, path)
    for where, record in records:
        try:
            if one := conversation(record):
                if check:
                    check(one)
                made.append(one)
        except Refused as error:
            raise InputError(f"{path}, {where} {error}: correct or remove it.") from None
    if not made:
        raise InputError(f"{path} holds no instructions.")
    return made


def encode(conversation, tokenizer, template, sequence_len):
    """Encode a conversation as ids and targets of equal length, at most `sequence_len`.

    A target is the next id, or IGNORE_INDEX if that is not part of an answer. Each answer ends
    with the end token. Returns None if the prompts alone fill the sequence.
    """
    ids, inside = template.encode(conversation, tokenizer)
    ids, inside = ids[: sequence_len + 1], inside[: sequence_len + 1]
    if not any(inside):
        return None
    return ids[:-1], [id if on else IGNORE_INDEX for id, on in zip(ids[1:], inside[1:])]


def prompt_text(conversation):
    """Return the text of the last question, which comes before the last answer."""
    return with_input(conversation[-2])


def answers(model, tokenizer, template, conversations, batch_size=64):
    """Generate greedy answers of at most 64 tokens to the last question of each conversation.

    A prompt that is too long for the model loses its beginning.
    """
    found, positions = [], model.config.max_positions
    most = positions - min(64, positions // 4)  # ids in a prompt
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
    """Return the last questions with the expected and the generated answers."""
    found = answers(model, tokenizer, template, conversations)
    return [
        dict(prompt=prompt_text(one), expected=one[-1]["content"].strip(), answer=answer)
        for one, answer in zip(conversations, found)
    ]


def make_task(conversations, tokenizer, template, cfg, score, example="YOUR QUESTION"):
    """Split and encode conversations, and return the `Task`.

    score: function of a model and the held-out conversations
    """
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
    if cfg.eval_only and not kept[1]:
        raise InputError(f"{cfg.data}: {notes[-1]}. Raise --sequence_len.")
    train, held_out = ([pair for _, pair in half] for half in kept)
    asked = [one for one, _ in kept[1]]
    return Task(
        train, held_out, lambda models: [score(model, asked) for model in models.models],
        notes=notes, example=example,
        samples=lambda model: samples(model, tokenizer, template, asked[:1]),
    )


def load(cfg, tokenizer):
    """Read a file of instructions, and return the `Task`. It shows answers and has no metric."""
    template = load_template(tokenizer.folder)
    # A sweep has too many models to show, and with --stream each token reads all weights.
    shown = 0 if cfg.sweep or cfg.stream else 3
    score = lambda model, asked: {"samples": samples(model, tokenizer, template, asked[:shown])}
    return make_task(read_instructions(cfg.data, template.check), tokenizer, template, cfg, score)


def show(path):
    """Read a file of instructions as train.py does, and print what it holds.

    ShareGPT has no official source. Its usual file is ShareGPT_V3_unfiltered_cleaned_split.json in
    the data set anon8231489123/ShareGPT_Vicuna_unfiltered of the Hugging Face Hub."""
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
