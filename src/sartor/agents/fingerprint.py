"""An adapter's files against the digest under which it was admitted: what a worker looks at right before it loads them.

A module of its own: a worker has no use for the rest of admission, and pays for what it imports in memory.
"""

from __future__ import annotations

from pathlib import Path

from sartor.core.errors import ArtifactError
from sartor.core.filesystem import file_digest
from sartor.inference.engine import PROJECTORS, adapter_digest

_FILES = ("adapter_config.json", "adapter_model.safetensors", PROJECTORS)
_ANEW = "remove that directory and admit the Release again: sartor agents add RELEASE"


def check_digest(path: Path, adapter: str) -> None:
    """Raise ArtifactError unless the adapter in `path` has this digest."""
    try:
        found = adapter_digest({name: {"sha256": file_digest(path / name)} for name in _FILES if (path / name).exists()})
    except KeyError as error:
        raise ArtifactError(f"the adapter in {path} has no {error}", _ANEW) from None
    except OSError as error:
        raise ArtifactError(f"the adapter in {path} cannot be read: {error.strerror}", _ANEW) from None
    if found != adapter:
        raise ArtifactError(f"the adapter in {path} has the digest {found[:16]}, not {adapter[:16]} as admitted", _ANEW)
