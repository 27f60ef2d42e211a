"""The progress line of a de-duplication, on stderr."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Lines


class Progress:
    """A bar for every stage that `show` is told of; nothing at all without `visible`."""

    def __init__(self, visible: bool) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
        self._lines = Lines(*columns, console=Console(stderr=True), disable=not visible)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.stop()

    def show(self, stage: str, done: int, of: int) -> None:
        """`done` of `of` pieces of a stage are behind us."""
        if stage not in self._tasks:
            self._tasks[stage] = self._lines.add_task(stage, total=of)
        self._lines.update(self._tasks[stage], completed=min(done, of), total=of)  # type: ignore[arg-type]
