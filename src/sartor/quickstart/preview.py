"""Preview of a source or a recipe: columns, and the first rows as they would be learnt from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sartor.core.config import load
from sartor.core.records import Drop, Example
from sartor.curate.pipeline import load_recipe
from sartor.curate.recipe import CurateRecipe
from sartor.curate.shards import apply_steps
from sartor.curate.sources.encodings import KNOWN_ENCODINGS
from sartor.curate.sources.planner import first_rows, plan_reading, read_all
from sartor.curate.sources.row_formats import column_names
from sartor.curate.sources.types import SourceOptions
from sartor.curate.step import RowStep
from sartor.curate.steps import makes_copies, needs_all_rows

# rows that a preview of a recipe reads of a source; all of them may be dropped
MAX_READ = 500


@dataclass(frozen=True)
class SourcePreview:
    """First rows of a source.

    form: as rows are read, such as "messages"; "unknown" if the columns have other names.
    columns: of a table.
    rows: kept rows. drops: rows among the first that cannot be read, with the reason.
    encodings: code pages to choose from, if the file's is not certain or one was chosen.
    """

    form: str
    encoding: str
    columns: Sequence[str]
    rows: Sequence[Example]
    drops: Sequence[Drop]
    encodings: Sequence[str] = ()


def preview(
    path: Path | str,
    *,
    fields: Mapping[str, str] | None = None,
    system: str = "",
    encoding: str = "",
    rows: int = 5,
) -> SourcePreview:
    """Return the first rows of a file or another source of a curation recipe.

    fields: Sartor's field -> the column. system: the system prompt of every row that has none. encoding: code page of
    the file, if it is not detected. rows: number of rows, kept and rejected ones each.
    Raises the errors of `curate` for a source that cannot be read.
    """
    options = {"path": str(path), "licence": "NOASSERTION", "fields": dict(fields or {})}
    texts = {name: text for name, text in (("system", system), ("encoding", encoding)) if text}
    source = load(SourceOptions, {**options, **texts})
    files = plan_reading([source], CurateRecipe.max_row_bytes).files
    kept: list[Example] = []
    drops: list[Drop] = []
    with tempfile.TemporaryDirectory() as media:
        for row in read_all(source, CurateRecipe.max_row_bytes, Path(media)):
            (kept if isinstance(row, Example) else drops).append(row)  # type: ignore[arg-type]
            if len(kept) >= rows or len(drops) >= rows:
                break
    is_unknown = any(drop.reason == "unknown_encoding" for drop in drops)
    return SourcePreview(
        form=files[0].form if files else "unknown",
        encoding=files[0].encoding if files else "",
        columns=column_names(first_rows(source, CurateRecipe.max_row_bytes)),
        rows=kept[:rows],
        drops=drops[:rows],
        encodings=KNOWN_ENCODINGS if encoding or is_unknown else (),
    )


@dataclass(frozen=True)
class RecipePreview:
    """First rows of a recipe's sources after its steps.

    rows: kept rows. drops: rows among the first that cannot be read or that a step drops.
    later_steps: steps that were not applied, since they compare or copy the rows of the whole Dataset.
    """

    rows: Sequence[Example]
    drops: Sequence[Drop]
    later_steps: Sequence[str]


def preview_recipe(recipe: CurateRecipe | Mapping[str, Any] | Path | str, *, rows: int = 5) -> RecipePreview:
    """Return the first rows of a curation recipe as they would be learnt from.

    rows: number of rows, kept and dropped ones each; every source gives about the same number.
    Raises the errors of `curate` for a recipe that is wrong and a source that cannot be read.
    """
    loaded = load_recipe(recipe)
    row_steps: list[RowStep] = []
    later: list[str] = []
    for step in loaded.steps:
        if needs_all_rows(step) or makes_copies(step):
            later.append(step.kind)
        else:
            row_steps.append(cast(RowStep, step))
    kept: list[Example] = []
    drops: list[Drop] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "media").mkdir()
        functions = [(step.kind, step.open(folder)) for step in row_steps]
        for index, source in enumerate(loaded.sources):
            most = -(-rows * (index + 1) // len(loaded.sources))
            for row in islice(read_all(source, loaded.max_row_bytes, folder / "media"), MAX_READ):
                outcome = apply_steps(row, functions) if isinstance(row, Example) else row
                (kept if isinstance(outcome, Example) else drops).append(outcome)  # type: ignore[arg-type]
                if len(kept) >= most:
                    break
    return RecipePreview(kept[:rows], drops[:rows], later)
