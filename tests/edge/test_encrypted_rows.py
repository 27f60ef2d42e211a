"""The encrypted rows: nothing readable on the disk, nothing changed unseen, and what is forgotten is gone, whenever the power is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_disks
from edge_disks import CUTS, Cut, File, MemoryDisk
from killed_update import Killer
from sartor.core.errors import (
    BudgetError,
    BusyError,
    ConfigError,
    KeyRefusedError,
    MissingError,
    SartorError,
    SourceError,
    StoreError,
)
from sartor.core.filesystem import Content, FileSystem, PrivateFileSystem, temporary_path
from sartor.core.records import Example, Feedback, Message
from sartor.edge.owner import encrypted_rows as module
from sartor.edge.owner.encrypted_rows import EncryptedRowStore
from sartor.edge.owner.row_keys import FileKey, Passphrase
from sartor.personalization.user_rows import UserRow, of_feedback

WORDS = "my neighbour Wilhelmina snores"


def row(question: str, answer: str = "yes") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def opened(folder: Path, **options: object) -> EncryptedRowStore:
    return EncryptedRowStore(folder / "rows", FileKey(folder / "device.key"), **options)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_given(tmp_path: Path) -> None:
    diary = opened(tmp_path)
    tools = [{"type": "function", "function": {"name": "light"}}]
    given_ = [
        ({**row("is it late"), "tools": tools}, 1.0, ""),
        (row("Ünïcode 🙂", "ja"), -1.0, "nein"),
        (Example((Message.of("user", "a"), replace(Message.of("assistant", "b"), weight=0.5)), ()), None, ""),
    ]
    ids = [diary.add(*one) for one in given_]
    found = opened(tmp_path).rows()
    assert [one.id for one in found] == ids and len(set(ids)) == 3 and diary.count() == 3
    assert [(one.rating, one.correction) for one in found] == [
        (rating, correction) for _, rating, correction in given_
    ]
    assert found[0].example.tools == json.dumps(tools)
    assert found[1].example.messages[0].text == "Ünïcode 🙂"
    assert found[2].example.id == given_[2][0].id  # type: ignore[union-attr]
    assert found[0].date.endswith("Z") and diary.notes == []


def test_what_is_learnt_of_a_row(tmp_path: Path) -> None:
    diary = opened(tmp_path)
    for rating, correction in ((None, ""), (1.0, ""), (-1.0, ""), (-1.0, "no"), (None, "no")):
        diary.add(row("q"), rating, correction)
    assert [one.learnt and one.learnt.reply for one in diary.rows()] == ["yes", "yes", None, "no", "no"]


def test_feedback_of_a_served_team_is_a_row() -> None:
    asked = {"receipt": "r", "agent": "a", "date": "2026-01-01", "correction": "no"}
    assert of_feedback(Feedback(**asked, messages=({"role": "user", "content": "q"},), reply="yes")).reply == "yes"
    assert of_feedback(Feedback(**asked, text="q", reply="")).reply == "no"
    with pytest.raises(SourceError):
        of_feedback(Feedback(**asked))


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonsense": 1},
        {"messages": [{"role": "user", "content": "q"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        row("\ud800"),
    ],
)
def test_unreadable_row_is_refused_and_not_written(tmp_path: Path, wrong: dict[str, object]) -> None:
    """A rating out of range is refused as well."""
    diary = opened(tmp_path)
    diary.add(row("a"))
    with pytest.raises(SourceError):
        diary.add(wrong)
    with pytest.raises(ConfigError, match="rating"):
        diary.add(row("b"), 5.0)
    assert diary.count() == 1


def test_stored_rows_are_encrypted_and_only_for_the_owner(tmp_path: Path) -> None:
    """No file holds a word of a row or a JSON key, also after an erasure, and modes exclude other users."""
    diary = opened(tmp_path)
    for number in range(5):
        diary.add(row(f"{WORDS} {number}", "Wilhelmina"), -1.0, "snores")
    diary.forget(lambda one: one.text.startswith(f"{WORDS} 2"))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(
                word.encode() in content for word in ("neighbour", "Wilhelmina", "snores", "messages", "rating")
            )
            assert file.stat().st_mode & 0o077 == 0 or file.name == "lock"
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700


def test_lengths_are_told_in_steps(tmp_path: Path) -> None:
    diary = opened(tmp_path)
    for text in ("a", "a" * 20):
        diary.add(row(text))
    first, second = (tmp_path / "rows/diary").read_bytes().splitlines()[1:]
    assert len(first) == len(second)


def test_a_wrong_key_is_a_clear_error(tmp_path: Path) -> None:
    opened(tmp_path).add(row("a"))
    with pytest.raises(KeyRefusedError, match="no key at"):
        EncryptedRowStore(tmp_path / "rows", FileKey(tmp_path / "other.key")).rows()
    EncryptedRowStore(tmp_path / "else", FileKey(tmp_path / "other.key")).add(row("b"))
    with pytest.raises(KeyRefusedError, match="does not hold the key"):
        EncryptedRowStore(tmp_path / "rows", FileKey(tmp_path / "other.key")).rows()
    assert opened(tmp_path).count() == 1


# changes to the lines of a file of five rows: None where the last row alone is meant, which a power cut may leave so
CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "moved": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "repeated": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "taken out": lambda lines: [lines[0], *lines[2:]],
    "another id": lambda lines: [lines[0], b"0" * 16 + lines[1][16:], *lines[2:]],
    "another id's bytes": lambda lines: [lines[0], lines[2][:16] + lines[1][16:], *lines[2:]],
    "a character": lambda lines: [
        lines[0],
        lines[1][:-9] + (b"A" if lines[1][-9:-8] != b"A" else b"B") + lines[1][-8:],
        *lines[2:],
    ],
    "emptied": lambda lines: [lines[0], b"x", *lines[2:]],
    "merged": lambda lines: [lines[0], lines[1] + lines[2], *lines[3:]],
    "all merged": lambda lines: [lines[0], b"".join(lines[1:]) * 300],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_changed_moved_or_repeated_is_found(tmp_path: Path, change: str) -> None:
    diary = opened(tmp_path)
    for number in range(5):
        diary.add(row(str(number)))
    file = tmp_path / "rows/diary"
    before = file.read_bytes()
    file.write_bytes(b"\n".join(CHANGES[change](before.splitlines())) + b"\n")
    for call in (diary.rows, diary.count, lambda: diary.add(row("x")), lambda: diary.forget(lambda _: True)):
        with pytest.raises(StoreError, match=r"changed, moved"):
            call()
    file.write_bytes(before)
    assert opened(tmp_path).count() == 5


def test_a_row_of_an_older_file_or_another_diary_does_not_open(tmp_path: Path) -> None:
    diary, other = opened(tmp_path), EncryptedRowStore(tmp_path / "else", FileKey(tmp_path / "device.key"))
    for number in range(4):
        diary.add(row(str(number)))
        other.add(row(str(number)))
    file = tmp_path / "rows/diary"
    old = file.read_bytes().splitlines()
    diary.forget(lambda one: one.text.startswith("3"))
    new = file.read_bytes().splitlines()
    for foreign in (old, (tmp_path / "else/diary").read_bytes().splitlines()):
        file.write_bytes(b"\n".join([*new[:2], foreign[2], new[3]]) + b"\n")
        with pytest.raises(StoreError):
            diary.rows()


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"{}", StoreError),
        (b"", StoreError),
        (b"[" * 100_000, StoreError),
        (b'{"kind":"diary","name":"a","generation":"b","schema":2}', StoreError),
        (b'{"kind":"diary","name":"a","generation":"b","schema":1}', StoreError),
    ],
)
def test_a_header_that_was_changed_is_said(tmp_path: Path, header: bytes, error: type[SartorError]) -> None:
    opened(tmp_path).add(row("a"))
    file = tmp_path / "rows/diary"
    file.write_bytes(b"\n".join([header, *file.read_bytes().split(b"\n")[1:]]))
    with pytest.raises(error):
        opened(tmp_path).rows()


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_torn_end_costs_the_last_row_alone_and_is_said(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    diary = opened(folder)
    for number in range(3):
        diary.add(row(str(number)))
    file = folder / "rows/diary"
    content = file.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    cut = data.draw(st.integers(start + 1, len(content) - 2))
    rest = data.draw(st.sampled_from([b"", bytes(30), b"garbage\x00\n", b"many\nlines \n\n of it"]))
    file.write_bytes(content[:cut] + rest)
    assert [one.text for one in diary.rows()] == ["0\nyes\n", "1\nyes\n"]
    assert "left out" in diary.notes[0] and len(diary.notes) == 1
    diary.add(row("new"))
    again = opened(folder)
    assert [one.text for one in again.rows()] == ["0\nyes\n", "1\nyes\n", "new\nyes\n"] and again.notes == []


def test_it_is_bounded_and_nothing_is_dropped_to_make_room(tmp_path: Path) -> None:
    diary = opened(tmp_path, limit_bytes=4_000)
    with pytest.raises(BudgetError, match="edge forget NAME --before DATE"):
        for number in range(100):
            diary.add(row(str(number)))
    held = diary.count()
    assert 3 <= held <= 10 and (tmp_path / "rows/diary").stat().st_size <= 4_000
    with pytest.raises(BudgetError, match="a row may take"):
        diary.add(row("a" * module.ROW_BYTES))
    diary.forget(lambda one: one.text.startswith("0"))
    diary.add(row("new"))
    assert diary.count() == held


def test_many_rows_are_added_or_none(tmp_path: Path) -> None:
    diary = opened(tmp_path, limit_bytes=4_000)
    first = diary.add(row("first"))
    ids = diary.add_all([(row("a"), 1.0, ""), (row("b"), None, "no")])
    assert [one.id for one in opened(tmp_path).rows()] == [first, *ids]
    assert [(one.rating, one.correction) for one in diary.rows()[1:]] == [(1.0, ""), (None, "no")]
    before = (tmp_path / "rows/diary").read_bytes()
    refused: list[tuple[list[tuple[Any, float | None, str]], type[SartorError], str]] = [
        ([(row(str(number)), None, "") for number in range(20)], BudgetError, "and 20 more take"),
        ([(row("c"), None, ""), (row("d" * module.ROW_BYTES), None, "")], BudgetError, "a row may take"),
        ([(row("c"), None, ""), (row("d"), 7.0, "")], ConfigError, "the rating is 7"),
        ([(row("c"), None, ""), ({"x": 1}, None, "")], SourceError, "x"),
    ]
    for rows, error, problem in refused:
        with pytest.raises(error, match=problem):
            diary.add_all(rows)
        assert (tmp_path / "rows/diary").read_bytes() == before
    assert diary.add_all([]) == [] and diary.count() == 3


# forgetting


def test_forget_removes_rows_and_the_key_of_old_copies(tmp_path: Path) -> None:
    """The other rows stay under a new key; a file that was copied before can no longer be opened."""
    diary = opened(tmp_path)
    ids = [diary.add(row(f"{WORDS} {number}")) for number in range(4)]
    names = diary.names(ids)
    old = (tmp_path / "rows/diary").read_bytes()
    assert diary.forget(lambda one: one.id == ids[1]) == (ids[1],)
    assert [one.id for one in diary.rows()] == [ids[0], *ids[2:]] and diary.names(ids) == names
    assert old.splitlines()[0] != (tmp_path / "rows/diary").read_bytes().splitlines()[0]
    (tmp_path / "rows/diary").write_bytes(old)
    with pytest.raises(KeyRefusedError, match="does not hold the key"):
        opened(tmp_path).rows()
    assert len(json.loads((tmp_path / "device.key").read_text())["keys"]) == 1


def test_leftovers_of_a_killed_writer_go_with_what_is_forgotten(tmp_path: Path) -> None:
    """A temporary of the rows under their old key, and one of the key file that holds that key."""
    diary = opened(tmp_path)
    diary.add(row("a"))
    left = [temporary_path(tmp_path / "rows/diary"), temporary_path(tmp_path / "device.key")]
    for leftover, file in zip(left, (tmp_path / "rows/diary", tmp_path / "device.key"), strict=True):
        leftover.write_bytes(file.read_bytes())
    opened(tmp_path).forget(lambda one: True)
    assert [leftover.exists() for leftover in left] == [False, False]


def test_where_nothing_is_chosen_nothing_is_written(tmp_path: Path) -> None:
    diary = opened(tmp_path)
    diary.add(row("a"))
    before = (tmp_path / "rows/diary").read_bytes()
    assert diary.forget(lambda one: False) == () and (tmp_path / "rows/diary").read_bytes() == before


def test_names_are_keyed(tmp_path: Path) -> None:
    first, second = opened(tmp_path), EncryptedRowStore(tmp_path / "else", FileKey(tmp_path / "device.key"))
    assert first.names(["a"]) == opened(tmp_path).names(["a"]) != second.names(["a"])


def test_another_source_takes_over(tmp_path: Path) -> None:
    diary = opened(tmp_path)
    diary.add(row("a"))
    diary.rekey(Passphrase("six words", n=16))
    diary.add(row("b"))
    with pytest.raises(KeyRefusedError, match="of the kind 'passphrase'"):
        opened(tmp_path).rows()
    assert EncryptedRowStore(tmp_path / "rows", Passphrase("six words")).count() == 2


# kills, power cuts, full disks


@dataclass
class LooseKey(FileKey):
    """Its file is in memory, where there are no rights."""

    def check_rights(self) -> None:
        """See FileKey."""


class LogDisk(MemoryDisk):
    """As edge_disks says, but what was fsynced of a file that grew stays: journalling file systems promise that."""

    def after(self, cut: Cut | None) -> LogDisk:
        made = LogDisk(super().after(None).root)
        if cut is not None:
            made.root = _Growing(cut).folder(self.root)
        return made


class _Growing(edge_disks._Survivor):
    def file(self, file: File) -> File:
        if not file.durable or not file.content.startswith(file.durable) or file.content == file.durable:
            return super().file(file)
        tail = super().file(File(file.content[len(file.durable) :]))
        return File(file.durable + tail.content, file.durable + tail.content)


FOLDER = Path("/device")


def in_memory(disk: FileSystem) -> EncryptedRowStore:
    return EncryptedRowStore(FOLDER / "rows", LooseKey(FOLDER / "key/device.key", disk), disk=disk)


def texts(rows: list[UserRow]) -> list[str]:
    return [one.example.messages[0].text for one in rows]


STEPS: list[tuple[str, Callable[[EncryptedRowStore], object], list[str], list[str]]] = [
    ("first", lambda diary: diary.add(row("a")), [], ["a"]),
    ("second", lambda diary: diary.add(row("b" * 500)), ["a"], ["a", "b" * 500]),
    ("forget", lambda diary: diary.forget(lambda one: one.text.startswith("a")), ["a", "b" * 500], ["b" * 500]),
    ("third", lambda diary: diary.add(row("c")), ["b" * 500], ["b" * 500, "c"]),
    ("forget all", lambda diary: diary.forget(lambda one: True), ["b" * 500, "c"], []),
    ("many", lambda diary: diary.add_all([(row("d"), None, ""), (row("e"), 1.0, "")]), [], ["d", "e"]),
]


def check_interrupted(disk: FileSystem, what: str, before: list[str], after: list[str]) -> None:
    diary = in_memory(disk)
    try:
        assert texts(diary.rows()) in (before, after)
        diary.add(row("later"))
        assert texts(diary.rows()) in ([*before, "later"], [*after, "later"])
        key = FOLDER / "key/device.key"
        with disk.open(key) as stream, disk.open(FOLDER / "rows/diary") as rows:
            keys, name = json.loads(stream.read())["keys"], json.loads(rows.read().split(b"\n")[0])["name"]
        assert len([one for one in keys if one.startswith(name)]) == 1
    except Exception as error:
        raise AssertionError(what) from error


def test_kill_or_power_cut_anywhere_leaves_old_or_new_rows() -> None:
    """Interrupt before each operation of every step, by a kill and by every kind of power cut."""
    disk = LogDisk()
    points: list[tuple[str, list[str], list[str], LogDisk]] = []
    for name, act, before, after in STEPS:

        def note(operation: str, path: Path) -> None:
            cuts = [None, *CUTS]
            points.extend((f"{operation} {path}, {name}, {cut}", before, after, disk.after(cut)) for cut in cuts)  # noqa: B023

        disk.before = note
        act(in_memory(disk))
        disk.before = lambda operation, path: None
        assert texts(in_memory(disk).rows()) == after
        points.append((f"end of {name}", after, after, disk.after(Cut("none", "lost"))))
    assert len(points) > 400
    for what, before, after, left in points:
        check_interrupted(left, what, before, after)


def test_a_power_cut_while_it_recovers_from_a_kill() -> None:
    """What a killed process renamed is seen and not durable: the key of the file before must not go first."""
    disk = LogDisk()
    for _, act, _, _ in STEPS[:2]:
        act(in_memory(disk))
    lefts: list[LogDisk] = []
    disk.before = lambda operation, path: lefts.append(disk.after(None))
    STEPS[2][1](in_memory(disk))
    count = 0
    for left in lefts:
        seconds: list[LogDisk] = []
        left.before = lambda operation, path: seconds.extend(left.after(cut) for cut in CUTS[:5])  # noqa: B023
        in_memory(left).rows()
        for second in seconds:
            count += 1
            check_interrupted(second, "recovery", STEPS[2][2], STEPS[2][3])
    assert count > 20


class ForgetfulKey(LogDisk):
    """Says that the names beside the rows are synced, and has not."""

    def sync_folder(self, path: Path) -> None:
        if path.name == "rows":
            self.before("sync_folder", path)
        else:
            super().sync_folder(path)


def test_the_model_can_fail() -> None:
    """Without the fsync of the folder the old key goes before the new rows are durable, and the test sees it."""
    disk = ForgetfulKey()
    for _, act, _, _ in STEPS[:2]:
        act(in_memory(disk))
    disk.root.durable = dict(disk.root.names)
    LogDisk.sync_folder(disk, FOLDER / "rows")
    STEPS[2][1](in_memory(disk))
    with pytest.raises(AssertionError):
        check_interrupted(disk.after(Cut("none", "lost")), "forgotten", STEPS[2][2], STEPS[2][3])


class Full(FileSystem):
    """A disk that takes half of the next write and then nothing."""

    full = False

    def append(self, path: Path, content: bytes) -> None:
        super().append(path, content[: len(content) // 2] if self.full else content)
        if self.full:
            raise OSError(28, "No space left on device")


class FullForNewFiles(FileSystem):
    """A disk that takes half of the next new file and then nothing."""

    full = False

    def write(self, path: Path, content: Content) -> None:
        assert isinstance(content, bytes)
        super().write(path, content[: len(content) // 2] if self.full else content)
        if self.full:
            raise OSError(28, "No space left on device")


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    disk = Full()
    diary = opened(tmp_path, disk=disk)
    diary.add(row("a"))
    disk.full = True
    with pytest.raises(MissingError, match="the disk is full"):
        diary.add(row("b"))
    disk.full = False
    diary.add(row("c"))
    assert texts(diary.rows()) == ["a", "c"] and diary.notes == []


def test_a_disk_that_fills_half_way_takes_none_of_many_rows(tmp_path: Path) -> None:
    disk = FullForNewFiles()
    diary = opened(tmp_path, disk=disk)
    diary.add(row("a"))
    disk.full = True
    with pytest.raises(MissingError, match="the disk is full"):
        diary.add_all([(row("b"), None, ""), (row("c"), None, "")])
    disk.full = False
    assert texts(diary.rows()) == ["a"] and diary.notes == []


class UnsyncedFolder(PrivateFileSystem):
    """A disk whose folders cannot be synced after a rename, once."""

    fails = False

    def sync_folder(self, path: Path) -> None:
        if self.fails:
            self.fails = False
            raise OSError(5, "Input/output error")
        super().sync_folder(path)


def test_many_rows_are_taken_back_if_their_rename_is_not_synced(tmp_path: Path) -> None:
    disk = UnsyncedFolder()
    diary = opened(tmp_path, disk=disk)
    diary.add(row("a"))
    disk.fails = True
    with pytest.raises(MissingError, match="could not be used"):
        diary.add_all([(row("b"), None, ""), (row("c"), None, "")])
    assert texts(opened(tmp_path).rows()) == ["a"]


@pytest.mark.services
def test_a_real_kill_at_every_operation(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 30
    for number, _, operation in kills:
        folder = tmp_path / str(number)
        diary = opened(folder)
        assert texts(diary.rows()) in ([], ["a"], ["a", "b"], ["b"]), operation
        diary.add(row("later"))
        assert texts(diary.rows())[-1] == "later"
        shutil.rmtree(folder)


# many at once


def test_two_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sartor.edge.owner.encrypted_rows.LOCK_S", 300.0)  # a slow disk

    def write(number: int) -> None:
        diary = opened(tmp_path)
        for place in range(5):
            diary.add(row(f"{number} {place}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts(opened(tmp_path).rows())) == sorted(f"{n} {p}" for n in range(3) for p in range(5))


class MadeMeanwhile(PrivateFileSystem):
    """Another process makes each folder between this one's look and its making of it."""

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        super().mkdir(path)


