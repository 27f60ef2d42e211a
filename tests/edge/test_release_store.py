"""The store's verbs on a real disk: install, update, roll back; what is refused, and what a runtime reads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_disks import NAME, VERSIONS, check_whole, digest_of, digests, fetch, install, sizes, tree, version_of
from sartor.core.artifacts import open_artifact, write_artifact
from sartor.core.errors import BusyError, HealthError, MissingError, SartorError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Trial, installed, parse


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "edge" / "store")


@pytest.fixture
def updated(store: ReleaseStore) -> ReleaseStore:
    install(store, "1.0", FileSystem())
    install(store, "1.1", FileSystem())
    return store


def test_install_update_and_rollback(store: ReleaseStore) -> None:
    assert store.current(NAME) is None
    install(store, "1.0", FileSystem())
    assert (version_of(store.current(NAME)), version_of(store.previous(NAME))) == ("1.0", None)
    install(store, "1.1", FileSystem())
    assert (version_of(store.current(NAME)), version_of(store.previous(NAME))) == ("1.1", "1.0")
    assert store.rollback(NAME, "worse").version == "1.0"
    assert (version_of(store.current(NAME)), version_of(store.previous(NAME))) == ("1.0", None)
    assert dict(store.refused(NAME)) == {"1.1": "worse"}
    check_whole(store, FileSystem())


def test_a_staged_directory_opens_as_a_release(store: ReleaseStore, tmp_path: Path) -> None:
    def fill(part: Path) -> dict[str, str]:
        (part / "deep").mkdir()
        (part / "deep" / "weights").write_bytes(b"weights" * 100)
        return {"name": "faq"}

    release = write_artifact(tmp_path / "release", "release", fill)
    (release.path / "signature").write_bytes(b"signed")
    contents = {
        path.relative_to(release.path).as_posix(): path.read_bytes()
        for path in release.path.rglob("*")
        if path.is_file()
    }
    fetch(store, contents)
    path = store.stage(NAME, "1.0", {name: digest_of(content) for name, content in contents.items()})
    store.activate(NAME, "1.0", lambda staged: open_artifact(staged, "release") and None)
    assert open_artifact(path, "release").id == release.id


def test_any_program_reads_what_is_current(updated: ReleaseStore) -> None:
    said = json.loads((updated.folder / "current" / f"{NAME}.json").read_text())
    assert said["current"]["version"] == "1.1"
    assert tree(FileSystem(), updated.folder / said["current"]["path"]) == VERSIONS["1.1"]
    found = installed(updated.folder, NAME)  # while another holds the lock
    assert found == updated.current(NAME)
    assert found is not None and found.path == updated.folder / "releases" / NAME / "1.1"


def test_current_version_stays_readable_through_an_update(updated: ReleaseStore) -> None:
    """A file that a program has open is whole after an update, a rollback and a collection."""
    current = updated.current(NAME)
    assert current is not None
    with (current.path / "adapter.safetensors").open("rb") as running:
        install(updated, "1.2", FileSystem())
        updated.rollback(NAME)
        updated.collect()
        assert running.read() == VERSIONS["1.1"]["adapter.safetensors"]


def test_a_download_goes_on_where_it_stopped(store: ReleaseStore) -> None:
    content = b"0123456789" * 10
    digest = digest_of(content)
    store.append(digest, 0, content[:30])
    store.close()
    store = ReleaseStore(store.folder)
    assert (store.partial(digest), store.has(digest)) == (30, False)
    store.collect()
    with pytest.raises(StoreError, match="has 30 bytes; content for byte 0") as raised:
        store.append(digest, 0, content)
    assert "from byte 30" in raised.value.remedy
    store.append(digest, 30, content[30:])
    store.finish(digest)
    assert (store.partial(digest), store.has(digest)) == (0, True)
    with store.open(digest) as stream:
        assert stream.read() == content


def test_finish_refuses_and_removes_bytes_of_another_digest(store: ReleaseStore) -> None:
    """A discarded download is gone too, and a blob that is absent cannot be opened."""
    digest = digest_of(b"wanted")
    store.append(digest, 0, b"served")
    with pytest.raises(StoreError, match="has the sha256"):
        store.finish(digest)
    assert (store.partial(digest), store.has(digest)) == (0, False)
    store.append(digest, 0, b"half")
    store.discard(digest)
    assert store.partial(digest) == 0
    with pytest.raises(StoreError, match="holds no blob"):
        store.open(digest)


def test_a_long_download_is_durable_before_it_is_finished(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.edge.store.content_store._SYNC_EACH_BYTES", 100)
    synced: list[str] = []
    monkeypatch.setattr(FileSystem, "sync", lambda self, path: synced.append(path.name))
    digest = digest_of(bytes(250))
    for offset in range(0, 250, 50):
        store.append(digest, offset, bytes(50))
    assert synced == [digest, digest]


def test_a_download_whose_fsync_failed_is_not_built_upon(store: ReleaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FileSystem, path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    digest = digest_of(b"content")
    store.append(digest, 0, b"content")
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "sync", fail)
        with pytest.raises(MissingError, match="Input/output error"):
            store.finish(digest)
    assert (store.partial(digest), store.has(digest)) == (0, False)


def test_an_unhealthy_version_is_not_activated(updated: ReleaseStore) -> None:
    fetch(updated, VERSIONS["1.2"])
    path = updated.stage(NAME, "1.2", digests("1.2"))
    asked: list[Path] = []

    def unhealthy(staged: Path) -> None:
        asked.append(staged)
        assert version_of(installed(updated.folder, NAME)) == "1.1"  # the check comes before the commit
        raise ValueError("canary prompt 3 was answered 'xyz'")

    with pytest.raises(HealthError, match="canary prompt 3 was answered 'xyz'; 1.1 stays current"):
        updated.activate(NAME, "1.2", unhealthy)
    assert asked == [path]
    assert version_of(updated.current(NAME)) == "1.1"
    assert "canary prompt 3" in updated.refused(NAME)["1.2"] and updated.staged(NAME) is None
    with pytest.raises(HealthError, match="refused on this device"):
        updated.stage(NAME, "1.2", digests("1.2"))
    updated.forgive(NAME, "1.2")
    install(updated, "1.2", FileSystem())
    assert version_of(updated.current(NAME)) == "1.2"


def test_check_that_could_not_run_does_not_refuse_the_version(updated: ReleaseStore) -> None:
    """Without a base the check fails, and the same version can be activated later."""
    fetch(updated, VERSIONS["1.2"])
    updated.stage(NAME, "1.2", digests("1.2"))

    def no_base(staged: Path) -> None:
        raise MissingError("no base", "install it")

    with pytest.raises(HealthError, match="no base"):
        updated.activate(NAME, "1.2", no_base)
    assert not updated.refused(NAME)
    updated.activate(NAME, "1.2", lambda staged: None)


def on_trial(store: ReleaseStore, starts: int = 2) -> ReleaseStore:
    fetch(store, VERSIONS["1.2"])
    store.stage(NAME, "1.2", digests("1.2"))
    store.activate(NAME, "1.2", lambda staged: None, starts=starts)
    return store


def test_a_version_that_never_confirms_is_left_after_its_starts(updated: ReleaseStore) -> None:
    on_trial(updated)
    assert [version_of(updated.start(NAME)) for _ in range(4)] == ["1.2", "1.2", "1.1", "1.1"]
    assert updated.refused(NAME)["1.2"] == "starts: it did not confirm within 2"
    found = updated.current(NAME)
    assert found is not None and found.trial is None
    check_whole(updated, FileSystem())


def test_a_version_that_confirms_stays(updated: ReleaseStore) -> None:
    on_trial(updated)
    updated.start(NAME)
    said = installed(updated.folder, NAME)
    assert said is not None and said.trial == Trial(1, 2)
    updated.confirm(NAME)
    assert [version_of(updated.start(NAME)) for _ in range(4)] == ["1.2"] * 4
    assert not updated.refused(NAME)


def test_starts_are_counted_over_restarts_of_the_machine(updated: ReleaseStore) -> None:
    on_trial(updated, 3)
    versions = []
    for _ in range(4):
        updated.close()
        updated = ReleaseStore(updated.folder)
        versions.append(version_of(updated.start(NAME)))
    assert versions == ["1.2", "1.2", "1.2", "1.1"]


def test_version_on_trial_is_no_fallback_of_the_next(updated: ReleaseStore) -> None:
    """A failed trial goes back to the version that was current before both trials."""
    on_trial(updated)
    fetch(updated, VERSIONS["1.0"])
    updated.stage(NAME, "2.0", digests("1.0"))
    updated.activate(NAME, "2.0", lambda staged: None, starts=1)
    assert version_of(updated.previous(NAME)) == "1.1"
    assert [version_of(updated.start(NAME)) for _ in range(2)] == ["2.0", "1.1"]


def test_first_or_proven_version_has_no_trial(store: ReleaseStore) -> None:
    """Such a version stays current however often it starts without a confirmation."""
    fetch(store, VERSIONS["1.0"])
    store.stage(NAME, "1.0", digests("1.0"))
    store.activate(NAME, "1.0", lambda staged: None, starts=1)
    assert [version_of(store.start(NAME)) for _ in range(3)] == ["1.0"] * 3
    install(store, "1.1", FileSystem())
    store.activate(NAME, "1.0", lambda staged: None, starts=1)  # back to it, as after a halt
    assert [version_of(store.start(NAME)) for _ in range(3)] == ["1.0"] * 3


def test_a_trial_whose_way_back_is_damaged_goes_on(updated: ReleaseStore) -> None:
    on_trial(updated, 1)
    back = updated.previous(NAME)
    assert back is not None
    for file in (back.path / "adapter.safetensors", updated.folder / "blobs" / digests("1.1")["adapter.safetensors"]):
        file.write_bytes(b"rot")
    assert [version_of(updated.start(NAME)) for _ in range(3)] == ["1.2"] * 3


def test_a_pointer_that_knows_no_trial_is_read(updated: ReleaseStore) -> None:
    from sartor.core.artifacts import manifest_id

    for folder in ("current", "backup"):
        file = updated.folder / folder / f"{NAME}.json"
        said = json.loads(file.read_text())
        del said["trial"]
        said["schema"] = 1
        said["id"] = manifest_id(said)
        file.write_text(json.dumps(said))
    found = updated.current(NAME)
    assert found is not None and (found.version, found.trial) == ("1.1", None)


def test_health_check_error_is_reported_without_its_remedy(updated: ReleaseStore) -> None:
    def unhealthy(staged: Path) -> None:
        raise MissingError("no base", "install it")

    with pytest.raises(HealthError, match="not healthy: no base; 1.1 stays") as raised:
        updated.activate(NAME, "1.0", unhealthy)
    assert "install it" not in raised.value.problem


def test_rolled_back_version_is_not_staged_or_activated_again(updated: ReleaseStore) -> None:
    """The refusal repeats the reason of the rollback; a second rollback has no version to go to."""
    updated.rollback(NAME, "it answered in riddles")
    for again in (
        lambda: updated.stage(NAME, "1.1", digests("1.1")),
        lambda: updated.activate(NAME, "1.1", lambda path: None),
    ):
        with pytest.raises(HealthError, match="refused on this device: it answered in riddles"):
            again()
    with pytest.raises(StoreError, match="no previous version"):
        updated.rollback(NAME)


def test_staging_the_same_version_again_changes_nothing(updated: ReleaseStore) -> None:
    before = tree(FileSystem(), updated.folder)
    updated.stage(NAME, "1.1", digests("1.1"))
    updated.activate(NAME, "1.1", lambda path: None)
    assert tree(FileSystem(), updated.folder) == before


def test_installed_version_cannot_be_staged_with_other_files(updated: ReleaseStore) -> None:
    """A version that is only staged may still change its files."""
    with pytest.raises(StoreError, match="installed with other files"):
        updated.stage(NAME, "1.1", {"release.json": digests("1.1")["release.json"]})
    fetch(updated, VERSIONS["1.2"])
    updated.stage(NAME, "1.2", {"release.json": digests("1.2")["release.json"]})
    path = updated.stage(NAME, "1.2", digests("1.2"))  # what is staged alone may still change
    assert tree(FileSystem(), path) == VERSIONS["1.2"]


def test_a_path_that_leads_outside_a_release_is_refused(updated: ReleaseStore) -> None:
    for path in ("../x", "/x", "a/../x", "a//x", "./x", "", "a/.", "a\\x", "a\0", "x" * 300, "a\n"):
        with pytest.raises(StoreError, match="no path inside a release"):
            updated.stage(NAME, "2.0", {path: digests("1.1")["release.json"]})


def test_a_file_below_a_file_is_refused(updated: ReleaseStore) -> None:
    digest = digests("1.1")["release.json"]
    with pytest.raises(StoreError, match="lies below a file"):
        updated.stage(NAME, "2.0", {"a": digest, "a/b": digest})


def test_a_name_that_is_no_name_is_refused(updated: ReleaseStore) -> None:
    for name, version in (("../x", "1"), (NAME, "../1"), (NAME, ".1"), ("", "1"), (NAME, "1\n"), ("A", "1")):
        with pytest.raises(StoreError):
            updated.stage(name, version, digests("1.1"))


def test_a_digest_that_is_none_is_refused(store: ReleaseStore) -> None:
    for digest in ("", "../lock", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        for call in (
            store.has,
            store.partial,
            store.open,
            store.finish,
            store.discard,
            lambda one: store.append(one, 0, b"x"),
        ):
            with pytest.raises(StoreError, match="no sha256"):
                call(digest)


def test_a_version_that_lacks_a_blob_is_not_staged(updated: ReleaseStore) -> None:
    with pytest.raises(StoreError, match="1.2 lacks 2 of its blobs"):
        updated.stage(NAME, "1.2", digests("1.2"))
    with pytest.raises(StoreError, match="not in the store"):
        updated.activate(NAME, "1.2", lambda path: None)


def test_there_is_one_writer(store: ReleaseStore) -> None:
    code = f"""
