"""In CI a skipped test outside the allow-list fails the run: a suite that quietly skips proves nothing.

`tests/allowed_skips.txt` holds one `node-id-glob | reason` a line.
"""

import fnmatch
import os
from pathlib import Path

import pytest

ALLOWED = Path(__file__).parent / "allowed_skips.txt"


def allowed_globs() -> list[str]:
    lines = (line.split("#")[0].strip() for line in ALLOWED.read_text().splitlines())
    return [line.split("|")[0].strip() for line in lines if line]


class StrictSkips:
    def __init__(self) -> None:
        self.offenders: list[str] = []
        self.globs = allowed_globs()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._judge(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._judge(report.nodeid)

    def _judge(self, node_id: str) -> None:
        if not any(fnmatch.fnmatch(node_id, glob) for glob in self.globs):
            self.offenders.append(node_id)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.offenders and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.offenders:
            terminalreporter.section("skipped outside tests/allowed_skips.txt", red=True, bold=True)
            for node_id in self.offenders:
                terminalreporter.line(node_id)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI"):
        config.pluginmanager.register(StrictSkips(), "strict-skips")
