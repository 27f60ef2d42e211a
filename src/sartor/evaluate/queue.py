"""How much of a Dataset waits for a person: what its queue holds and nobody decided. No torch."""

from __future__ import annotations

import json

from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError

FILE = "review.jsonl"


def open_items(dataset: Artifact) -> int | None:
    """Items of `review.jsonl` without a decision; None where there is no such file.

    A line is an item, with an `id`, or a decision about the `item` that it names. Raises ArtifactError for a line that is none.
    """
    file = dataset.path / FILE
    if not file.is_file():
        return None
    items: set[str] = set()
    decided: set[str] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            (decided if "item" in said else items).add(str(said["item" if "item" in said else "id"]))
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{file}:{number} is neither an item nor a decision", f"sartor review {dataset.path}") from None
    return len(items - decided)
