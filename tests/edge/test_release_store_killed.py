"""SIGKILL of a real process before every operation of an update, and in the middle of every write: no point is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_disks import STEPS
from killed_update import CHANGES, Killer
from sartor.core.filesystem import FileSystem
from update_kills import check_each, kill_each


@pytest.mark.services
def test_kill_at_every_operation_leaves_old_or_new_version(memory: Path) -> None:
    """Kill before each operation of every step, and in the middle of writes."""
    kills = kill_each(memory, 1)
    assert [number for number, _, _ in kills] == list(range(len(kills)))
    assert len(kills) >= 200
    assert {step for _, step, _ in kills} == {step.name for step in STEPS}
    assert {operation.split()[0] for _, _, operation in kills} == {*CHANGES, "half"}
    check_each(memory, kills)


def test_kill_at_every_16th_operation_leaves_old_or_new_version(memory: Path) -> None:
    kills = kill_each(memory, 16)
    assert len(kills) >= 12
    check_each(memory, kills)


def test_killer_covers_every_operation_that_changes_files() -> None:
    """Each method of FileSystem either only reads, is composed of others, or has a kill before it."""
    reads = {"open", "digest", "names", "stat", "free_bytes", "lock", "is_whole", "leftovers"}
    composed = {"replace", "take_name", "removed_on_error", "remove_leftovers", "make_folders", "copy", "remove"}
    assert {name for name in vars(FileSystem) if not name.startswith("_")} == {*CHANGES} | reads | composed
    assert {*CHANGES} <= set(vars(Killer))
