"""Part of core.artifacts."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

from sartor.core.filesystem import FileSystem

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _remove_leftovers(path: Path) -> None:
    """What killed runs left beside `path`; the writer's lock is held, so nobody is still writing them."""
    for leftover in FileSystem().leftovers(path):
        print(f"removing what a killed run left: {leftover}", file=sys.stderr)
        shutil.rmtree(leftover, ignore_errors=True)
