"""OASST1's trees of messages (arXiv 2304.07327), one conversation from each.

A file has one tree per line, {"prompt": {"role", "text", "rank", "replies": [...]}}, or one message
per line, {"message_id", "parent_id", "role", "text", "rank", ...}.
"""

import math

from data import InputError, Refused
from data.formats.fields import TABLE, TEXT, TRUE_OR_FALSE, first_few, list_of, number, shown

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
        raise Refused("answers a message that cannot be used, or is not in the file")
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


def grow_trees(records, path):
    """Join flat messages into trees: [(place of the prompt, tree or its `Refused`), ...]."""
    nodes, trees = {}, []
    for where, message in records:
        try:
            if not isinstance(message, dict) or not {"message_id", "parent_id"} <= message.keys():
                raise Refused('has no "message_id" and "parent_id", as the others have')
            check_message(message)
            id = message["message_id"]
            if id is None or id in nodes:
                raise Refused('has the "message_id" of another, or none', shown(id))
            nodes[id] = where, {**message, "replies": []}
        except Refused as error:
            trees.append((where, error))
    seen = []
    for where, node in nodes.values():
        if node["parent_id"] in nodes:
            nodes[node["parent_id"]][1]["replies"].append(node)
        else:  # a prompt, or a reply to a message that the file lacks, which `best_path` refuses
            trees.append((where, {"prompt": node, "tree_state": node.get("tree_state")}))
            seen.append(node)
    for node in seen:  # the list grows
        seen += node["replies"]
    if len(seen) < len(nodes):
        names = first_few(sorted(nodes.keys() - {node["message_id"] for node in seen}))
        raise InputError(f"{path}: the messages {names} answer each other in a ring: remove them.")
    return trees
