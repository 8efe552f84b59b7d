"""The built-in example: a small bilingual world, made by a grammar, and a task in it.

The base model of `python train.py` learns to read little stories, in English and in French, and
to answer a question about each *in the language of the story*. The task of the side network is to
answer English stories in French. The base never does that; but what the answer must say stands in
its hidden states already, so that there is something for a side network to read.
"""

import contextlib
import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

from data import InputError
from data.formats.files import make_writable_folder
from data.tasks import instruct
from data.tokens import chat
from data.tokens.chat import frame

CACHE = Path(os.path.relpath(Path(__file__).parents[1] / "cache"))  # git-ignored
# The base model, and how train.py trains it.
BASE = dict(n_layer=5, n_head=4, n_embd=128, n_ffn=344, max_positions=256, tied=True)
VOCAB_SIZE, LONGEST = 768, 47  # LONGEST: tokens of a question with its answer
BASE_RUN = dict(
    max_iters=160, batch_size=32, learning_rate=6e-3, lr_schedule="linear", warmup_iters=30,
    optimizer="muon", beta2=0.99, weight_decay=0.1, seed=0,
)

# The words and sentences of the language, each in English and in French
WORLD = json.loads(Path(__file__).with_name("tiny.json").read_text(encoding="utf-8"))
NAMES, PLACES, FILLERS = WORLD["names"], WORLD["places"], WORLD["fillers"]
TELL, ASK = WORLD["tell"], WORLD["ask"]
# A mood is never told in a story, only what brings it about.
MOODS = {tuple(mood): events for *mood, events in WORLD["moods"]}
ENGLISH, FRENCH = 0, 1
EXAMPLE = "Leo went to the mill. He won the race. The birds sang. How did Leo feel, and where?"


def story(rng, language):
    """Make one: the story with its question, and the answers in both languages."""
    name, place, mood = rng.choice(NAMES), rng.choice(PLACES), rng.choice(list(MOODS))
    event, filler = rng.choice(MOODS[mood]), rng.choice(FILLERS)
    sentences = [event[language] + ".", filler[language] + "."]
    rng.shuffle(sentences)
    told = TELL[language].format(name=name, place=place[language])
    asked = ASK[language].format(name=name)
    return " ".join([told, *sentences, asked]), [f"{m}, {p}" for m, p in zip(mood, place)]


def pretraining(n, seed):
    """What the base learns from: stories in either language, answered in the same."""
    rng = random.Random(seed)
    for _ in range(n):
        language = rng.choice((ENGLISH, FRENCH))
        question, answers = story(rng, language)
        yield {"instruction": question, "output": answers[language]}


def pretraining_examples(tokenizer):
    """The same as (ids, targets): a base learns from all of the text, not from answers alone."""
    conversations = map(instruct.conversation, pretraining(4000, BASE_RUN["seed"]))
    texts = [chat.plain(one, tokenizer)[0] for one in conversations]
    return [(ids[:-1], ids[1:]) for ids in texts]


def base_folder(make):
    """The folder of the built-in base. `make(folder)` is called if it is not there yet."""
    own = Path(__file__).read_bytes() + Path(__file__).with_name("tiny.json").read_bytes()
    recipe = hashlib.sha256(own).hexdigest()[:8]
    folder = Path(os.environ.get("QST_CACHE") or CACHE) / f"tiny-{recipe}"
    if not folder.is_dir():
        make_writable_folder(folder.parent, "QST_CACHE (the folder of the built-in base)")
        make(folder)
    return folder


@contextlib.contextmanager
def new_base(folder):
    """Give the body a temporary folder with a tokenizer, to save the base there. Afterwards the
    folder gets its name, so that nobody sees half a base."""
    folder = Path(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as unfinished:
            base = Path(unfinished) / "base"
            base.mkdir()
            train_tokenizer(base / "tokenizer.model")
            yield base
            os.rename(base, folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same
            message = f"{folder} could not be written ({error.strerror})"
            raise InputError(f"{message}: name another folder in the variable QST_CACHE.") from None


def task(n, seed):
    """What the side network learns: n different English stories, answered in French."""
    rng, made = random.Random(seed), {}
    while len(made) < n:
        question, answers = story(rng, ENGLISH)
        made[question] = answers[FRENCH]
    return [{"instruction": question, "output": answer} for question, answer in made.items()]


def load(cfg, tokenizer):
    """The built-in example: `Task`, scored by the answers that are right in every letter."""
    template = chat.load_template(tokenizer.folder)

    def score(model, held_out):
        found = instruct.samples(model, tokenizer, template, held_out[: cfg.eval_examples])
        right = [sample["answer"] == sample["expected"] for sample in found]
        return dict(exact_match=sum(right) / len(right), examples=len(right), samples=found[:2])

    conversations = [instruct.conversation(record) for record in task(2200, cfg.data_seed)]
    return instruct.make_task(conversations, tokenizer, template, cfg, score, EXAMPLE)


def train_tokenizer(path):
    """Train a sentencepiece tokenizer, of LLaMA's kind, on the language of the grammar."""
    import sentencepiece

    text = (frame(r["instruction"]) + r["output"] for r in pretraining(4000, seed=0))
    lines = [line for sample in text for line in sample.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(Path(path).with_suffix("")),
        vocab_size=VOCAB_SIZE, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        num_threads=1, minloglevel=2,
    )
