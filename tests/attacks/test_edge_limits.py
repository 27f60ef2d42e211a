"""Limits of a command whose children fork, leave its session and lose their parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.core import resource_limits
from sartor.core.resource_limits import CGROUPS, ResourceLimits, holder, run

MB = 1 << 20
# a child that is no child any more: a double fork with a session of its own, which writes its number to argv[1]
ESCAPES = (
    "import os, signal, sys, time\n"
    "def escape(what):\n"
    "    if os.fork() == 0:\n"
    "        os.setsid()\n"
    "        if os.fork() == 0:\n"
    "            with open(sys.argv[1] + '.new', 'w') as file: file.write(str(os.getpid()))\n"
    "            os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "            what()\n"
    "        os._exit(0)\n"
    "    os.wait()\n"
)
BURN = "def burn():\n    while True: pass\n"


def _has_counting_cgroup() -> bool:
    folder = resource_limits._counting_cgroup(CGROUPS)
    if folder is not None:
        folder.rmdir()
    return folder is not None


def _has_memory_cgroup() -> bool:
    mechanism = holder(100 * MB)
    mechanism.close()
    return mechanism.name.startswith("cgroup")


@pytest.fixture(params=["cgroup", "no cgroup"])
def cgroups(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "no cgroup":
        return tmp_path / "none"
    if not _has_counting_cgroup() or not _has_memory_cgroup():
        pytest.skip("no cgroup can be made here: run as root")
    return CGROUPS


@pytest.fixture
def pid_file(tmp_path: Path) -> Iterator[Path]:
    """File with the number of the escaped process, which is killed at the end in any case."""
    file = tmp_path / "pid"
    yield file
    if file.exists() and is_alive(int(file.read_text())):
        os.kill(int(file.read_text()), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def attack(code: str, pid_file: Path) -> list[str]:
    return [sys.executable, "-c", ESCAPES + BURN + code, str(pid_file)]


def test_wall_limit_ends_an_escaped_grandchild(cgroups: Path, pid_file: Path) -> None:
    used = run(
        attack("escape(lambda: time.sleep(600))\ntime.sleep(600)", pid_file), ResourceLimits(wall_s=2), cgroups=cgroups
    )
    assert (used.killed, used.not_ended) == ("wall", [])
    assert not is_alive(int(pid_file.read_text()))


def test_wall_limit_ends_a_grandchild_that_ignores_sigterm(
    cgroups: Path, pid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_limits, "GRACE_S", 0.5)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nescape(lambda: time.sleep(600))\ntime.sleep(600)"
    used = run(attack(code, pid_file), ResourceLimits(wall_s=2), cgroups=cgroups)
    assert (used.killed, used.exit_code) == ("wall", -signal.SIGKILL) and used.wall_s < 60
    assert not is_alive(int(pid_file.read_text()))


def test_cpu_limit_counts_an_escaped_grandchild(cgroups: Path, pid_file: Path) -> None:
    """The command itself sleeps; only the orphan in another session burns processor time."""
    used = run(attack("escape(burn)\ntime.sleep(600)", pid_file), ResourceLimits(cpu_s=1, wall_s=120), cgroups=cgroups)
    assert used.killed == "cpu" and used.cpu_s >= 1
    assert not is_alive(int(pid_file.read_text()))


def test_memory_limit_counts_the_sum_of_children(cgroups: Path, pid_file: Path) -> None:
    """Each of four children stays below the limit; together they are above it."""
    code = (
        "for index in range(4):\n"
        "    if os.fork() == 0:\n"
        "        held = bytearray(60 << 20)\n"
        "        held[::4096] = b'x' * len(held[::4096])\n"
        "        time.sleep(600)\n"
        "for index in range(4): os.wait()\n"
    )
    used = run(attack(code, pid_file), ResourceLimits(memory_bytes=150 * MB, wall_s=60), cgroups=cgroups)
    assert used.killed == "memory"


def test_nothing_outlives_a_command_that_exits(cgroups: Path, pid_file: Path) -> None:
    """A command that starts a daemon and exits with 0 does not go on by it."""
    used = run(attack("escape(burn)\ntime.sleep(0.5)", pid_file), ResourceLimits(), cgroups=cgroups)
    assert (used.exit_code, used.killed, used.not_ended) == (0, "", [])
    assert not is_alive(int(pid_file.read_text()))


def test_memory_shared_by_forks_counts_once(cgroups: Path, pid_file: Path) -> None:
    """Four forks that share 80 MB are within 200 MB: the sum must not kill an honest command."""
    code = (
        "held = bytearray(80 << 20)\nheld[::4096] = b'x' * len(held[::4096])\n"
        "for index in range(4):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1)\n"
        "        os._exit(0)\n"
        "for index in range(4): os.wait()\n"
    )
    used = run(attack(code, pid_file), ResourceLimits(memory_bytes=200 * MB), cgroups=cgroups)
    assert (used.exit_code, used.killed) == (0, "")


def test_a_process_that_cannot_be_ended_is_reported(monkeypatch: pytest.MonkeyPatch, pid_file: Path) -> None:
    """SIGKILL is taken away, as a process in an uninterruptible wait would not act on it."""
    monkeypatch.setattr(resource_limits, "END_S", 0.2)
    monkeypatch.setattr(resource_limits.ProcessTree, "send", lambda tree, number: None)
    used = run(attack("escape(lambda: time.sleep(600))", pid_file), ResourceLimits(), cgroups=Path("/nowhere"))
    assert used.not_ended == [f"process {pid_file.read_text()}"]


def test_without_proc_the_process_group_is_ended(
    tmp_path: Path, pid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS: a child that stays in the session is ended with the command."""
    monkeypatch.setattr(resource_limits, "PROC", tmp_path / "no proc")
    code = "if os.fork() == 0:\n    open(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    used = run(attack(code, pid_file), ResourceLimits(wall_s=2), cgroups=tmp_path / "none")
    assert used.killed == "wall" and used.wall_s < 30
    deadline = time.monotonic() + 10
    while is_alive(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_to_the_caller_ends_the_command(tmp_path: Path, pid_file: Path) -> None:
    """The command has a session of its own; a signal that ends the caller must not leave it running."""
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom sartor.core.resource_limits import ResourceLimits, run\nrun(sys.argv[1:], ResourceLimits())",
            *attack("escape(burn)\ntime.sleep(600)", pid_file),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 60
    while not pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.send_signal(signal.SIGTERM)
    assert caller.wait(60) == 128 + signal.SIGTERM
    assert not is_alive(int(pid_file.read_text()))
