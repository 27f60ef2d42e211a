"""What the operating system holds a worker to: it ends with its parent, goes first when memory ends, has a limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# of 1000: the kernel's out-of-memory killer takes a worker before the front, and before most else of the user's
_OOM_SCORE = 800
_PAGE_BYTES = resource.getpagesize()


def end_with_parent() -> None:
    """SIGKILL when the parent dies (Linux; elsewhere the end of the connection tells, between two steps).

    The signals by which a terminal or a service manager ends a whole group are the front's to hear: it drains, and the
    worker goes on until it is told.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_first() -> None:
    """When the machine's memory ends, the kernel is to end this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")


def limit_data(limit_bytes: int) -> None:
    """Allocations beyond fail (Linux counts private writable memory) instead of pushing the machine to its end."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, by default this one; 0 where the system does not say, or the process is gone.

    Where there is no /proc, of this process its peak.
    """
    try:
        pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        if pid not in (None, os.getpid()) or sys.platform == "linux":
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * _PAGE_BYTES
