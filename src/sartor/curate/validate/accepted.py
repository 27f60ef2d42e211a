"""The rows that were accepted, as a Dataset; the others are its Drops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sartor.core.artifacts import open_artifact
from sartor.core.records import Example, dropped
from sartor.curate.dataset_writer import write_derived
from sartor.curate.validate.outcome import Validated

STEP = "validate"


def write_accepted(out: Path, dataset: Path, rows: Sequence[Example], found: Validated, *, replace: bool) -> Path:
    """Write the synthetic rows without a flaw; returns where. The first flaw of a row is its Drop's reason."""
    flaws = {flaw.place: flaw for flaw in reversed(found.flaws)}
    kept = [row for place, row in enumerate(rows) if place not in flaws]
    drops = [dropped(rows[place], flaw.reason, flaw.detail, step=STEP) for place, flaw in sorted(flaws.items())]
    facts = {
        "reality": str(found.reality.name),
        "rows": dict(found.rows),
        "tests": {test.name: test.as_json() for test in found.tests},
        **found.facts,
    }
    return write_derived(out, [open_artifact(dataset, "dataset")], kept, drops, step={STEP: facts}, replace=replace).path
