"""data/tasks/examples.py and scoring.py: batches, splits, losses, and logits of next tokens."""

import itertools
import time

import pytest
import torch
from helpers import FAMILIES, shaken, small_base

from data import IGNORE_INDEX, InputError
from data.tasks.examples import (
    Task, batches, collate, iteration_batches, prefetch, split,
)
from data.tasks.glue import ANSWER, FORMS
from data.tasks.scoring import choice_logits, mean_loss, word_ids
from data.tokens.tokenizer import load_tokenizer
from model import token_loss
from qst import QST, SharedBase
from side import SideConfig
from train import TrainConfig


def test_batches_have_every_example_once_an_epoch():
    """Batches have examples of similar lengths, padded on the right, each once an epoch."""
    examples = [([i] * (1 + i % 37), [i] * (1 + i % 37)) for i in range(1, 301)]
    stream = batches(examples, 8, seed=0)
    seen, filled, room = [], 0, 0
    while len(seen) < 300:
        idx, targets = collate(next(stream))
        assert idx.shape == targets.shape and len(idx) <= 8
        seen += idx[:, 0].tolist()
        filled, room = filled + (targets != IGNORE_INDEX).sum().item(), room + targets.numel()
        assert torch.equal(idx != 0, targets != IGNORE_INDEX)
    assert sorted(seen) == list(range(1, 301))
    assert filled / room > 0.9  # at random, 0.6
    assert next(batches(examples, 8, 5)) == next(batches(examples, 8, 5))


@pytest.mark.parametrize("n, epochs, steps", [(9, 10, 1), (64, 1, 1), (7, 1, 3), (20, 3, 4)])
def test_epochs_read_every_example_so_often(n, epochs, steps):
    """No iteration more is needed, and none less: counted in the batches themselves. An epoch's
    last batch may be small."""
    task = Task([([i], [i]) for i in range(n)], [], preamble="p")
    cfg = task.settled(TrainConfig(epochs=epochs, batch_size=8, gradient_accumulation_steps=steps))
    assert (cfg.epochs, cfg.preamble) == (None, "p")
    stream, seen = iteration_batches(task.train, 8, steps, seed=0), []
    for iteration in range(1, cfg.max_iters + 1):
        assert min(map(seen.count, range(n))) < epochs
        seen += [i for idx, *_ in next(stream) for i in idx[:, 0].tolist()]
    assert min(map(seen.count, range(n))) >= epochs
    assert task.settled(TrainConfig(max_iters=5, batch_size=8)).max_iters == 5


def test_an_example_is_shown_with_what_it_trains(tokenizer):
    """From its ids and targets, with special tokens, on one line, and cut in the middle; of a
    classifier there is nothing to show."""
    ids = [tokenizer.bos_id, *tokenizer.encode("Why?\n\x1b[2J"), *tokenizer.encode("So."), 2]
    on = len(tokenizer.encode("So.")) + 1
    targets = [IGNORE_INDEX] * (len(ids) - 1 - on) + ids[-on:]
    show = lambda *example, **more: [*Task([example], [], **more).marked(tokenizer)]
    end = f": {on} of {len(ids) - 1} tokens trained"
    assert show(ids[:-1], targets) == [f"example     <s> Why?\\n\\x1b[2J[[ So.</s>]]{end}"]
    assert show(ids[:-1], targets, n_labels=2) == [] == [*Task([], []).marked(tokenizer)]
    lacking = tokenizer.vocab_size  # config.json may name an end that has no token
    assert show([lacking], [lacking]) == ["example     [[]]: 1 of 1 tokens trained"]
    yes = tokenizer.encode("yes")
    word = tokenizer.token_bytes[yes[0]].decode()
    targets = [IGNORE_INDEX] * (len(ids) - 1) + [yes[0]]
    assert f"[[{word}]]: 1 of" in show(ids, targets)[0]
    long = tokenizer.encode("Tom went to the woods. " * 20)
    (line,) = show(long, long[1:] + [IGNORE_INDEX])
    assert " ... " in line and line.count("[[") == 1 and len(line) < 160


