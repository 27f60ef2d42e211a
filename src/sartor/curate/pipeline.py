"""Sources -> Dataset: read, step by step, hold out, write. `read` is always `kept` plus every Drop."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, lineage, rows
from sartor.core.artifacts import Artifact, check_free, write_artifact
from sartor.core.errors import SourceError
from sartor.core.holdout import held_out_groups
from sartor.core.records import Drop, Example, digest
from sartor.curate import steps as steps_module
from sartor.curate.recipe import CurateRecipe, Split
from sartor.curate.sources import FileFacts, Reader


@dataclass(frozen=True)
class Curated:
    """What `curate` made: the Dataset and how many rows went where."""

    dataset: Artifact
    read: int
    kept: int
    dropped: dict[str, int]
    wall_s: float

    @property
    def rows_per_s(self) -> float:
        """Rows read per second of wall time."""
        return self.read / self.wall_s if self.wall_s else math.inf

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        manifest = self.dataset.manifest
        return {
            "dataset": str(self.dataset.path),
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped,
            "licences": sorted({source["licence"] for source in manifest["sources"]}),
            "forms": {_place(source): source["form"] for source in manifest["sources"]},
            "splits": manifest["counts"]["splits"],
            "wall_s": round(self.wall_s, 3),
            "rows_per_s": round(self.rows_per_s, 1),
        }


@dataclass
class Survivors:
    """Examples that are still in, by id, and Drops of those that are not."""

    examples: dict[str, Example] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)


def curate(
    recipe: CurateRecipe | Mapping[str, Any] | Path | str, out: Path | str, *, strict: bool = False, replace: bool = False
) -> Curated:
    """Read the sources of a recipe, apply its steps, split by group, write a Dataset to `out`.

    `recipe` is a CurateRecipe, a mapping in its form, or the path of a YAML file. Raises ConfigError for a bad recipe or a
    taken `out`, SourceError when no row is kept or, under `strict`, at the first row that cannot be used.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe)
    out = Path(out)
    check_free(out.absolute(), replace=replace)
    result: dict[str, Any] = {}

    def fill(part: Path) -> Mapping[str, Any]:
        reader = Reader(recipe.max_row_bytes, part / "media", strict)
        survivors = _run(recipe, reader)
        examples = assign_splits(list(survivors.examples.values()), recipe)
        examples, leaked = keep_groups_whole(examples)
        drops = survivors.drops + leaked
        read = sum(file.read for file in reader.files)
        assert read == len(examples) + len(drops), f"{read} rows read, {len(examples)} kept, {len(drops)} dropped"
        if not examples:
            raise SourceError(_nothing_kept(read, drops), "mend the rows or the sources; the reasons stand above")
        _drop_unused_media(part, examples)
        rows.write_examples(part / "examples" / "part-00000.parquet", examples)
        rows.write_drops(part / "drops" / "part-00000.parquet", drops)
        dropped = lineage.tally(drop.reason for drop in drops)
        result.update(read=read, kept=len(examples), dropped=dropped)
        return _facts(recipe, reader.files, examples, result)

    dataset = write_artifact(out, "dataset", fill, replace=replace)
    catalogue.register(dataset)
    return Curated(dataset, wall_s=time.monotonic() - began, **result)


