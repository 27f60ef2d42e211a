"""Where Sartor keeps what is shared between runs: SARTOR_HOME, by default the platform's cache folder.

assets/  bases/  towers/  keys/  trusted/  revoked/  catalogue.sqlite  digests.sqlite
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """The directory, made if absent."""
    path = Path(os.environ.get("SARTOR_HOME") or platformdirs.user_cache_dir("sartor")).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def folder(name: str) -> Path:
    """A subdirectory of `home()`, made if absent."""
    path = home() / name
    path.mkdir(parents=True, exist_ok=True)
    return path
