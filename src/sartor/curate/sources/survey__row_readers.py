"""Part of curate.sources.survey."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file, the number of its first line or row, and in Parquet its first and last row group."""

    start: int
    length: int
    first: int
    crc: int
    groups: tuple[int, int] | None = None
