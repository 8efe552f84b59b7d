"""The whole suite on two cores: a second pytest takes tests from the last file on, this one from
the first, each the next that is free, until they meet. All results are reported here."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = "QST_TEST_HALVES"  # with a file for each test that is taken, and the second's reports
MANY = 20  # files, from which on a second process is worth its start


class Halves:
    """A plugin of pytest, in the first process and, where FOLDER is set, in the second."""

    def __init__(self, config):
        self.config, self.folder, self.child = config, os.environ.get(FOLDER), None

    def pytest_collection_modifyitems(self, items):
        self.numbers = {item: str(number) for number, item in enumerate(items)}
        if self.folder:  # the second
            files = list(dict.fromkeys(item.path for item in items))
            items.sort(key=lambda item: -files.index(item.path))

    def pytest_collection_finish(self, session):
        files = {item.path for item in session.items}
        alone = self.config.option.collectonly or (os.cpu_count() or 1) < 2
        if self.folder or alone or len(files) < MANY:
            return
        self.folder = tempfile.mkdtemp()
        call = self.config.invocation_params
        with open(Path(self.folder) / "output", "w") as output:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "pytest", *call.args], cwd=call.dir,
                env=os.environ | {FOLDER: self.folder}, stdout=output, stderr=output,
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Pass over, without a word, what the other process has taken."""
        if self.folder:
            try:
                (Path(self.folder) / self.numbers[item]).touch(exist_ok=False)
            except FileExistsError:
                return True
        return None

    def pytest_runtest_logreport(self, report):
        if self.folder and not self.child:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with open(Path(self.folder) / "reports", "a") as file:
                file.write(json.dumps(data) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        """Wait for the second process, and report its tests as if they had run here."""
        if not self.child:
            return
        if session.shouldstop or session.shouldfail or session.exitstatus == 2:
            self.child.terminate()
        ended, hook = self.child.wait(), self.config.hook
        reports = Path(self.folder) / "reports"
        for line in reports.read_text().splitlines() if reports.exists() else ():
            report = hook.pytest_report_from_serializable(
                config=self.config, data=json.loads(line)
            )
            if isinstance(report.longrepr, list):  # a tuple where and why one was skipped
                report.longrepr = tuple(report.longrepr)
            hook.pytest_runtest_logreport(report=report)
        if ended:
            session.exitstatus = 1
            print((Path(self.folder) / "output").read_text(), f"\nThe second process: {ended}.")
