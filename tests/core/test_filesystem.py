"""Files and directories are written whole or not at all, by any number of writers at once. Power cuts: tests/edge/test_release_store_power_cuts.py."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sartor.core.errors import ConfigError
from sartor.core.filesystem import (
    FileSystem,
    create_directory_atomic,
    create_file_atomic,
    make_parent,
    temporary_path,
    write_file_atomic,
)

CONTENTS = [letter.encode() * 300_000 for letter in "abcdefgh"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rights(path: Path | int) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """System calls in their order: `fsync NAME`, `rename NAME`; of a temporary the name of its target with `part`."""
    noted: list[str] = []
    fsync, replace = os.fsync, os.replace

    def short(path: Any) -> str:
        name = Path(path).name
        return f"{name[1:].split('.part-')[0]} part" if ".part-" in name else name

    def noting_fsync(descriptor: int) -> None:
        noted.append(f"fsync {short(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def noting_replace(source: Any, target: Any) -> None:
        noted.append(f"rename {short(source)} to {short(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return noted


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")


@linux
def test_file_is_fsynced_before_and_folder_after_rename(tmp_path: Path, calls: list[str]) -> None:
    write_file_atomic(tmp_path / "f", b"new")
    assert calls == ["fsync f part", "rename f part to f", f"fsync {tmp_path.name}"]
    assert (tmp_path / "f").read_bytes() == b"new"


@linux
def test_cache_write_renames_without_fsync(tmp_path: Path, calls: list[str]) -> None:
    write_file_atomic(tmp_path / "new" / "f", b"new", durable=False)
    assert calls == ["rename f part to f"]


@linux
def test_missing_folders_are_made_durable(tmp_path: Path, calls: list[str]) -> None:
    write_file_atomic(tmp_path / "a" / "b" / "f", b"new")
    assert calls == [f"fsync {tmp_path.name}", "fsync a", "fsync f part", "rename f part to f", "fsync b"]


@linux
def test_directory_is_fsynced_whole_before_rename(tmp_path: Path, calls: list[str]) -> None:
    with create_directory_atomic(tmp_path / "d") as part:
        (part / "inner").mkdir()
        (part / "inner" / "f").write_bytes(b"x")
    assert calls == ["fsync d part", "fsync f", "fsync inner", "rename d part to d", f"fsync {tmp_path.name}"]


@linux
def test_file_by_path_is_fsynced_before_rename(tmp_path: Path, calls: list[str]) -> None:
    with create_file_atomic(tmp_path / "f") as part:
        part.write_bytes(b"new")
    assert calls == ["fsync f part", "rename f part to f", f"fsync {tmp_path.name}"]


def test_content_may_be_written_to_a_stream(tmp_path: Path) -> None:
    def content(stream: BinaryIO) -> None:
        stream.write(b"12345")
        stream.seek(1)
        stream.write(b"_")

    write_file_atomic(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == b"1_345"


def by_stream(path: Path) -> None:
    def content(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise RuntimeError

    write_file_atomic(path, content)


def by_path(path: Path) -> None:
    with create_file_atomic(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError


def by_interrupt(path: Path) -> None:
    def content(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    write_file_atomic(path, content)


@pytest.mark.parametrize("write", [by_stream, by_path, by_interrupt])
def test_failing_writer_leaves_old_file_and_no_temporary(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        write(tmp_path / "f")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_system_call_leaves_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_file_atomic(tmp_path / "f", b"new")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
@pytest.mark.parametrize(
    ("mode", "mask", "expected"), [(0o644, 0o022, 0o644), (0o644, 0o077, 0o600), (0o600, 0, 0o600)]
)
def test_mode_holds_from_the_first_byte(tmp_path: Path, mode: int, mask: int, expected: int) -> None:
    seen: list[int] = []

    def content(stream: BinaryIO) -> None:
        seen.append(rights(stream.fileno()))
        stream.write(b"x")

    with umask(mask):
        write_file_atomic(tmp_path / "f", content, mode=mode)
        write_file_atomic(tmp_path / "g", b"x", mode=mode)
    assert seen == [expected]
    assert rights(tmp_path / "f") == rights(tmp_path / "g") == expected


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
def test_replacing_takes_the_new_mode(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o644)
    write_file_atomic(tmp_path / "f", b"new", mode=0o600)
    assert rights(tmp_path / "f") == 0o600


def test_concurrent_threads_end_with_one_whole_content(tmp_path: Path) -> None:
    file, end = tmp_path / "f", threading.Event()
    write_file_atomic(file, CONTENTS[0])
    torn: list[int] = []

    def read() -> None:
        while not end.is_set():
            if (content := file.read_bytes()) not in CONTENTS:
                torn.append(len(content))

    def write(content: bytes) -> None:
        for _ in range(20):
            write_file_atomic(file, content, durable=False)

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, CONTENTS))
    end.set()
    reader.join()
    assert torn == []
    assert file.read_bytes() in CONTENTS
    assert names(tmp_path) == ["f"]


def test_concurrent_processes_end_with_one_whole_content(tmp_path: Path) -> None:
    code = """import sys
