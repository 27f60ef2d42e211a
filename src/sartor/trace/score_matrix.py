"""Scores of all training rows for many queries, as a file of numpy."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import records
from sartor.core.filesystem import PRIVATE, check_output_file, write_file_atomic
from sartor.trace.attribution import Method
from sartor.trace.measured_trust import LEAST_LDS
from sartor.trace.methods import as_method, check_rows, own_lds, scores_of
from sartor.trace.traced_adapter import open_traced, read_queries

Notice = Callable[[str], object]


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of all training rows for many queries, in a file.

    shape: (queries, training rows).
    ids: file with the ids of the rows, a JSON list in the order of the columns.
    """

    file: str
    ids: str
    shape: tuple[int, int]
    method: Method
    lds: float | None
    approximate: str
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {
            "shape": list(self.shape),
            "scores": self.file,
            "ids": self.ids,
            "method": str(self.method),
            "lds": self.lds,
            "approximate": self.approximate or None,
            "wall_s": round(self.wall_s, 4),
        }


def score_rows(
    target: Path | str,
    queries: Path | str,
    scores: Path | str,
    *,
    method: Method | str = Method.RETRIEVAL,
    data: Path | str | None = None,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> ScoreMatrix:
    """Write the scores of all training rows for each query to a file of numpy, and the ids of the rows beside it.

    target: Adapter, Release or personal adapter.
    queries: JSONL file, {"prompt", "reply"} or {"messages"} in each line.
    scores: file for float64 of shape (queries, rows); the ids stand in the same name with .ids.json.
    data: a Dataset whose rows are scored, by retrieval or gradient, where those of the tuning are not here.
    replace: whether `scores` may exist.

    Raises ConfigError for an unknown method, one that these rows do not allow, a line that is no query or an output
    that exists, ArtifactError if the rows of the tuning are not here, and the errors of the methods.
    """
    start, chosen, file = time.monotonic(), as_method(method), Path(scores)
    ids = file.with_suffix(".ids.json")
    for output in (file, ids):
        check_output_file(output, "--scores", replace=replace)
    traced = open_traced(target, data)
    check_rows(traced, chosen)
    attribution = scores_of(traced, read_queries(Path(queries), traced), chosen, notice)
    for note in attribution.notes:
        notice(note)
    lds = own_lds(traced).get(chosen)
    if lds is not None and lds < LEAST_LDS:
        notice(f"{chosen} has an LDS of {lds:.2f} for this adapter, below {LEAST_LDS}: its scores rank nothing")
    buffer = io.BytesIO()
    np.save(buffer, attribution.scores, allow_pickle=False)
    write_file_atomic(file, buffer.getvalue(), mode=PRIVATE)
    write_file_atomic(ids, records.canonical(traced.ids), mode=PRIVATE)
    return ScoreMatrix(
        str(file),
        ids=str(ids),
        shape=(attribution.scores.shape[0], attribution.scores.shape[1]),
        method=chosen,
        lds=lds,
        approximate=attribution.approximate,
        wall_s=time.monotonic() - start,
    )
