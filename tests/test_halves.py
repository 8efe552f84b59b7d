"""halves.py: two processes run every test once, and what fails in either one fails."""

import os
import re
import subprocess
import sys

import halves
import pytest
from helpers import ROOT


def suite(folder, last):
    """Run a suite of many files in two processes; the last file is of the second, for whom the
    first one waits."""
    (folder / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import halves; halves.MANY = 3; halves.os.cpu_count = lambda: 2\n"
        "def pytest_configure(config): config.pluginmanager.register(halves.Halves(config))\n"
    )
    mark = folder / "the second is there"
    here = "import time\nfrom pathlib import Path\nMARK = Path(" + repr(str(mark)) + ")\n"
    wait = "for _ in range(60000):\n        MARK.exists() or time.sleep(0.01)"
    for i in range(5):
        does = f"{wait}" if i == 0 else f"MARK.touch(); {last}" if i == 4 else "pass"
        body = f"{here}def test_a(): pass\ndef test_b():\n    {does}\n"
        (folder / f"test_{i}.py").write_text(body)
    env = {name: value for name, value in os.environ.items() if name != halves.FOLDER}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", folder],
        cwd=folder, env=env, capture_output=True, text=True,
    )


@pytest.mark.parametrize("last, found", [
    ("pass", "^10 passed"), ("assert 1 == 2", "assert 1 == 2"),
    ("__import__('pytest').skip('why')", "(?s)test_4.py:6: why.*^9 passed, 1 skipped"),
    ("__import__('os')._exit(7)", "The second process: 7"),
    ("__import__('os')._exit(1)", "The second process: 1"),  # as after a test that hangs
], ids=["pass", "failure", "skip", "crash", "exit"])
def test_every_test_counts(last, found, tmp_path):
    result = suite(tmp_path, last)
    assert re.search(found, result.stdout, re.MULTILINE), result.stdout
    assert (result.returncode == 0) == ("passed" in found)
