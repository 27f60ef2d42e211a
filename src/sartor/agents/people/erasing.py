"""Lines of a file that others append to, made unreadable where they stand: blanks over their bytes, on disk before it returns.

The file keeps its length and its inode: who has it open goes on, and what is known of other lines' places goes on to hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sartor.core.lineage.receipt_index import PATTERN, ReceiptIndex


def lines_with(file: Path, needle: bytes) -> list[tuple[int, bytes]]:
    """(where it begins, the line without its end) of each line that holds these bytes; one that a kill cut short too."""
    found, start = [], 0
    for line in file.read_bytes().split(b"\n"):
        if needle in line:
            found.append((start, line))
        start += len(line) + 1
    return found


def blank(file: Path, lines: Sequence[tuple[int, bytes]]) -> None:
    """Write blanks over lines of a file."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for start, line in lines:
            os.pwrite(descriptor, b" " * len(line), start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def erase_receipts(folder: Path, person: str) -> tuple[int, list[str]]:
    """Blank every receipt of a person's own version, and leave it out of the index. Returns (how many, the segments)."""
    index, count, touched = ReceiptIndex(folder), 0, []
    for file in sorted(folder.glob(PATTERN)):
        if lines := lines_with(file, f'"person":"{person}"'.encode()):
            blank(file, lines)
            index.leave_out(file.name, [start for start, _ in lines])
            touched.append(file.name)
            count += len(lines)
    return count, touched
