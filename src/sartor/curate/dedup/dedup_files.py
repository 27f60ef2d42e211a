"""Verb `dedup`: duplicates in any files of records."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Lines

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, check_output_free, open_artifact, write_artifact
from sartor.core.config import option
from sartor.core.errors import ArtifactError, ConfigError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.processes import Executor, WorkerPool
from sartor.curate.dedup import pair_store
from sartor.curate.dedup.clusters import RemovalLimits, Removals, check_removals, resolve_clusters
from sartor.curate.dedup.file_passes import FileOfRows, RecordLocations, Writer, inspect_files, sketch_files, stamp_of
from sartor.curate.dedup.near_duplicates import near_duplicates
from sartor.curate.dedup.pair_scoring import DuplicateRules, rules_for
from sartor.curate.dedup.record_files import BadRecord, ComparedFields, blocks


class DedupProgress:
    """Progress display with one bar for each stage; shows nothing unless `visible`."""

    def __init__(self, visible: bool) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
        self._lines = Lines(*columns, console=Console(stderr=True), disable=not visible)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` pieces of a stage."""
        if stage not in self._tasks:
            self._tasks[stage] = self._lines.add_task(stage, total=total)
        self._lines.update(self._tasks[stage], completed=min(done, total), total=total)  # type: ignore[arg-type]


# Less input than this is read and compared faster than two processes start.
_PAYS_BYTES = 24 << 20
_STORE = "shingles.bin"
_FILE_KEYS = ("path", "rows", "fields", "fields_reason", "left_out")


@dataclass(frozen=True)
class DedupOptions:
    """Options of `sartor dedup`."""

    text_field: str = option(
        "", "field or fields (a,b) compared, a.b goes into objects; empty: `text`, a known form, or all of them joined"
    )
    threshold: float = option(
        0.0, "Jaccard similarity from which two rows are duplicates; 0 takes 0.65 for words, 0.45 for characters"
    )
    contained: float | None = option(
        None, "share of the shorter row that must stand in the longer (0: never); None: 0.9 for words"
    )
    unit: Literal["auto", "words", "characters"] = option(
        "auto", "what shingles are runs of; auto: characters for short records"
    )
    size: int = option(0, "length of a shingle; 0: 2 words, 3 characters")
    keep: Literal["longest", "first"] = option("longest", "which row of several alike stays")
    max_source_fraction: float = option(0.75, "stop if one cluster would remove more of a file")
    max_fraction: float = option(0.9, "stop if more of all rows would be removed")
    allow: tuple[str, ...] = option((), "files that may go wholly")
    max_row_bytes: int = option(4 << 20, "a longer row is put aside")
    processes: int = option(0, "worker processes; 0: as many as cores where that pays, 1: none")

    def __post_init__(self) -> None:
        for name in ("max_source_fraction", "max_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name):g}; it must be above 0 and at most 1",
                    f"--{name.replace('_', '-')} 0.9",
                )
        if self.unit not in ("auto", "words", "characters") or self.keep not in ("longest", "first"):
            raise ConfigError(
                f"unit is {self.unit!r}, keep {self.keep!r}",
                "--unit auto, words or characters; --keep longest or first",
            )
        if self.max_row_bytes < 1:
            raise ConfigError(
                f"max_row_bytes is {self.max_row_bytes}; it must be 1 or more", "--max-row-bytes 4194304"
            )
        if self.processes < 0:
            raise ConfigError(f"processes is {self.processes}; it must be 0 or more", "--processes 0")

    @property
    def limits(self) -> RemovalLimits:
        """Limits on removals."""
        return RemovalLimits(self.max_source_fraction, self.max_fraction, allow=self.allow)


@dataclass(frozen=True)
class Deduplicated:
    """Result of `dedup`.

    listed: number of duplicate pairs.
    pairs_file: file to which they were exported, if any.
    """

    artifact: Artifact
    wall_s: float
    listed: int
    pairs_file: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        manifest = self.artifact.manifest
        files = []
        for file in manifest["inputs"]:
            files.append({key: file[key] for key in _FILE_KEYS})
        return {
            "out": str(self.artifact.path),
            **manifest["counts"],
            "pairs": self.listed,
            "pairs_file": str(self.pairs_file) if self.pairs_file else None,
            **{name: manifest[name] for name in ("unit", "size", "unit_reason")},
            **{name: manifest["rules"][name] for name in ("threshold", "floor", "contained")},
            **manifest["noticed"],
            "files": files,
            "wall_s": round(self.wall_s, 3),
            "rows_per_s": round(manifest["counts"]["read"] / self.wall_s, 1) if self.wall_s else math.inf,
        }


