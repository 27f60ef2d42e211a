"""Ledger of evaluations on this machine: the rows of each evaluation and its adapter.

    SARTOR_HOME/evaluations.jsonl     one line per evaluation: digest of its rows, its rows, adapter, time, split

Comparing many adapters on the same rows and taking the best one is a selection on those rows, which the Report's
interval does not cover. A Report therefore states how many evaluations of its rows are known. The number is a lower
bound: other machines, deleted ledgers and evaluations without a Report are not counted. The ledger holds digests and
    no
text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sartor.core.home import home
from sartor.core.line_ledger import LineLedger

FILE = "evaluations.jsonl"
# hex digits that identify a row in the ledger: 48 bits of a digest of its id, from which the id cannot be recovered
MARK_DIGITS = 12
_LOCK_TIMEOUT_S = 30.0
_LEDGER = LineLedger(
    "ledger of evaluations",
    1,
    lambda line: (
        isinstance(line["rows"], list) and all(isinstance(line[key], str) for key in ("digest", "adapter", "time"))
    ),
    "cp BACKUP {file}; or rm {file}: evaluations are then counted anew, and the ones before are unknown",
)


@dataclass(frozen=True, kw_only=True)
class ChoiceEvidence:
    """Evaluations of a Report's rows known on this machine, including its own.

    evaluations_known, adapters_known: counts over evaluations that share at least one row; lower bounds.
    rows_digest: digest of the ids of all rows.
    since: day from which the ledger counts.
    problem: reason why this evaluation could not be recorded; empty if it was.
    """

    evaluations_known: int
    adapters_known: int
    rows_digest: str
    since: str
    problem: str = ""

    @property
    def sentence(self) -> str:
        """Sentence that explains the counts."""
        plural = "" if self.evaluations_known == 1 else "s"
        # evaluations of a run's checkpoints chose its weights, so each of them counts
        adapters = "1 adapter" if self.adapters_known == 1 else f"{self.adapters_known} adapters or checkpoints"
        text = (
            f"at least {self.evaluations_known} evaluation{plural} of these rows known on this machine since "
            f"{self.since}, "
            f"of {adapters}, this one included"
        )
        return f"{text}; it could not be written down: {self.problem}" if self.problem else text

    def as_json(self) -> dict[str, Any]:
        """Return the value of the key `chosen` of a Report."""
        return {
            "evaluations_known": self.evaluations_known,
            "adapters_known": self.adapters_known,
            "rows_digest": self.rows_digest,
            "since": self.since,
            "recorded": not self.problem,
            "sentence": self.sentence,
        }


def ledger_file() -> Path:
    """Return the path of the ledger, whether or not it exists."""
    return home() / FILE


def check_ledger() -> None:
    """Raise ArtifactError if the ledger is damaged; call it before a long evaluation."""
    _LEDGER.read_lines(ledger_file())


def digest_rows(row_ids: Iterable[str]) -> str:
    """Return the digest of a set of row ids, independent of their order."""
    return hashlib.sha256("\n".join(sorted(set(row_ids))).encode()).hexdigest()


def record_evaluation(adapter_id: str, row_ids: Iterable[str], split: str) -> ChoiceEvidence:
    """Record the evaluation of an adapter on rows, and return the known evaluations of these rows.

    If the home cannot be written to, the evaluation is still counted and `problem` states the reason: a finished
    evaluation must not be lost. Raises ArtifactError for a damaged ledger.
    """
    ids = set(row_ids)
    marks = {hashlib.sha256(row_id.encode()).hexdigest()[:MARK_DIGITS] for row_id in ids}
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    row_digest = digest_rows(ids)
    line: dict[str, Any] = {
        "schema": _LEDGER.schema,
        "digest": row_digest,
        "adapter": adapter_id,
        "time": now,
        "split": split,
        "rows": sorted(marks),
    }
    file, problem = ledger_file(), ""
    try:
        with FileLock(file.with_name(f".{FILE}.lock"), timeout=_LOCK_TIMEOUT_S):
            lines = [*_LEDGER.read_lines(file), line]
            _LEDGER.write_lines(file, lines)
    except OSError as error:  # a lock timeout is an OSError too
        problem = f"{file}: {error.strerror or error}"
        lines = [*_LEDGER.read_lines(file), line]
    same = [other for other in lines if not marks.isdisjoint(other["rows"])]
    return ChoiceEvidence(
        evaluations_known=len(same),
        adapters_known=len({other["adapter"] for other in same}),
        rows_digest=row_digest,
        since=min(other["time"] for other in lines)[:10],
        problem=problem,
    )
