"""Rows of a file that an evaluation names, without those that the model was trained on.

A row was trained on if a training row has its id, stands at the same place of a file with the same bytes, whatever
curation made of its words, or asks the same question in other white space, letter case or form of Unicode. The last is
the rule of the split: rows with one prompt are never divided, unless their file states groups.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import parquet_io, records
from sartor.core.artifacts import Artifact
from sartor.core.config import load
from sartor.core.errors import ConfigError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.records import Drop, Example
from sartor.core.splits import prompt_group
from sartor.curate.sources.planner import read_all
from sartor.curate.sources.types import Columns, SourceOptions

MAX_ROW_BYTES = 4 << 20


def rows_of_file(
    data: Path, task: Sequence[Artifact], training: Sequence[Artifact], media: Path
) -> tuple[list[Example], dict[str, int]]:
    """Return the rows of a file or folder that were not trained on, and the numbers left out by reason.

    task: Datasets of the task; their sources say which columns hold what, where the file's own names do not.
    training: all Datasets that were trained on, those of the rehearsal included.
    media: folder into which the media are copied.
    Raises SourceError if no row is left.
    """
    rows = _read(data, task, media)
    examples = [row for row in rows if isinstance(row, Example)]
    drops = [row for row in rows if isinstance(row, Drop)]
    left_out = records.count_values(drop.reason for drop in drops)
    trained, digest_of = TrainingRows.of(training), functools.cache(file_digest)
    row_reasons = [trained.reason(example, _places(example, data, digest_of)) for example in examples]
    kept = [example for example, reason in zip(examples, row_reasons, strict=True) if not reason]
    reasons = Counter(reason for reason in row_reasons if reason)
    left_out |= dict(reasons)
    if kept:
        return kept, left_out
    if reasons:
        raise SourceError(
            f"no row of {data} can be used: {reasons.total():,} of {len(rows):,} were trained on",
            "--data FILE with rows that were not trained on",
        )
    if not drops:
        raise SourceError(f"{data} has no row", "--data FILE with rows like those of the tuning")
    first = drops[0]
    raise SourceError(
        f"no row of {data} can be used: of {len(drops):,} the first, {first.locator}, is left out as {first.reason}: "
        f"{first.detail or 'it is no row'}",
        "--data FILE with rows like those of the tuning, each with a reply; docs/curation.md lists the forms",
    )


def _read(data: Path, task: Sequence[Artifact], media: Path) -> list[Example | Drop]:
    """Return the rows as the Datasets of the task read theirs, so that a row has the same id as there.

    A file without their columns is read by its own. Raises SourceError if it has neither.
    """
    options = replace(_task_source(task), path=str(data))
    try:
        return list(read_all(options, MAX_ROW_BYTES, media / "media"))
    except ConfigError as error:
        if not options.fields.by_name():
            raise
        missing = error.problem
    rows = list(read_all(replace(options, fields=Columns()), MAX_ROW_BYTES, media / "media"))
    if all(isinstance(row, Drop) and row.reason == "unknown_form" for row in rows):
        names = ", ".join(options.fields.by_name().values())
        raise SourceError(missing, f"--data FILE with the columns {names}, as the rows of the tuning have them")
    return rows


def _task_source(task: Sequence[Artifact]) -> SourceOptions:
    """Return columns, system prompt and encoding that all sources of the task share; the defaults if they differ."""
    sources = []
    for dataset in task:
        for source in dataset.manifest.get("recipe", {}).get("sources", []):
            if source.get("rehearsal"):
                continue
            stated = {name: source[name] for name in ("fields", "system", "encoding") if source.get(name)}
            try:
                sources.append(load(SourceOptions, {"path": "any", **stated}))
            except ConfigError:  # of another version
                sources.append(SourceOptions("any"))
    return sources[0] if sources and all(item == sources[0] for item in sources) else SourceOptions("any")


@dataclass(frozen=True)
class TrainingRows:
    """What tells a row that was trained on.

    places: digest of the file and place in it. prompts: of rows whose group is that of their prompt.
    """

    ids: frozenset[str]
    places: frozenset[tuple[str, str]]
    prompts: frozenset[Any]

    @classmethod
    def of(cls, datasets: Sequence[Artifact]) -> TrainingRows:
        """Return those of the training rows of Datasets."""
        ids, places, prompts = set(), set(), set()
        for dataset in datasets:
            digests = {
                (source.get("source"), Path(source.get("path", "")).name): source.get("sha256", "")
                for source in dataset.manifest.get("sources", [])
            }
            for example in parquet_io.read_examples(dataset, "train"):
                ids.add(example.id)
                if example.group.startswith(("prompt:", "media:")) or not example.group:
                    prompts.add(_prompt_key(example))
                for origin in example.origins:
                    file, _, place = origin.locator.rpartition(":")
                    if digest := digests.get((origin.source, Path(file).name)):
                        places.add((digest, place))
        return cls(frozenset(ids), frozenset(places), frozenset(prompts))

    def reason(self, example: Example, places: Sequence[tuple[str, str]]) -> str:
        """Return the reason why a row at these places is left out; empty if it was not trained on."""
        if example.id in self.ids or not self.places.isdisjoint(places):
            return "trained_on"
        return "prompt_trained_on" if _prompt_key(example) in self.prompts else ""


def _places(example: Example, data: Path, digest_of: Callable[[Path], str]) -> list[tuple[str, str]]:
    """Return the digest of its file and the place in it, of each origin of a row of `data`."""
    places = []
    for origin in example.origins:
        file, _, place = origin.locator.rpartition(":")
        path = data if data.is_file() else data / file
        if path.is_file():
            places.append((digest_of(path), place))
    return places


def _prompt_key(example: Example) -> str:
    """Return the name of a row's prompt without differences of white space, letter case and form of Unicode."""
    messages = [
        replace(message, content=tuple(replace(part, text=_plain(part.text)) for part in message.content))
        for message in example.messages
    ]
    if example.is_document:
        return f"document:{_plain(example.reply)}"
    return prompt_group(replace(example, messages=tuple(messages)))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
