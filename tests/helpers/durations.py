"""Recorded seconds of slow tests: `make quick` passes over them, every other target runs them.

    make durations     # runs the default tier and writes tests/durations.json anew

A test that took SLOW_S or more when that was recorded gets the mark `slow`. One without an entry is taken for quick.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "durations.json"
SLOW_S = 0.1  # after rounding to tenths
_seconds: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --record-durations."""
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.json")


# after conftest's own order, before the expression of -m is applied
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that were slow when durations were recorded."""
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    for item in items:
        if item.nodeid in recorded:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up a test's setup, call and teardown."""
    _seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the slow ones, where that was asked for and this process is no worker of xdist."""
    if session.config.getoption("--record-durations") and "PYTEST_XDIST_WORKER" not in os.environ:
        write_durations(FILE, _seconds)


def write_durations(file: Path, seconds: dict[str, float]) -> None:
    """Write the tests of SLOW_S or more, by name, to a tenth of a second."""
    rounded = {name: round(value, 1) for name, value in sorted(seconds.items())}
    slow = {name: value for name, value in rounded.items() if value >= SLOW_S}
    file.write_text(json.dumps(slow, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
