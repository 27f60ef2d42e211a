"""`review.jsonl` of a Dataset: what a person is to look at, a line each. It is written beside the manifest, not under it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sartor.core.artifacts import fsync_directory
from sartor.core.errors import ArtifactError
from sartor.core.records import Example
from sartor.curate.validate.outcome import Validated

FILE = "review.jsonl"
ORIGIN = "validate"
SCHEMA = 1
# the tests of which a person would ask for the bias of the data, and not for its likeness
_OF_BIAS = ("group_outcome",)


def write_review(dataset: Path, rows: Sequence[Example], found: Validated) -> Path:
    """Put the flaws of rows and the failed tests into the queue of a Dataset; returns the file.

    A flaw is a finding about a row, a failed test one about a slice: the whole set. Findings of an earlier validation are
    replaced; those of others, and what a person decided, stay.
    """
    file = dataset / FILE
    kept = [line for line in _known(file) if line.get("origin") != ORIGIN or line.get("what", "finding") != "finding"]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*kept, *_lines(rows, found)))
    part = file.with_name(f".{FILE}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)
    fsync_directory(dataset)
    return file


def _known(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [_object(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{place} is no JSON object", "mend the line, or take it out")
    return found


def _lines(rows: Sequence[Example], found: Validated) -> Iterator[dict[str, Any]]:
    same = {"schema": SCHEMA, "what": "finding", "origin": ORIGIN}
    for test in found.failed:
        kind = "bias" if test.name in _OF_BIAS else "validation"
        said = {"reason": test.name, "detail": test.detail, "evidence": test.as_json()}
        yield {**same, "kind": kind, "slice": "all synthetic rows", **said}
    for flaw in found.flaws:
        evidence = {"locator": rows[flaw.place].origins[0].locator}
        said = {"reason": flaw.reason, "detail": flaw.detail, "evidence": evidence}
        yield {**same, "kind": "validation", "examples": [flaw.id], **said}
