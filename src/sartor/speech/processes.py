"""The programs that speak: started at a lower priority, so that whoever computes replies goes first."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from sartor.core.errors import DeadlineError, UnavailableError

NICE = 10


def start(command: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """The program, running. Text goes in by a pipe alone: on a command line it could be read as an option, and be seen."""
    # piper is a Python program: whatever the locale, what comes in is UTF-8
    process = subprocess.Popen(list(command), env={**os.environ, "PYTHONUTF8": "1"}, **pipes)
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
    except OSError:  # it is over already
        pass
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    """End it at once, and leave no zombie."""
    process.kill()
    process.wait()


def too_slow(voice: str, seconds: float) -> DeadlineError:
    """The error for a program that was killed."""
    return DeadlineError(f"the voice {voice!r} had not spoken after {seconds:g} s and was stopped", "try again, or another voice")


def ended(voice: str, code: int | None) -> UnavailableError:
    """The error for a program that ended before it had spoken."""
    how = f"with the code {code}" if code is None or code >= 0 else f"by the signal {-code}"
    return UnavailableError(f"the voice {voice!r} ended {how} before it had spoken", "try again, or another voice")
