"""MT-Bench: questions with two turns, and answers in the format of FastChat's judge.

A line of the questions   {"question_id", "category", "turns": ["...", "..."]}
A line of the answers     {"question_id", "answer_id", "model_id", "choices": [{"index": 0,
                          "turns": [...]}], "tstamp"}. The file's name is the model's name.
The judge is another model, which this project does not contain.
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
from data.formats.fields import TABLE, TEXT, WORD, either, list_of, shown, whole
from data.formats.files import checksum, read_records, write_atomically

TEMPERATURES = {  # FastChat's, by category
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
}
QUESTION_ID = either(whole(-(1 << 62), 1 << 62), WORD)


def read_questions(path):
    questions = {}
    for where, record in read_records(path, "--questions"):
        known = TABLE.fits(record) and QUESTION_ID.fits(record.get("question_id"))
        if not known or not list_of(TEXT, least=1).fits(record.get("turns")):
            raise InputError(f'{path}, {where} has no "question_id" and list of "turns".')
        id = record["question_id"]
        if id in questions or not TEXT.fits(record.get("category", "")):
            why = f'the "question_id" {shown(id)} of another, or a "category" that is not text'
            raise InputError(f"{path}, {where} has {why}: correct it.")
        questions[id] = record
    return list(questions.values())


def answer(talk, question):
    """Answer all turns of a question in one conversation, and print what does not fit.

    A turn that does not fit into the model has the answer "".
    """
    talk.reset()
    answers = []
    for i, text in enumerate(question["turns"], 1):
        where = f"question {question['question_id']}, turn {i}"
        try:
            if dropped := talk.ask(text):
                tqdm.write(f"{where}: the {dropped} oldest messages did not fit in", sys.stderr)
            answers.append("".join(talk.answer()).strip())
        except Refused as error:
            tqdm.write(f"{where} {error}: left without an answer", sys.stderr)
            answers.append("")
    return answers


def answered(path, model_id):
    """Read the answers of an earlier run, which must all be of this model."""
    answers = read_records(path, "--out") if os.path.exists(path) else []
    for where, answer in answers:
        known = TABLE.fits(answer) and {"question_id", "model_id", "choices"} <= answer.keys()
        if not known or not QUESTION_ID.fits(answer["question_id"]):
            raise InputError(f"{path}, {where} is not an answer: give --out a file for answers.")
        if answer["model_id"] != model_id:
            why = f"an answer of {shown(answer['model_id'])}, not of {model_id}"
            raise InputError(f"{path}, {where} is {why}: give another --out.")
    return [answer for _, answer in answers]


def answer_file(args, start_talk):
    """Answer the questions that have no answer in --out yet; a crash loses one answer at most."""
    model_id = args.model_id or Path(args.out).stem
    if args.side:  # another training gives another model, whose answers must not be mixed
        model_id += f"-{checksum(Path(args.side) / 'side.safetensors')[:8]}"
    questions = read_questions(args.questions)
    answers = answered(args.out, model_id)
    done = {one["question_id"] for one in answers}
    todo = [question for question in questions if question["question_id"] not in done]
    talk = start_talk()
    for question in tqdm(todo, "answers", unit="question"):
        if args.fastchat_temperatures:
            args.temperature = TEMPERATURES.get(question.get("category"), 0.7)
        choices = [{"index": 0, "turns": answer(talk, question)}]
        about = dict(question_id=question["question_id"], answer_id=uuid.uuid4().hex)
        answers.append(about | dict(model_id=model_id, choices=choices, tstamp=time.time()))
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in answers]
        write_atomically(args.out, lambda file: file.write("".join(lines).encode()))
    print(f"{args.out}: {len(todo)} new answers; all {len(questions)} questions have one")


def show(path):
    """Count the questions in a file, and print the first one."""
    questions = read_questions(path)
    print(f"{len(questions)} questions. The first:", *questions[0]["turns"], sep="\n\n")


if __name__ == "__main__":
    from data.tasks.download import command_line

    command_line(show, "MT-Bench")
