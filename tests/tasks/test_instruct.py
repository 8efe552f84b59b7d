"""data/tasks/instruct.py makes ids, targets and answers of conversations."""

from types import SimpleNamespace

import pytest
import torch
from helpers import say

from data import IGNORE_INDEX, InputError
from data.tasks import instruct
from data.tokens import chat
from data.tokens.chat import ChatTemplate
from model import from_pretrained

PLAIN = ChatTemplate()


def test_answers_after_rewritten_turns_are_examples_of_their_own(tokenizer):
    """Where a template begins otherwise after each turn, each answer is learned once, if it is not
    too far from the beginning; a conversation is in one half of the data."""
    text = "{{ (messages | length + 1) // 2 }}"
    text += "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    made = say(*["user: a", "assistant: b", "user: c", "assistant: d"])
    answers = [
        [t for t in targets if t != IGNORE_INDEX]
        for _, targets in instruct.examples(made, tokenizer, ChatTemplate(text), 99)
    ]
    assert answers == [[*tokenizer.encode(text), tokenizer.eos_id] for text in "bd"]
    cfg = SimpleNamespace(
        held_out=0.5, data_seed=0, max_examples=0, eval_only=False, sequence_len=99, data="x",
    )
    task = instruct.make_task([made, made], tokenizer, ChatTemplate(text), cfg, None)
    assert len(task.train) == len(task.held_out) == 2 and not task.notes
    assert len(instruct.examples(made, tokenizer, ChatTemplate(text), 7)) == 1


def test_a_first_token_is_no_target(tokenizer):
    """An answer that is all of the text, in one token, leaves nothing to learn."""
    text = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    word = next(w for w in "abcdefgh" if len(tokenizer.encode(w)) == 1)
    made = say("user: Why?", f"assistant: {word}")
    assert instruct.examples(made, tokenizer, ChatTemplate(text), 99) == []


def test_the_plain_frame(tokenizer):
    """Ids are bos, the frame, the answer and eos; input and system message have their places."""
    answer = [*tokenizer.encode("3"), tokenizer.eos_id]
    for given, text in (
        ("1 2", "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
        ("", "### Instruction:\nAdd.\n\n### Response:\n"),
    ):
        record = {"instruction": "Add.", "input": given, "output": "3"}
        ((ids, targets),) = instruct.examples(instruct.conversation(record), tokenizer, PLAIN, 200)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text), *answer[:-1]]
        assert [t for t in targets if t != IGNORE_INDEX] == answer
    ids, inside = PLAIN.encode(say("system: S", "system: T", "user: q"), tokenizer)
    text = "S\n\nT\n\n### Instruction:\nq\n\n### Response:\n"
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text)] and not any(inside)


def test_targets_are_the_answers_tokens(tokenizer):
    """A target is the next id inside an answer, its end included, and else IGNORE_INDEX."""
    record = {"instruction": "Where was Tom?", "input": "Tom went to the lake.", "output": "lake"}
    ((ids, targets),) = instruct.examples(instruct.conversation(record), tokenizer, PLAIN, 200)
    answer = [t for t in targets if t != IGNORE_INDEX]
    assert answer == tokenizer.encode("lake") + [tokenizer.eos_id]
    assert ids[0] == tokenizer.bos_id and len(ids) == len(targets)
    assert targets[-1] == tokenizer.eos_id and ids[-1] != tokenizer.eos_id
    start = targets.index(answer[0])
    assert ids[start + 1 :] == answer[:-1]
    text = tokenizer.decode(ids[: start + 1])
    assert text.strip() == chat.frame(record["instruction"], record["input"]).strip()


def test_every_assistant_turn_is_trained_on(tokenizer):
    """The targets are all answers; the prompt is what stands before the last one."""
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Tom"}, {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "the lake"},
    ]
    made = instruct.conversation({"messages": messages})
    assert made == messages
    ((ids, targets),) = instruct.examples(made, tokenizer, PLAIN, 300)
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("Tom", "the lake")]
    assert [t for t in targets if t != IGNORE_INDEX] == answers[0] + answers[1]
    assert "Be short." in tokenizer.decode(ids)
    prompt, _ = PLAIN.encode(made[:-1], tokenizer)
    assert prompt == ids[: len(ids) - len(tokenizer.encode("the lake"))]
    assert instruct.with_input(made[-2]) == "Where?"


