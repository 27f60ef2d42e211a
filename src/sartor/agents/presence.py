"""Whether a server of a team runs on this machine: it holds a lock, which ends with its process however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "serving.lock"


@contextmanager
def served(state: Path) -> Iterator[None]:
    """Inside, this process serves the team of that state directory; several may at once."""
    descriptor = os.open(state / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_served(state: Path) -> bool:
    """Whether any process on this machine serves that team now."""
    try:
        descriptor = os.open(state / FILE, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
