"""OASST1's trees of messages (arXiv 2304.07327): from each, one conversation.

A file has a tree a line, {"prompt": {"role", "text", "rank", "replies": [...]}}; or it is flat, a
message a line, {"message_id", "parent_id", "role", "text", "rank", ...}.
"""

import math

from data import InputError, Refused
from data.formats.fields import TABLE, TEXT, TRUE_OR_FALSE, first_few, list_of, number, shown

FIELDS = {  # of a message: what they must be where they are there, and not null
    "rank": number(0, 1 << 30), "deleted": TRUE_OR_FALSE, "review_result": TRUE_OR_FALSE,
    "message_id": TEXT, "parent_id": TEXT, "tree_state": TEXT,
}


def check_message(node):
    """Refuse a message with fields that are not what they should be."""
    for name, kind in FIELDS.items():
        if node.get(name) is not None and not kind.fits(node[name]):
            raise Refused(f'has "{name}" {shown(node[name])}, which must be {kind.text}')


def best_path(prompt):
    """Follow the best replies through a tree of OASST1, from its prompt to an answer.

    Of several answers, that of the lowest rank is taken. Of several questions, which nobody
    ranked, the first that was answered. Deleted and rejected messages are not followed.
    """
    path, question = [], prompt
    while question and replies(question):
        answer = replies(question)[0]
        path += [question, answer]
        question = next(filter(replies, replies(answer)), None)
    return path


def replies(node):
    """The replies to a message that stand, the best first; one without a rank comes last."""
    nodes = [] if node.get("replies") is None else node["replies"]
    if not list_of(TABLE).fits(nodes):
        raise Refused('has something that is not a list of messages in "replies"')
    for one in nodes:
        check_message(one)
    stand = [n for n in nodes if not n.get("deleted") and n.get("review_result") is not False]
    return sorted(stand, key=lambda n: math.inf if n.get("rank") is None else n["rank"])


def grow_trees(records, path):
    """Join the flat messages of OASST1 to trees: [(where its prompt stands, the tree), ...]."""
    nodes = {}
    for where, message in records:
        refuse = lambda why: InputError(f"{path}, {where} {why}: mend or remove it.")
        if not isinstance(message, dict) or not {"message_id", "parent_id"} <= message.keys():
            raise refuse('has no "message_id" and "parent_id", which others have')
        try:
            check_message(message)
        except Refused as error:
            raise refuse(error) from None
        if message["message_id"] is None or message["message_id"] in nodes:
            raise refuse(f'has the "message_id" {shown(message["message_id"])} of another, or none')
        nodes[message["message_id"]] = where, {**message, "replies": []}
    trees, seen = [], []
    for where, node in nodes.values():
        if node["parent_id"] is None:
            trees.append((where, {"prompt": node, "tree_state": node.get("tree_state")}))
        if node["parent_id"] in nodes:
            nodes[node["parent_id"]][1]["replies"].append(node)
        else:  # what answers a message that was left out is lost with it
            seen.append(node)
    for node in seen:  # which grows
        seen += node["replies"]
    if len(seen) < len(nodes):
        names = first_few(sorted(nodes.keys() - {node["message_id"] for node in seen}))
        raise InputError(f"{path}: the messages {names} answer each other in a ring: remove them.")
    return trees
