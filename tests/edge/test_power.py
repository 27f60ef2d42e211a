"""Power cuts: a disk that drops what was not fsynced, cut before every operation of install, update, rollback, update, collect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edge_disks import CUTS, STEPS, Cut, MemoryDisk, Step, check_after

from sartor.edge.disk import Disk
from sartor.edge.store import Store

FOLDER = Path("/device/store")


class ForgetfulDisk(MemoryDisk):
    """Says that it has synced, for some operations, and has not."""

    def __init__(self, forgets: Callable[[str, Path], bool]) -> None:
        super().__init__()
        self.forgets = forgets

    def sync(self, path: Path) -> None:
        if self.forgets("sync", path):
            self.before("sync", path)
        else:
            super().sync(path)

    def sync_folder(self, path: Path) -> None:
        if self.forgets("sync_folder", path):
            self.before("sync_folder", path)
        else:
            super().sync_folder(path)


def interrupted(disk: MemoryDisk, cuts: list[Cut]) -> Iterator[tuple[int, str, Step, Cut, MemoryDisk]]:
    """The disk as each power cut leaves it, at each operation: (which operation, what, in which step, how cut, the disk)."""
    points: list[tuple[int, str, Step, Cut, MemoryDisk]] = []
    step = STEPS[0]
    count = 0

    def before(operation: str, path: Path) -> None:
        nonlocal count
        points.extend((count, f"{operation} {path}", step, cut, disk.after(cut)) for cut in cuts)
        count += 1

    disk.before = before
    store = Store(FOLDER, disk=disk)
    for step in STEPS:
        step.act(store, disk)
        before("end", FOLDER)
        yield from points
        points.clear()


def failures(disk: MemoryDisk, cuts: list[Cut]) -> tuple[int, list[str]]:
    count, failed = 0, []
    for number, operation, step, cut, left in interrupted(disk, cuts):
        count += 1
        try:
            check_after(left, FOLDER, step)
        except Exception as error:
            failed.append(f"{number} {operation}, {step.name}, {cut}: {type(error).__name__}: {error}")
    return count, failed


def test_a_power_cut_at_any_operation_leaves_the_old_or_the_new_version() -> None:
    count, failed = failures(MemoryDisk(), CUTS)
    assert failed == []
    assert count >= 200 * len(CUTS)
