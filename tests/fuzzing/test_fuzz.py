"""tests/fuzzing/fuzz.py, for a few mutants; and that it sees what it looks for."""

import sys

import fuzz
from helpers import run_script

from data.formats import fields


def test_no_mutant_is_a_defect():
    """Mutants of every kind of file load, or are refused in one sentence."""
    printed = run_script("tests/fuzzing/fuzz.py", "--mutants", "2")
    last = printed.strip().split("\n")[-1].split()
    assert last[0] == "all" and int(last[1]) == 2 * len(fuzz.READERS) and last[4] == "0"


def test_a_reader_that_checks_nothing_is_found(monkeypatch, capsys):
    """Where fields are taken out of a file without a look at them, the same run finds defects."""

    def field(where, record, name, kind, absent=None):
        value = record.get(name.rpartition(".")[2])
        return absent if value is None else value

    right = fields.field
    for module in list(sys.modules.values()):
        if getattr(module, "field", None) is right:
            monkeypatch.setattr(module, "field", field)
    assert fuzz.main(["--mutants", "40", "--only", "config LLaMA"]) == 1
    assert "TypeError" in capsys.readouterr().out
