"""Writer of every Dataset: split, rows, drops, evidence, card and manifest.

Every verb that makes a Dataset uses DatasetWriter, so the contents of a manifest are defined in one place.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import catalogue, parquet_io
from sartor.core.artifacts import Artifact, Dataset, write_artifact
from sartor.core.errors import SourceError
from sartor.core.filesystem import file_digest
from sartor.core.licences import compliance
from sartor.core.lineage import origin_index
from sartor.core.records import Drop, Example, digest
from sartor.curate import card

ROWS_PER_FILE = 100_000
EDITED = "review"  # ending of the step name in the origin of a row that a person edited
SET_ASIDE = parquet_io.EXAMPLES.append(pa.field("was", pa.string()))
# manifest keys that belong to one artefact and are never inherited
SEAL = frozenset(["schema", "kind", "created", "files", "id", "digest"])


def write_dataset(
    path: Path,
    fill: Callable[[DatasetWriter], Mapping[str, Any]],
    *,
    parents: Sequence[Artifact] = (),
    replace: bool = False,
) -> Dataset:
    """Write a Dataset to `path`, whole or not at all, and register it in the catalogue.

    fill: gets the writer and returns the result of `DatasetWriter.finish`.

    Raises ConfigError if `path` is taken.
    """
    dataset = write_artifact(path, "dataset", lambda folder: fill(DatasetWriter(folder, parents)), replace=replace)
    catalogue.register(dataset)
    return dataset


class DatasetWriter:
    """Writer of the files of one Dataset and of its manifest's facts.

    folder: the directory to fill.
    parents: the Datasets that the rows come from; may be set until `finish`.
    row_count: rows written to `examples/`.
    dropped: rows written to `drops/`, by reason, in order of first occurrence.
    """

    def __init__(self, folder: Path, parents: Sequence[Artifact] = ()) -> None:
        self.folder, self.parents = folder, parents
        self.row_count = 0
        self.dropped: Counter[str] = Counter()

    def examples(self, tables: Iterable[Any]) -> None:
        """Write tables in the schema `parquet_io.EXAMPLES` as `examples/part-*.parquet`."""
        self.row_count += write_tables(self.folder / "examples", parquet_io.EXAMPLES, tables)

    def drops(self, tables: Iterable[Any]) -> None:
        """Write tables in the schema `parquet_io.DROPS` as `drops/part-*.parquet`."""

        def counted() -> Iterator[Any]:
            for table in tables:
                self.dropped.update(table["reason"].to_pylist())
                yield table

        write_tables(self.folder / "drops", parquet_io.DROPS, counted())

    def example_file(self, examples: Iterable[Example]) -> None:
        """Write all Examples as one file, however many they are.

        The digest of a Dataset covers the bytes of its files, and Datasets derived from others have always had one
        file.
        """
        self.row_count += parquet_io.write_examples(self.folder / "examples" / "part-00000.parquet", examples)

    def drop_file(self, drops: Sequence[Drop]) -> None:
        """Write Drops as one more file after the existing files of drops."""
        number = len(list((self.folder / "drops").glob("*.parquet")))
        parquet_io.write_drops(self.folder / "drops" / f"part-{number:05d}.parquet", drops)
        self.dropped.update(drop.reason for drop in drops)

    def set_aside(self, rows: Iterable[tuple[str, Example]]) -> None:
        """Write `set_aside/part-*.parquet` if there is any row.

        rows: pairs of the row's id in the evidence (column `was`) and the row.
        """

        def tables() -> Iterator[Any]:
            for pairs in batched(rows, 1024):
                was = pa.array([name for name, _ in pairs], pa.string())
                yield parquet_io.examples_table(example for _, example in pairs).append_column("was", was)

        remaining = tables()
        first = next(remaining, None)
        if first is not None:
            write_tables(self.folder / "set_aside", SET_ASIDE, itertools.chain([first], remaining))

    def evidence(self, name: str, table: Any) -> None:
        """Write `evidence/<name>.parquet`."""
        (self.folder / "evidence").mkdir(exist_ok=True)
        pq.write_table(table, self.folder / "evidence" / f"{name}.parquet", compression="zstd")

    def media(self, source: Path) -> None:
        """Add the files of a folder to `media/`, by hard links where possible; the originals stay.

        `finish` removes files that no row refers to.
        """
        target = self.folder / "media"
        for file in sorted(source.glob("*")):
            target.mkdir(exist_ok=True)
            if (target / file.name).exists():
                continue
            # a read-only file is copied, not linked: files of an artefact are opened to be synced
            if os.access(file, os.W_OK):
                with contextlib.suppress(OSError):
                    os.link(file, target / file.name)
                    continue
            shutil.copyfile(file, target / file.name)

    def sources_with_kept(self, sources: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the entries of `sources` with `kept`: the rows of `examples/` read from each file."""
        counts = kept_by_file(self.folder)
        return [{**source, "kept": counts[source["source"], source["path"]]} for source in sources]

    def finish(
        self,
        *,
        sources: Sequence[Mapping[str, Any]],
        steps: Mapping[str, Any],
        counts: Mapping[str, Any],
        recipe: Mapping[str, Any] | None = None,
        extra_facts: Mapping[str, Any] | None = None,
        inherits: bool = False,
    ) -> dict[str, Any]:
        """Remove unused media, write lineage index and card; return the facts of the manifest.

        sources: an entry for each file that was read, with `kept`, the rows kept of it.
        counts: `read` and `made`. Kept and dropped rows, splits and groups are counted here.
        extra_facts: further keys. A `licence` among them replaces the one computed from the sources.
        inherits: keep keys of the first parent that are not written anew, and its licence if `sources` is empty.
        """
        _remove_unused_media(self.folder)
        facts: dict[str, Any] = {}
        if inherits:
            facts |= {key: value for key, value in self.parents[0].manifest.items() if key not in SEAL}
        if sources or not inherits:
            facts |= _licence_facts(sources)
        if recipe is not None:
            facts["recipe"] = recipe
        facts |= extra_facts or {}
        facts |= {
            "sources": sources,
            "counts": {
                **counts,
                "kept": self.row_count,
                "dropped": dict(self.dropped.most_common()),
                **self._split_counts(),
            },
            "steps": steps,
            "parents": [parent.as_parent() for parent in self.parents],
            "versions": {name: importlib.metadata.version(name) for name in ("sartor", "pyarrow")},
        }
        origin_index.write(self.folder)
        card.write(self.folder, facts)
        file_digests = {
            file.relative_to(self.folder).as_posix(): file_digest(file)
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        }
        return {**facts, "digest": digest(file_digests)}

    def _split_counts(self) -> dict[str, dict[str, int]]:
        """Return the rows and the groups of each split, counted in the written Examples."""
        files = sorted((self.folder / "examples").glob("*.parquet"))
        table = pa.concat_tables(pq.read_table(file, columns=["split", "group"]) for file in files)
        groups = table.group_by(["split", "group"]).aggregate([])
        return {
            "splits": dict(_value_counts(table["split"]).most_common()),
            "groups": dict(sorted(_value_counts(groups["split"]).items())),
        }


