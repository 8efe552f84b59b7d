"""tests/fuzzing/fuzz.py, for a few seconds; and that it sees what it looks for."""

import subprocess
import sys

from helpers import ROOT, run_script

BROKEN = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/fuzzing"]
from data.formats import fields
def field(where, record, name, kind, absent=None):
    value = record.get(name.rpartition(".")[2])
    return absent if value is None else value
fields.field = field
import fuzz
sys.exit(fuzz.main(["--seconds", "1", "--only", "config LLaMA"]))
"""


def test_no_mutant_is_a_defect():
    """Mutants of every kind of file load, or are refused in one sentence."""
    printed = run_script("tests/fuzzing/fuzz.py", "--seconds", "1")
    last = printed.strip().split("\n")[-1].split()
    assert last[0] == "all" and int(last[1]) > 20 and last[4] == "0"


def test_a_reader_that_checks_nothing_is_found():
    """Where fields are taken out of a file without a look at them, the same run finds defects."""
    told = subprocess.run(
        [sys.executable, "-c", BROKEN.format(root=str(ROOT))], capture_output=True, text=True
    )
    assert told.returncode == 1 and "TypeError" in told.stdout, told.stdout + told.stderr
