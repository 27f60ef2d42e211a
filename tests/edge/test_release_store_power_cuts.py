"""Power cuts: a disk that drops what was not fsynced, cut before every operation of install, update, rollback, update, collect.

Also of the one writer of files, `core.filesystem.write_file_atomic`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_disks import CUTS, STEPS, Cut, MemoryDisk, Step, check_after, content_of, walk
from sartor.core import filesystem
from sartor.core.filesystem import Content, write_file_atomic
from sartor.edge.store.release_store import ReleaseStore

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


def interrupted(
    disk: MemoryDisk, cuts: list[Cut], rotate: bool = False
) -> Iterator[tuple[int, str, Step, Cut, MemoryDisk]]:
    """The disk as each power cut leaves it, at each operation: (which operation, what, in which step, how cut, the disk)."""
    points: list[tuple[int, str, Step, Cut, MemoryDisk]] = []
    step = STEPS[0]
    count = 0

    def before(operation: str, path: Path) -> None:
        nonlocal count
        some = [cuts[count % len(cuts)]] if rotate else cuts
        points.extend((count, f"{operation} {path}", step, cut, disk.after(cut)) for cut in some)
        count += 1

    disk.before = before
    store = ReleaseStore(FOLDER, disk=disk)
    for step in STEPS:
        step.act(store, disk)
        before("end", FOLDER)
        yield from points
        points.clear()


def failures(disk: MemoryDisk, cuts: list[Cut], rotate: bool = False) -> tuple[int, list[str]]:
    """How many points there were, and what went wrong at which. `rotate`: one of the cuts at each operation, in turn."""
    count, failed = 0, []
    for number, operation, step, cut, left in interrupted(disk, cuts, rotate):
        count += 1
        try:
            check_after(left, FOLDER, step)
        except Exception as error:
            failed.append(f"{number} {operation}, {step.name}, {cut}: {type(error).__name__}: {error}")
    return count, failed


def test_power_cut_at_any_operation_leaves_old_or_new_version() -> None:
    """One kind of power cut at each operation, in turn."""
    count, failed = failures(MemoryDisk(), CUTS, rotate=True)
    assert failed == []
    assert count >= 200


@pytest.mark.services
def test_every_kind_of_power_cut_leaves_old_or_new_version() -> None:
    """At each operation, with six more random cuts."""
    cuts = [*CUTS, *(Cut("random", "random", seed) for seed in range(10, 16))]
    count, failed = failures(MemoryDisk(), cuts)
    assert failed == []
    assert count >= 200 * len(cuts)


@pytest.mark.services
def test_power_cut_during_recovery_leaves_old_or_new_version() -> None:
    """What a killed process renamed is seen and not durable; a power cut in the next opening must not build on it."""
    count, again = 0, [Cut("none", "lost"), Cut("all", "garbage"), Cut("random", "random", 5)]
    first = [None, Cut("random", "random", 3)]
    for number, operation, step, kind, left in interrupted(MemoryDisk(), first):  # type: ignore[arg-type]
        if number % 5:
            continue
        seconds: list[tuple[str, MemoryDisk]] = []
        left.before = lambda what, path: seconds.append(  # noqa: B023
            (f"{what} {path}", left.after(again[len(seconds) % len(again)]))  # noqa: B023
        )
        with ReleaseStore(FOLDER, disk=left) as store:
            step.act(store, left)
            store.collect()
        for second, disk in seconds[:: 2 + number % 3]:
            count += 1
            try:
                check_after(disk, FOLDER, step)
            except Exception as error:
                raise AssertionError(
                    f"{kind or 'kill'} before {operation} ({number}) of {step.name}, then {second}"
                ) from error
    assert count >= 500


def is_in(folder: str) -> Callable[[str, Path], bool]:
    return lambda operation, path: str(path).startswith(str(FOLDER / folder))


def is_folder(*parts: str) -> Callable[[str, Path], bool]:
    return lambda operation, path: operation == "sync_folder" and path == FOLDER.joinpath(*parts)


LOST, GARBAGE = Cut("none", "lost"), Cut("all", "garbage")
FORGOTTEN: dict[str, tuple[Cut, Callable[[str, Path], bool]]] = {
    "the bytes of a download": (
        GARBAGE,
        lambda operation, path: operation == "sync" and is_in("partial")(operation, path),
    ),
    # one of the two copies alone is not missed: the other is whole
    "the bytes of both pointers": (
        GARBAGE,
        lambda operation, path: (
            operation == "sync" and (is_in("current")(operation, path) or is_in("backup")(operation, path))
        ),
    ),
    "the bytes of a copy in a tree": (
        GARBAGE,
        lambda operation, path: operation == "sync" and is_in("releases")(operation, path),
    ),
    "the names of blobs": (LOST, is_folder("blobs")),
    # without its names the pointer that is found is an older one
    "the names of pointers": (Cut("random", "all"), is_folder("current")),
    "the names of trees": (LOST, is_folder("releases", "faq")),
    "the folder of a release": (LOST, is_folder("releases")),
    "the folders in a tree": (LOST, lambda operation, path: operation == "sync_folder" and len(path.parts) > 5),
    "the folders of the store": (LOST, lambda operation, path: path in (FOLDER, FOLDER.parent)),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_an_fsync_that_is_left_out_is_found(forgotten: str) -> None:
    """The model and its checks can fail: a store that does not sync this loses the device's release."""
    cut, forgets = FORGOTTEN[forgotten]
    for _, _, step, _, left in interrupted(ForgetfulDisk(forgets), [cut]):
        try:
            check_after(left, FOLDER, step)
        except Exception:
            return
    raise AssertionError(f"nobody noticed that {forgotten} were not synced")


