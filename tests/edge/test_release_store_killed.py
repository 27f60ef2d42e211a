"""SIGKILL of a real process before every operation of an update, and in the middle of every write: no point is left out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_disks import STEPS, check_after
from killed_update import CHANGES, Killer

from sartor.core.filesystem import FileSystem

Kill = tuple[int, str, str]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process's writes are in the page cache all the same."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def kill_each(root: Path, each: int) -> list[Kill]:
    script = Path(__file__).with_name("killed_update.py")
    done = subprocess.run([sys.executable, str(script), str(root), str(each)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def check_each(root: Path, kills: list[Kill]) -> None:
    steps = {step.name: step for step in STEPS}
    for number, step, operation in kills:
        folder = root / str(number)
        try:
            check_after(FileSystem(), folder, steps[step])
        except Exception as error:
            raise AssertionError(f"killed before {operation!r} ({number}) of {step}") from error
        shutil.rmtree(folder)


@pytest.mark.services
def test_a_kill_at_every_operation_leaves_the_old_or_the_new_version(memory: Path) -> None:
    kills = kill_each(memory, 1)
    assert [number for number, _, _ in kills] == list(range(len(kills)))
    assert len(kills) >= 200
    assert {step for _, step, _ in kills} == {step.name for step in STEPS}
    assert {operation.split()[0] for _, _, operation in kills} == {*CHANGES, "half"}
    check_each(memory, kills)


def test_a_kill_at_every_sixteenth_operation_leaves_the_old_or_the_new_version(memory: Path) -> None:
    kills = kill_each(memory, 16)
    assert len(kills) >= 12
    check_each(memory, kills)


def test_the_killer_stands_before_every_operation_that_changes_something() -> None:
    reads = {"open", "digest", "names", "stat", "free_bytes", "lock", "is_whole", "leftovers"}
    composed = {"replace", "take_name", "removed_on_error", "remove_leftovers", "make_folders", "copy", "remove"}
    assert {name for name in vars(FileSystem) if not name.startswith("_")} == {*CHANGES} | reads | composed
    assert {*CHANGES} <= set(vars(Killer))