from pathlib import Path
from sartor.core.errors import BusyError
from sartor.edge.store.release_store import ReleaseStore
try:
    ReleaseStore(Path({str(store.folder)!r}))
except BusyError as error:
    print(error.problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another process writes to the store" in done.stdout
    with pytest.raises(BusyError):
        ReleaseStore(store.folder)
    store.close()
    ReleaseStore(store.folder).close()


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SartorError) as raised:
        ReleaseStore(tmp_path / "file" / "store")
    assert raised.value.exit_code == 6


def test_a_pointer_of_a_later_sartor_is_refused_by_name(updated: ReleaseStore) -> None:
    from sartor.core.artifacts import manifest_id

    file = updated.folder / "current" / f"{NAME}.json"
    said = json.loads(file.read_text())
    said["schema"] = 99
    said["id"] = manifest_id(said)
    file.write_text(json.dumps(said))
    with pytest.raises(StoreError, match="schema 99"):
        updated.current(NAME)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_pointer_is_none(content: bytes) -> None:
    assert parse(content, NAME) is None


def test_collection_keeps_current_and_previous_version(updated: ReleaseStore) -> None:
    """Hard links take no space, and a second collection frees nothing."""
    content = sum(len(content) for version in ("1.0", "1.1") for content in VERSIONS[version].values())
    assert content <= updated.used_bytes() <= content + 8192  # and two pointers
    install(updated, "1.2", FileSystem())
    assert updated.collect() >= 1500
    assert updated.collect() == 0
    assert (version_of(updated.current(NAME)), version_of(updated.previous(NAME))) == ("1.2", "1.1")
    check_whole(updated, FileSystem())


