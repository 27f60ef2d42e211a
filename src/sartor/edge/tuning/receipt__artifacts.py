"""Part of edge.tuning.receipt."""

from __future__ import annotations

from pathlib import Path

from sartor.core.filesystem import file_digest

ADAPTER = "adapter_model.safetensors"


def digests(folder: Path) -> dict[str, str]:
    """{file: sha256} of the adapter in a folder, empty while there is none."""
    names = [name for name in (ADAPTER, "adapter_config.json") if (folder / name).is_file()]
    return {name: file_digest(folder / name) for name in names}
