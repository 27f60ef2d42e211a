"""The curation recipe: sources, steps, split, seed. One declaration per option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import config
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences.spdx import UNKNOWN
from sartor.curate.sources.python_rows import HELD_OUT, source_path
from sartor.curate.sources.source_files import ROWS
from sartor.curate.sources.types import SourceOptions
from sartor.curate.steps import Step, makes_copies
from sartor.curate.steps.text_duplicates import ExactDuplicates


@dataclass(frozen=True)
class Split:
    """Options for the held-out rows. All rows of a group get the same split."""

    eval_fraction: float = option(0.1, "fraction of the rows held out, 0..1")
    test_fraction: float = option(
        0.0, "fraction held out for release alone (split test): tuning never reads it; 0 for none"
    )
    by: Literal["group", "prompt"] = option(
        "group", "the row's `group` field (its prompt where it has none), or the prompt"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1", "eval_fraction: 0.1"
            )
        if not 0 <= self.test_fraction < 1 - self.eval_fraction:
            problem = (
                f"test_fraction is {self.test_fraction} beside eval_fraction {self.eval_fraction}; no row is left to "
                "train on"
            )
            raise ConfigError(problem, "test_fraction: 0.1, at least 0, and below 1 together with eval_fraction")


@dataclass(frozen=True)
class CurateRecipe:
    """Recipe of a curation: sources, steps and split of one Dataset."""

    sources: tuple[SourceOptions, ...] = option(REQUIRED, "where rows come from")
    steps: tuple[Step, ...] = option((ExactDuplicates(),), "what is done to each row, in order")
    split: Split = option(Split(), "how rows are held out")
    seed: int = option(0, "seed of the split")
    max_row_bytes: int = option(4 << 20, "a longer row is dropped, not read")
    workers: int = option(0, "processes at once; 0 takes one a core. Changes nothing in the Dataset")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; it must be 0 or more", "workers: 2")
        if not self.sources:
            raise ConfigError("the recipe names no source", "sources: [{path: rows.jsonl, licence: CC-BY-4.0}]")
        self._check_copies_are_last()

    def _check_copies_are_last(self) -> None:
        """Raise ConfigError unless the copying steps come last and each occurs once.

        Copies are made once the held-out rows are known, so no other step could see them. Many of those steps would
        take the copies for duplicates.
        """
        kinds: list[str] = [step.kind for step in self.steps]
        copying: list[str] = [step.kind for step in self.steps if makes_copies(step)]
        others: list[str] = [step.kind for step in self.steps if not makes_copies(step)]
        if kinds != others + copying:
            later_step = next(kind for kind in kinds[kinds.index(copying[0]) :] if kind not in copying)
            problem = f"steps: {later_step} stands behind {copying[0]}, whose copies are made after every other step"
            raise ConfigError(problem, f"put {' and '.join(dict.fromkeys(copying))} last")
        if repeated := next((kind for kind in copying if copying.count(kind) > 1), ""):
            raise ConfigError(
                f"steps: {repeated} stands twice; its copies are made of the rows, not of copies",
                f"one {repeated} with more copies, as {{kind: {repeated}, copies: 4}}",
            )


def with_rows(
    recipe: CurateRecipe | Mapping[str, Any] | Path | str | None,
    names: Sequence[str],
    *,
    licence: str = "",
    fields: Mapping[str, str] | None = None,
    system: str = "",
) -> CurateRecipe | Mapping[str, Any] | Path | str:
    """Return a recipe with a source for each name of rows given from Python. Sources that it has for them stay.

    licence, fields, system: of the sources that are added. Beside rows called `eval`, `test` or `validation`, which
    are held out, rows called `train` are for training alone.
    Raises ConfigError without a recipe and rows, for a source of rows that are not given, and for options of rows that
    the recipe describes, or that are not given.
    """
    if recipe is not None and not isinstance(recipe, (CurateRecipe, Mapping, Path, str)):
        problem = f"the recipe is a {type(recipe).__name__}, and rows are given as `rows`"
        raise ConfigError(problem, 'sartor.curate(rows=rows, out="data", licence="own")')
    options: dict[str, Any] = {"licence": licence, "fields": dict(fields or {}), "system": system}
    options = {name: value for name, value in options.items() if value}
    if not names and options:
        problem = f"{' and '.join(options)} describe rows, and none are given"
        raise ConfigError(problem, "rows=..., or these options of the recipe's sources")
    if not names:
        if recipe is None:
            raise ConfigError(
                "neither a recipe nor rows are given", 'sartor.curate(rows=rows, out="data", licence="own")'
            )
        return recipe
    document: dict[str, Any] = {}
    if recipe is not None:
        document = config.dump(recipe) if isinstance(recipe, CurateRecipe) else {**_read(recipe)}
    stated = document.get("sources") or []
    sources = [stated] if isinstance(stated, (str, Mapping)) else list(stated)
    declared = {source.get("path") if isinstance(source, Mapping) else source for source in sources}
    paths = {name: source_path(name) for name in names}
    for path in declared:
        if str(path).startswith(ROWS) and path not in paths.values():
            raise ConfigError(
                f"the recipe reads {path!r}, and rows are given as {', '.join(names)}", 'rows={"NAME": rows}'
            )
    has_held_out = any(name in HELD_OUT for name in names)
    for name, path in paths.items():
        if path in declared:
            if options:
                raise ConfigError(f"{next(iter(options))} is given, and the recipe describes {path!r}", "leave it out")
            continue
        source = {"path": path, "licence": UNKNOWN, **options}
        if name in HELD_OUT or (name == "train" and has_held_out):
            source["split"] = "train" if name == "train" else "eval"
        sources.append(source)
    return {**document, "sources": sources}


def _read(recipe: Mapping[str, Any] | Path | str) -> Mapping[str, Any]:
    return recipe if isinstance(recipe, Mapping) else config.read_yaml(Path(str(recipe)))