def load_recipe(recipe: CurateRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> CurateRecipe:
    """The recipe in any of the forms that `curate` takes, with flags (`--split.eval_fraction 0.2`) on top."""
    return config.load_any(CurateRecipe, recipe, flags)


def _run(recipe: CurateRecipe, reader: Reader) -> Survivors:
    """Read every source and apply the steps in order."""
    # Duplicates must be found even where no step asks: an Example's id is its content, and ids are unique in a Dataset.
    survivors = Survivors()
    for source in recipe.sources:
        for row in reader.read(source):
            if isinstance(row, Drop):
                survivors.drops.append(row)
                continue
            row = replace(row, split=source.split)
            outcome = _apply(recipe.steps, row)
            if isinstance(outcome, Drop):
                survivors.drops.append(outcome)
            elif (twin := survivors.examples.get(outcome.id)) is None:
                survivors.examples[outcome.id] = outcome
            else:
                survivors.drops.append(_merge(survivors, twin, outcome))
    return survivors


def _apply(steps: Sequence[steps_module.Step], example: Example) -> Example | Drop:
    """The per-row steps; exact duplicates need the other rows and are found by the caller."""
    outcome: Example | Drop = example
    for step in steps:
        if isinstance(step, steps_module.Length) and isinstance(outcome, Example):
            outcome = steps_module.length(step, outcome)
    return outcome


def _merge(survivors: Survivors, twin: Example, again: Example) -> Drop:
    """Let `twin` keep the origin of a row of equal content; returns that row's Drop.

    Of two groups the survivor keeps its own; of two declared splits, eval wins, so that no held-out row is trained on.
    """
    split = "eval" if "eval" in (twin.split, again.split) else twin.split or again.split
    merged = replace(twin, origins=twin.origins + again.origins, split=split, group=twin.group or again.group)
    survivors.examples[twin.id] = merged
    detail = f"the same content as {twin.origins[0].locator}"
    return steps_module.dropped(again, "exact_duplicate", detail, step="exact_duplicates", kept=twin.id)


def assign_splits(examples: Sequence[Example], recipe: CurateRecipe) -> list[Example]:
    """Fill in each Example's group and split; whole groups are held out until `eval_fraction` of the rows is reached."""
    grouped = [replace(example, group=_group(example, recipe.split)) for example in examples]
    undecided = (example.group for example in grouped if not example.split)
    held_out = held_out_groups(undecided, recipe.split.eval_fraction, recipe.seed)
    return [replace(example, split=example.split or ("eval" if example.group in held_out else "train")) for example in grouped]


def keep_groups_whole(examples: Sequence[Example]) -> tuple[list[Example], list[Drop]]:
    """The check that no group straddles the split: a training row whose group is held out is dropped.

    Only sources with a declared split can bring that about; a group that the recipe splits is whole by construction.
    """
    held_out = {example.group for example in examples if example.split == "eval"}
    kept, drops = [], []
    for example in examples:
        if example.split == "train" and example.group in held_out:
            detail = f"its group {example.group[:80]!r} is held out for evaluation"
            drops.append(steps_module.dropped(example, "group_held_out", detail, step="split"))
            # the Drops of a merged row's twins are counted already; this one stands for the survivor
        else:
            kept.append(example)
    return kept, drops


def _group(example: Example, split: Split) -> str:
    if split.by == "group" and example.group:
        return example.group
    if example.is_document:
        return example.id
    prompt = [message.plain() for message in example.messages if message.role == "user"]
    return f"prompt:{digest(prompt)[:16]}"


def _facts(
    recipe: CurateRecipe, files: Sequence[FileFacts], examples: Sequence[Example], result: Mapping[str, Any]
) -> dict[str, Any]:
    groups: dict[str, set[str]] = {}
    for example in examples:
        groups.setdefault(example.split, set()).add(example.group)
    counts = {
        **result,
        "splits": lineage.tally(example.split for example in examples),
        "groups": {split: len(names) for split, names in sorted(groups.items())},
    }
    kept = Counter((origin.source, origin.locator.rpartition(":")[0]) for row in examples for origin in row.origins)
    sources = [{**dataclasses.asdict(file), "kept": kept[file.source, file.path]} for file in files]
    return {
        "recipe": config.dump(recipe),
        "sources": sources,
        "licence": lineage.combine(source["licence"] for source in sources if source["kept"]),
        "counts": counts,
        "parents": [],
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "pyarrow")},
    }


def _place(source: Mapping[str, Any]) -> str:
    """A file as its source names it: two sources may hold files of one name."""
    return str(source["source"] if source["source"].endswith(source["path"]) else f"{source['source']}/{source['path']}")


def _drop_unused_media(part: Path, examples: Iterable[Example]) -> None:
    """Media of rows that were not kept do not stay."""
    used = {piece.media for example in examples for message in example.messages for piece in message.content if piece.media}
    for file in (part / "media").glob("*"):
        if f"media/{file.name}" not in used:
            file.unlink()


def _nothing_kept(read: int, drops: Sequence[Drop]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in lineage.tally(drop.reason for drop in drops).items())
    first = f"; the first: {drops[0].locator}: {drops[0].detail}" if drops else ""
    return f"no row is left of {read}" + (f" ({reasons}{first})" if reasons else "")
