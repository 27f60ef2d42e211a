"""What rows are made from: rows of sources as `curate` reads them, training rows of Datasets; never held-out ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.records import Drop, Example, digest
from sartor.curate.sources import chunk_reader, media_files, planner
from sartor.curate.sources.types import Source

# Of a Source, what its files' entries in the manifest say besides the licence: core/licences/compliance.py reads them there
TERMS = ("share_alike", "non_commercial", "expires", "consent", "rehearsal")


@dataclass
class Seeds:
    """rows: to make others from. drops: what could not be read. files: their entries for the manifest, without counts.

    held_out: rows that are for evaluation: what is made of them would show a model the answers. repeated: rows
    that stood there before.
    """

    rows: list[Example] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    parents: list[Artifact] = field(default_factory=list)
    held_out: int = 0
    repeated: int = 0
    read: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Rows that were read."""
        return len(self.rows) + len(self.drops) + self.held_out + self.repeated

    @property
    def digest(self) -> str:
        """Of what was read: a run goes on only with the same."""
        return digest([[row.id for row in self.rows], [drop.locator for drop in self.drops], self.held_out])


def read(sources: tuple[Source, ...], max_row_bytes: int, folder: Path) -> Seeds:
    """The seeds, their media copied below `folder`. A row that stands there twice is one seed. Raises as `curate`."""
    found = Seeds()
    for source in sources:
        path = Path(source.path)
        if path.is_dir() and kind_of(path) == "dataset":
            coming: Iterator[Example | Drop] = _of_dataset(open_artifact(path, "dataset"), found, folder)
        else:
            coming = _of_files(source, max_row_bytes, found, folder)
        for row in coming:
            if isinstance(row, Drop):
                found.drops.append(row)
            elif row.split == "eval":
                found.held_out += 1
            else:
                found.rows.append(row)
    once = {row.id: row for row in reversed(found.rows)}
    found.repeated = len(found.rows) - len(once)
    found.rows = list(reversed(once.values()))
    return found


def _of_files(source: Source, max_row_bytes: int, found: Seeds, folder: Path) -> Iterator[Example | Drop]:
    plan = planner.plan([source], max_row_bytes)
    terms = {name: getattr(source, name) for name in TERMS}
    found.files += [{**asdict(file), **terms} for file in plan.files]
    for unit in plan.units:
        for row in chunk_reader.read(unit, source, folder / "media"):
            place = row.locator if isinstance(row, Drop) else row.origins[0].locator
            found.read[source.path, place.rpartition(":")[0]] += 1
            yield row if isinstance(row, Drop) or not source.split else replace(row, split=source.split)


def _of_dataset(dataset: Artifact, found: Seeds, folder: Path) -> Iterator[Example]:
    found.parents.append(dataset)
    found.files += [{**file, "notes": {}} for file in dataset.manifest["sources"]]
    for row in parquet_io.read_examples(dataset):
        for origin in row.origins[:1]:
            found.read[origin.source, origin.locator.rpartition(":")[0]] += 1
        if row.split != "eval":
            for part in (part for message in (*row.messages, *row.rejected) for part in message.content if part.media):
                media_files.copy_file(dataset.path / part.media, folder / "media")
        yield row
