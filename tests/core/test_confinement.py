"""Confinement of a process: what it reaches and writes, and what is said where the system allows none."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sartor.core import confinement

REACHED = """
import socket, sys
from sartor.core.confinement import leave_network
problem = leave_network() if sys.argv[1] == "leave" else ""
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
    try:
        opened.connect(("127.0.0.1", 9))
    except OSError:
        problem = problem or "unreachable"
print(problem or "reached")
"""
WRITES = """
import os, sys
from pathlib import Path
from sartor.core.confinement import confine_writes
inside, outside = map(Path, sys.argv[1:])
print(confine_writes(inside))
(inside / "a").write_text("a")
(inside / "a").rename(inside / "b")
Path(os.devnull).write_text("x")
for change in (lambda: (outside / "new").write_text("x"), (outside / "kept").unlink, (outside / "folder").mkdir,
               lambda: os.truncate(outside / "kept", 0), lambda: os.kill(os.getppid(), 0)):
    try:
        change()
    except PermissionError:
        continue
    print("changed")
print((outside / "kept").read_text())
"""


def printed(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_process_without_network_reaches_not_even_itself() -> None:
    assert printed(REACHED, "stay") == ["reached"]
    assert printed(REACHED, "leave") == ["unreachable"]


def test_confined_process_changes_its_folder_alone(tmp_path: Path) -> None:
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    assert printed(WRITES, str(tmp_path / "inside"), str(tmp_path / "outside")) == ["True", "kept"]
    assert sorted(os.listdir(tmp_path / "outside")) == ["kept"]


class _Library:
    """A C library whose calls all fail."""

    def unshare(self, flags: int) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    def syscall(self, *arguments: Any) -> int:
        return -1


def test_system_that_allows_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(confinement.ctypes, "CDLL", lambda *arguments, **keywords: _Library())
    assert confinement.leave_network() == "unshare: EPERM, Operation not permitted"
    assert confinement.confine_writes(tmp_path) is False
    monkeypatch.setattr(confinement.ctypes, "CDLL", lambda *arguments, **keywords: object())
    assert confinement.leave_network() == "this system has no network namespaces"
    assert confinement.confine_writes(tmp_path) is False
