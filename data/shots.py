"""Which answered examples stand before a question, `--shots K`: those after which the frozen model
answers best.

A side network can only read what the frozen model makes of a text, and a few examples with their
answers let it make more of it; how much more depends on which ones. So several sets are drawn, and
the model answers training examples after each. Half of the sets are left after a round, and are
judged by twice as many examples in the next: successive halving (arXiv 1502.07943).
"""

import random
from itertools import zip_longest

from tqdm import tqdm

from quant import InputError

SETS, JUDGES = 16, 16  # how many are drawn, and by how many examples each is judged at first


def take_shots(rows, number):
    """Of (sentences, label) rows, the first of each class in turn."""
    classes = {}
    for row in rows:
        classes.setdefault(row[1], []).append(row)
    in_turn = [row for turn in zip_longest(*classes.values()) for row in turn if row]
    if number > len(in_turn):
        raise InputError(f"--shots {number} is more than the {len(rows)} examples: give less.")
    return in_turn[:number]


def choose_shots(rows, number, loss, seed):
    """The set of `number` rows with the lowest loss, and that; rows in their order are one of those
    that are tried.

    loss: function of a set and of the rows that judge it; infinite where a set is too long
    """
    rng, judges = random.Random(seed), JUDGES
    orders = [rows, *(rng.sample(rows, len(rows)) for _ in range(SETS - 1))]
    sets = [take_shots(order, number) for order in orders]
    bar = tqdm(total=2 * SETS - 2, desc="shots", unit="set", leave=False)
    while len(sets) > 1:
        losses = []
        for one in sets:
            losses.append(loss(one, [row for row in rows[:judges] if row not in one]))
            bar.update()
        best = sorted(range(len(sets)), key=losses.__getitem__)[: len(sets) // 2]
        sets, judges = [sets[i] for i in best], 2 * judges
    bar.close()
    return sets[0], losses[best[0]]
