"""A Dataset made of the rows of other Datasets: some of them, with other weights, with rows added. Its parents are those."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import SourceError
from sartor.core.licences import compliance
from sartor.core.records import Drop, Example
from sartor.curate.dataset_writer import DatasetWriter, write_dataset


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

    def fill(writer: DatasetWriter) -> dict[str, Any]:
        writer.example_file(kept)
        writer.drop_file(dropped)
        for parent in parents:
            writer.media(parent.path / "media")
        # of the rows: what is made of a source may be under its licence and a teacher's word
        licence = compliance.combine(sorted({origin.licence for example in kept for origin in example.origins}))
        synthetic = [parent.manifest["synthetic"] for parent in parents if "synthetic" in parent.manifest][:1]
        return writer.finish(
            recipe={**parents[0].manifest["recipe"], "derived": list(step)},
            sources=_sources(parents, kept),
            steps={**{name: facts for parent in parents for name, facts in parent.manifest["steps"].items()}, **step},
            counts={"read": len(kept) + len(dropped), "made": 0},
            more={"licence": licence, **({"synthetic": synthetic[0]} if synthetic else {})},
        )

    return write_dataset(Path(out), fill, parents=parents, replace=replace)


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


def _sources(parents: Sequence[Artifact], kept: Sequence[Example]) -> list[dict[str, Any]]:
    """The parents' entries. Rows count for the file of each origin, also those that were made of a row of it."""
    used = Counter((origin.source, re.sub(r":[^:]*$", "", origin.locator)) for example in kept for origin in example.origins)
    entries = {(entry["source"], entry["path"]): entry for parent in parents for entry in parent.manifest["sources"]}
    return [{**entry, "kept": used[name]} for name, entry in entries.items()]
