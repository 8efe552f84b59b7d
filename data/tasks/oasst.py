"""OASST1's trees of messages (arXiv 2304.07327), one conversation from each.

A file has one tree per line, {"prompt": {"role", "text", "rank", "replies": [...]}}. OASST1's other
form, one message per line, is not read: the trees hold the same.
"""

import math

from data import Refused
from data.formats.fields import TABLE, TEXT, TRUE_OR_FALSE, list_of, number, shown

FIELDS = {  # of a message: their kinds, if they are neither missing nor null
    "rank": number(0, 1 << 30), "deleted": TRUE_OR_FALSE, "review_result": TRUE_OR_FALSE,
    "tree_state": TEXT,
}


def check_message(node):
    for name, kind in FIELDS.items():
        if node.get(name) is not None and not kind.fits(node[name]):
            raise Refused(f'has a "{name}" that is not {kind.text}', shown(node[name]))


def best_path(tree):
    """Follow the best replies through a tree, from its prompt to an answer.

    The best answer has the lowest rank, and the best question is the first one with an answer.
    """
    check_message(tree)
    if tree.get("tree_state") not in (None, "ready_for_export"):
        raise Refused("is a tree that is not ready for export", shown(tree["tree_state"]))
    path, questions = [], [tree["prompt"]]
    while question := next(filter(replies, questions), None):
        answer = replies(question)[0]
        path += [question, answer]
        questions = replies(answer)
    return path


def replies(node):
    """List the replies that are neither deleted nor rejected. Those without a rank come last."""
    nodes = [] if node.get("replies") is None else node["replies"]
    if not list_of(TABLE).fits(nodes):
        raise Refused('has something that is not a list of messages in "replies"')
    for one in nodes:
        check_message(one)
    valid = [n for n in nodes if not n.get("deleted") and n.get("review_result") is not False]
    return sorted(valid, key=lambda n: math.inf if n.get("rank") is None else n["rank"])
