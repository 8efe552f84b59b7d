"""Instructions and conversations: reads the files, and makes ids and targets.

A file is a JSON list, JSON lines, or a .csv or .tsv with a row of names, in one of these formats
    Alpaca      {"instruction": ..., "input": optional, "output": ..., "history": optional pairs}
    Dolly       {"instruction": ..., "context": optional, "response": ...}
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
    ShareGPT    {"conversations": [{"from": "system" | "human" | "gpt", "value": ...}, ...]}
    pairs       {"prompt": ..., "completion": ...} or {"question": ..., "answer": ...}
    OASST1      trees: see oasst.py

Each record becomes a conversation, a list of {"role": "system" | "user" | "assistant",
"content": ...} that ends with an answer. An Alpaca question keeps its "input" beside "content".
The chat template makes ids of it: see chat.py. The loss counts only the tokens of the answers.
"""

import csv
import io
import sys
from collections import Counter
from itertools import chain, pairwise, takewhile
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from data import IGNORE_INDEX, InputError, Refused, leaf
from data.devices import distributed
from data.formats.fields import HALF, LIST, TABLE, TEXT, first_few, list_of, reason, shown
from data.formats.files import read_records, read_text
from data.generate.sampling import pad_left
from data.tasks.examples import Task, split
from data.tokens.chat import load_template, prompt_that_fits, with_input

ROLES = {"system": "system"} | dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")
NAMES = ("role", "from"), ("content", "value", "text")  # of a message's fields
# The name of a question, and the names that its answer may have
ANSWERS = {"instruction": ("output", "response"), "prompt": ["completion"], "question": ["answer"]}


def conversation(record):
    """Turn a record into a conversation. `Refused` gives the reason if it is not possible."""
    if isinstance(record, Refused):  # a row of a table
        raise record
    if not isinstance(record, dict):
        raise Refused("is not an object")
    for field in ("messages", "conversations"):
        if field in record:
            return checked(record[field], field, record.get("system"))
    if isinstance(record.get("prompt"), dict):
        return checked(leaf("oasst").best_path(record), "prompt")
    return checked(question_and_answer(record), "", record.get("system"))


def question_and_answer(record):
    """Turn a record with a question and an answer, and its "history", into messages."""
    question = next(filter(record.__contains__, ANSWERS), "instruction")
    answer = next(filter(record.__contains__, ANSWERS[question]), ANSWERS[question][0])
    for name in (question, answer):
        if not isinstance(record.get(name), str):
            raise lacks(name, record)
    if record.get("input") and record.get("context"):
        raise Refused('has both an "input" and a "context"')
    input = record.get("input") or record.get("context", record.get("input"))
    last = {"role": "user", "content": record[question], "input": input}
    turns = record.get("history") or []
    if not (LIST.fits(turns) and all(LIST.fits(turn) and len(turn) == 2 for turn in turns)):
        raise Refused('has no pairs of texts in "history"')
    past = [dict(role=r, content=t) for turn in turns for r, t in zip(("user", "assistant"), turn)]
    return [*past, last, {"role": "assistant", "content": record[answer]}]


def lacks(name, record):
    """Return the `Refused` of a record without a text in a field, which may have another form."""
    lists = [other for other, value in record.items() if list_of(TABLE, least=1).fits(value)]
    if "chosen" in record:
        new = "messages" if LIST.fits(record["chosen"]) else 'completion", and its question "prompt'
        return Refused(f'has a "chosen" answer: call it "{new}"')
    if name in record or name != "instruction" or not (lists or "text" in record):
        return Refused(f'has no text in "{name}"', first_few([*record]) or "empty")
    if "message_id" in record:
        return Refused("is one message of OASST1: give its file of trees")
    if lists:
        return Refused("is an object in place of a list: keep only its list", first_few(lists))
    return Refused('has a "text" and no question: write all texts to a .txt for --task text')


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
        own = [next((n for n in names if n in message), names[0]) for names in NAMES]
        role, text = map(message.get, own)
        if not (TEXT.fits(role) and role in ROLES):
            raise Refused("has a message without a known role", shown(role))
        if not isinstance(text, str):
            raise Refused(f'has a message without text in "{own[1]}"', shown(text))
        if not isinstance(input := message.get("input"), str | None):
            raise Refused("has an input or context that is not text", shown(input))
        # JSON may spell halves of surrogate pairs, which cannot be encoded.
        more = {"input": HALF.sub("?", input)} if input else {}
        made.append({"role": ROLES[role], "content": HALF.sub("?", text)} | more)
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
        for kind, one in {"question": before, "answer": message}.items():
            if is_answer(message) and not with_input(one).strip():
                raise Refused(f"has an empty {kind}")
    return made


