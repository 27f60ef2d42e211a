"""The programs that speak: how they are started, and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sartor.core.errors import DeadlineError, UnavailableError

ANOTHER = "try again, or another voice"


@dataclass(frozen=True)
class Terms:
    """patience_s: after which a program that has not spoken is killed. nice: added to its niceness, so that others go first."""

    patience_s: float = 20.0
    nice: int = 0


ALONE = Terms()


def start(command: Sequence[str], nice: int, **pipes: Any) -> subprocess.Popen[bytes]:
    """The program, running. Text goes in by a pipe alone: on a command line it could be read as an option, and be seen."""
    # piper is a Python program: whatever the locale, what comes in is UTF-8
    process = subprocess.Popen(list(command), env={**os.environ, "PYTHONUTF8": "1"}, **pipes)
    if nice:
        _add_niceness(process.pid, nice)
    return process


def _add_niceness(which: int, nice: int) -> None:
    """That process or thread has so much more than this process; what it inherited from a thread does not add up."""
    with suppress(OSError):  # it may be over already
        os.setpriority(os.PRIO_PROCESS, which, os.getpriority(os.PRIO_PROCESS, os.getpid()) + nice)


def step_back(nice: int) -> None:
    """Let others go before this thread too. Linux alone has a niceness for each thread."""
    if sys.platform == "linux":
        _add_niceness(threading.get_native_id(), nice)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End it at once, and leave no zombie."""
    process.kill()
    process.wait()


def too_slow(voice: str, seconds: float) -> DeadlineError:
    """The error for a program that was killed."""
    return DeadlineError(f"the voice {voice!r} had not spoken after {seconds:g} s and was stopped", ANOTHER)


def ended(voice: str, code: int | None) -> UnavailableError:
    """The error for a program that ended before it had spoken."""
    how = f"with the code {code}" if code is None or code >= 0 else f"by the signal {-code}"
    return UnavailableError(f"the voice {voice!r} ended {how} before it had spoken", ANOTHER)
