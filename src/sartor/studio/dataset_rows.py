"""Rows and drops of a Dataset, a page at a time, filtered while its Parquet files are scanned.

A page is found by scanning row groups from a position until it is full or SCAN_S have passed; then the page says how
far it came, and the next page begins there. So a page of a Dataset of any size comes within a bounded time, and memory
holds a few row groups. A filter by text reads the columns of texts alone; whole rows are read for the matches only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.parquet_io import numbers, to_string_array

PAGE_ROWS = 25
# time after which a scan stops and the page says how far it came
SCAN_S = 1.2
# row groups read ahead by the threads of a scan
AHEAD = 4
EXAMPLES, DROPS = "examples/", "drops/"


@dataclass(frozen=True)
class RowFilter:
    """What rows must have. Empty: no condition.

    split: of a row. text: words in any of its texts, upper and lower case alike. reason: of a drop.
    """

    split: str = ""
    text: str = ""
    reason: str = ""


@dataclass(frozen=True)
class RowPage:
    """A page of rows.

    rows: (position, row) in the order of the files.
    next_position: where the next page begins; None at the end of the rows.
    scanned, total: how far the scan came, and the number of all rows.
    is_cut: whether the time ended the scan before the page was full.
    """

    rows: Sequence[tuple[int, dict[str, Any]]]
    next_position: int | None
    scanned: int
    total: int
    is_cut: bool


@dataclass(frozen=True)
class _Group:
    """A row group of a file. start: position of its first row among all rows. metadata: the file's, read once."""

    file: Path
    metadata: Any
    index: int
    start: int
    rows: int


class RowTable:
    """The Parquet files of one kind of a Dataset's rows.

    dataset: its manifest must have been checked. prefix: EXAMPLES or DROPS.
    files: in the order of their rows. total: number of rows.
    Raises ArtifactError for a file that cannot be read.
    """

    def __init__(self, dataset: Artifact, prefix: str) -> None:
        names = [name for name in dataset.manifest["files"] if name.startswith(prefix) and name.endswith(".parquet")]
        self._groups: list[_Group] = []
        self.total = 0
        self.files = [dataset.path / name for name in sorted(names)]
        for file in self.files:
            with _readable(file) as parquet:
                metadata = parquet.metadata
            for index in range(metadata.num_row_groups):
                count = metadata.row_group(index).num_rows
                self._groups.append(_Group(file, metadata, index, self.total, count))
                self.total += count

    def page(self, wanted: RowFilter, position: int = 0, size: int = PAGE_ROWS) -> RowPage:
        """Return the rows from a position on that fit the filter."""
        if position < 0 or position > self.total:
            raise ConfigError(f"there is no row {position:,}; there are {self.total:,}", "begin with the first page")
        deadline = time.monotonic() + SCAN_S
        matches: list[int] = []
        scanned, is_cut = position, False
        for group, found in self._scan(wanted, position):
            matches += [group.start + int(row) for row in found if group.start + row >= position]
            scanned = group.start + group.rows
            if len(matches) > size:
                break
            if time.monotonic() > deadline and scanned < self.total:
                is_cut = len(matches) < size
                break
        has_more = len(matches) > size
        shown = matches[:size]
        following = matches[size] if has_more else scanned if scanned < self.total else None
        if has_more:
            scanned = following or scanned
        return RowPage(list(zip(shown, self.take(shown), strict=True)), following, scanned, self.total, is_cut)

    def _scan(self, wanted: RowFilter, position: int) -> Iterator[tuple[_Group, Any]]:
        """Yield (row group, numbers of its rows that fit) from a position on; a few are read ahead by threads."""
        waiting = [group for group in self._groups if group.start + group.rows > position]
        with ThreadPoolExecutor(AHEAD) as threads:
            futures = [(group, threads.submit(_matching, group, wanted)) for group in waiting[:AHEAD]]
            upcoming = iter(waiting[AHEAD:])
            try:
                while futures:
                    group, future = futures.pop(0)
                    yield group, future.result()
                    if (following := next(upcoming, None)) is not None:
                        futures.append((following, threads.submit(_matching, following, wanted)))
            finally:
                for _, future in futures:
                    future.cancel()

    def take(self, positions: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows at positions, in order; each row group is read once. columns: all by default."""
        rows: dict[int, dict[str, Any]] = {}
        for group in self._groups:
            inside = [place - group.start for place in positions if 0 <= place - group.start < group.rows]
            if inside:
                with _readable(group.file, group.metadata) as parquet:
                    table = parquet.read_row_group(group.index, columns).take(pa.array(inside, pa.int64()))
                for place, row in zip(inside, table.to_pylist(), strict=True):
                    rows[group.start + place] = row
        return [rows[place] for place in positions]

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the positions of the rows with these ids; unknown ids are left out."""
        wanted = [identity for identity in dict.fromkeys(ids) if identity]
        result: dict[str, int] = {}
        if not wanted:
            return result
        value_set = to_string_array(wanted)
        for group in self._groups:
            column = _read(group, ["id"])["id"].combine_chunks()
            for place in np.flatnonzero(numbers(pc.is_in(column, value_set=value_set))):
                result.setdefault(column[int(place)].as_py(), group.start + int(place))
            if len(result) == len(wanted):
                break
        return result

    def counts(self, *names: str, only_duplicates: bool = False) -> dict[tuple[str, ...], int]:
        """Return how often each combination of values of columns of texts occurs, the most frequent first.

        only_duplicates: of the rows that were dropped for another row.
        """
        if not self.files:
            return {}
        rows = pl.scan_parquet(self.files)
        if only_duplicates:
            rows = rows.filter(pl.col("kept").str.len_bytes() > 0)
        try:
            counted = rows.group_by(names).len().collect()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise _unreadable(self.files[0], error) from None
        ordered = counted.sort("len", *names, descending=[True, *(False for _ in names)])
        return {tuple(str(value or "") for value in row[:-1]): int(row[-1]) for row in ordered.rows()}


def _matching(group: _Group, wanted: RowFilter) -> Any:
    """Return the numbers of a row group's rows that fit, (N,)."""
    is_match = np.ones(group.rows, bool)
    for name, value in (("split", wanted.split), ("reason", wanted.reason)):
        if value:
            is_match &= numbers(pc.equal(pc.fill_null(_read(group, [name])[name].combine_chunks(), ""), value))
    if wanted.text and is_match.any():
        is_match &= _contains(group, wanted.text)
    return np.flatnonzero(is_match)


def _contains(group: _Group, text: str) -> Any:
    """Return which rows of a group have a text in any of their texts, (N,)."""
    schema = group.metadata.schema
    paths = [schema.column(index).path for index in range(len(schema))]
    if "text" in paths:  # drops
        table = _read(group, ["text", "detail"])
        found = [_has(table[name].combine_chunks(), text) for name in ("text", "detail")]
        return found[0] | found[1]
    is_match = np.zeros(group.rows, bool)
    for name in ("messages", "rejected"):
        columns = [path for path in paths if path.startswith(f"{name}.") and path.endswith(".text")]
        if not columns:
            continue
        messages = _read(group, columns)[name].combine_chunks()
        contents = pc.struct_field(pc.list_flatten(messages), "content")
        texts = pc.struct_field(pc.list_flatten(contents), "text")
        rows_of_messages = numbers(pc.list_parent_indices(messages))
        messages_of_texts = numbers(pc.list_parent_indices(contents))
        is_match[rows_of_messages[messages_of_texts[_has(texts, text)]]] = True
    return is_match


def _has(texts: Any, text: str) -> Any:
    """Return which texts hold another one, in any case, (N,)."""
    return numbers(pc.fill_null(pc.match_substring(texts, text, ignore_case=True), False))


def _read(group: _Group, columns: list[str]) -> Any:
    with _readable(group.file, group.metadata) as parquet:
        return parquet.read_row_group(group.index, columns=columns, use_threads=False)


@contextmanager
def _readable(file: Path, metadata: Any = None) -> Iterator[Any]:
    """Open a Parquet file; its errors are ArtifactErrors. metadata: of the file, if it was read before."""
    try:
        with pq.ParquetFile(file, metadata=metadata) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{file.name} is not readable Parquet: {error}", "make the Dataset again: sartor curate --replace"
    )


