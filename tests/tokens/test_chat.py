"""data/tokens/chat.py: the formats of chat models, compared with their own templates.

Texts are compared with strings that are written out here; ids with those of the whole text, encoded
at once, and, where transformers is installed, with those of its `apply_chat_template`.
"""

import json
import shutil
from itertools import groupby

import pytest
from chat_templates import CHATML, LLAMA2, REFUSED, OTHERS, TEMPLATES
from helpers import FIXTURES, TEST_DATA, needs_test_data, say

from data import InputError, Refused
from data.tasks import instruct
from data.tokens import chat
from data.tokens.tokenizer import load_tokenizer

HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]  # which the fixtures lack
SYSTEM = {
    "SmolLM2": "<|im_start|>system\nBe S.<|im_end|>\n",
    "Qwen2.5": "<|im_start|>system\nYou are Q, made by A.\nDon't be \"un\"kind.<|im_end|>\n",
    "LLaMA-3.1": "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
}
CONVERSATIONS = [
    say("user: Hi"),
    say("user: Hi", "assistant: Hello! 1234"),
    say("system: Be brief.", "user:   Hi there \n", "assistant: Yes.\n\n"),
    say("system:  ", "user: \n\nA", "assistant: B ", "user: C\tD", "assistant: 日本👍"),
    say("system: ", "user: x", "assistant: y", "user: "),
    say("user: 1", "assistant: 2", "user: 3", "assistant: 4", "user: 5"),
]


@pytest.fixture(params=TEMPLATES)
def model(request, tmp_path):
    """(name, folder, tokenizer, template): a small tokenizer with the tokens of a format."""
    name, text = request.param, TEMPLATES[request.param]
    llama = name.startswith("LLaMA")
    return name, *make_folder(tmp_path, "llama3" if llama else "smollm2", text)