def _value_counts(column: Any) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def _licence_facts(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return licence, conflicts and obligations that result from the sources with kept rows."""
    used = [source for source in sources if source["kept"]]
    return {
        "licence": compliance.combine(source["licence"] for source in used),
        "licence_conflicts": compliance.conflicts(used),
        "obligations": compliance.obligations(used),
    }


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of at most `size` items."""
    source = iter(items)
    while batch := list(itertools.islice(source, size)):
        yield batch


def write_tables(folder: Path, schema: Any, tables: Iterable[Any]) -> int:
    """Write tables as `part-NNNNN.parquet` of at most ROWS_PER_FILE rows; return the number of rows.

    The files depend on the rows alone, not on their division into tables. At least one file is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total, number, room = 0, 0, 0
    writer = None
    try:
        for table in rechunk_tables(tables, schema, parquet_io.ROWS_PER_GROUP):
            if writer is None or room < len(table):
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"part-{number:05d}.parquet", schema, compression="zstd")
                number, room = number + 1, ROWS_PER_FILE
            writer.write_table(table, row_group_size=parquet_io.ROWS_PER_GROUP)
            total, room = total + len(table), room - len(table)
    finally:
        if writer is not None:
            writer.close()
    return total


def rechunk_tables(tables: Iterable[Any], schema: Any, size: int) -> Iterator[Any]:
    """Yield the same rows in tables of exactly `size` rows; the last may be shorter.

    Without any row it yields one empty table.
    """
    pending, count, has_yielded = [], 0, False
    for table in tables:
        while len(table):
            piece = table.slice(0, size - count)
            pending.append(piece)
            count, table = count + len(piece), table.slice(len(piece))
            if count == size:
                yield pa.concat_tables(pending).combine_chunks()
                pending, count, has_yielded = [], 0, True
    if pending:
        yield pa.concat_tables(pending).combine_chunks()
    elif not has_yielded:
        yield schema.empty_table()


def kept_by_file(folder: Path) -> Counter[tuple[str, str]]:
    """Count rows by (source, file), from the origins of the written Examples.

    A row with two origins counts for both. A row made from another counts for none, with two exceptions: a row edited
    by a person still belongs to its source, and a synthesised row counts since a synthetic Dataset has no others.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for file in sorted((folder / "examples").glob("*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(65536, columns=["origins"]):
                origins = batch["origins"].flatten()
                is_read = pc.equal(pc.list_value_length(origins.field("parents")), 0)
                step = origins.field("step")
                is_own = pc.or_(pc.ends_with(step, EDITED), pc.starts_with(step, "synthesize:"))
                origins = origins.filter(pc.or_(is_read, is_own))
                paths = pc.replace_substring_regex(origins.field("locator"), pattern=r":[^:]*$", replacement="")
                pairs = pa.table({"source": origins.field("source"), "file": paths})
                for row in pairs.group_by(["source", "file"]).aggregate([([], "count_all")]).to_pylist():
                    counts[row["source"], row["file"]] += row["count_all"]
    return counts


def _remove_unused_media(folder: Path) -> None:
    """Remove media files to which no kept or set-aside row refers."""
    used: set[str] = set()
    for file in sorted((folder / "examples").glob("*.parquet")) + sorted((folder / "set_aside").glob("*.parquet")):
        for name in ("messages", "rejected"):
            content = pq.read_table(file, columns=[name])[name].combine_chunks().flatten().field("content").flatten()
            for kind in ("image", "audio"):
                used.update(value for value in pc.unique(content.field(kind)).to_pylist() if value)
    for file in (folder / "media").glob("*"):
        if f"media/{file.name}" not in used:
            file.unlink()


def write_dataset_from(
    out: Path | str,
    parents: Sequence[Artifact],
    examples: Iterable[Example],
    drops: Iterable[Drop] = (),
    *,
    step: Mapping[str, Mapping[str, Any]],
    replace: bool = False,
) -> Dataset:
    """Write a Dataset of `examples`: rows of the `parents`, or rows made from them.

    Rows of equal content are merged into one with all origins.

    drops: rows left out, with reasons.
    step: {name: facts} of the step applied, for manifest and card.

    Raises SourceError if no row is left, ConfigError if `out` is taken.
    """
    rows, dropped = _merge_equal(examples), list(drops)
    if not rows:
        raise SourceError(
            f"no row of {', '.join(str(parent.path) for parent in parents)} is left",
            "sartor validate with larger --limits..., or sartor bias --mitigate reweight, which drops no row",
        )

    def fill(writer: DatasetWriter) -> dict[str, Any]:
        writer.example_file(rows)
        writer.drop_file(dropped)
        for parent in parents:
            writer.media(parent.path / "media")
        # from the rows: a derived row may be under both the licence of its source and the terms of a teacher
        licence = compliance.combine(sorted({origin.licence for example in rows for origin in example.origins}))
        # a row counts for the file of each of its origins, also if it was made from a row of that file
        kept: Counter[tuple[str, str]] = Counter()
        for example in rows:
            kept.update((origin.source, re.sub(r":[^:]*$", "", origin.locator)) for origin in example.origins)
        extra_facts = {"licence": licence}
        sources: dict[tuple[str, str], dict[str, Any]] = {}
        steps: dict[str, Any] = {}
        for parent in parents:
            for entry in parent.manifest["sources"]:
                file = entry["source"], entry["path"]
                sources[file] = {**entry, "kept": kept[file]}
            steps |= parent.manifest["steps"]
            if "synthetic" in parent.manifest:
                extra_facts.setdefault("synthetic", parent.manifest["synthetic"])
        return writer.finish(
            recipe={**parents[0].manifest["recipe"], "derived": list(step)},
            sources=list(sources.values()),
            steps={**steps, **step},
            counts={"read": len(rows) + len(dropped), "made": 0},
            extra_facts=extra_facts,
        )

    return write_dataset(Path(out), fill, parents=parents, replace=replace)


def _merge_equal(examples: Iterable[Example]) -> list[Example]:
    results: dict[str, Example] = {}
    for example in examples:
        earlier = results.setdefault(example.id, example)
        new_origins = [origin for origin in example.origins if origin not in earlier.origins]
        if new_origins:
            # built field by field; as with dataclasses.replace, the cached id is not carried over
            results[example.id] = Example(
                messages=earlier.messages,
                origins=(*earlier.origins, *new_origins),
                group=earlier.group,
                split=earlier.split,
                weight=earlier.weight,
                rejected=earlier.rejected,
                tools=earlier.tools,
                steps=earlier.steps,
                rating=earlier.rating,
            )
    return list(results.values())
