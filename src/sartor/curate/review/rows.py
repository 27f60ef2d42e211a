"""Rows of a Dataset by their ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, check_file
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import words
from sartor.core.records import Example


def rows_of(dataset: Artifact, ids: Iterable[str]) -> dict[str, Example]:
    """The Examples with these ids that the Dataset holds. Only the row groups that have one are read whole."""
    wanted = words(sorted(set(ids)))
    files = origin_index.example_files(dataset) if len(wanted) else []
    return {row["id"]: parquet_io.example_of(row) for file in files for row in _rows(dataset, file, wanted)}


def _rows(dataset: Artifact, file: Path, wanted: Any) -> Iterator[dict[str, Any]]:
    check_file(dataset, file.relative_to(dataset.path).as_posix())
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            mask = pc.is_in(parquet.read_row_group(group, columns=["id"])["id"], value_set=wanted)
            if pc.any(mask).as_py():
                yield from parquet.read_row_group(group).filter(mask).to_pylist()
