"""Location of SARTOR_HOME, the folder shared between runs.

The default is the platform's cache folder. It holds

    assets/  bases/  towers/  rehearsal/  features/  activations/  probes/  kernels/  edge/  keys/  trusted/  revoked/
    catalogue.sqlite  digests.sqlite  evaluations.jsonl
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

# what is computed of the rows of tunings and evaluations, under digests of what it was computed of
ROW_CACHES = ("activations", "features")


def home() -> Path:
    """Return the directory, creating it if absent."""
    path = Path(os.environ.get("SARTOR_HOME") or platformdirs.user_cache_dir("sartor")).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def folder(name: str) -> Path:
    """Return a subdirectory of `home()`, creating it if absent."""
    path = home() / name
    path.mkdir(parents=True, exist_ok=True)
    return path
