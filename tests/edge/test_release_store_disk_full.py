"""A disk that is full from any operation on, or for one operation: the old version works on, and the error says what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_disks import (
    NAME,
    VERSIONS,
    Cut,
    MemoryDisk,
    Step,
    check_done,
    check_whole,
    digests,
    fetch,
    install,
    sizes,
    steps_on,
    tree,
    version_of,
)
from sartor.core.errors import BudgetError, MissingError
from sartor.edge.store.release_store import ReleaseStore

FOLDER = Path("/device/store")


class Full:
    """Raises ENOSPC at the n-th operation; with `stays`, at every later one that takes room too."""

    def __init__(self, at: int, stays: bool, code: int = errno.ENOSPC) -> None:
        self.at, self.stays, self.code = at, stays, code
        self.count = 0
        self.met = ""

    def __call__(self, operation: str, path: Path) -> None:
        reached = self.count >= self.at if self.stays else self.count == self.at
        self.count += 1
        if reached and operation not in ("unlink", "rmdir"):
            self.met = self.met or f"{operation} {path}"
            raise OSError(self.code, "No space left on device")


def full_at(step: Step, disk: MemoryDisk, full: Full) -> None:
    """Do the step on the disk, which fills up; then make room, and do it again with the same store if it could be opened."""
    disk.before = full
    store = None
    try:
        store = ReleaseStore(FOLDER, disk=disk)
        step.act(store, disk)
    except MissingError as error:
        assert error.exit_code == 6
        assert "free" in error.remedy or full.code not in (errno.ENOSPC, errno.EDQUOT)
        assert "full" in error.problem or full.code not in (errno.ENOSPC, errno.EDQUOT)
    disk.before = lambda operation, path: None
    again = store or ReleaseStore(FOLDER, disk=disk)
    found = version_of(again.current(NAME))
    # The commit is the rename of current/NAME.json: what fails before it leaves the old version, what fails after it the new.
    assert found in (step.before, step.after, step.during)
    check_whole(again, disk)
    step.act(again, disk)
    check_done(again, disk, step)


def points(stays: bool, code: int = errno.ENOSPC, each: int = 1) -> Iterator[str]:
    for step, disk in steps_on(FOLDER):
        never = Full(1 << 30, stays)
        full_at(step, disk.after(Cut("all", "all")), never)
        for at in range(0, never.count, each):
            full = Full(at, stays, code)
            try:
                full_at(step, disk.after(Cut("all", "all")), full)
            except Exception as error:
                raise AssertionError(f"{step.name}, full from {full.met} ({at})") from error
            if full.met:  # an unlink works on a full disk
                yield f"{step.name} {full.met}"


@pytest.mark.parametrize("stays", [True, False])
def test_full_disk_at_every_8th_operation_leaves_a_whole_version(stays: bool) -> None:
    """Until its pointer is renamed the old version stays, afterwards the new one; a retry succeeds."""
    assert len(list(points(stays, each=8))) >= 20


@pytest.mark.services
@pytest.mark.parametrize("stays", [True, False])
def test_a_full_disk_at_any_operation_leaves_the_old_version(stays: bool) -> None:
    assert len(list(points(stays))) >= 200


@pytest.mark.services
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failing_disk_at_any_operation_leaves_the_old_version(code: int) -> None:
    assert len(list(points(False, code))) >= 200


SPARE_BYTES = 4096


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> MemoryDisk:
    """1.0 is installed. The files are small, and so is what is spared for pointers."""
    monkeypatch.setattr("sartor.edge.store.store_maintenance._SPARE_BYTES", SPARE_BYTES)
    disk = MemoryDisk()
    with ReleaseStore(FOLDER, disk=disk) as store:
        install(store, "1.0", disk)
    return disk


def used(disk: MemoryDisk) -> int:
    return ReleaseStore(FOLDER, disk=disk).used_bytes()


def test_an_update_that_cannot_fit_is_refused_before_it_begins(disk: MemoryDisk) -> None:
    install(ReleaseStore(FOLDER, disk=disk), "1.1", disk)
    before = tree(disk, FOLDER)
    store = ReleaseStore(FOLDER, limit_bytes=used(disk) + SPARE_BYTES, disk=disk)
    with pytest.raises(BudgetError, match="beside the"):
        store.make_room(NAME, {"a" * 64: 10_000})
    assert tree(disk, FOLDER) == before
    assert version_of(store.previous(NAME)) == "1.0"


def test_the_remedy_of_a_limit_is_enough(disk: MemoryDisk) -> None:
    with pytest.raises(BudgetError) as raised:
        ReleaseStore(FOLDER, limit_bytes=used(disk) + 10, disk=disk).make_room(NAME, sizes("1.1"))
    enough = re.search(r"--limit-bytes (\d+)", raised.value.remedy)
    assert enough
    store = ReleaseStore(FOLDER, limit_bytes=int(enough[1]), disk=disk)
    install(store, "1.1", disk)
    assert version_of(store.current(NAME)) == "1.1"


def test_a_small_disk_is_refused_with_the_bytes_that_are_short(disk: MemoryDisk) -> None:
    disk.free = 1000
    store = ReleaseStore(FOLDER, disk=disk)
    with pytest.raises(MissingError, match="the disk is full") as raised:
        store.make_room(NAME, sizes("1.1"))
    short = int(raised.value.remedy.split()[1].replace(",", ""))
    disk.free += short - 1
    with pytest.raises(MissingError):
        store.make_room(NAME, sizes("1.1"))
    disk.free += 1
    store.make_room(NAME, sizes("1.1"))


def test_small_limit_replaces_the_previous_version(disk: MemoryDisk) -> None:
    """The new version takes the space of the previous one; the current one becomes the previous."""
    install(ReleaseStore(FOLDER, disk=disk), "1.1", disk)
    limit_bytes = used(disk) + SPARE_BYTES + 100
    store = ReleaseStore(FOLDER, limit_bytes=limit_bytes, disk=disk)
    install(store, "1.2", disk)
    assert (version_of(store.current(NAME)), version_of(store.previous(NAME))) == ("1.2", "1.1")
    assert store.used_bytes() <= limit_bytes
    assert disk.names(FOLDER / "releases" / NAME) == ["1.1", "1.2"]
    check_whole(store, disk)


def test_make_room_keeps_previous_while_current_is_damaged(disk: MemoryDisk) -> None:
    """An update that needs the space of the previous version is refused instead."""
    install(ReleaseStore(FOLDER, disk=disk), "1.1", disk)
    current = ReleaseStore(FOLDER, disk=disk).current(NAME)
    assert current is not None
    file = disk._file(current.path / "release.json")
    file.content = bytes(len(file.content))
    store = ReleaseStore(FOLDER, limit_bytes=used(disk) + SPARE_BYTES + 100, disk=disk)
    with pytest.raises(BudgetError):
        store.make_room(NAME, sizes("1.2"))
    assert version_of(store.previous(NAME)) == "1.0"


def test_garbage_is_collected_before_an_update_is_refused(disk: MemoryDisk) -> None:
    ReleaseStore(FOLDER, disk=disk).append("b" * 64, 0, bytes(5000))
    store = ReleaseStore(FOLDER, limit_bytes=used(disk) + SPARE_BYTES, disk=disk)
    install(store, "1.1", disk)
    assert store.partial("b" * 64) == 0
    assert version_of(store.previous(NAME)) == "1.0"


def test_a_download_above_the_limit_is_refused(disk: MemoryDisk) -> None:
    store = ReleaseStore(FOLDER, limit_bytes=used(disk) + 100, disk=disk)
    store.append("c" * 64, 0, bytes(100))
    with pytest.raises(BudgetError):
        store.append("c" * 64, 100, b"1")
    assert store.partial("c" * 64) == 100


def failing_sync_of_pointers(operation: str, path: Path) -> None:
    if (operation, path) == ("sync_folder", FOLDER / "current"):
        raise OSError(errno.EIO, "Input/output error")


def works(operation: str, path: Path) -> None:
    return


def test_removal_waits_until_the_pointer_is_durable(disk: MemoryDisk) -> None:
    """Files stay until the pointer that no longer names them has been synced to the disk."""
    store = ReleaseStore(FOLDER, disk=disk)
    install(store, "1.1", disk)
    disk.before = failing_sync_of_pointers
    with pytest.raises(MissingError):
        install(store, "1.2", disk)
    with pytest.raises(MissingError):
        store.rollback(NAME)
    disk.before = works
    store.collect()
    for cut in (Cut("none", "lost"), Cut("all", "garbage")):
        left = disk.after(cut)
        check_whole(ReleaseStore(FOLDER, disk=left), left)
    disk.before = failing_sync_of_pointers
    with pytest.raises(MissingError):
        store.collect()


def test_restaging_survives_a_power_cut_at_any_operation(disk: MemoryDisk) -> None:
    """A staged tree is replaced only once no durable pointer names it, so staged files match their digests."""
    store = ReleaseStore(FOLDER, disk=disk)
    for version in ("1.1", "1.2"):
        fetch(store, VERSIONS[version])
    store.stage(NAME, "1.2", digests("1.2"))
    disk.before = failing_sync_of_pointers
    with pytest.raises(MissingError):
        store.stage(NAME, "1.2", digests("1.1"))
    lefts: list[MemoryDisk] = []
    disk.before = lambda operation, path: lefts.append(disk.after(Cut("none", "lost")))
    store.stage(NAME, "1.2", digests("1.1"))
    for left in lefts:
        again = ReleaseStore(FOLDER, disk=left)
        if staged := again.staged(NAME):
            assert {path: left.digest(staged.path / path) for path in staged.files} == dict(staged.files)