def make_folder(folder, kind, template):
    source = FIXTURES / "tokenizers" / kind
    spec = json.loads((source / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    for i, text in enumerate(HEADERS, 1):
        spec["added_tokens"].append(last | dict(content=text, special=True, id=last["id"] + i))
    config = dict(bos_token="<|begin_of_text|>", chat_template=template)
    config |= dict(eos_token="<|im_end|>" if kind == "smollm2" else "<|eot_id|>")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, load_tokenizer(folder), chat.load_template(folder)


def as_text(ids, tokenizer):
    """The text of ids, with the names of special tokens."""
    names, text, run = {id: text for text, id in tokenizer.special.items()}, "", []
    for id in [*ids, None]:
        if id is None or id in names:
            text += tokenizer.decode(run) + names.get(id, "")
            run = []
        else:
            run.append(id)
    return text


def learned(example, tokenizer):
    """The answers that an example teaches, each with its end."""
    ids, inside = example
    runs = groupby(zip(ids, inside), lambda one: one[1])
    return [as_text([id for id, _ in run], tokenizer) for on, run in runs if on]


def test_formats_are_the_templates_own(model):
    """The text of a conversation, default system prompt included, written out by hand."""
    name, _, tokenizer, template = model
    messages = say("user: Hi \n", "assistant: Yes?", "user: No")
    if "LLaMA" in name:
        bos, prompt = "<|begin_of_text|>", "Hi"
        line = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
        last = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    else:
        bos, prompt = "", "Hi \n"
        line, last = "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    said = ("user", prompt), ("assistant", "Yes?"), ("user", "No")
    rest = "".join(line.format(*one) for one in said) + last
    text = as_text(template.encode(messages, tokenizer)[0], tokenizer)
    assert text == bos + SYSTEM.get(name, "") + rest
    own = template.encode(say("system: Be.") + messages, tokenizer)[0]
    dates = SYSTEM[name].split("<|end_header_id|>\n\n")[1][:-10] if name == "LLaMA-3.1" else ""
    assert as_text(own, tokenizer) == bos + line.format("system", dates + "Be.") + rest


def test_ids_are_those_of_the_whole_text(model):
    """A conversation has the ids of its text, encoded at once; answers and their end tokens are
    what is trained on."""
    name, _, tokenizer, template = model
    strip = str.strip if "LLaMA" in name else str
    for messages in CONVERSATIONS:
        ids, _ = template.encode(messages, tokenizer)
        assert ids == tokenizer.encode(as_text(ids, tokenizer), special=True)
        answers = [strip(m["content"]) for m in messages if m["role"] == "assistant"]
        if messages[-1]["role"] == "assistant":
            (example,) = template.examples(messages, tokenizer)
            end = "<|eot_id|>" if "LLaMA" in name else "<|im_end|>"
            assert learned(example, tokenizer) == [answer + end for answer in answers]
        assert template.end_ids(tokenizer) == [tokenizer.eos_id]


def equal_transformers(folder, tokenizer, template, conversations=CONVERSATIONS):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for messages in conversations:
        options = dict(add_generation_prompt=messages[-1]["role"] != "assistant")
        try:
            want = theirs.apply_chat_template(messages, return_dict=False, **options)
        except Exception:
            with pytest.raises((InputError, Refused)):
                template.encode(messages, tokenizer)
        else:
            assert template.encode(messages, tokenizer)[0] == list(want)


def test_formats_equal_transformers(model):
    """Where transformers is installed: ids of its `apply_chat_template`."""
    equal_transformers(*model[1:])


@pytest.mark.parametrize("name", [*OTHERS, "Thoughts off"])
def test_other_templates(name, tmp_path):
    """Those of other models equal transformers' too, and their answers end as they should."""
    text = OTHERS[name.split(" off")[0]]
    text = "{% set enable_thinking = false %}" * name.endswith("off") + text
    folder, tokenizer, template = make_folder(tmp_path, "smollm2", text)
    for messages in CONVERSATIONS:
        if messages[-1]["role"] == "assistant" and (name, messages[0]["role"]) not in REFUSED:
            made = template.examples(messages, tokenizer)
            texts = [text for example in made for text in learned(example, tokenizer)]
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            assert len(texts) == len(answers)
            for text, answer in zip(texts, answers):
                assert answer.strip() in text and text.endswith("<|im_end|>")
    equal_transformers(folder, tokenizer, template)


@needs_test_data
def test_templates_from_outside(tmp_path):
    """The same, of the templates in the folder of test data."""
    for i, path in enumerate(sorted(TEST_DATA.rglob("*.jinja"))):
        (tmp_path / f"{i}").mkdir()
        equal_transformers(*make_folder(tmp_path / f"{i}", "smollm2", path.read_text()))


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    """Its answers are in examples of their own, each with the earlier turns as they are then; what
    the prompt begins and the answer does not have is not learned."""
    _, tokenizer, template = make_folder(tmp_path, "smollm2", OTHERS["Thoughts"])
    thought = "assistant: <think>\na\n</think>\n\nA"
    made = template.examples(say("user: 1", thought, "user: 2", "assistant: B"), tokenizer)
    start = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    first, second = (as_text(ids, tokenizer) for ids, _ in made)
    assert first == start + "<think>\na\n</think>\n\nA<|im_end|>\n"
    assert second == (start + "A<|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
                      "<think>\n\n</think>\n\nB<|im_end|>\n")
    assert [learned(one, tokenizer) for one in made] == [
        ["<think>\na\n</think>\n\nA<|im_end|>"], ["<think>\n\n</think>\n\nB<|im_end|>"]]
    assert template.encode(say("user: 1", thought), tokenizer) == made[0]


def test_a_question_is_not_learned(tmp_path):
    """Not even where the template puts the system message into the prompt, and not before the
    answer: of what it writes, the answer alone is learned."""
    _, tokenizer, template = make_folder(tmp_path, "smollm2", OTHERS["System last"])
    messages = say("system: Be.", "user: Hi", "assistant: Yes", "user: So?", "assistant: No")
    prompt = as_text(template.encode(messages[:2], tokenizer)[0], tokenizer)
    assert prompt == "<|begin_of_text|>[INST]Be.\n\nHi[/INST]"
    (made,) = template.examples(messages, tokenizer)
    assert "Be." not in as_text(made[0], tokenizer)
    assert [text.strip() for text in learned(made, tokenizer)] == ["Yes<|im_end|>", "No<|im_end|>"]


def test_the_end_of_a_prompt_is_the_start_of_the_answer(model):
    """What the model is prompted with is what stood before the answer in training."""
    _, _, tokenizer, template = model
    for messages in CONVERSATIONS[1:4]:
        prompt, _ = template.encode(messages[:-1], tokenizer)
        ids, inside = template.encode(messages, tokenizer)
        start = len(ids) - inside[::-1].index(True)
        while inside[start - 1]:
            start -= 1
        assert prompt == ids[:start]


def test_a_chat_template_has_an_input_below_the_question(model):
    """An Alpaca record's "input" is not lost in a format without a place for it."""
    _, _, tokenizer, template = model
    one = instruct.conversation({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert "Add.\n\n1 2<|" in as_text(template.encode(one, tokenizer)[0], tokenizer)


def test_an_answer_also_ends_where_its_marker_does(tmp_path):
    """A base model with a chat template may have another end token than its marker; a template that
    takes no such question and answer has the model's own."""
    make_folder(tmp_path, "smollm2", CHATML)
    config = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ends = [tokenizer.special["<|im_end|>"], tokenizer.special["<|eot_id|>"]]
    assert chat.load_template(tmp_path).end_ids(tokenizer) == ends
    picky = chat.ChatTemplate("{{ raise_exception('no') }}")
    assert picky.end_ids(tokenizer) == ends[1:]


def test_llama2_is_metas(tiny_model, tmp_path):
    """LLaMA-2's ids are those of Meta's rule: each turn with its answer, between bos and eos."""
    (tmp_path / "tokenizer.model").write_bytes((tiny_model / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=LLAMA2)))
    tokenizer, template = load_tokenizer(tmp_path), chat.load_template(tmp_path)
    messages = say(
        "system: Be brief.", "user: Hi", "assistant: Yes? ", "user:  Who", "assistant: Tom",
        "user: No",
    )
    want = [
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? ",
        "[INST] Who [/INST] Tom ",
        "[INST] No [/INST]",
    ]
    ids = []
    for i, text in enumerate(want):
        ids += [tokenizer.bos_id, *tokenizer.model.encode(text)] + [tokenizer.eos_id] * (i < 2)
    assert template.encode(messages, tokenizer)[0] == ids
    ((ids, inside),) = template.examples(messages[:-1], tokenizer)
    answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("Yes? ", "Tom ")]
    assert [id for id, on in zip(ids, inside) if on] == sum(answers, [])
    with pytest.raises(Refused, match="is refused by the chat template: must alternate"):
        template.encode(say("user: a", "user: a"), tokenizer)


def test_a_merged_model_keeps_its_format(tiny_model, tmp_path):
    """The plain format, written to a folder without a template, is recognized there, with the same
    ids; and Jinja renders the same text. A template that is there already stays."""
    folder = tmp_path / "merged"
    shutil.copytree(tiny_model, folder)
    for _ in range(2):
        chat.keep_plain_template(folder)
    kept, tokenizer = chat.load_template(folder), load_tokenizer(tiny_model)
    messages = say("system: Be kind.", "user: Who?", "assistant: Tom.", "user: Where?")
    framed = [*messages[:1], {**messages[1], "input": "A story."}, *messages[2:]]
    assert kept.encode(framed, tokenizer) == chat.ChatTemplate().encode(framed, tokenizer)
    assert kept.plain and kept.text and kept.end_ids(tokenizer) == tokenizer.eos_ids
    jinja = pytest.importorskip("jinja2").Environment(trim_blocks=True, lstrip_blocks=True)
    text = jinja.from_string(chat.WRITTEN_OUT).render(messages=messages, bos_token="<s>",
                                                      eos_token="</s>")
    said = as_text(chat.ChatTemplate().encode(messages, tokenizer)[0], tokenizer)
    assert text == said.replace("\n Tom", "\nTom")  # the tokenizer puts a space before a text
    (folder / "chat_template.jinja").write_text(CHATML)
    chat.keep_plain_template(folder)
    assert (folder / "chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize("system", [[], ["system: Be kind."]])
def test_a_prompt_keeps_as_many_turns_as_fit(system, tiny_model):
    """With exactly the room for the last n turns, these remain, down to one that is too long."""
    tokenizer, template = load_tokenizer(tiny_model), chat.ChatTemplate()
    for n in range(1, 5):
        lines = [f"user: Question {i}?\nassistant: Yes, {i}.".split("\n") for i in range(n)]
        for kept in range(1, n + 1):
            messages, want = (
                say(*system, *sum(part, [])[:-1]) for part in (lines, lines[n - kept :])
            )
            ids, _ = template.encode(want, tokenizer)
            fit = chat.prompt_that_fits(messages, tokenizer, template, len(ids))
            assert fit == (ids, want)
            if kept == 1:
                assert chat.prompt_that_fits(messages, tokenizer, template, len(ids) - 1) == fit


def test_a_long_conversation_is_encoded_few_times(tiny_model):
    """Finding the turns that fit encodes a few more turns than fit, a few times, of 1,000."""
    tokenizer, calls = load_tokenizer(tiny_model), []

    class Counted(chat.ChatTemplate):
        def encode(self, messages, tokenizer):
            calls.append(messages)
            return super().encode(messages, tokenizer)

    messages = say(*["user: Tom?", "assistant: Yes."] * 999, "user: Leo?")
    ids, kept = chat.prompt_that_fits(messages, tokenizer, Counted(), 64)
    assert len(ids) <= 64 and len(kept) > 1 and len(calls) < 15
    assert max(map(len, calls)) < 3 * len(kept)
