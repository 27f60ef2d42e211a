"""The progress line of a curation: rows, rows per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# Where stderr is no terminal, a line this often.
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Goes by bytes, since nobody knows the number of rows before they are read. Use as a context manager."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice, self._is_live = notice, sys.stderr.isatty()
        columns = [TextColumn("curate"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn()]
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not self._is_live, transient=True)
        self._task = self._bar.add_task("curate", total=1, said="looking at the files ...")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, name: str, total_bytes: int) -> None:
        """A pass over that many bytes begins."""
        self._name, self._total, self._bytes, self._rows = name, max(total_bytes, 1), 0, 0
        self._began = self._said = time.monotonic()
        self._bar.reset(self._task, total=self._total, said=name)

    def advance(self, done_bytes: int, rows: int) -> None:
        """A piece is done."""
        self._bytes, self._rows = self._bytes + done_bytes, self._rows + rows
        now = time.monotonic()
        rate = self._rows / max(now - self._began, 1e-3)
        said = f"{self._name}  {self._rows:,} rows  {rate:,.0f} rows/s"
        self._bar.update(self._task, completed=self._bytes, said=said)
        if not self._is_live and now - self._said > SECONDS_BETWEEN_LINES:
            left = (now - self._began) * (self._total - self._bytes) / max(self._bytes, 1)
            self._notice(f"{said}  {self._bytes / self._total:.0%}, about {left:.0f} s left")
            self._said = now
