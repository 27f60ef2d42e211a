"""Parquet -> rows, by row group, within a memory that does not hang on what the file claims or hides.

A Parquet file can be far larger than its bytes: a value in a dictionary page stands for any number of rows, and so does a run
of nulls. What the footer declares is held against the file's size at planning (`fault`); what one batch unfolds to is held
down by the longest value of the dictionary pages, looked at before they are unfolded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.records import Malformed
from sartor.curate.sources.tables import Read

BATCH_ROWS = 1024
MOST_BATCH_BYTES = 64 << 20  # of a batch once unfolded
MOST_ROWS_PER_BYTE = 64  # a row of text takes at least a few bits of the file
MOST_UNFOLDED, MOST_RATIO = 1 << 30, 200  # of a row group: over both, it is a bomb
MOST_OVERSIZE_RUN = 100  # rows over the limit one after another, before the rest of a group is given up
PIECE_BYTES = 32 << 20  # unfolded, of the row groups that make one unit


def fault(stream: BinaryIO, size: int) -> Malformed | None:
    """Why a Parquet file is not read, by its footer."""
    try:
        metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        return _not_whole(error)
    if metadata.num_rows > 100_000 + MOST_ROWS_PER_BYTE * size:
        return Malformed("parquet_bomb", f"{size:,} bytes that claim to hold {metadata.num_rows:,} rows")
    for number in range(metadata.num_row_groups):
        unfolded = sum(column.total_uncompressed_size for column in _columns(metadata.row_group(number)))
        if unfolded > MOST_UNFOLDED and unfolded > MOST_RATIO * size:
            return Malformed("parquet_bomb", f"row group {number + 1} of {size:,} bytes unfolds to {unfolded:,} bytes")
    return None


def pieces(stream: BinaryIO) -> Iterator[tuple[int, int, int, int, int]]:
    """(first byte, length, first row, first group, last group) of groups that go into one unit together."""
    metadata = pq.ParquetFile(stream).metadata
    begin, row, unfolded, rows = 0, 1, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        unfolded, rows = unfolded + group.total_byte_size, rows + group.num_rows
        if unfolded >= PIECE_BYTES or number == metadata.num_row_groups - 1:
            spans = [_span(column) for place in range(begin, number + 1) for column in _columns(metadata.row_group(place))]
            start = max(0, min((first for first, _ in spans), default=0))
            yield start, max(0, max((last for _, last in spans), default=0) - start), row, begin, number
            begin, row, unfolded, rows = number + 1, row + rows, 0, 0


def read(stream: BinaryIO, first: int, groups: tuple[int, int] | None, most_bytes: int) -> Read:
    """Rows of the groups from the first to the last named, or of all; `first` is the number of the first row."""
    number = first
    try:
        metadata = pq.ParquetFile(stream).metadata
        begin, last = groups or (0, metadata.num_row_groups - 1)
        for group in range(begin, last + 1):
            expected = number + metadata.row_group(group).num_rows
            for place, row in _group(stream, group, number, most_bytes):
                number = place
                yield str(place), row
            number = expected
    except (pa.ArrowException, OSError, ValueError) as error:
        yield str(number), _not_whole(error)


def _group(stream: BinaryIO, group: int, number: int, most_bytes: int) -> Iterator[tuple[int, Any]]:
    batch_rows, run = _batch_rows(stream, group), 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_rows, row_groups=[group]):
        if batch.nbytes <= most_bytes:  # no row of it can be too long
            for row in batch.to_pylist():
                yield number, drop_nulls(row)
                number += 1
            continue
        for place in range(batch.num_rows):
            one = batch.slice(place, 1)
            run = run + 1 if one.nbytes > most_bytes else 0
            if not run:
                yield number, drop_nulls(one.to_pylist()[0])
            elif run <= MOST_OVERSIZE_RUN:
                detail = f"the row has {one.nbytes:,} bytes; the limit is {most_bytes:,} (max_row_bytes)"
                yield number, Malformed("oversize_row", detail)
            else:
                detail = f"{run} rows in succession are longer than {most_bytes:,} bytes; the rest of row group {group + 1}"
                yield number, Malformed("parquet_bomb", f"{detail} is not read")
                return
            number += 1


def _batch_rows(stream: BinaryIO, group: int) -> int:
    """Rows to unfold at once, so that each could hold the longest value of a dictionary page."""
    metadata = pq.ParquetFile(stream).metadata
    leaves = [
        column.path_in_schema
        for column in _columns(metadata.row_group(group))
        if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    ]
    if not leaves or not metadata.row_group(group).num_rows:
        return BATCH_ROWS
    batch = next(pq.ParquetFile(stream, read_dictionary=leaves).iter_batches(1, row_groups=[group]))
    longest = max((_longest(column) for column in batch.columns), default=0)
    return max(1, min(BATCH_ROWS, MOST_BATCH_BYTES // max(1, longest)))


def _longest(array: Any) -> int:
    """Bytes of the longest value in the dictionaries of an array, at any depth."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.max(lengths).as_py() or 0)
    if pa.types.is_struct(array.type):
        return max((_longest(array.field(place)) for place in range(array.type.num_fields)), default=0)
    if pa.types.is_map(array.type):
        return max(_longest(array.keys), _longest(array.items))
    nested = pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    return _longest(array.values) if nested else 0


def drop_nulls(value: Any) -> Any:
    """Parquet structs carry every field of their type; an absent one is null."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _columns(group: Any) -> list[Any]:
    return [group.column(place) for place in range(group.num_columns)]


def _span(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _not_whole(error: Exception) -> Malformed:
    return Malformed("unreadable_file", f"not whole Parquet: {(str(error).splitlines() or [''])[0][:200]}")