def test_collection_keeps_downloads_of_an_update_after_restart(updated: ReleaseStore) -> None:
    """They are removed once another update has begun."""
    updated.make_room(NAME, sizes("1.2"))
    came = digests("1.2")["adapter.safetensors"]
    updated.append(came, 0, VERSIONS["1.2"]["adapter.safetensors"])
    updated.finish(came)
    updated.close()
    store = ReleaseStore(updated.folder)
    store.collect()
    assert store.has(came)
    store.make_room(NAME, sizes("1.1"))  # the update was given up
    store.collect()
    assert not store.has(came)


class NoLinks(FileSystem):
    """FAT, as on an SD card."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path) -> None:
    disk = NoLinks()
    store = ReleaseStore(tmp_path / "store", disk=disk)
    for version in ("1.0", "1.1", "1.2"):
        install(store, version, disk)
    check_whole(store, disk)
    assert store.verify() == []


def test_two_releases_do_not_know_of_each_other(updated: ReleaseStore) -> None:
    fetch(updated, VERSIONS["1.0"])
    updated.stage("farm", "7", digests("1.0"))
    updated.activate("farm", "7", lambda path: None)
    updated.rollback(NAME)
    updated.collect()
    assert version_of(updated.current("farm")) == "7"
    assert tree(FileSystem(), updated.folder / "releases" / "farm" / "7") == VERSIONS["1.0"]
    assert updated.verify() == []


def test_files_and_folders_are_really_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor))[1]
    )
    disk = FileSystem()
    disk.replace(tmp_path / "file", b"content")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    assert (tmp_path / "file").read_bytes() == b"content"