def test_an_iterations_batches_share_its_targets():
    """A batch's share is its part of the targets. A run that continues gets the same batches as one
    without a break."""
    examples = [([i] * n, [i] * n) for i, n in enumerate((1, 2, 3, 5, 8, 13, 21), start=1)]
    stream = iteration_batches(examples, 2, 3, seed=0)
    first, second = next(stream), next(stream)
    for parts in (first, second):
        counts = [(targets != IGNORE_INDEX).sum().item() for _, targets, _ in parts]
        assert [share for *_, share in parts] == [n / sum(counts) for n in counts]
    again = next(iteration_batches(examples, 2, 3, seed=0, start=1))
    for one, two in zip(second, again, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_each_epoch_has_an_order_of_its_own():
    """Which examples share a batch is drawn anew, and so is the order of the batches."""
    examples = [([i], [i]) for i in range(64)]  # of one length, which decides nothing
    stream = batches(examples, 8, seed=0)
    epoch = lambda: {frozenset(ids[0] for ids, _ in next(stream)) for _ in range(8)}
    first, second = epoch(), epoch()
    assert not first & second and not first & {frozenset(range(i, i + 8)) for i in range(0, 64, 8)}
    stream = batches([([5] * n, [5] * n) for n in range(1, 33)], 4, seed=0)
    epoch = lambda: [len(next(stream)[0][0]) for _ in range(8)]  # the shortest of each batch
    one, two = epoch(), epoch()
    assert sorted(one) == sorted(two) != one != two


def test_the_next_batch_is_made_while_one_is_in_use():
    """One ahead, in order, and none left out."""
    made = []
    ready = prefetch(made.append(i) or i for i in itertools.count())
    for i in range(5):
        assert next(ready) == i
        for _ in range(1000):
            if len(made) > i + 1:
                break
            time.sleep(0.001)
        assert made == [*range(i + 2)]


def test_the_mean_loss_is_that_of_a_target(base):
    """Every target weighs the same, whichever batch it is in, and however many others are there."""
    examples = [([5 + n] * n, [IGNORE_INDEX] * (n // 2) + [7] * (n - n // 2)) for n in range(1, 9)]
    losses = [token_loss(base(torch.tensor([ids])), torch.tensor([targets]), "sum").item()
              for ids, targets in examples]
    expected = sum(losses) / sum(n - n // 2 for n in range(1, 9))
    for batch_size in (1, 3, 100):
        (loss,) = mean_loss(SharedBase([base]), examples, batch_size)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_split_is_by_seed_and_disjoint():
    """Every example is in one of the two parts; `most` takes so many of them."""
    train, held_out = split(list(range(100)), 0.1, seed=3)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(100))
    assert split(list(range(100)), 0.1, 3) == (train, held_out)
    assert split(list(range(100)), 0.1, 4)[1] != held_out
    assert sum(map(len, split(list(range(100)), 0.1, 3, most=20))) == 20


def test_labels_are_asked_for_once():
    """A label is the target of the last token alone."""


def test_word_ids(tiny_model):
    """The ids are what the tokenizer makes of the words after the question, and all differ."""
    tokenizer = load_tokenizer(tiny_model)
    for form in (form for task, form in FORMS.items() if task != "stsb"):
        ids = word_ids(tokenizer, form.words, ANSWER)
        for word, id in zip(form.words, ids):
            assert tokenizer.encode(f"x{ANSWER} {word}")[len(tokenizer.encode(f"x{ANSWER}"))] == id
    with pytest.raises(InputError, match="begins several of yes, yes alike"):
        word_ids(tokenizer, ("yes", "yes"), ANSWER)


@pytest.mark.parametrize("family, quant, side", [
    ("qwen3", "nf4", False), ("opt", "none", False), ("qwen3", "nf4", True),
    ("opt", "nf4", True),
])
@pytest.mark.parametrize("shared", [0, 1, 17])
def test_batched_logits_are_those_of_one_by_one(family, quant, side, shared):
    """In any batch, behind a common beginning of any length, and in the prompts' order."""
    model = small_base(quant, **FAMILIES[family])
    if side:
        model = shaken(QST(model, SideConfig(reduction=4, rank=2)))
    draw = torch.Generator().manual_seed(1)
    row = lambda size: torch.randint(3, 61, (size,), generator=draw).tolist()
    prefix = row(shared)
    prompts = [prefix + row(size) for size in (9, 3, 20, 1, 14, 3, 8)]
    if shared == 17:
        prompts.append(prefix)  # nothing but what all have
    last = lambda prompt: model.head(model.hidden(torch.tensor([prompt])))[:, -1]
    with torch.no_grad():
        one_by_one = torch.cat([last(prompt) for prompt in prompts])
    for batch_size in (1, 3, 100):
        (logits,) = choice_logits(SharedBase([model]), prompts, None, batch_size)
        torch.testing.assert_close(logits, one_by_one, atol=1e-5, rtol=1e-5)
    (chosen,) = choice_logits(SharedBase([model]), prompts, [7, 4, 60], 3)
    torch.testing.assert_close(chosen, one_by_one[:, [7, 4, 60]], atol=1e-5, rtol=1e-5)
    assert chosen.dtype == torch.float32 and not chosen.requires_grad
    with pytest.raises(InputError, match="longer than the model's 64 positions"):
        choice_logits(SharedBase([model]), [[5] * 65], None, 1)
