"""Reading and writing of review.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock

from sartor.core import strict_json
from sartor.core.artifacts import REVIEW, Artifact, check_file
from sartor.core.errors import SartorError, SourceError
from sartor.core.filesystem import write_file_atomic
from sartor.core.records import canonical
from sartor.curate.labels.label_ranking import BY_LABEL, SHOWN_CHARACTERS
from sartor.curate.review.review_items import SCHEMA, Decision, ReviewItem, decision_of, item_of
from sartor.curate.steps.label_errors import EVIDENCE

FILE = REVIEW
LABELS = f"evidence/{EVIDENCE}.parquet"
MOST_LINE_BYTES = 4 << 20


@dataclass
class Lines:
    """Content of a `review.jsonl`.

    samples: plans of the samples that were drawn.
    """

    items: dict[str, ReviewItem] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, fields: Mapping[str, Any], content_digest: str) -> None:
        """Add a parsed line.

        Raises SourceError for one that is no finding, decision or sample.
        """
        kind = fields.get("what", "decision" if "verdict" in fields else "finding")
        if kind == "decision":
            self.decisions.append(decision_of(fields))
        elif kind == "sample":
            self.samples.append(dict(fields))
        elif kind == "finding":
            item = item_of(fields, content_digest=content_digest)
            self.items.setdefault(item.id, item)
        else:
            raise SourceError(f"a line is a {kind!r}", "what: finding, decision or sample")


def content_of(dataset: Artifact) -> str:
    """Return the digest of a Dataset's content, to which findings about slices belong.

    It stays the same when an equal Dataset is curated at another time or place.
    """
    return str(dataset.manifest.get("digest") or dataset.id)


def of_dataset(dataset: Artifact) -> Lines:
    """Read the findings and decisions in a Dataset's files.

    Raises SourceError for a line that cannot be read.
    """
    lines = Lines()
    if (dataset.path / FILE).is_file():
        if FILE in dataset.manifest["files"]:
            check_file(dataset, FILE)
        lines = read_review_file(dataset.path / FILE, content_digest=content_of(dataset))
    for item in _suspicious(dataset):
        lines.items.setdefault(item.id, item)
    return lines


def read_review_file(file: Path, *, content_digest: str = "") -> Lines:
    """Read a `review.jsonl`.

    content_digest: digest of the Dataset that findings about slices belong to. Raises SourceError.
    """
    lines = Lines()
    for location, _, fields in _lines_of(file):
        _take(lines, fields, location, content_digest)
    return lines


def _lines_of(file: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (location, line, parsed line) of each line that is not blank.

    Raises SourceError.
    """
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_LINE_BYTES + 1), b""), 1):
                if line.strip():
                    yield f"{file}:{number}", line.strip(), _parsed(line, f"{file}:{number}")
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror}", "give a review.jsonl, or a Dataset that has one"
        ) from None


def _parsed(line: bytes, location: str) -> dict[str, Any]:
    if len(line) > MOST_LINE_BYTES:
        raise SourceError(
            f"{location} is longer than {MOST_LINE_BYTES:,} bytes", "no finding is: name rows by their ids"
        )
    try:
        fields = strict_json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{location} is no JSON: {error}", "write the line as one JSON object, or delete it"
        ) from None
    if not isinstance(fields, dict):
        raise SourceError(f"{location} is no JSON object", "one finding or decision a line")
    return fields


def _take(lines: Lines, fields: Mapping[str, Any], location: str, content_digest: str) -> None:
    try:
        lines.add(fields, content_digest)
        canonical(fields)  # a lone surrogate could not be written again
    except SartorError as error:
        raise SourceError(f"{location}: {error.problem}", error.remedy) from None
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{location} holds what no file can: {error.reason}",
            r"delete the lone \ud800 to \udfff from the line, or the line",
        ) from None


def write_review_file(
    file: Path, items: Iterable[ReviewItem], decisions: Iterable[Decision], samples: Iterable[Mapping[str, Any]] = ()
) -> int:
    """Write a `review.jsonl`; return the number of lines. `read_review_file` parses it."""
    lines = [*(item.as_json() for item in items), *(decision.as_json() for decision in decisions)]
    lines += [{"schema": SCHEMA, **sample, "what": "sample"} for sample in samples]
    write_file_atomic(file, b"".join(canonical(line) + b"\n" for line in lines))
    return len(lines)


def renew(dataset: Path, origin: str, findings: Iterable[Mapping[str, Any]]) -> Path:
    """Replace the findings of one origin in a Dataset's `review.jsonl`; return the file.

    The file is written after the Dataset's manifest. Findings of other origins, and decisions, stay. A lock file makes
    concurrent callers wait. Raises SourceError for a line that cannot be read.
    """
    file = dataset / FILE
    with FileLock(dataset / f".{FILE}.lock"):
        lines = []
        if file.is_file():
            for _, line, fields in _lines_of(file):
                what = fields.get("what", "decision" if "verdict" in fields else "finding")
                if what != "finding" or fields.get("origin") != origin:
                    lines.append(line)
        for finding in findings:
            item_of(finding)
            lines.append(canonical({**finding, "origin": origin}))
        write_file_atomic(file, b"".join(line + b"\n" for line in lines))
    return file


def _suspicious(dataset: Artifact) -> Iterator[ReviewItem]:
    """Yield an item for each label that the step `suspicious_labels` found wrong."""
    if LABELS not in dataset.manifest["files"]:
        return
    check_file(dataset, LABELS)
    form = str((dataset.manifest.get("steps", {}).get("suspicious_labels") or {}).get("label", ""))
    columns = ["id", "given", "suggested", "score", "looks_wrong", "kind", "evidence"]
    for row in pq.read_table(dataset.path / LABELS, columns=columns).to_pylist():
        if row["looks_wrong"]:
            yield ReviewItem(
                "label",
                (row["id"],),
                reason="suspicious_label",
                detail=f"labelled {row['given']!r}; the other rows say {row['suggested']!r}",
                evidence={"score": round(row["score"], 6), "judged_by": row["kind"], "near": row["evidence"]},
                suggestion=_suggestion(row, form),
                origin="suspicious_labels",
            )


def _suggestion(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return the edit that would correct the label; empty if the stored label was cut, or a pattern located it."""
    suggested = str(row["suggested"])
    if not suggested or len(suggested) == SHOWN_CHARACTERS and suggested.endswith("…"):
        return {}
    if row["kind"] != BY_LABEL or form == "reply":
        return {"reply": suggested}
    return {"label": form, "value": suggested} if form.startswith("json:") else {}
