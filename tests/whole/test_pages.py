"""The pages: short sentences and paragraphs, and links that lead somewhere; help texts."""

import re
from dataclasses import fields

import pytest
from helpers import ROOT

import qst
from train import TrainConfig

WORDS = {  # of a page, tables and code included
    "README.md": 1900, "data/README.md": 1500, "tests/README.md": 1500, "tests/RESULTS.md": 1500,
    "tests/COMPARISON.md": 1500, "tests/MEMORY.md": 1500, "tests/PAPER.md": 1500,
    "tests/FEATURES.md": 1500, "tests/NEGATIVE.md": 1500, "tests/lectures/README.md": 1500,
    "tests/exercises/README.md": 1500,
    "tests/build/README.md": 1500, "tests/lectures/FIGURE.md": 700, "tests/AGENTS.md": 250,
    "tests/CLAUDE.md": 10, "tests/exercises/SOLUTIONS.md": 1500,
    "tests/lectures/1-four-bits.md": 1500, "tests/lectures/2-side-network.md": 1500,
    "tests/lectures/3-memory.md": 1500,
}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("data/*.md")), *sorted(ROOT.glob("tests/**/*.md"))]


def prose(text):
    """The paragraphs of a page, and the items of its lists, without code, tables and links."""
    text = re.sub(r"```.*?```|</summary>", "\n\n", text, flags=re.S)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.split("\n") if " | " not in line and not line.startswith("#")]
    text = re.sub(r"\n(\s*[-*] |\s*\d+\. )", r"\n\n\1", "\n".join(lines))
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(paragraph):
    paragraph = re.sub(r"`[^`]*`", "Code", paragraph)  # a dot in it ends nothing
    return re.split(r"(?<=[.!?:;])\s+(?=[A-Z*(`\d])|(?<=[.!?][*)])\s+", paragraph)


@pytest.mark.parametrize("name", WORDS)
def test_a_page_is_short(name):
    """In words, in paragraphs of 80 words and in sentences of 25."""
    text = (ROOT / name).read_text()
    assert len(text.split()) <= WORDS[name]
    for paragraph in prose(text):
        assert len(paragraph.split()) <= 80, paragraph
        for sentence in sentences(paragraph):
            assert len(sentence.split()) <= 25, sentence


def test_the_first_page_is_one_that_people_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """To a file that is there, and to a heading of it."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        page, _, anchor = target.partition("#")
        if "://" in page:
            continue
        other = (path.parent / page).resolve() if page else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_help_texts_are_noun_phrases():
    """They do not begin with "of", nor with a capital letter or an article."""
    texts = {f.name: f.metadata["help"] for f in fields(TrainConfig) if f.metadata["flag"]}
    texts |= {name: flag["help"] for name, flag in qst.FLAGS.items()}
    for name, text in texts.items():
        assert text and not re.match(r"of |what |which |the |a ", text, re.I), (name, text)
        assert not text.endswith("."), (name, text)


def test_every_page_is_measured():
    """But for the archive, which nobody must read."""
    pages = {str(path.relative_to(ROOT)) for path in PAGES}
    assert pages - {"tests/NOTEBOOK.md"} == set(WORDS)
