"""Progress of long work on stderr or in a notebook, with the remaining time.

`ProgressBar` is what is drawn. `Progress` is one piece of work. Where one command has several pieces (`sartor
tailor`), `WholeProgress` shows them as one bar; each inner Progress moves that bar.

If the environment variable SARTOR_PROGRESS_FILE names a file, the progress is also appended to it for other programs,
one JSON object a line: `{"at": Unix time in s, "what": name, "fraction": 0 to 1, "text": detail}`. Work that measures
its pace itself adds `"left_s"`, the seconds to its end; null until it knows them.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.2
PROGRESS_FILE = "SARTOR_PROGRESS_FILE"
SECONDS_BETWEEN_RECORDS = 0.5
# fraction of a piece after which its pace is known
_LEAST_GAIN = 0.05
_WHOLE: ContextVar[WholeProgress | None] = ContextVar("whole_progress", default=None)


class ProgressBar:
    """A bar of rich on stderr; in a notebook one line of HTML, drawn again in its place.

    is_kept: whether the finished bar stays.
    """

    def __init__(self, what: str, text: str, *, is_shown: bool, is_kept: bool = False) -> None:
        self._what, self._is_kept = what, is_kept
        self._began = self._drawn_at = time.monotonic()
        self._notebook: Any = _notebook() if is_shown else None
        self._handle: Any = None  # IPython's, of what is drawn in the notebook
        self._bars, self._task = _bars(what, text, is_shown=is_shown and self._notebook is None, is_kept=is_kept)
        self._last = (0.0, text)

    def start(self) -> None:
        """Draw the bar for the first time."""
        self._bars.start()
        if self._notebook is not None:
            self._handle = self._notebook.display(self._html(), display_id=True)

    def stop(self) -> None:
        """Draw the last state, or remove the bar."""
        self._bars.stop()
        if self._handle is not None:
            self._handle.update(self._html() if self._is_kept else self._notebook.HTML(""))

    def restart(self, text: str) -> None:
        """Begin from 0 again, with the clock of the remaining time."""
        self._bars.reset(self._task, total=1.0, count=text)
        self._last, self._began = (0.0, text), time.monotonic()

    def show(self, fraction: float, text: str) -> None:
        """Draw a fraction, 0 to 1, and a text beside the bar. A notebook is drawn five times a second at most."""
        self._bars.update(self._task, completed=fraction, count=text)
        self._last = (fraction, text)
        now = time.monotonic()
        if self._handle is not None and now - self._drawn_at > _SECONDS_BETWEEN_DRAWINGS:
            self._handle.update(self._html())
            self._drawn_at = now

    def _html(self) -> Any:
        """Return the line as IPython's HTML. It has the theme's own colours."""
        fraction, text = self._last
        remaining_s = (time.monotonic() - self._began) * (1 - fraction) / max(fraction, 1e-6)
        left = f", about {_duration(remaining_s)} left" if 0 < fraction < 1 else ""
        bar = f'<progress value="{fraction:.4f}" max="1"></progress>'
        line = f"<div><code>{html.escape(self._what)}</code> {bar} {html.escape(text + left)}</div>"
        return self._notebook.HTML(line)


class Progress:
    """A bar on a terminal, otherwise a notice every ten seconds. Use as a context manager.

    what: name of the work, such as "evaluate".
    total: amount of work in `unit`; may be fractional.
    """

    def __init__(self, what: str, total: float, unit: str, notice: Callable[[str], object]) -> None:
        self._what, self._total, self._unit, self._notice = what, total, unit, notice
        self.done = 0.0
        self._whole = _WHOLE.get()
        self._is_live = is_live()
        self._bar = ProgressBar(what, self._count(0), is_shown=self._is_live and self._whole is None)
        self._began = self._last_notice = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, done: float) -> None:
        """Report the amount of `total` that is done."""
        self.done = done
        fraction = min(done / self._total, 1.0) if self._total else 1.0
        if self._whole is not None:
            self._whole.show(self._what, fraction, self._count(done))
            return
        self._bar.show(fraction, self._count(done))
        record_progress(self._what, fraction, self._count(done))
        now = time.monotonic()
        if not self._is_live and now - self._last_notice > SECONDS_BETWEEN_LINES:
            remaining_s = (now - self._began) * (1 - fraction) / max(fraction, 1e-6)
            self._notice(f"{self._what}  {self._count(done)}, {fraction:.0%}, about {_duration(remaining_s)} left")
            self._last_notice = now

    def advance(self, by: float = 1.0) -> None:
        """Report an additional amount as done."""
        self.show(self.done + by)

    def _count(self, done: float) -> str:
        return f"{round(done):,} of {round(self._total):,} {self._unit}"


class WholeProgress:
    """One progress bar for several pieces of work. Use as a context manager.

    seconds: expected duration of each piece in s, by the `what` of its Progress; other pieces change nothing. A piece
        that is slower or faster than expected scales the remaining time of those after it.

    A piece may begin above 0, where an earlier process stopped: only what this process did gives the pace.
    """

    def __init__(self, what: str, seconds: Mapping[str, float], notice: Callable[[str], object]) -> None:
        self._what, self._notice = what, notice
        self._seconds = dict(seconds)
        self._done = dict.fromkeys(seconds, 0.0)
        self._is_live = is_live()
        self._bar = ProgressBar(what, "", is_shown=self._is_live)
        self._last_notice = time.monotonic()
        # of each piece: when this process saw it first, and its fraction then
        self._starts = {piece: (self._last_notice, 0.0) for piece in list(seconds)[:1]}
        self._scale = 1.0  # actual seconds over expected ones

    def __enter__(self) -> WholeProgress:
        self._token = _WHOLE.set(self)
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        _WHOLE.reset(self._token)

    def show(self, what: str, fraction: float, text: str, left_s: float | None = None) -> None:
        """Report the progress of a piece.

        fraction: 0 to 1.
        text: detail shown for the piece.
        left_s: seconds to the end of the piece, if it measures its pace itself; infinite until it knows it.
        """
        if what not in self._seconds:
            return
        for earlier in self._seconds:
            if earlier == what:
                break
            self._done[earlier] = 1.0
        self._done[what] = fraction
        total_s = sum(self._seconds.values())
        done_s = sum(self._seconds[name] * part for name, part in self._done.items())
        now = time.monotonic()
        left_s = self._left(what, fraction, left_s, now)
        self._bar.show(done_s / max(total_s, 1e-6), f"{what}: {text}")
        record_progress(self._what, done_s / max(total_s, 1e-6), f"{what}: {text}", left_s)
        if not self._is_live and now - self._last_notice > SECONDS_BETWEEN_LINES:
            part = f"{done_s / max(total_s, 1e-6):.0%} of all"
            self._notice(f"{self._what}  {what}: {text}; {part}, about {_duration(left_s)} left")
            self._last_notice = now

    def _left(self, what: str, fraction: float, left_s: float | None, now: float) -> float:
        """Return the seconds to the end of all pieces. left_s: of the piece, if it knows."""
        expected_s = max(self._seconds[what], 1e-6)
        if left_s is None:
            start_s, start_fraction = self._starts.setdefault(what, (now, fraction))
            if fraction - start_fraction >= _LEAST_GAIN:
                self._scale = (now - start_s) / (expected_s * (fraction - start_fraction))
        elif math.isfinite(left_s) and fraction < 1 - _LEAST_GAIN:  # near the end a small rest would tell little
            self._scale = left_s / (expected_s * (1 - fraction))
        if left_s is None or not math.isfinite(left_s):
            left_s = expected_s * (1 - fraction) * self._scale
        names = list(self._seconds)
        later_s = sum(self._seconds[name] for name in names[names.index(what) + 1 :])
        return left_s + later_s * self._scale


def record_progress(what: str, fraction: float, text: str, left_s: float | None = None) -> None:
    """Append the progress of the whole command to the file that SARTOR_PROGRESS_FILE names, if it does.

    left_s: seconds to its end, if the work measures its pace itself; infinite until it knows it.
    At most one line in SECONDS_BETWEEN_RECORDS is written, and the last one (fraction 1). A file that cannot be
    written to is ignored: it must not fail the work.
    """
    global _last_record
    name, now = os.environ.get(PROGRESS_FILE), time.monotonic()
    if not name or (now - _last_record < SECONDS_BETWEEN_RECORDS and fraction < 1):
        return
    _last_record = now
    line = {"at": round(time.time(), 3), "what": what, "fraction": round(fraction, 6), "text": text}
    if left_s is not None:
        line["left_s"] = round(left_s, 2) if math.isfinite(left_s) else None
    with contextlib.suppress(OSError), open(name, "a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(line)}\n")


_last_record = -SECONDS_BETWEEN_RECORDS


def whole_progress() -> WholeProgress | None:
    """Return the WholeProgress to which the running work belongs, or None."""
    return _WHOLE.get()


def is_live() -> bool:
    """Return whether a bar can be drawn in place: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or _notebook() is not None


def _notebook() -> Any:
    """Return IPython's module `display` in the kernel of a notebook, else None.

    IPython is not imported where it does not run already.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return importlib.import_module("IPython.display") if getattr(shell, "kernel", None) is not None else None


def _bars(what: str, count: str, *, is_shown: bool, is_kept: bool) -> tuple[Any, Any]:
    """Return (bar of rich, its task).

    The import of rich takes 0.1 s, so it happens only here and not in short commands.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = [TextColumn(what), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn()]
    bars = Bars(*columns, console=Console(stderr=True), disable=not is_shown, transient=not is_kept)
    return bars, bars.add_task(what, total=1.0, count=count)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