# the one writer of files

FILE, OLD, NEW = Path("/device/settings.json"), b"old" * 40, b"new" * 50
Point = tuple[str, Cut, MemoryDisk]


def written(disk: MemoryDisk, file: Path, content: Content, patch: pytest.MonkeyPatch, **how: bool) -> list[Point]:
    """Write FILE anew on the disk; returns it as each power cut leaves it at each operation, the last after the return."""
    disk.mkdir(FILE.parent)
    disk.sync_folder(FILE.parent.parent)
    disk.write(FILE, OLD)
    disk.sync(FILE)
    disk.sync_folder(FILE.parent)
    points: list[Point] = []
    disk.before = lambda operation, path: points.extend((operation, cut, disk.after(cut)) for cut in CUTS)
    patch.setattr(filesystem, "FileSystem", lambda mode: disk)
    write_file_atomic(file, content, **how)
    disk.before("end", file)
    return points


def operations(points: list[Point]) -> list[str]:
    return [operation for operation, _, _ in points[:: len(CUTS)]]


def wrong(points: list[Point]) -> list[str]:
    """Power cuts after which FILE is neither old nor new, or is not new though the writer had returned."""
    return [
        f"{operation} {cut}"
        for operation, cut, left in points
        if content_of(left, FILE) not in ([NEW] if operation == "end" else [OLD, NEW])
    ]


@pytest.mark.parametrize("content", [NEW, lambda stream: stream.write(NEW)], ids=["bytes", "stream"])
def test_power_cut_leaves_old_or_new_file(content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    points = written(MemoryDisk(), FILE, content, monkeypatch)
    assert operations(points) == ["write", "sync", "rename", "sync_folder", "end"]
    assert wrong(points) == []


def test_power_cut_leaves_no_half_file_in_a_new_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    file = FILE.with_name("new") / "deep" / "settings.json"
    points = written(MemoryDisk(), file, NEW, monkeypatch)
    assert operations(points) == [*["mkdir", "sync_folder"] * 2, "write", "sync", "rename", "sync_folder", "end"]
    for operation, cut, left in points:
        exists = left.stat(file) is not None
        assert not exists or content_of(left, file) == NEW, f"{operation} {cut}"
        assert exists or operation != "end", cut


@pytest.mark.parametrize("forgotten", ["sync", "sync_folder"])
def test_writer_that_leaves_out_an_fsync_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[Path] = []  # the first rename is the writer's: what came before made the old file durable
    disk = ForgetfulDisk(lambda operation, path: operation == forgotten and (".part-" in str(path) or bool(renamed)))
    monkeypatch.setattr(
        disk, "rename", lambda source, target: (renamed.append(target), MemoryDisk.rename(disk, source, target))
    )
    assert wrong(written(disk, FILE, NEW, monkeypatch))


def test_cache_write_may_lose_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `durable=False` gives up."""
    points = written(MemoryDisk(), FILE, NEW, monkeypatch, durable=False)
    assert operations(points) == ["write", "rename", "end"]
    assert wrong(points)


@pytest.mark.parametrize("failing", ["write", "sync", "rename", "sync_folder"])
def test_failing_operation_leaves_no_temporary(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk()
    written(disk, FILE, OLD, monkeypatch)

    def fail(operation: str, path: Path) -> None:
        if operation == failing:
            raise OSError(5, "Input/output error", str(path))

    disk.before = fail
    with pytest.raises(OSError, match="Input/output"):
        write_file_atomic(FILE, NEW)
    assert list(walk(disk, FILE.parent)) == [FILE.name]
    assert content_of(disk, FILE) == (NEW if failing == "sync_folder" else OLD)
