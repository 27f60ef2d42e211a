"""Training rows in the trace store, which are read one at a time.

    SARTOR_HOME/trace/ADAPTER_ID/[rows-DATASET/]retrieval-KEY/
      header.json          schema, rows of each Dataset, sources, system prompt and tools of most rows
      rows, row_starts     JSON of each row, laid end to end
      ids                  (N, 64) Example ids
      prompts.*, replies.*, media.*, sources.*, rejected_rows, equal_rows      the retrieval index (retrieval_store.py)

KEY is a digest of what the rows depend on: the Datasets and what the tuning held out and left out. Everything is for
its owner alone, and found by an erasure as the sketches are (core/trace_store.py). A folder is written under another
name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import parquet_io
from sartor.core.errors import ArtifactError
from sartor.core.records import Example
from sartor.core.trace_store import read_trace_json
from sartor.trace.word_index import PackedTexts

SCHEMA = 1
HEADER, ROWS, STARTS, IDS = "header.json", "rows", "row_starts", "ids"
# rows that stay decoded; a trace looks at those of the best groups several times
_DECODED_ROWS = 1024


class StoredExamples(Sequence[Example]):
    """Examples of N training rows in a folder of the trace store. header: of the folder."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        """Map the rows. Raises OSError or ValueError if a file is absent or damaged."""
        self.folder, self.header = folder, header
        self._texts = PackedTexts(map_array(folder, ROWS), map_array(folder, STARTS))
        self._read = lru_cache(maxsize=_DECODED_ROWS)(self._decode)
        if len(self._texts) != sum(header["counts"]) or len(map_array(folder, IDS)) != len(self._texts):
            raise ValueError(f"{folder} holds another number of rows than its header says")

    @classmethod
    def open(cls, folder: Path) -> StoredExamples | None:
        """Return the rows in a folder; None if there are none that this version can read."""
        try:
            header = read_trace_json(folder / HEADER)
            return cls(folder, header) if header is not None and header.get("schema") == SCHEMA else None
        except (OSError, ValueError, KeyError, TypeError, ArtifactError):
            return None

    @property
    def ids(self) -> list[str]:
        """Ids (N,) of the Examples."""
        return [str(id) for id in map_array(self.folder, IDS).astype(str)]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(place) for place in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])

    def _decode(self, index: int) -> Example:
        return parquet_io.example_of(json.loads(self._texts[index]))


def pack_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the arrays of a folder from which `StoredExamples` reads these rows, by name."""
    rows = (json.dumps(parquet_io.example_row(example), ensure_ascii=False).encode() for example in examples)
    packed = PackedTexts.of(rows)
    ids = np.array([example.id for example in examples], dtype="S64")
    return {ROWS: packed.content, STARTS: packed.starts, IDS: ids}


def map_array(folder: Path, name: str) -> Any:
    """Return an array of a folder without reading it into memory."""
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
