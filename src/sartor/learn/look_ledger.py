"""Ledger of looks: the held-out rows that the retrains of an agent were compared on.

    STATE/retrain/AGENT/looks.jsonl     one line a retrain that compared versions: digests of the rows, by kind

A row that has decided once counts with less weight the next time (`gain_test`), so the ledger outlives the folders of
the retrains. It holds digests of rows and no text. Retrains from before the ledger are counted by their
`beside.parquet`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sartor.core import parquet_io
from sartor.core.line_ledger import LineLedger
from sartor.learn.run_record import RunRecord, list_runs, now

FILE = "looks.jsonl"
# file of a retrain with the versions' scores side by side, row by row
SCORES_FILE = "beside.parquet"


def record_look(run: RunRecord, rows: Mapping[str, Iterable[str]]) -> None:
    """Append the rows that a retrain has looked at, once however often it is resumed.

    rows: their digests by kind.
    """
    file = run.folder.parent / FILE
    lines = _LEDGER.read_lines(file)
    if any(_key_of_line(line) == _key_of_run(run) for line in lines):
        return
    digests = {kind: sorted(set(ids)) for kind, ids in rows.items()}
    line = {
        "schema": _LEDGER.schema,
        "number": run.record.number,
        "began": run.record.began,
        "looked": now(),
        "live": run.record.live.release_id,
        "sets": {kind: hashlib.sha256("\n".join(ids).encode()).hexdigest() for kind, ids in digests.items()},
        "rows": digests,
    }
    _LEDGER.write_lines(file, [*lines, line])


def count_looks(run: RunRecord) -> Counter[str]:
    """Return the number of other retrains of the agent that looked at each row, by its
    digest. Raises ArtifactError.
    """
    home = run.folder.parent
    lines = [line for line in _LEDGER.read_lines(home / FILE) if _key_of_line(line) != _key_of_run(run)]
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update({digest for ids in line["rows"].values() for digest in ids})
    counted = {*map(_key_of_line, lines), _key_of_run(run)}
    for other in list_runs(home.parent.parent, run.record.agent):
        if _key_of_run(other) not in counted and (other.folder / SCORES_FILE).exists():
            counts.update({str(row["id"]) for row in parquet_io.read_file(other.folder / SCORES_FILE)})
    return counts


def _key_of_run(run: RunRecord) -> tuple[int, str]:
    """Return (number, start time): a number is reused if the folders were deleted, the pair is not."""
    return run.record.number, run.record.began


def _key_of_line(line: Mapping[str, Any]) -> tuple[int, str]:
    return int(line["number"]), str(line["began"])


_LEDGER = LineLedger("ledger of looks", 1, lambda line: isinstance(line["rows"], dict) and bool(_key_of_line(line)))
