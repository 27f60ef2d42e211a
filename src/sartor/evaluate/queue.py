"""How much of a Dataset waits for a person: what its `review.jsonl` holds and nobody decided. No torch."""

from __future__ import annotations

import json

from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError

FILE = "review.jsonl"


def open_items(dataset: Artifact) -> int:
    """Findings of `review.jsonl` without a decision; 0 where there is no such file.

    A line's `what` says which it is, and a decision names its `item`. Raises ArtifactError for a line that is neither.
    """
    file = dataset.path / FILE
    if not file.is_file():
        return 0
    found, decided = 0, set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            said = json.loads(line)
            if said["what"] == "decision":
                decided.add(str(said["item"]))
            found += said["what"] == "finding"
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(
                f"{file}:{number} is neither a finding nor a decision", f"sartor review {dataset.path}"
            ) from None
    return max(0, found - len(decided))
