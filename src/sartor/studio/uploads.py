"""Files that are given to a studio: checked names, written atomically below `uploads/`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from sartor.core.errors import ConfigError, MissingError
from sartor.core.filesystem import create_file_atomic
from sartor.studio.studio_folder import DATA_SUFFIXES, UPLOADS, StudioFolder

MAX_STEM_CHARS = 80
# bytes that stay free on the disk
RESERVE_BYTES = 64 << 20
_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


def safe_file_name(name: str) -> str:
    """Return the name under which an uploaded file is stored: its last part, of letters, digits, . _ + and -.

    Raises ConfigError for a name whose ending no reader of rows knows.
    """
    last = PureWindowsPath(PurePosixPath(name).name).name
    suffix = PurePosixPath(last).suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise ConfigError(f"{last[:80]!a} is no file of rows", f"a file that ends in {', '.join(DATA_SUFFIXES)}")
    stem = _NOT_IN_A_NAME.sub("-", last[: -len(suffix)]).strip("-.")[:MAX_STEM_CHARS] or "rows"
    return f"{stem}{suffix}"


def store_upload(folder: StudioFolder, name: str, content: BinaryIO, size: int) -> str:
    """Write an uploaded file below `uploads/` and return its name below the folder; an existing file stays.

    size: bytes of the content. Raises ConfigError for a name that is not taken, MissingError if the disk is too full.
    """
    file_name = safe_file_name(name)
    if not size:
        raise ConfigError(f"{file_name} is empty", "choose a file with rows")
    if folder.free_bytes() < size + RESERVE_BYTES:
        raise MissingError(
            f"the disk has {folder.free_bytes():,} bytes left, and {file_name} has {size:,}",
            f"df -h {folder.root} shows the full disk; remove something there",
        )
    target = _free_name(folder.root / UPLOADS, file_name)
    if target.parent.is_symlink():
        raise ConfigError(f"{UPLOADS} is a link", f"remove the link {UPLOADS}")
    with create_file_atomic(target) as part, part.open("wb") as stream:
        shutil.copyfileobj(content, stream, 1 << 20)
    return f"{UPLOADS}/{target.name}"


def _free_name(folder: Path, name: str) -> Path:
    stem, suffix = Path(name).stem, Path(name).suffix
    candidates = (folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffix}" for number in range(1, 10_000))
    return next(path for path in candidates if not path.exists())