def test_a_folder_that_another_made_meanwhile_is_used(tmp_path: Path) -> None:
    diary = opened(tmp_path, disk=MadeMeanwhile())
    diary.add(row("a"))
    assert texts(diary.rows()) == ["a"]


def test_one_that_holds_it_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = opened(tmp_path)
    diary.add(row("a"))
    monkeypatch.setattr(module, "LOCK_S", 0.05)
    unlock = FileSystem().lock(tmp_path / "rows/lock")
    with pytest.raises(BusyError):
        diary.rows()
    unlock()
    assert diary.count() == 1


class OwnersKiller(Killer, PrivateFileSystem):
    """Kills as Killer does, and makes what its owner alone may read."""


def interrupted(folder: Path, disk: Killer) -> None:
    diary = EncryptedRowStore(folder / "rows", FileKey(folder / "device.key", disk), disk=disk)
    diary.add(row("a"))
    diary.add(row("b"))
    diary.forget(lambda one: one.text.startswith("a"))


def kills(root: Path) -> Iterator[None]:
    """One child per operation; each kills itself there."""
    import os

    at = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                interrupted(root / str(at), OwnersKiller(at))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        if not os.WIFSIGNALED(status := os.waitpid(child, 0)[1]):
            assert status == 0
            return
        at += 1
        yield


if __name__ == "__main__":
    for _ in kills(Path(sys.argv[1])):
        pass
