"""Another threshold for what was de-duplicated before: from its ledger of pairs, without comparing a row again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, check_free, open_artifact, write_artifact
from sartor.core.errors import ArtifactError
from sartor.core.filesystem import file_digest
from sartor.core.processes import Means
from sartor.curate.dedup import ledger
from sartor.curate.dedup.clusters import Limits, guard, resolve
from sartor.curate.dedup.fields import Choice
from sartor.curate.dedup.files import Deduplicated, facts, write_rows
from sartor.curate.dedup.first_reading import FileOfRows, stamp_of
from sartor.curate.dedup.inputs import Fault, blocks
from sartor.curate.dedup.outputs import Rows
from sartor.curate.dedup.progress import Progress
from sartor.curate.dedup.verify import Rules


def rethreshold(
    path: Path | str, out: Path | str, *, threshold: float, replace: bool = False, show: bool = False
) -> Deduplicated:
    """Write to `out` what `sartor dedup` would have written at another threshold, from the pairs in its artefact at `path`.

    The input files are read for their rows alone. Raises ConfigError for a threshold below the floor that pairs were kept to,
    ArtifactError if an input file is gone or was changed, GuardError as `dedup` does.
    """
    began = time.monotonic()
    old = open_artifact(path, "duplicates")
    manifest = old.manifest
    ledger.check_threshold(threshold, manifest["rules"]["floor"])
    check_free(Path(out).absolute(), replace=replace)
    rules = dataclasses.replace(Rules(**manifest["rules"]), threshold=threshold)
    listed: list[int] = []

    def fill(part: Path) -> Mapping[str, Any]:
        options = manifest["options"]
        inputs = [_input(said) for said in manifest["inputs"]]
        rows = _rows(old, inputs, options["max_row_bytes"])
        pairs, rank = ledger.read_pairs(old.path / "pairs.parquet", len(rows.line))
        removals = resolve(pairs, rank, rules)
        guard(
            removals,
            rows.file,
            rows.names,
            Limits(options["max_source_fraction"], options["max_fraction"], allow=options["allow"]),
            rows.say,
        )
        counts = [said["rows"] for said in manifest["inputs"]]
        with Progress(show) as progress:
            write_rows(part, inputs, counts, rows, removals, options["max_row_bytes"], Means(progress.show))
        ledger.write_pairs(part / "pairs.parquet", pairs, rank, rules)
        listed.append(len(ledger.listed(pairs, len(rank), rules).a))
        same = {name: manifest[name] for name in ("unit", "size", "unit_reason", "noticed")}
        return {
            **facts(inputs, counts, rows, removals, rules),
            **same,
            "options": {**options, "threshold": threshold},
            "parents": [old.as_parent()],
        }

    artifact = write_artifact(Path(out), "duplicates", fill, replace=replace)
    catalogue.register(artifact)
    return Deduplicated(artifact, time.monotonic() - began, listed[0])


def _input(said: Mapping[str, Any]) -> FileOfRows:
    file = Path(said["path"])
    again = "put the file back as it was, or de-duplicate again"
    if not file.is_file():
        raise ArtifactError(f"the input file {file} is not there", again)
    if file.stat().st_size != said["bytes"] or file_digest(file) != said["sha256"]:
        raise ArtifactError(f"the input file {file} was changed since it was de-duplicated", again)
    choice = Choice(tuple(said["fields"]), said["joined"], tuple(said["left_out"]), said["fields_reason"])
    return FileOfRows(file, said["format"], choice, said["name"], stamp_of(file))


def _rows(old: Artifact, inputs: list[FileOfRows], most_bytes: int) -> Rows:
    """Where the rows stand, by reading the files for their lines; which could not be used, by what was dropped."""
    of_file, lines = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for number, file in enumerate(inputs):
        for block in blocks(file.path, file.kind, most_bytes):
            lines.append(np.array(block.lines, np.int64))
            of_file.append(np.full(len(block.lines), number, np.int32))
    dropped = pq.read_table(old.path / "dropped.parquet", columns=["row", "reason", "detail", "kept_row"]).to_pylist()
    faults = {drop["row"]: Fault(drop["reason"], drop["detail"]) for drop in dropped if drop["kept_row"] is None}
    return Rows([str(file.path) for file in inputs], np.concatenate(of_file), np.concatenate(lines), faults)