def dedup(
    files: Sequence[Path | str] | Path | str,
    out: Path | str,
    *,
    pairs: Path | str | None = None,
    replace: bool = False,
    show: bool = False,
    **options: Any,
) -> Deduplicated:
    """Find duplicates in files of records; write kept rows, dropped rows and all verified pairs to `out`.

    pairs: file to which duplicates are exported as (a, b, score, method). Rows are numbered from 0 over all files in
    order.
    show: show progress on stderr.
    options: those of DedupOptions.

    Raises ConfigError, SourceError (no row can be used, or a file changes meanwhile), GuardError.
    """
    began = time.monotonic()
    settings = _options(options)
    paths = [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
    pairs = Path(pairs) if pairs is not None else None
    check_output_free(Path(out).absolute(), replace=replace)
    if pairs is not None:
        pair_store.check_export(pairs)
    pair_counts: list[int] = []

    def fill(folder: Path) -> Mapping[str, Any]:
        with DedupProgress(show) as progress, WorkerPool(_processes(settings, paths)) as workers:
            executor = Executor(progress.show, workers.spread)
            inputs, shingling = inspect_files(
                paths,
                settings.text_field,
                unit=settings.unit,
                size=settings.size,
                max_row_bytes=settings.max_row_bytes,
            )
            rules = rules_for(shingling, settings.threshold, settings.contained)
            sketched = sketch_files(
                inputs, shingling, store=folder / _STORE, max_row_bytes=settings.max_row_bytes, executor=executor
            )
            rows = sketched.rows
            if not len(rows.line) or len(rows.faults) == len(rows.line):
                raise SourceError(_nothing(rows), "check the files and --text-field")
            rank = sketched.lengths if settings.keep == "longest" else np.zeros(len(sketched.lengths))
            near_pairs = near_duplicates(
                sketched.shingles, sketched.offsets, sketched.digests, rules=rules, rank=rank, executor=executor
            )
            (folder / _STORE).unlink()
            removals = resolve_clusters(near_pairs.pairs, rank, rules)
            check_removals(
                removals, sources=rows.file, names=rows.names, limits=settings.limits, describe=rows.describe
            )
            write_rows(
                folder,
                inputs,
                sketched.counts,
                rows=rows,
                removals=removals,
                max_row_bytes=settings.max_row_bytes,
                executor=executor,
            )
        pair_store.write_pairs(folder / "pairs.parquet", near_pairs.pairs, rank, rules)
        duplicates = pair_store.duplicates_at(near_pairs.pairs, len(rank), rules)
        pair_counts.append(len(duplicates.a))
        if pairs is not None:
            pair_store.export(pairs, duplicates, rules)
        noticed = {
            "ignored_shingles": near_pairs.common,
            "empty": near_pairs.empty - len(rows.faults),
            "candidates": near_pairs.candidates,
        }
        return {
            **facts(inputs, sketched.counts, rows=rows, removals=removals, rules=rules),
            "unit": shingling.unit,
            "size": shingling.size,
            "unit_reason": shingling.reason,
            "options": asdict(settings),
            "noticed": noticed,
        }

    artifact = write_artifact(Path(out), "duplicates", fill, replace=replace)
    catalogue.register(artifact)
    return Deduplicated(artifact, time.monotonic() - began, pair_counts[0], pairs)


def write_rows(
    folder: Path,
    inputs: Sequence[FileOfRows],
    counts: Sequence[int],
    rows: RecordLocations,
    removals: Removals,
    max_row_bytes: int,
    executor: Executor,
) -> None:
    """Read every file a second time and write its rows. Raises SourceError if one has changed."""
    first = 0
    with Writer(folder, rows, removals) as writer:
        for file, count in zip(inputs, counts, strict=True):
            file.check_unchanged()
            written = writer.write(file.path, file.kind, first=first, name=file.name, max_row_bytes=max_row_bytes)
            if written != count:
                raise SourceError(f"{file.path} was changed while it was read", "run again when nobody writes it")
            file.check_unchanged()
            first += count
            executor.show("writing", first, sum(counts))


def facts(
    inputs: Sequence[FileOfRows],
    counts: Sequence[int],
    rows: RecordLocations,
    removals: Removals,
    rules: DuplicateRules,
) -> dict[str, Any]:
    """Return the facts of the manifest, except those that only a first run knows."""
    read = len(rows.line)
    reasons = Counter(fault.reason for fault in rows.faults.values())
    dropped = dict(sorted(reasons.items()))
    if len(removals.rows):
        dropped["duplicate"] = len(removals.rows)
    return {
        "rules": asdict(rules),
        "inputs": [_input_facts(file, count) for file, count in zip(inputs, counts, strict=True)],
        "counts": {
            "read": read,
            "kept": read - len(removals.rows) - len(rows.faults),
            "removed": removals.by_method(),
            "dropped": dropped,
            "clusters": removals.clusters,
            "largest_cluster": removals.largest_cluster,
        },
        "parents": [],
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "rensa", "xxhash", "pyarrow")},
    }


def _input_facts(file: FileOfRows, count: int) -> dict[str, Any]:
    return {
        "path": str(file.path.absolute()),
        "name": file.name,
        "sha256": file_digest(file.path),
        "bytes": file.stamp[0],
        "format": file.kind,
        "rows": count,
        "fields": list(file.choice.fields),
        "left_out": list(file.choice.left_out),
        "joined": file.choice.joined,
        "fields_reason": file.choice.reason,
    }


