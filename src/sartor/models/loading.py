"""Quiet, memory-lean weight loading; converted model directories."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import transformers
from filelock import FileLock

from sartor.core import model_refs
from sartor.core.artifacts import create_output_directory


@contextlib.contextmanager
def copied_while_read() -> Iterator[None]:
    """Make transformers read single tensors into memory instead of mapping files, inside the `with` block.

    If weights change their width while they are read, pages of a mapped file stay resident beside the new weights
    until all are done: the whole 16-bit base a second time. (A base that is kept as stored in the files is mapped and
    not copied.)
    """
    loading = transformers.modeling_utils
    mapping = loading.safe_open
    if "backend" not in (getattr(mapping, "__text_signature__", "") or ""):  # an older safetensors only maps
        yield
        return
    loading.safe_open = lambda file, **options: mapping(file, **{**options, "backend": "pread"})
    try:
        with freed_at_once():
            yield
    finally:
        loading.safe_open = mapping


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Make glibc give each large block its own mapping, which is returned to the system when freed.

    Otherwise the memory into which weights were read stays in the heap, as gaps between the weights that are kept.
    After the `with` block the thresholds are those at which glibc's own adaptive threshold ends up in a process that
    has freed large blocks. Without glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    mallopt(threshold, 1 << 20)
    try:
        yield
    finally:
        mallopt(threshold, 32 << 20)
        mallopt(trim, 64 << 20)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, log messages and warnings; the caller shows what matters."""
    bars = transformers.utils.logging
    was_on, level = bars.is_progress_bar_enabled(), bars.get_verbosity()
    bars.disable_progress_bar()
    bars.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bars.set_verbosity(level)
        if was_on:
            bars.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


STAMP = "sartor_base.json"
WEIGHTS = "model.safetensors"


def convert_once(path: Path, digest: str, fill: Callable[[Path], Mapping[str, str]]) -> None:
    """Have `fill` write the directory, unless it is complete.

    `fill` returns further fields of the stamp, such as `derived_from`. Of two processes the second waits for the
    first. Nothing is left behind if `fill` raises.
    """
    with FileLock(path.parent / f".{path.name}.wait"):
        if _is_whole(path):
            return
        if path.exists():
            shutil.rmtree(path)  # a damaged conversion, which can be repeated at any time
        with create_output_directory(path) as part:
            fields = fill(part)
            files = {file.name: model_refs.remembered_digest(file) for file in part.iterdir() if file.is_file()}
            (part / STAMP).write_text(json.dumps({"schema": 1, "digest": digest, **fields, "files": files}, indent=1))


def _is_whole(path: Path) -> bool:
    """Return whether a converted directory has every byte as written; a changed one is converted again."""
    try:
        files = json.loads((path / STAMP).read_text())["files"]
        whole = all(model_refs.remembered_digest(path / name) == sha256 for name, sha256 in files.items())
        return whole and WEIGHTS in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
