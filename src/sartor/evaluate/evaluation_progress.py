"""Progress of an evaluation on stderr, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class EvaluationProgress:
    """A bar where somebody looks, else a notice every ten seconds. Use as a context manager."""

    def __init__(self, rows: int, notice: Callable[[str], object]) -> None:
        self._rows, self._notice, self._is_live = rows, notice, sys.stderr.isatty()
        columns = [TextColumn("evaluate"), BarColumn(), TextColumn("{task.fields[rows]} rows"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not self._is_live, transient=True)
        self._task = self._bar.add_task("evaluate", total=1.0, rows=f"0 of {rows:,}")

    def __enter__(self) -> EvaluationProgress:
        self._began = self._last_notice = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, fraction: float) -> None:
        """Tell how much is done, 0 to 1."""
        now, text = time.monotonic(), f"{round(fraction * self._rows):,} of {self._rows:,}"
        self._bar.update(self._task, completed=fraction, rows=text)
        if not self._is_live and now - self._last_notice > SECONDS_BETWEEN_LINES:
            remaining_s = (now - self._began) * (1 - fraction) / max(fraction, 1e-6)
            self._notice(f"evaluate  {text} rows, {fraction:.0%}, about {remaining_s:.0f} s left")
            self._last_notice = now