def _options(options: Mapping[str, Any]) -> DedupOptions:
    known = [column.name for column in dataclasses.fields(DedupOptions)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ConfigError(f"there is no option {name!r}", f"{near[0]}?" if near else f"one of {', '.join(known)}")
    return DedupOptions(**options)


def _processes(settings: DedupOptions, paths: Sequence[Path]) -> int:
    """Return the number of worker processes; 0 for none besides this one."""
    count = settings.processes
    if not count and sum(path.stat().st_size for path in paths if path.is_file()) >= _PAYS_BYTES:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(cores, 8)
    return count if count > 1 else 0


def _nothing(rows: RecordLocations) -> str:
    if not rows.faults:
        return f"no row of {len(rows.line)} can be used"
    counts = Counter(fault.reason for fault in rows.faults.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    row, fault = next(iter(rows.faults.items()))
    example = f"the first: {rows.describe(row)}: {fault.detail}"
    return f"no row of {len(rows.line)} can be used ({reasons}; {example})"


def rethreshold(
    path: Path | str, out: Path | str, *, threshold: float, replace: bool = False, show: bool = False
) -> Deduplicated:
    """Write to `out` the result of `sartor dedup` at another threshold, from the pairs stored at `path`.

    The input files are read only to write their rows. Raises ConfigError for a threshold below the floor of the stored
    pairs, ArtifactError if an input file is missing or was changed, GuardError as `dedup` does.
    """
    began = time.monotonic()
    old = open_artifact(path, "duplicates")
    manifest = old.manifest
    pair_store.check_threshold(threshold, manifest["rules"]["floor"])
    check_output_free(Path(out).absolute(), replace=replace)
    rules = dataclasses.replace(DuplicateRules(**manifest["rules"]), threshold=threshold)
    pair_counts: list[int] = []

    def fill(folder: Path) -> Mapping[str, Any]:
        options = manifest["options"]
        inputs = [_input(entry) for entry in manifest["inputs"]]
        rows = _rows(old, inputs, options["max_row_bytes"])
        pairs, rank = pair_store.read_pairs(old.path / "pairs.parquet", len(rows.line))
        removals = resolve_clusters(pairs, rank, rules)
        limits = RemovalLimits(
            options["max_source_fraction"],
            options["max_fraction"],
            allow=options["allow"],
            rerun=f"sartor dedup FILE... --out DIR --threshold {threshold:g}",
        )
        check_removals(removals, sources=rows.file, names=rows.names, limits=limits, describe=rows.describe)
        counts = [entry["rows"] for entry in manifest["inputs"]]
        with DedupProgress(show) as progress:
            write_rows(
                folder,
                inputs,
                counts,
                rows=rows,
                removals=removals,
                max_row_bytes=options["max_row_bytes"],
                executor=Executor(progress.show),
            )
        pair_store.write_pairs(folder / "pairs.parquet", pairs, rank, rules)
        pair_counts.append(len(pair_store.duplicates_at(pairs, len(rank), rules).a))
        inherited = {name: manifest[name] for name in ("unit", "size", "unit_reason", "noticed")}
        return {
            **facts(inputs, counts, rows=rows, removals=removals, rules=rules),
            **inherited,
            "options": {**options, "threshold": threshold},
            "parents": [old.as_parent()],
        }

    artifact = write_artifact(Path(out), "duplicates", fill, replace=replace)
    catalogue.register(artifact)
    return Deduplicated(artifact, time.monotonic() - began, pair_counts[0])


def _input(entry: Mapping[str, Any]) -> FileOfRows:
    file = Path(entry["path"])
    remedy = f"cp BACKUP/{file.name} {file}, as it was; or sartor dedup FILE... --out DIR anew"
    if not file.is_file():
        raise ArtifactError(f"the input file {file} is not there", remedy)
    if file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
        raise ArtifactError(f"the input file {file} was changed since it was de-duplicated", remedy)
    choice = ComparedFields(tuple(entry["fields"]), entry["joined"], tuple(entry["left_out"]), entry["fields_reason"])
    return FileOfRows(file, kind=entry["format"], choice=choice, name=entry["name"], stamp=stamp_of(file))


def _rows(old: Artifact, inputs: list[FileOfRows], max_row_bytes: int) -> RecordLocations:
    """Return the locations of the rows from the files, and the bad records from the dropped rows."""
    of_file, lines = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for number, file in enumerate(inputs):
        for block in blocks(file.path, file.kind, max_row_bytes):
            lines.append(np.array(block.lines, np.int64))
            of_file.append(np.full(len(block.lines), number, np.int32))
    dropped = pq.read_table(old.path / "dropped.parquet", columns=["row", "reason", "detail", "kept_row"]).to_pylist()
    faults = {drop["row"]: BadRecord(drop["reason"], drop["detail"]) for drop in dropped if drop["kept_row"] is None}
    return RecordLocations([str(file.path) for file in inputs], np.concatenate(of_file), np.concatenate(lines), faults)
