"""Skips and expected failures are counted, and in CI one that tests/allowed_skips.toml does not list fails the run.

A skip is a test that proved nothing. Where CI=true the run ends with status 1 if a test or a whole file was skipped,
or failed as expected, and no entry of the list allows it; elsewhere the same lines are information. The controller
judges: xdist hands it the reports of its workers, those of collection too. Entries that matched in no run of this
checkout are named: they may be stale.
"""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "allowed_skips.toml"
FIELDS = {"test", "reason", "why", "machine"}
CACHE_KEY = "sartor/allowed_skips"
FALSE = ("", "0", "false", "no")


@dataclass(frozen=True)
class Skip:
    """A skipped test. test: its id, or a file's; reason: what pytest.skip, a mark or xfail says; kind: skipped or xfailed."""

    test: str
    reason: str
    kind: str


@dataclass(frozen=True)
class Allowed:
    """A skip that may happen. test, reason: patterns with * and ?, either of them empty for any.

    why: the reason why that is no loss; machine: the kind of machine on which it happens.
    """

    test: str
    reason: str
    why: str
    machine: str

    @property
    def name(self) -> str:
        """The entry in a word or two."""
        return " ".join(part for part in (self.test, self.reason and f'"{self.reason}"') if part)

    def matches(self, skip: Skip) -> bool:
        """Whether this entry allows that skip."""
        return _fits(skip.test, self.test) and _fits(skip.reason, self.reason)


def _fits(text: str, pattern: str) -> bool:
    # the brackets of a parametrised test's id are letters, not a set of them
    return not pattern or fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def read_allowed(file: Path) -> list[Allowed]:
    """Read the list. Raises pytest.UsageError if an entry lacks a field or allows everything."""
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8")).get("skip", [])
    except tomllib.TOMLDecodeError as error:
        raise pytest.UsageError(f"{file} is not TOML: {error}") from None
    for number, entry in enumerate(entries, 1):
        if unknown := sorted(set(entry) - FIELDS):
            raise pytest.UsageError(
                f"{file}, entry {number}: unknown field {unknown[0]!r}; an entry has {sorted(FIELDS)}"
            )
        if not entry.get("why") or not entry.get("machine"):
            raise pytest.UsageError(f"{file}, entry {number}: say `why` it may be skipped and on what `machine`")
        if not (entry.get("test", "").strip("*") or entry.get("reason", "").strip("*")):
            raise pytest.UsageError(f"{file}, entry {number} allows every skip: give it a `test` or a `reason`")
    return [
        Allowed(entry.get("test", ""), entry.get("reason", ""), entry["why"], entry["machine"]) for entry in entries
    ]


def is_ci() -> bool:
    """Whether the environment says that this is CI."""
    return os.environ.get("CI", "").lower() not in FALSE


def skip_of(report: Any) -> Skip | None:
    """The skip or the expected failure that a report of a test or of a file's collection is of."""
    if not report.skipped:
        return None
    if isinstance(expected := getattr(report, "wasxfail", None), str):
        return Skip(report.nodeid, expected.removeprefix("reason: "), "xfailed")
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return Skip(report.nodeid, text.removeprefix("Skipped: "), "skipped")


class Guard:
    """What was skipped in a run, held against the list."""

    def __init__(self, config: pytest.Config, allowed: Sequence[Allowed]) -> None:
        self.config, self.allowed = config, allowed
        self.skips: dict[Skip, list[Allowed]] = {}

    @property
    def refused(self) -> list[Skip]:
        """Skips that no entry allows."""
        return [skip for skip, entries in self.skips.items() if not entries]

    def note(self, report: Any) -> None:
        """Count a report, if it is of a skip."""
        if skip := skip_of(report):
            self.skips[skip] = [entry for entry in self.allowed if entry.matches(skip)]

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and is_ci() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def never_matched(self) -> list[str]:
        """Entries that allowed nothing in any run of this checkout so far; they are remembered in pytest's cache."""
        used = {entry.name for entries in self.skips.values() for entry in entries}
        if cache := getattr(self.config, "cache", None):
            used |= set(cache.get(CACHE_KEY, []))
            cache.set(CACHE_KEY, sorted(used))
        return [entry.name for entry in self.allowed if entry.name not in used]

    def lines(self) -> Iterator[str]:
        """What the summary says of them."""
        for skip in self.refused:
            yield f"{skip.kind}: {skip.test}"
            yield f"    {skip.reason or 'no reason is given'}"
        if self.refused:
            remedy = (
                "Install what the reason names, or add an entry with `why` and `machine` to tests/allowed_skips.toml."
            )
            yield f"{len(self.refused)} not on the list. {remedy}"
        if unused := self.never_matched():
            yield f"{len(unused)} of {len(self.allowed)} entries of the list matched nothing yet, in this run or an earlier one:"
            yield from (f"    {name}" for name in unused)

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not (self.refused or is_ci()):
            return
        what = "fail this run" if is_ci() else "would fail in CI (CI=true)"
        terminalreporter.section(f"skips that {what}" if self.refused else "skips: all are on the list", sep="-")
        for line in self.lines():
            terminalreporter.write_line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", default=str(FILE), metavar="FILE", help="which skips do not fail a run in CI")


def pytest_configure(config: pytest.Config) -> None:
    """A worker of xdist judges nothing: what it skips is reported to the controller."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(
            Guard(config, read_allowed(Path(config.getoption("--allowed-skips")))), "skips-guard"
        )
