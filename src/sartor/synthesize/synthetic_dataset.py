"""Input and output of a synthesis: seed rows, and synthetic rows as a Dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.errors import SourceError
from sartor.core.licences.compliance import combine
from sartor.core.records import Drop, Example, Origin, canonical_text, digest
from sartor.core.splits import HELD_OUT_SPLITS, split_group
from sartor.curate.dataset_writer import DatasetWriter, batched, kept_by_file
from sartor.curate.sources import chunk_reader, media_files, planner
from sartor.curate.sources.types import SourceOptions
from sartor.synthesize.generator import GeneratedRow

# Terms of a source, besides the licence, that are copied to its files' entries in the manifest;
# core/licences/compliance.py reads them there.
TERMS = ("share_alike", "non_commercial", "expires", "consent", "rehearsal")


@dataclass
class Seeds:
    """Seed rows of a synthesis.

    rows: the seeds. drops: rows that could not be read.
    files: entries of the source files for the manifest, without counts. parents: source Datasets.
    held_out: number of evaluation rows. They are not used, since rows made from them would show a model the answers.
    repeated: number of rows that repeat an earlier one.
    read: rows read, by (source, file).
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
        """Number of rows read."""
        return len(self.rows) + len(self.drops) + self.held_out + self.repeated

    @property
    def digest(self) -> str:
        """Digest of the rows read; a run is resumed only with the same."""
        return digest([[row.id for row in self.rows], [drop.locator for drop in self.drops], self.held_out])


def read_seeds(sources: tuple[SourceOptions, ...], max_row_bytes: int, folder: Path) -> Seeds:
    """Return the seeds, with their media copied below `folder`.

    A row that occurs twice is one seed. Raises as `curate` does.
    """
    result = Seeds()
    for source in sources:
        path = Path(source.path)
        if path.is_dir() and kind_of(path) == "dataset":
            rows: Iterator[Example | Drop] = _of_dataset(open_artifact(path, "dataset"), result, folder)
        else:
            rows = _of_files(source, max_row_bytes, result, folder)
        for row in rows:
            if isinstance(row, Drop):
                result.drops.append(row)
            elif row.split in HELD_OUT_SPLITS:
                result.held_out += 1
            else:
                result.rows.append(row)
    unique = {row.id: row for row in reversed(result.rows)}
    result.repeated = len(result.rows) - len(unique)
    result.rows = list(reversed(unique.values()))
    return result


def _of_files(source: SourceOptions, max_row_bytes: int, seeds: Seeds, folder: Path) -> Iterator[Example | Drop]:
    plan = planner.plan_reading([source], max_row_bytes)
    terms = {name: getattr(source, name) for name in TERMS}
    seeds.files += [{**asdict(file), **terms} for file in plan.files]
    for unit in plan.chunks:
        for row in chunk_reader.read_chunk(unit, source, folder / "media"):
            locator = row.locator if isinstance(row, Drop) else row.origins[0].locator
            seeds.read[source.path, locator.rpartition(":")[0]] += 1
            yield row if isinstance(row, Drop) or not source.split else replace(row, split=source.split)


def _of_dataset(dataset: Artifact, seeds: Seeds, folder: Path) -> Iterator[Example]:
    seeds.parents.append(dataset)
    seeds.files += [{**file, "notes": {}} for file in dataset.manifest["sources"]]
    for row in parquet_io.read_examples(dataset):
        for origin in row.origins[:1]:
            seeds.read[origin.source, origin.locator.rpartition(":")[0]] += 1
        if row.split not in HELD_OUT_SPLITS:
            for message in (*row.messages, *row.rejected):
                for part in message.content:
                    if part.media:
                        media_files.copy_file(dataset.path / part.media, folder / "media")
        yield row


