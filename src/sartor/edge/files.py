"""Writing a file so that a power cut leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

from sartor.core.filesystem import fsync_directory


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` by a hidden sibling, fsync and rename; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
    fsync_directory(path.parent)
