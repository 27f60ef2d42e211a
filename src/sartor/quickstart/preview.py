"""Preview of a source: its form, its columns, and its first rows as they would be learnt from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sartor.core.config import load
from sartor.core.records import Drop, Example
from sartor.curate.recipe import CurateRecipe
from sartor.curate.sources.planner import columns_of, plan_reading, read_all
from sartor.curate.sources.types import SourceOptions


@dataclass(frozen=True)
class SourcePreview:
    """First rows of a source.

    form: as rows are read, such as "messages"; "unknown" if the columns have other names.
    columns: of a table.
    rows: kept rows. drops: rows among the first that cannot be read, with the reason.
    """

    form: str
    encoding: str
    columns: Sequence[str]
    rows: Sequence[Example]
    drops: Sequence[Drop]


def preview(
    path: Path | str, *, fields: Mapping[str, str] | None = None, system: str = "", rows: int = 5
) -> SourcePreview:
    """Return the first rows of a file or another source of a curation recipe.

    fields: Sartor's field -> the column. system: the system prompt of every row that has none. rows: number of rows,
    kept and rejected ones each.
    Raises the errors of `curate` for a source that cannot be read.
    """
    options = {"path": str(path), "licence": "NOASSERTION", "fields": dict(fields or {})}
    source = load(SourceOptions, {**options, **({"system": system} if system else {})})
    files = plan_reading([source], CurateRecipe.max_row_bytes).files
    kept: list[Example] = []
    drops: list[Drop] = []
    with tempfile.TemporaryDirectory() as media:
        for row in read_all(source, CurateRecipe.max_row_bytes, Path(media)):
            (kept if isinstance(row, Example) else drops).append(row)  # type: ignore[arg-type]
            if len(kept) >= rows or len(drops) >= rows:
                break
    return SourcePreview(
        form=files[0].form if files else "unknown",
        encoding=files[0].encoding if files else "",
        columns=columns_of(source, CurateRecipe.max_row_bytes),
        rows=kept[:rows],
        drops=drops[:rows],
    )
