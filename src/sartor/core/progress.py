"""Progress of long work on stderr, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar where somebody looks, else a notice every ten seconds. Use as a context manager.

    what: the work in a word, as "evaluate". total: of what is counted in `unit`; both may be fractions of a whole.
    """

    def __init__(self, what: str, total: float, unit: str, notice: Callable[[str], object]) -> None:
        # rich takes 0.1 s to import, which no import of this module by a short command has to wait for
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._what, self._total, self._unit, self._notice = what, total, unit, notice
        self.done = 0.0
        self._is_live = sys.stderr.isatty()
        columns = [TextColumn(what), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn()]
        self._bars = Bars(*columns, console=Console(stderr=True), disable=not self._is_live, transient=True)
        self._task = self._bars.add_task(what, total=total, count=self._count(0))
        self._began = self._last_notice = time.monotonic()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def show(self, done: float) -> None:
        """Tell how much of `total` is done."""
        self.done = done
        self._bars.update(self._task, completed=done, count=self._count(done))
        now = time.monotonic()
        if not self._is_live and now - self._last_notice > SECONDS_BETWEEN_LINES:
            fraction = min(done / self._total, 1.0) if self._total else 1.0
            remaining_s = (now - self._began) * (1 - fraction) / max(fraction, 1e-6)
            self._notice(f"{self._what}  {self._count(done)}, {fraction:.0%}, about {remaining_s:.0f} s left")
            self._last_notice = now

    def advance(self, by: float = 1.0) -> None:
        """Tell that so much more is done."""
        self.show(self.done + by)

    def _count(self, done: float) -> str:
        return f"{round(done):,} of {round(self._total):,} {self._unit}"
