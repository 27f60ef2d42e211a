"""A Dataset made of the rows of other Datasets: some of them, with other weights, with rows added. Its parents are those."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.core import catalogue, licences, lineage_index, rows
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import SourceError
from sartor.core.lineage import tally
from sartor.core.records import Drop, Example, digest
from sartor.curate import card, finish
from sartor.curate.pipeline import digests, licence_facts


def write_derived(
    out: Path | str,
    parents: Sequence[Artifact],
    examples: Iterable[Example],
    drops: Iterable[Drop] = (),
    *,
    step: Mapping[str, Mapping[str, Any]],
    replace: bool = False,
) -> Artifact:
    """Write a Dataset of `examples`, rows of the `parents` or made of them; rows of equal content stand once, with all origins.

    `drops` are the rows that are not in it and why; `step` is what was done, {name: facts}, for manifest and card. Raises
    SourceError where no row is left, ConfigError where `out` is taken.
    """
    kept, dropped = _merged(examples), list(drops)
    if not kept:
        raise SourceError(f"no row of {', '.join(str(parent.path) for parent in parents)} is left", "less strict limits")

    def fill(folder: Path) -> Mapping[str, Any]:
        rows.write_examples(folder / "examples" / "part-00000.parquet", kept)
        rows.write_drops(folder / "drops" / "part-00000.parquet", dropped)
        for parent in parents:
            _link_media(parent.path / "media", folder / "media")
        finish.drop_unused_media(folder)
        facts = _facts(parents, kept, dropped, step)
        lineage_index.write(folder)
        card.write(folder, facts)
        return {**facts, "digest": digest(digests(folder))}

    dataset = write_artifact(Path(out), "dataset", fill, replace=replace)
    catalogue.register(dataset)
    return dataset


def _merged(examples: Iterable[Example]) -> list[Example]:
    found: dict[str, Example] = {}
    for example in examples:
        known = found.setdefault(example.id, example)
        if known is not example and (more := [one for one in example.origins if one not in known.origins]):
            # the fields by hand: dataclasses.replace would carry no cached id, and cost nothing else
            found[example.id] = Example(
                known.messages, (*known.origins, *more), known.group, known.split, known.weight, known.rejected, known.tools,
                known.steps, known.rating,
            )  # fmt: skip
    return list(found.values())


def _link_media(source: Path, target: Path) -> None:
    for file in sorted(source.glob("*")):
        target.mkdir(exist_ok=True)
        if not (target / file.name).exists():
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)


def _facts(
    parents: Sequence[Artifact], kept: Sequence[Example], dropped: Sequence[Drop], step: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    used = Counter((one.source, re.sub(r":[^:]*$", "", one.locator)) for example in kept for one in example.origins)
    sources: dict[tuple[str, str], dict[str, Any]] = {}
    for parent in parents:
        for one in parent.manifest["sources"]:
            place = one["source"], one["path"]
            sources[place] = {**one, "kept": used[place]}
    groups: dict[str, set[str]] = {}
    for example in kept:
        groups.setdefault(example.split, set()).add(example.group)
    steps = {name: facts for parent in parents for name, facts in parent.manifest["steps"].items()}
    return {
        "recipe": {**parents[0].manifest["recipe"], "derived": list(step)},
        "sources": list(sources.values()),
        **licence_facts(list(sources.values())),
        # of the rows: what is made of a source may be under its licence and a teacher's word
        "licence": licences.combine(sorted({one.licence for example in kept for one in example.origins})),
        **next(({"synthetic": parent.manifest["synthetic"]} for parent in parents if "synthetic" in parent.manifest), {}),
        "counts": {
            "read": len(kept) + len(dropped),
            "made": 0,
            "kept": len(kept),
            "dropped": tally(drop.reason for drop in dropped),
            "splits": tally(example.split for example in kept),
            "groups": {name: len(some) for name, some in sorted(groups.items())},
        },
        "steps": {**steps, **step},
        "parents": [parent.as_parent() for parent in parents],
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "pyarrow")},
    }