from pathlib import Path
from sartor.core.filesystem import write_file_atomic
for _ in range(50):
    write_file_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 300_000, durable=False)"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "f"), letter]) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert (tmp_path / "f").read_bytes() in CONTENTS
    assert names(tmp_path) == ["f"]


def test_temporary_names_differ_by_thread_and_process(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from sartor.core.filesystem import temporary_path; print(temporary_path(Path('f')))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    barrier = threading.Barrier(4)

    def take(index: int) -> str:
        barrier.wait()
        return temporary_path(Path("f")).name.rsplit("-", 1)[0]  # without the time: process and thread alone

    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(take, range(4)), other.rsplit("-", 1)[0]}) == 5


def test_killed_writer_leaves_old_file_and_a_known_leftover(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / ".f.partial").write_bytes(b"somebody else's")
    (tmp_path / ".f2.part-1-2-3").write_bytes(b"another target's")
    code = """import os, signal, sys
from pathlib import Path
from sartor.core.filesystem import write_file_atomic
def content(stream):
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_file_atomic(Path(sys.argv[1]), content)"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=False)
    assert (tmp_path / "f").read_bytes() == b"old"
    (leftover,) = FileSystem().leftovers(tmp_path / "f")
    assert leftover.read_bytes() == b"half"
    FileSystem().remove_leftovers(tmp_path / "f")
    assert names(tmp_path) == [".f.partial", ".f2.part-1-2-3", "f"]


def test_leftover_of_an_older_version_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".f.part").write_bytes(b"half")
    FileSystem().remove_leftovers(tmp_path / "f")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
def test_longest_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_file_atomic(tmp_path / name, b"new")
    assert names(tmp_path) == [name]
    temporary_path(tmp_path / name).write_bytes(b"half")
    FileSystem().remove_leftovers(tmp_path / name)
    assert names(tmp_path) == [name]


def test_parent_that_cannot_be_made_names_more_than_out(tmp_path: Path) -> None:
    """Commands without --out make folders too."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        make_parent(tmp_path / "file" / "keys" / "root")
    assert "an argument, SARTOR_HOME" in caught.value.remedy


def test_parent_that_takes_no_file_is_an_error_before_the_work() -> None:
    """To root the access bits of /proc allow what the kernel does not."""
    with pytest.raises(ConfigError, match="/proc cannot be written to"):
        make_parent(Path("/proc/page.html"))


def test_directory_that_is_there_is_kept_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    with pytest.raises(OSError), create_directory_atomic(tmp_path / "d") as part:
        (part / "new").touch()
    assert names(tmp_path / "d") == ["old"]
    with create_directory_atomic(tmp_path / "d", replace=True) as part:
        (part / "new").touch()
        assert names(tmp_path / "d") == ["old"]
    assert names(tmp_path / "d") == ["new"]
    assert names(tmp_path) == ["d"]


def test_directory_is_replaced_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and old kernels."""
    monkeypatch.setattr("sartor.core.filesystem._exchange", lambda one, other: False)
    test_directory_that_is_there_is_kept_or_replaced(tmp_path)


def test_failing_directory_writer_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    with pytest.raises(RuntimeError), create_directory_atomic(tmp_path / "d", replace=True) as part:
        (part / "new").touch()
        raise RuntimeError
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["old"]


@pytest.mark.parametrize("replace", [False, True])
def test_directory_never_replaces_a_file_or_a_link(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "f").touch()
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError), create_directory_atomic(tmp_path / name, replace=replace) as part:
            (part / "new").touch()
    assert names(tmp_path) == ["file", "link", "mine"]
    assert names(tmp_path / "mine") == ["f"]


def test_a_name_that_another_writer_takes_in_between_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "d", os.replace

    def rename_after_another_writer(source: Path, target: Path) -> None:
        if not path.exists():
            path.mkdir()
            (path / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr("sartor.core.filesystem.os.replace", rename_after_another_writer)
    with create_directory_atomic(path, replace=True) as part:
        (part / "ours").touch()
    assert names(tmp_path) == ["d"]
    assert names(path) == ["ours"]


def test_a_directory_that_cannot_be_renamed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no loop: EACCES says nothing of a directory that is there."""

    def refused(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "no", str(source))

    monkeypatch.setattr("sartor.core.filesystem.os.replace", refused)
    with pytest.raises(PermissionError), create_directory_atomic(tmp_path / "d", replace=True) as part:
        (part / "new").touch()
    assert names(tmp_path) == []


@pytest.mark.parametrize("has_exchange", [True, False])
def test_concurrent_directory_writers_end_with_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    if not has_exchange:
        monkeypatch.setattr("sartor.core.filesystem._exchange", lambda one, other: False)

    def write(number: int) -> None:
        for _ in range(10):
            with create_directory_atomic(tmp_path / "d", replace=True) as part:
                for name in "abc":
                    (part / name).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert names(tmp_path) == ["d"]
    assert len({(tmp_path / "d" / name).read_text() for name in "abc"}) == 1
    assert names(tmp_path / "d") == ["a", "b", "c"]
