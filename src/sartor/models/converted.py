"""A directory made once from an asset or a file, under SARTOR_HOME: whole, checked whenever used, made anew if damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from sartor.core import model_refs
from sartor.core.artifacts import create_output_directory

STAMP = "sartor_base.json"
WEIGHTS = "model.safetensors"


def make_once(path: Path, digest: str, fill: Callable[[Path], Mapping[str, str]]) -> None:
    """Have `fill` write the directory unless it is there whole; it returns what the stamp says besides, such as `derived_from`.

    Two processes at once: the second waits for the first. Nothing is left behind where `fill` raises.
    """
    with FileLock(path.parent / f".{path.name}.wait"):
        if _is_whole(path):
            return
        with create_output_directory(path, replace=path.exists() and _set_aside(path)) as part:
            said = fill(part)
            files = {file.name: model_refs.remembered_digest(file) for file in part.iterdir() if file.is_file()}
            (part / STAMP).write_text(json.dumps({"schema": 1, "digest": digest, **said, "files": files}, indent=1))


def _is_whole(path: Path) -> bool:
    """Whether a converted directory is there with every byte as written; a changed one is made again."""
    try:
        files = json.loads((path / STAMP).read_text())["files"]
        whole = all(model_refs.remembered_digest(path / name) == sha256 for name, sha256 in files.items())
        return whole and WEIGHTS in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _set_aside(path: Path) -> bool:
    """Remove a damaged conversion, which can be made again at any time; returns False, since nothing is left to replace."""
    shutil.rmtree(path)
    return False
