"""What the tests of SGLang could not test."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2] for report in skipped if "sglang" in report.nodeid}
    for reason in sorted(reasons):
        terminalreporter.write_sep("!", reason, yellow=True, bold=True)
