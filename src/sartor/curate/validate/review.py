"""What a person is to look at of synthetic rows: findings in the `review.jsonl` of their Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sartor.core.records import Example
from sartor.curate.review import review_file
from sartor.curate.review.review_items import SCHEMA
from sartor.curate.validate.outcome import Validated

ORIGIN = "validate"
# the tests of which a person would ask for the bias of the data, and not for its likeness
_OF_BIAS = ("group_outcome",)


def write_review(dataset: Path, rows: Sequence[Example], found: Validated) -> Path:
    """Put the flaws of rows and the failed tests before the person who reviews a Dataset; returns the file.

    A flaw is a finding about a row, a failed test one about a slice: the whole set. Findings of an earlier validation are
    replaced; those of others, and what a person decided, stay.
    """
    return review_file.renew(dataset, ORIGIN, _lines(rows, found))


def _lines(rows: Sequence[Example], found: Validated) -> Iterator[dict[str, Any]]:
    same = {"schema": SCHEMA, "what": "finding"}
    for test in found.failed:
        kind = "bias" if test.name in _OF_BIAS else "validation"
        said = {"reason": test.name, "detail": test.detail, "evidence": test.as_json()}
        yield {**same, "kind": kind, "slice": "all synthetic rows", **said}
    for flaw in found.flaws:
        evidence = {"locator": rows[flaw.place].origins[0].locator}
        said = {"reason": flaw.reason, "detail": flaw.detail, "evidence": evidence}
        yield {**same, "kind": "validation", "examples": [flaw.id], **said}
