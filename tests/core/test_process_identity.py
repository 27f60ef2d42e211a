"""A process is known by number and start, so a number that is given out again is another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sartor.core.processes import ProcessId


def test_running_process_is_alive() -> None:
    own = ProcessId.of(os.getpid())
    assert own.is_alive and own.started


def test_another_start_is_another_process() -> None:
    assert not ProcessId(os.getpid(), "another boot:1").is_alive


def test_ended_process_is_not_alive_before_and_after_it_is_awaited() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = ProcessId.of(child.pid)
        assert identity.is_alive
        assert child.stdin
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert not identity.is_alive
    assert not identity.is_alive


def test_identity_of_no_process_is_an_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    with pytest.raises(ProcessLookupError):
        ProcessId.of(child.pid)