def plain_messages(row: Mapping[str, Any], name: str = "messages") -> list[dict[str, Any]]:
    """Return the messages of a row as {role, text, reasoning, media, files, tool_calls, weight, is_learnt}.

    The assistant's turns are learnt, but for those of weight 0. name: "messages" or "rejected".
    media: a line for each picture and recording. files: the same as {kind, path, number}; the number counts those of
    the whole row (`row_media`).
    """
    result = []
    number = len(_media_parts(row, "messages")) if name == "rejected" else 0
    for message in row.get(name) or []:
        parts = message.get("content") or []
        texts = [part.get("text") or "" for part in parts if part.get("type") == "text"]
        files = []
        for part in parts:
            if part.get("type") != "text":
                files.append({"kind": part["type"], "path": part.get(part["type"]) or "", "number": number})
                number += 1
        weight = 1.0 if message.get("weight") is None else message["weight"]
        result.append(
            {
                "role": message.get("role") or "",
                "reasoning": message.get("reasoning_content") or "",
                "text": "".join(texts),
                "media": [f"{file['kind']}: {file['path']}" for file in files],
                "files": files,
                "tool_calls": message.get("tool_calls") or "",
                "weight": weight,
                "is_learnt": message.get("role") == "assistant" and weight > 0,
            }
        )
    return result


def row_media(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures and recordings that a row names as {kind, path, number}, by their numbers."""
    messages = [*plain_messages(row), *plain_messages(row, "rejected")]
    return [file for message in messages for file in message["files"]]


def _media_parts(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    contents = [message.get("content") or [] for message in row.get(name) or []]
    return [part for parts in contents for part in parts if part.get("type") != "text"]


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row as readable text, as a drop keeps it."""
    return "\n".join(f"{message['role']}: {message['text']}" for message in plain_messages(row))
