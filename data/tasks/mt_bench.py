"""MT-Bench: questions of two turns, and the answers in the form that FastChat's judge reads.

A question   {"question_id", "category", "turns": ["...", "..."]}, a line of mt_bench_question.jsonl
An answer    {"question_id", "answer_id", "model_id", "choices": [{"index": 0, "turns": [...]}],
             "tstamp"}, a line of the file whose name, without .jsonl, is the model's
The judge itself is another model, and no part of this project.
"""

import json
import os
import sys
import time
import uuid
from pathlib import Path

if __name__ == "__main__":  # imports start in the project's folder, two above this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tqdm import tqdm

from data import InputError, Refused
from data.formats.fields import TEXT, WORD, either, list_of, shown, whole
from data.formats.files import checksum, parse_json, read_bytes, read_records

TEMPERATURES = {  # FastChat's, by category
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
}


QUESTION_ID = either(whole(-(1 << 62), 1 << 62), WORD)


def read_questions(path):
    """Read and check the questions."""
    questions = {}
    for where, record in read_records(path, "--questions"):
        turns = record.get("turns") if isinstance(record, dict) else None
        right = list_of(TEXT).fits(turns) and turns
        if not right or not QUESTION_ID.fits(record.get("question_id")):
            raise InputError(f'{path}, {where} has no "question_id" and list of "turns".')
        id, category = record["question_id"], record.get("category", "")
        if id in questions or not TEXT.fits(category):
            twice = f'the "question_id" {shown(id)} of another, or a "category" that is no text'
            raise InputError(f"{path}, {where} has {twice}: mend it.")
        questions[id] = record
    return list(questions.values())


def temperature(question):
    return TEMPERATURES.get(question.get("category"), 0.7)


def answer(talk, question, note):
    """The answers to all turns of a question, each with those before it in view.

    A turn that the model cannot read has the answer ""; `note` is told, and what was dropped.
    """
    talk.reset()
    answers = []
    for i, text in enumerate(question["turns"], 1):
        where = f"question {question['question_id']}, turn {i}"
        try:
            if dropped := talk.ask(text):
                note(f"{where}: the {dropped} oldest messages did not fit")
            answers.append("".join(talk.answer()).strip())
        except Refused as error:
            note(f"{where} {error}: left without an answer")
            answers.append("")
    return answers


def answer_line(question_id, model_id, turns):
    """A line of the answers' file."""
    answer = {
        "question_id": question_id, "answer_id": uuid.uuid4().hex, "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
    }
    return json.dumps(answer, ensure_ascii=False) + "\n"


def answered(path, model_id):
    """The ids of the questions that an earlier run has answered; its file is ready to go on with.

    A last line that a crash has cut off is taken away, since its question will be asked again. No
    other file is touched: what is not an answer of this model is refused.
    """
    path = Path(path)
    if not path.exists():
        return set()
    *lines, last = read_bytes(path, "give another --out").split(b"\n")
    done = {_question_id(path, i, line, model_id) for i, line in enumerate(lines, 1)}
    if last:
        start = b'{"question_id": '
        if not last.startswith(start[: len(last)]):
            raise _refusal(path, len(lines) + 1)
        try:
            done.add(_question_id(path, len(lines) + 1, last, model_id))
        except _Damaged:
            os.truncate(path, path.stat().st_size - len(last))
        else:
            with open(path, "ab") as file:  # whole but for its end
                file.write(b"\n")
    return done


class _Damaged(InputError):
    """A line is not JSON."""


def _refusal(path, number, kind=InputError):
    return kind(f"{path}, line {number} is not an answer: give --out a file of its own.")


def _question_id(path, number, line, model_id):
    try:
        answer = parse_json(line)
    except ValueError:  # also of bytes that are half a character
        raise _refusal(path, number, _Damaged) from None
    if not isinstance(answer, dict) or not {"question_id", "model_id", "choices"} <= answer.keys():
        raise _refusal(path, number)
    if answer["model_id"] != model_id:
        other = shown(answer["model_id"])
        raise InputError(
            f"{path}, line {number} is an answer of {other}, not of {model_id}: give another --out."
        )
    if not QUESTION_ID.fits(answer["question_id"]):
        raise _refusal(path, number)
    return answer["question_id"]


FLAGS = {  # of `qst.py answer`
    "questions": dict(required=True, help="mt_bench_question.jsonl, or a file like it"),
    "model_id": dict(help="the model's name there, behind which the first digits of the side"
        " checkpoint's SHA-256 are put; default: the name of --out, as FastChat has it"),
    "limit": dict(type=int, help="only the first so many questions"),
    "fastchat_temperatures": dict(action="store_true",
        help="FastChat's temperature for each category, instead of --temperature"),
}


def answer_file(args, start_talk):
    """Answer the questions that --out has no answers to yet."""
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} must be at least 1.")
    model_id = args.model_id or Path(args.out).stem
    if args.side:  # trained anew, it is another model, whose answers must not finish a file
        model_id += f"-{checksum(Path(args.side) / 'side.safetensors')[:8]}"
    questions = read_questions(args.questions)[: args.limit]
    done = answered(args.out, model_id)
    todo = [question for question in questions if question["question_id"] not in done]
    note = lambda text: tqdm.write(text, sys.stderr)
    talk = start_talk()  # before a file is made
    with open(args.out, "a", encoding="utf-8") as out:
        for question in tqdm(todo, "answers", unit="question"):
            if args.fastchat_temperatures:
                args.temperature = temperature(question)
            turns = answer(talk, question, note)
            out.write(answer_line(question["question_id"], model_id, turns))
            out.flush()
    print(f"{args.out}: {len(todo)} questions answered, {len(questions) - len(todo)} were before")


def show(path):
    """Count the questions of a file, and print the first."""
    questions = read_questions(path)
    print(f"{len(questions)} questions. The first:", *questions[0]["turns"], sep="\n\n")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "MT-Bench")
