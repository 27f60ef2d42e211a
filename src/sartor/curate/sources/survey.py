"""The one pass over an input file before any row is read: its sha256, and where it may be cut into pieces.

A piece of JSON Lines is about PIECE_BYTES and ends at a line's end; a piece of Parquet is some row groups; every other file is
one piece. A piece keeps the CRC-32 of its bytes, so that who reads it later knows it is what was planned, without reading
the whole file again.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from sartor.curate.sources import parquet
from sartor.curate.sources.survey__row_readers import Piece  # noqa: F401

PIECE_BYTES = 8 << 20
BLOCK_BYTES = 1 << 20


def survey(stream: BinaryIO, kind: str) -> tuple[str, int, list[Piece]]:
    """(sha256, bytes, pieces) of a file. Memory is that of a block, however long a line is."""
    if kind == "jsonl":
        return _survey_lines(stream)
    digest, crc, size = hashlib.sha256(), 0, 0
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        crc, size = zlib.crc32(block, crc), size + len(block)
    if kind == "parquet" and size > PIECE_BYTES and (found := list(parquet.pieces(stream))):
        pieces = [
            Piece(start, length, row, checksum(stream, start, length), (begin, last))
            for start, length, row, begin, last in found
        ]
        return digest.hexdigest(), size, pieces
    return digest.hexdigest(), size, [Piece(0, size, 1, crc)]


def _survey_lines(stream: BinaryIO) -> tuple[str, int, list[Piece]]:
    digest, pieces = hashlib.sha256(), []
    start, line, crc, at, lines = 0, 1, 0, 0, 0
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        begun = 0
        while (cut := block.find(b"\n", max(begun, start + PIECE_BYTES - at - 1)) + 1) > 0:
            crc, lines = zlib.crc32(block[begun:cut], crc), lines + block.count(b"\n", begun, cut)
            pieces.append(Piece(start, at + cut - start, line, crc))
            start, line, crc, begun = at + cut, line + lines, 0, cut
            lines = 0
        crc, lines = zlib.crc32(block[begun:], crc), lines + block.count(b"\n", begun)
        at += len(block)
    if at > start or not pieces:
        pieces.append(Piece(start, at - start, line, crc))
    return digest.hexdigest(), at, pieces


def checksum(stream: BinaryIO, start: int, length: int) -> int:
    """CRC-32 of a piece of a file."""
    crc = 0
    for block in _blocks(stream, start, length):
        crc = zlib.crc32(block, crc)
    return crc


def _blocks(stream: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    stream.seek(start)
    while length > 0 and (block := stream.read(min(BLOCK_BYTES, length))):
        length -= len(block)
        yield block
