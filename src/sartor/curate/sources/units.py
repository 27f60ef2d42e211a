"""The input as the pipeline sees it: `plan` cuts the sources into units, `read` gives the Examples and Drops of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sartor.core.records import Drop, Example
from sartor.curate.recipe import Source
from sartor.curate.sources.declared import FileFacts
from sartor.curate.sources.planning import Plan, plan
from sartor.curate.sources.reading import InputFile, Unit, read, unit_of_json

__all__ = ["FileFacts", "InputFile", "Plan", "Unit", "plan", "read", "read_all", "unit_of_json"]


def read_all(source: Source, max_row_bytes: int, media_folder: Path) -> Iterator[Example | Drop]:
    """Every row of one source, in this process. Raises as `plan` and `read` do."""
    for unit in plan([source], max_row_bytes).units:
        yield from read(unit, source, media_folder)
