"""A probe of options: two values of one option, and what an observer makes of each."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sartor.core.errors import SartorError


class Workspace:
    """A test's folder and fixtures, for observers that need files."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._count = 0

    @property
    def path(self) -> Path:
        """The test's folder."""
        path: Path = self._request.getfixturevalue("tmp_path")
        return path

    @property
    def patch(self) -> pytest.MonkeyPatch:
        """The test's monkeypatch."""
        patch: pytest.MonkeyPatch = self._request.getfixturevalue("monkeypatch")
        return patch

    def fixture(self, name: str) -> Any:
        """Return a fixture's value."""
        return self._request.getfixturevalue(name)

    def folder(self) -> Path:
        """Return a new folder, one a call."""
        self._count += 1
        folder = self.path / f"observed-{self._count}"
        folder.mkdir()
        return folder


Observer = Callable[[Any, Workspace], Any]  # a function or a coroutine function


def observed_by(observe: Observer, value: Any, workspace: Workspace) -> Any:
    """Return what an observer sees of a value; a coroutine runs to its end, in a loop of its own."""
    outcome = observe(value, workspace)
    return asyncio.run(outcome) if inspect.iscoroutine(outcome) else outcome


class Probe(NamedTuple):
    """Two values of an option and their observer.

    may_refuse: a value may end in a SartorError, whose text is then what is observed. is_slow: of the tier `circle`.
    repeats: the first value is observed twice; not where that is dear and other tests show that it repeats.
    """

    option: str
    values: tuple[Any, Any]
    observe: Observer
    may_refuse: bool = False
    is_slow: bool = False
    repeats: bool = True

    def outcomes(self, workspace: Workspace) -> list[Any]:
        """Return what is seen of the first value, of the first again, and of the second."""
        first = self._outcome(self.values[0], workspace)
        again = self._outcome(self.values[0], workspace) if self.repeats else first
        return [first, again, self._outcome(self.values[1], workspace)]

    def _outcome(self, value: Any, workspace: Workspace) -> Any:
        if not self.may_refuse:
            return observed_by(self.observe, value, workspace)
        try:
            return observed_by(self.observe, value, workspace)
        except SartorError as error:
            return re.sub(r"observed-\d+", "observed", f"{type(error).__name__}: {error}")


def probes_of(
    cls: str, observe: Observer, values: Mapping[str, tuple[Any, Any]], *, may_refuse: bool = False
) -> tuple[Probe, ...]:
    """Return probes of options of one class, which share an observer of `(option, value)` mappings: `{option: value}`."""
    return tuple(
        Probe(f"{cls}.{name}", ({name: first}, {name: second}), observe, may_refuse)
        for name, (first, second) in values.items()
    )


def with_marks(probes: tuple[Probe, ...], **marks: bool) -> tuple[Probe, ...]:
    """Return the probes with other marks: `is_slow`, `repeats`."""
    return tuple(probe._replace(**marks) for probe in probes)


def beside_default(
    cls: str, observe: Observer, others: Mapping[str, Any], *, may_refuse: bool = False, is_slow: bool = False
) -> tuple[Probe, ...]:
    """Return probes of options of one class against its default options, `{option: the other value}`.

    The defaults are observed twice by the first probe, which shows that they repeat, and once for all others.
    """
    outcomes: list[Any] = []

    def observed(values: Any, workspace: Workspace) -> Any:
        if values:
            return observed_by(observe, values, workspace)
        if len(outcomes) > 1:
            return outcomes[0]
        outcomes.append(observed_by(observe, {}, workspace))
        return outcomes[-1]

    return tuple(
        Probe(f"{cls}.{name}", ({}, {name: other}), observed, may_refuse, is_slow, repeats=index == 0)
        for index, (name, other) in enumerate(others.items())
    )
