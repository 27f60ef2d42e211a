"""Bit rot in every file of the store in turn: what is there twice is mended, anything else falls back to the version before."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_disks import (
    NAME,
    SHARED,
    VERSIONS,
    Cut,
    MemoryDisk,
    check_whole,
    digest_of,
    digests,
    fetch,
    install,
    version_of,
)
from sartor.core.errors import StoreError
from sartor.edge.store.release_store import ReleaseStore

FOLDER = Path("/device/store")
ROT: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: bytes([content[0] ^ 1]) + content[1:] if content else b"\x01",
    "cut": lambda content: content[: len(content) // 2] if content else b"\x01",
    "empty": lambda content: b"" if content else b"\x01",
    "zeros": lambda content: bytes(len(content) + 1),
}


@pytest.fixture(scope="module")
def updated() -> MemoryDisk:
    """1.1 is current, 1.0 previous."""
    disk = MemoryDisk()
    with ReleaseStore(FOLDER, disk=disk) as store:
        install(store, "1.0", disk)
        install(store, "1.1", disk)
    return disk


def copied(disk: MemoryDisk) -> MemoryDisk:
    return disk.after(Cut("all", "all"))


def check_mended(disk: MemoryDisk) -> None:
    """Nobody does anything but verify and sync."""
    with ReleaseStore(FOLDER, disk=disk) as store:
        store.verify()
        found = store.current(NAME)
        assert found is not None
        assert {path: disk.digest(found.path / path) for path in found.files} == digests(found.version)
        install(store, "1.1", disk)
        fetch(store, VERSIONS["1.0"])
        check_whole(store, disk)
        assert store.verify() == []
        previous = store.previous(NAME)
        assert previous is not None and previous.version == "1.0"
        assert version_of(store.rollback(NAME)) == "1.0"
        check_whole(store, disk)


@pytest.mark.parametrize("rot", ROT)
def test_rot_in_any_file_leaves_a_version_that_works(updated: MemoryDisk, rot: str) -> None:
    inodes = {file.number: path for path, file in updated.files(FOLDER)}
    assert len(inodes) >= 12  # two pointers, and what two versions hold, the shared files twice
    for path in inodes.values():
        disk = copied(updated)
        file = disk._file(path)
        file.content = file.durable = ROT[rot](file.content)
        try:
            check_mended(disk)
        except Exception as error:
            raise AssertionError(f"{rot} {path}") from error


def test_a_file_that_is_gone_is_rot_too(updated: MemoryDisk) -> None:
    for path, _ in updated.files(FOLDER):
        disk = copied(updated)
        del disk._folder(path.parent).names[path.name]
        try:
            check_mended(disk)
        except Exception as error:
            raise AssertionError(f"without {path}") from error


class BadBlocks(MemoryDisk):
    """Some files cannot be read."""

    bad: set[int] = set()

    def digest(self, path: Path) -> str:
        if self._file(path).number in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return super().digest(path)

    def open(self, path: Path):  # type: ignore[no-untyped-def]
        if self._file(path).number in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return super().open(path)


def test_a_block_that_cannot_be_read_is_rot_too(updated: MemoryDisk) -> None:
    for path in {file.number: path for path, file in updated.files(FOLDER)}.values():
        disk = BadBlocks(copied(updated).root)
        disk.bad = {disk._file(path).number}
        try:
            check_mended(disk)
        except Exception as error:
            raise AssertionError(f"unreadable {path}") from error


def test_damaged_shared_file_is_repaired_from_its_second_copy(updated: MemoryDisk) -> None:
    """A file of two versions is on the disk twice; either copy restores the other without a download."""
    path, content = next(iter(SHARED.items()))
    digest = digest_of(content)
    disk = copied(updated)
    trees = [FOLDER / "releases" / NAME / version / path for version in ("1.0", "1.1")]
    assert len({disk._file(file).number for file in trees}) == 2
    for file in trees:
        node = disk._file(file)
        node.content = node.durable = b"rot"
        with ReleaseStore(FOLDER, disk=disk) as store:
            assert store.verify() == [digest]
            assert store.has(digest)
            assert version_of(store.current(NAME)) == "1.1"
            assert store.verify() == []
            check_whole(store, disk)
        assert len({disk._file(file).number for file in trees}) == 2


def test_two_copies_stay_two_through_many_updates() -> None:
    disk = MemoryDisk()
    path, content = next(iter(SHARED.items()))
    with ReleaseStore(FOLDER, disk=disk) as store:
        for version in ("1.0", "1.1", "1.2"):
            install(store, version, disk)
            store.collect()
            assert len({file.number for _, file in disk.files(FOLDER) if file.content == content}) <= 2
        files = [FOLDER / "releases" / NAME / version / path for version in ("1.1", "1.2")]
        assert len({disk._file(file).number for file in files}) == 2


def test_damaged_current_version_falls_back_to_the_previous(
    updated: MemoryDisk,
) -> None:
    """The damaged file is quarantined; the version is current again once the file has been fetched."""
    disk = copied(updated)
    file = disk._file(FOLDER / "releases" / NAME / "1.1" / "adapter.safetensors")
    file.content = b"rot"
    with ReleaseStore(FOLDER, disk=disk) as store:
        digest = digests("1.1")["adapter.safetensors"]
        assert store.verify() == [digest]
        assert not store.has(digest)
        assert (version_of(store.current(NAME)), version_of(store.staged(NAME))) == ("1.0", "1.1")
        assert any("1.0 is current again" in said for said in store.mended)
        with pytest.raises(StoreError, match="damaged"):
            store.activate(NAME, "1.1", lambda path: None)
        assert disk.names(FOLDER / "quarantine") == [digest]
        store.collect()
        assert disk.names(FOLDER / "quarantine") == []
        install(store, "1.1", disk)
        assert version_of(store.current(NAME)) == "1.1"
        check_whole(store, disk)


def test_rollback_does_not_go_to_a_damaged_version(updated: MemoryDisk) -> None:
    disk = copied(updated)
    disk._file(FOLDER / "releases" / NAME / "1.0" / "adapter.safetensors").content = b"rot"
    with ReleaseStore(FOLDER, disk=disk) as store:
        with pytest.raises(StoreError, match="the previous version, is damaged"):
            store.rollback(NAME)
        assert version_of(store.current(NAME)) == "1.1"


def test_a_damaged_pointer_is_taken_from_its_other_copy(updated: MemoryDisk) -> None:
    disk = copied(updated)
    disk._file(FOLDER / "current" / f"{NAME}.json").content = b"{}"
    with ReleaseStore(FOLDER, disk=disk) as store:
        assert store.mended == [f"current/{NAME}.json was written anew from the other copy"]
        assert version_of(store.current(NAME)) == "1.1"


def test_without_either_pointer_the_store_opens_and_says_so(updated: MemoryDisk) -> None:
    disk = copied(updated)
    for folder in ("current", "backup"):
        disk._file(FOLDER / folder / f"{NAME}.json").content = b"\xff{"
    with ReleaseStore(FOLDER, disk=disk) as store:
        assert "neither copy" in store.mended[0]
        assert store.current(NAME) is None
        install(store, "1.1", disk)
        assert version_of(store.current(NAME)) == "1.1"


def test_a_blob_that_rotted_is_not_copied_into_a_new_version(updated: MemoryDisk) -> None:
    path, content = next(iter(SHARED.items()))
    disk = copied(updated)
    with ReleaseStore(FOLDER, disk=disk) as store:
        store.rollback(NAME)  # 1.0 is current: its file and the blob are one
        disk._file(FOLDER / "blobs" / digest_of(content)).content = bytes(len(content))
        fetch(store, VERSIONS["1.2"])
        with pytest.raises(StoreError, match="is damaged"):
            store.stage(NAME, "1.2", digests("1.2"))
        assert store.staged(NAME) is None
        assert store.verify() == [digest_of(content)]  # the copy of 1.1 is garbage and not asked
        fetch(store, VERSIONS["1.0"])
        install(store, "1.2", disk)
        check_whole(store, disk)
