"""OASST1's trees of messages (arXiv 2304.07327), one conversation from each.

A file has one tree per line, {"prompt": {"role", "text", "rank", "replies": [...]}}, or one message
per line, {"message_id", "parent_id", "role", "text", "rank", ...}.
"""

import math

from data import Refused
from data.formats.fields import TABLE, TEXT, TRUE_OR_FALSE, list_of, number, shown

FIELDS = {  # of a message: their kinds, if they are neither missing nor null
    "rank": number(0, 1 << 30), "deleted": TRUE_OR_FALSE, "review_result": TRUE_OR_FALSE,
    "message_id": TEXT, "parent_id": TEXT, "tree_state": TEXT,
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
    if tree["prompt"].get("parent_id") is not None:
        raise Refused("answers a message that cannot be used, or does not stand before it")
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


def grow_trees(records):
    """Join flat messages into trees: [(place of the prompt, tree or its `Refused`), ...].

    A reply stands behind its message, as in OASST1's files, which go through each tree in depth.
    """
    nodes, trees = {}, []
    for where, message in records:
        try:
            if not isinstance(message, dict) or not {"message_id", "parent_id"} <= message.keys():
                raise Refused('has no "message_id" and "parent_id", as the others have')
            check_message(message)
            id = message["message_id"]
            if id is None or id in nodes:
                raise Refused('has the "message_id" of another, or none', shown(id))
            parent, nodes[id] = nodes.get(message["parent_id"]), {**message, "replies": []}
            if parent:
                parent["replies"].append(nodes[id])
            else:  # a prompt, or a reply, which `best_path` refuses
                tree = {"prompt": nodes[id], "tree_state": message.get("tree_state")}
                trees.append((where, tree))
        except Refused as error:
            trees.append((where, error))
    return trees
