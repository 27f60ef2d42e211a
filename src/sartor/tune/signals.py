"""SIGTERM and Ctrl-C while a run goes: the first is noted, so that the update in work can be finished and saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Signals:
    """Context manager: `received` is the signal that came, or None.

    The first signal puts the handlers back that were there before, so a second one does what it always did (Ctrl-C: at
    once). A signal that the process ignores (`nohup`) stays ignored, and outside the main thread nothing is done:
    Python allows handlers there only.
    """

    def __init__(self, notice: Callable[[str], object] = lambda line: None) -> None:
        self.received: signal.Signals | None = None
        self._notice = notice
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        # a handler may have cut into a write to the same stream, which then refuses a second one
        with contextlib.suppress(RuntimeError):
            self._notice(f"{self.received.name}: the update in work is finished and saved; the same again ends at once")
