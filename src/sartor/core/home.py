"""Location of SARTOR_HOME, the folder shared between runs.

The default is the platform's cache folder. It holds

    assets/  bases/  towers/  rehearsal/  features/  activations/  probes/  kernels/  edge/  keys/  trusted/  revoked/
    trace/
    catalogue.sqlite  digests.sqlite  evaluations.jsonl

What is created here is for its owner alone: features, activations and
sketches (trace_store.py) are computed from rows, and keys sign.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

# folders whose files are computed from single rows or media, under their digests
ROW_CACHES = ("activations", "features")


def home() -> Path:
    """Return the directory, creating it if absent."""
    path = Path(os.environ.get("SARTOR_HOME") or platformdirs.user_cache_dir("sartor")).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def folder(name: str) -> Path:
    """Return a subdirectory of `home()`, creating it if absent."""
    path = home() / name
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