def test_long_sequences_are_cut(tokenizer):
    """An answer is cut at the limit; an example whose prompt fills it is given up."""
    long = instruct.conversation({"instruction": "Say much.", "output": "lake " * 50})
    (whole,) = instruct.examples(long, tokenizer, PLAIN, 1000)
    ((ids, targets),) = instruct.examples(long, tokenizer, PLAIN, 40)
    assert len(ids) == 40 and ids == whole[0][:40] and targets == whole[1][:40]
    assert instruct.examples(long, tokenizer, PLAIN, 5) == []


def test_long_conversations_lose_their_beginning(tokenizer, tiny_model):
    """A conversation that is too long loses whole turns, oldest first, as in a chat; a single
    question that is too long loses its own beginning. The answer keeps its room."""
    model = from_pretrained(tiny_model, "nf4", torch.float32)
    turn = lambda i: "assistant: Yes." if i % 2 else f"user: Question {i}, is it so?"
    turns = [turn(i) for i in range(41)]
    conversations = [
        say(*turns, "assistant: Yes."), say("user: short", "assistant: a"),
        say("user: " + "very long " * 200 + "end", "assistant: a"),
    ]
    answers = lambda some: [s["answer"] for s in instruct.samples(model, tokenizer, PLAIN, some)]
    found = answers(conversations)
    assert len(found) == 3
    alone = [answers([one])[0] for one in conversations]
    assert len(found[1]) > 20 and alone[1].startswith(found[1][:20])
    ids, kept = chat.prompt_that_fits(conversations[0][:-1], tokenizer, PLAIN, 96)
    assert len(ids) <= 96 and kept[0]["role"] == "user"
    assert kept == conversations[0][:-1][-len(kept) :]
    assert len(chat.prompt_that_fits(conversations[0][:-1], tokenizer, PLAIN, 999)[1]) == 41


class Echo:
    """A model of 40 positions that says the last id of its prompt, and remembers the prompt."""

    device, config = "cpu", SimpleNamespace(max_positions=40)

    def generate(self, idx, new, **more):
        self.seen = idx[0].tolist(), new
        return torch.cat([idx, idx[:, -1:]], dim=1)


def test_a_question_that_is_too_long_loses_its_front(tokenizer):
    """The prompt keeps its end, leaves room for an answer, and does not contain the answer."""
    model, one = Echo(), say("user: " + "Tom went to the lake. " * 9, "assistant: lake")
    instruct.samples(model, tokenizer, PLAIN, [one])
    whole, _ = PLAIN.encode(one[:-1], tokenizer)
    assert len(whole) > 40 and model.seen == (whole[-30:], 10)


@pytest.mark.parametrize("eval_only", [False, True])
def test_all_is_held_out_where_nothing_is_trained(tokenizer, eval_only):
    """Of twenty conversations a tenth, and with --eval_only every one."""
    found = [say(f"user: Is it {i}?", "assistant: yes") for i in range(20)]
    cfg = dict(held_out=0.1, data_seed=1, max_examples=0, sequence_len=60, eval_only=eval_only)
    score = lambda model, held_out: len(held_out)
    task = instruct.make_task(found, tokenizer, PLAIN, SimpleNamespace(**cfg), score)
    sizes = len(task.train), len(task.held_out), task.score(SimpleNamespace(models=[None]))[0]
    assert sizes == ((0, 20, 20) if eval_only else (18, 2, 2))
    if eval_only:  # and none that fits is refused
        cfg |= dict(sequence_len=2, data="F")
        with pytest.raises(InputError, match="F leaves nothing to score: 20 .* --sequence_len 2"):
            instruct.make_task(found, tokenizer, PLAIN, SimpleNamespace(**cfg), score)


def test_a_question_that_will_be_asked_must_be_taken(tokenizer):
    """A turn behind the limit is never trained on, so that a template may refuse it; but the last
    question of what is held out is asked, and such a conversation is left out."""
    text = "{% for m in messages %}{% if m.content == 'Stop' %}{{ raise_exception('no') }}"
    template = ChatTemplate(text + "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}")
    one = say("user: a", "assistant: " + "lake " * 30, "user: Stop", "assistant: b")
    cfg = SimpleNamespace(
        held_out=0.5, data_seed=0, max_examples=0, eval_only=False, sequence_len=9, data="x",
    )
    task = instruct.make_task([one] * 4, tokenizer, template, cfg, None)
    why = "held-out examples left out: each is refused by the chat template: no"
    assert len(task.train) == 2 and not task.held_out and task.notes == [f"2 {why}"]