EVIDENCE = pa.schema(
    [
        ("id", pa.string()),
        ("way", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("teacher", pa.string()),
        ("prompt", pa.string()),  # digest of the question; like that of the answer, empty without a teacher
        ("answer", pa.string()),
        ("seed", pa.int64()),
        ("changes", pa.string()),
        ("span_start", pa.int64()),  # of the cited span, in characters of the parent's text; null if none is cited
        ("span_end", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Provenance:
    """Provenance of a generated row; the fields are empty without a teacher.

    prompt, answer: digests of question and answer.
    """

    teacher: str = ""
    prompt: str = ""
    answer: str = ""
    seed: int = 0


@dataclass
class SyntheticRows:
    """Synthetic rows collected during a run, each content once.

    licences: of rows made from nothing, and of the teacher's answers (empty for none).
    seeds: seed id -> locator.
    ways: generator kind -> counts of `made`, `dropped` and `skipped:REASON`.
    """

    licences: tuple[str, str]
    seeds: Mapping[str, str]  # id -> locator
    rows: dict[str, Example] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)
    evidence: list[dict[str, Any]] = field(default_factory=list)
    ways: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, kind: str, outcome: str) -> None:
        """Count one more `made`, `dropped` or `skipped:REASON` of a generator."""
        self.ways.setdefault(kind, Counter())[outcome] += 1

    def add(self, kind: str, generated: GeneratedRow, provenance: Provenance) -> None:
        """Add a row, or a Drop if its content equals a seed or an earlier row."""
        row = self._row(kind, generated, provenance)
        if row.id in self.seeds or row.id in self.rows:
            duplicate_of = (
                f"the seed {self.seeds[row.id]}" if row.id in self.seeds else f"{self.rows[row.id].origins[0].step}'s"
            )
            detail = f"the same content as {duplicate_of}"
            self.drop(
                kind,
                Drop("exact_duplicate", "", "", detail, id=row.id, kept=row.id, method="equal content"),
                generated.number,
            )
            return
        self.rows[row.id] = row
        self.count(kind, "made")
        span = generated.span or (None, None)
        fields = {
            "id": row.id,
            "way": kind,
            "parents": [parent.id for parent in generated.parents],
            **asdict(provenance),
        }
        self.evidence.append({**fields, "changes": generated.changes, "span_start": span[0], "span_end": span[1]})

    def drop(self, kind: str, drop: Drop, number: str) -> None:
        """Record an attempt that gave no row."""
        step = f"synthesize:{kind}"
        self.drops.append(
            replace(drop, step=step, source=drop.source or step, locator=drop.locator or f"{kind}:{number}")
        )
        self.count(kind, "dropped")

    def _row(self, kind: str, generated: GeneratedRow, provenance: Provenance) -> Example:
        step = f"synthesize:{kind}"
        made_by = canonical_text({"way": kind, **asdict(provenance)})
        of_nothing, of_teacher = self.licences
        origins: dict[Origin, None] = {}
        for parent in generated.parents:
            for origin in parent.origins:
                licence = origin.licence
                if of_teacher and provenance.teacher:
                    licence = combine([licence, of_teacher])
                origins[replace(origin, licence=licence, parents=(parent.id,), step=step, made_by=made_by)] = None
        if not generated.parents:
            licence = combine([of_nothing, of_teacher]) if of_teacher and provenance.teacher else of_nothing
            locator = f"{kind}:{generated.number}"
            origin = Origin(step, locator, licence=licence, parents=(), step=step, made_by=made_by)
            origins[origin] = None
        content = generated.row
        row = Example(content.messages, tuple(origins), split="train", rejected=content.rejected, tools=content.tools)
        return replace(row, group=generated.group or split_group(row))


def write(
    writer: DatasetWriter, work: Path, synthetic_rows: SyntheticRows, seeds: Seeds, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill the directory of the Dataset; return the facts of its manifest.

    fields: recipe, teacher name and digest of the seeds.
    """
    drops = [*seeds.drops, *synthetic_rows.drops]
    if not synthetic_rows.rows:
        raise SourceError(_nothing_made(drops, synthetic_rows.ways), "mend the sources, the ways or the teacher")
    writer.parents = seeds.parents
    writer.examples(parquet_io.examples_table(batch) for batch in batched(synthetic_rows.rows.values(), 1024))
    writer.drops(_drop_tables(drops))
    writer.media(work / "media")
    writer.evidence("synthetic", pa.Table.from_pylist(synthetic_rows.evidence, EVIDENCE))
    row_count = sum(map(_tried, synthetic_rows.ways.values()))
    assert row_count + len(seeds.drops) == writer.row_count + writer.dropped.total()
    ways = {kind: dict(sorted(counts.items())) for kind, counts in synthetic_rows.ways.items()}
    # source entries: the seeds' files, and one for each generator with rows made from nothing
    of_nothing = sorted(file_key for file_key in kept_by_file(writer.folder) if file_key[0].startswith("synthesize:"))
    entries = [*seeds.files, *(_pseudo(file_key, synthetic_rows.licences[0]) for file_key in of_nothing)]
    entries = [{**entry, "read": seeds.read[entry["source"], entry["path"]]} for entry in entries]
    by_licence = {origin.licence for row in synthetic_rows.rows.values() for origin in row.origins}
    return writer.finish(
        recipe=fields["recipe"],
        sources=writer.sources_with_kept(entries),
        # `copies`: rows that a step adds; the card plots how many of them are left
        steps={f"synthesize:{kind}": {**counts, "copies": _tried(counts)} for kind, counts in ways.items()},
        counts={"read": len(seeds.drops), "made": row_count},
        # the licence combines those of the seeds and, if stated, of the teacher's answers
        extra_facts={"licence": combine(by_licence), "synthetic": _synthetic(seeds, ways, fields)},
    )


def _nothing_made(drops: Sequence[Drop], ways: Mapping[str, Counter[str]]) -> str:
    reasons = Counter(drop.reason for drop in drops)
    for counts in ways.values():
        reasons.update({name.removeprefix("skipped:"): count for name, count in counts.items() if "skipped:" in name})
    first = f"; the first: {drops[0].detail}" if drops else ""
    counted = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "the ways had nothing to do"
    return f"no row was made ({counted}{first})"


def _synthetic(seeds: Seeds, ways: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "teacher": fields["teacher"],
        "ways": ways,
        "seeds": {
            "read": seeds.total,
            "used": len(seeds.rows),
            "held_out": seeds.held_out,
            "repeated": seeds.repeated,
            "dropped": len(seeds.drops),
        },
        "of": fields["of"],
    }


def _tried(counts: Mapping[str, int]) -> int:
    """Return the number of rows made and dropped by a generator."""
    return counts.get("made", 0) + counts.get("dropped", 0)


def _pseudo(file_key: tuple[str, str], licence: str) -> dict[str, Any]:
    """Return the source entry of rows that are made from the recipe alone."""
    terms: dict[str, Any] = {
        "share_alike": False,
        "non_commercial": False,
        "expires": "",
        "consent": "",
        "rehearsal": False,
    }
    assert terms.keys() == set(TERMS)
    entry = {
        "source": file_key[0],
        "path": file_key[1],
        "sha256": "",
        "bytes": 0,
        "licence": licence,
        "use": (),
        "form": "synthetic",
    }
    return {**entry, **terms, "notes": {}}


def _drop_tables(drops: Sequence[Drop]) -> Iterator[Any]:
    for batch in batched(drops, 4096):
        yield pa.Table.from_pylist([asdict(drop) for drop in batch], parquet_io.DROPS)