def csv_rows(path, separators=",", newline=None):
    """Yield the rows of a CSV file, (its first line, fields). separators: the file's is that of
    which its first line has most; newline: as for `read_text`"""
    text, line = read_text(path, newline=newline), 1
    separator = max(separators, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1  # a quoted field may span several lines
    except csv.Error as error:
        raise InputError(f"{path}, line {line} is not CSV ({reason(error)}).") from None


def read_table(path):
    """Read CSV whose first row has the names: [(place in the file, record), ...]."""
    (_, header), *rows = [*csv_rows(path, ",;\t")] or [(1, [])]
    if not rows:
        raise InputError(f"{path} holds no instructions.")
    n, named = len(header), [*filter(None, header)]  # a spreadsheet adds columns without a name
    if len(set(named)) < len(named):
        raise InputError(f"{path} has two columns of one name: rename one.")
    wrong = Refused("has not one field for each name in the first row, or has a NUL")
    fits = lambda row: len(row) >= n and not any(row[n:]) and "\0" not in "".join(row)
    made = lambda row: {name: text for name, text in zip(header, row) if name}
    return [(f"line {line}", made(row) if fits(row) else wrong) for line, row in rows]


def read_instructions(path):
    """Read and check a file: (conversations, notes on the records that were left out)."""
    is_table, made, left_out, notes = Path(path).suffix.lower() in (".csv", ".tsv"), [], {}, []
    records = read_table(path) if is_table else read_records(path)
    for where, record in records:
        try:
            made.append(conversation(record))
        except Refused as error:
            why, *found = error.args
            left_out.setdefault(why, []).append(": ".join([where, *found])[:50])
    for why, places in left_out.items():
        where = ", ".join(places[:3]) + f" and {len(places) - 3:,} more" * (len(places) > 3)
        notes.append(f"{len(places):,} of {len(records):,} records left out: each {why} ({where})")
    if not made:
        why = "; ".join(notes)[:400]
        raise InputError(f"{path} has no usable record: data/README.md shows the formats. {why}.")
    return made, [f"{path}: {note}" for note in notes]


def examples(conversation, tokenizer, template, sequence_len):
    """Encode a conversation as examples of ids and targets, of equal length <= `sequence_len`.

    The targets are the answers, each with its end token. An example that holds none is left out.
    """
    made = []
    for ids, inside in template.examples(conversation, tokenizer, sequence_len):
        ids, inside = ids[: sequence_len + 1], inside[: sequence_len + 1]
        targets = [id if on else IGNORE_INDEX for id, on in zip(ids[1:], inside[1:])]
        made += [(ids[:-1], targets)] * any(inside[1:])
    return made


def samples(model, tokenizer, template, conversations, batch_size=64):
    """Generate greedy answers of at most 64 tokens to the last questions: [{"prompt", "expected",
    "answer"}, ...]. A prompt that is too long for the model loses its beginning."""
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
    answers = chain.from_iterable(distributed.join(found))
    return [
        dict(prompt=with_input(one[-2]), expected=one[-1]["content"].strip(), answer=answer)
        for one, answer in zip(conversations, answers)
    ]


def make_task(conversations, tokenizer, template, cfg, score, example="YOUR QUESTION", notes=()):
    """Split and encode conversations, and return the `Task`.

    score: function of a model and the held-out conversations
    """
    train, held_out = split(conversations, cfg.held_out, cfg.data_seed, cfg.max_examples)
    if cfg.eval_only:
        train, held_out = [], train + held_out
    made, asked, notes = {"training": [], "held-out": []}, [], list(notes)
    for name, half in zip(made, (train, held_out)):
        left_out = Counter()
        for one in half:
            try:
                if half is held_out:  # it may be asked
                    template.encode(one[:-1], tokenizer)
                if not (pairs := examples(one, tokenizer, template, cfg.sequence_len)):
                    raise Refused(f"has a prompt that fills --sequence_len {cfg.sequence_len}")
                made[name] += pairs
                asked += [one] * (half is held_out)
            except Refused as error:  # also by the chat template
                left_out[str(error)] += 1
        often = left_out.most_common(5)  # a template may say something else of each
        notes += [f"{n} {name} examples left out: each {why}" for why, n in often]
        if rest := left_out.total() - sum(n for _, n in often):
            notes.append(f"{rest} {name} examples left out for other reasons")
    if cfg.eval_only and not asked:
        raise InputError(f"{cfg.data} leaves nothing to score: {notes[-1]}.")
    return Task(
        *made.values(), lambda models: [score(model, asked) for model in models.models],
        notes=notes, example=example,
    )


def load(cfg, tokenizer):
    """Read a file of instructions, and return the `Task`. It shows answers and has no metric."""
    template = load_template(tokenizer.folder)
    # A sweep has too many models to show, and with --stream each token reads all weights.
    most = 0 if cfg.sweep or cfg.stream else 3
    score = lambda model, asked: {"samples": samples(model, tokenizer, template, asked[:most])}
    conversations, notes = read_instructions(cfg.data)
    return make_task(conversations, tokenizer, template, cfg, score, notes=notes)


def show(path):
    """Read a file of instructions as train.py does, and print what it holds.

    ShareGPT has no official source. Its usual file is ShareGPT_V3_unfiltered_cleaned_split.json in
    the data set anon8231489123/ShareGPT_Vicuna_unfiltered of the Hugging Face Hub."""
    conversations, notes = read_instructions(path)
    print(*notes, sep="\n", end="\n" * bool(notes))
    answers = sum(message["role"] == "assistant" for one in conversations for message in one)
    print(f"{len(conversations)} conversations with {answers} answers. The first:")
    for message in conversations[0]:
        print(f"\n[{message['role']}]\n{with_input(message)}")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "Alpaca", "Dolly", "OASST1")
