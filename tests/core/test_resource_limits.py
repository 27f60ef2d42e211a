"""The system holds a command to its limits, and what it used is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sartor.core import resource_limits
from sartor.core.errors import BudgetError, MissingError
from sartor.core.resource_limits import (
    CGROUPS,
    JobResult,
    ResourceLimits,
    ResourceUsage,
    anonymous_bytes,
    holder,
    run,
    run_job,
)

MB = 1 << 20
LIMITS = ResourceLimits(wall_s=60)
TAKES = "import sys, time; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); time.sleep(2)"


def taking(megabytes: int, most: int, cgroups: Path = CGROUPS) -> ResourceUsage:
    return run(
        [sys.executable, "-c", TAKES, str(megabytes * MB)], ResourceLimits(memory_bytes=most * MB), cgroups=cgroups
    )


def has_cgroup() -> bool:
    made = holder(100 * MB)
    made.close()
    return made.name.startswith("cgroup")


needs_cgroup = pytest.mark.skipif(not has_cgroup(), reason="no cgroup can be made here: run as root")


@needs_cgroup
def test_command_within_memory_limit_reports_its_peak() -> None:
    """A command that takes 50 of 150 MB exits with 0; its peak, wall and processor time are measured."""
    used = taking(50, 150)
    assert (used.exit_code, used.killed, used.limit_bytes) == (0, "", 150 * MB)
    assert 50 * MB < used.peak_bytes < 75 * MB and used.held_by.startswith("cgroup")
    assert 2 < used.wall_s < 60 and 0 < used.cpu_s < used.wall_s * 4


@needs_cgroup
def test_a_command_above_its_memory_is_killed_by_the_kernel() -> None:
    used = taking(200, 100)
    assert used.killed == "memory" and used.exit_code == -9
    assert used.peak_bytes <= 100 * MB


@needs_cgroup
def test_page_cache_is_not_counted_and_kills_nobody(tmp_path: Path) -> None:
    # Each MB reaches the disk: what is written faster than a slow disk takes it is no cache yet, and counts (cgroup v1).
    code = "import os, sys; f = open(sys.argv[1], 'wb')\n"
    code += "for n in range(150): f.write(b'x' * (1 << 20)); f.flush(); os.fdatasync(f.fileno())\n"
    code += "f.close(); f = open(sys.argv[1], 'rb')\nwhile f.read(1 << 20): pass"
    used = run([sys.executable, "-c", code, str(tmp_path / "file")], ResourceLimits(memory_bytes=80 * MB))
    assert (used.exit_code, used.killed) == (0, "") and used.peak_bytes < 40 * MB


@needs_cgroup
def test_nothing_is_left_of_a_cgroup() -> None:
    folders = [folder for folder in (CGROUPS, *CGROUPS.iterdir()) if folder.is_dir()]
    taking(10, 100)
    assert not [made for folder in folders for made in folder.glob(f"sartor-{os.getpid()}-*")]


def test_without_cgroups_an_allocation_fails(tmp_path: Path) -> None:
    used = taking(300, 150, tmp_path)
    assert used.held_by == "RLIMIT_DATA" and used.exit_code == 1  # MemoryError
    used = taking(40, 150, tmp_path)
    assert used.exit_code == 0 and 40 * MB < used.peak_bytes < 65 * MB


def test_wall_limit_sends_sigterm_then_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that traps SIGTERM exits with 143; a process that ignores it is killed after GRACE_S."""
    heard = 'trap "exit 143" TERM; while :; do sleep 0.1; done'  # a shell is ready before the limit, also on a busy machine
    used = run(["/bin/sh", "-c", heard], ResourceLimits(wall_s=2.0))
    assert (used.killed, used.exit_code, used.held_by) == ("wall", 143, "nothing")
    monkeypatch.setattr(resource_limits, "GRACE_S", 0.5)
    used = run(["/bin/sh", "-c", 'trap "" TERM; exec sleep 60'], ResourceLimits(wall_s=2.0))
    assert (used.killed, used.exit_code) == ("wall", -9) and used.wall_s < 30


def test_processor_time_is_held() -> None:
    used = run([sys.executable, "-c", "while True: pass"], ResourceLimits(cpu_s=0.3))
    assert used.killed == "cpu" and used.exit_code == -15 and used.cpu_s >= 0.3


def test_it_stops_when_it_is_told_to() -> None:
    began = time.monotonic()
    used = run(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        ResourceLimits(),
        stop=lambda: time.monotonic() - began > 0.2,
    )
    assert (used.killed, used.exit_code) == ("stopped", -15) and used.wall_s < 30


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BudgetError, match="below 0") as caught:
        ResourceLimits(wall_s=-1)
    assert "--" not in caught.value.remedy, "commands name this limit differently"
    with pytest.raises(BudgetError, match="no Python"):
        ResourceLimits(memory_bytes=1)
    with pytest.raises(MissingError, match="could not be started"):
        run(["/nowhere/at-all"], ResourceLimits())


def test_log_gets_stdout_and_stderr(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier command")
    run(["/bin/sh", "-c", "echo one; echo two >&2"], ResourceLimits(), log=log)
    assert log.read_text() == "one\ntwo\n"
    with pytest.raises(MissingError, match="could not be started under nothing: .*at-all"):
        run(["/nowhere/at-all"], ResourceLimits(), log=log)


def test_anonymous_bytes_grow_with_an_allocation() -> None:
    before = anonymous_bytes(os.getpid())
    held = bytearray(50 * MB)
    held[::4096] = b"x" * len(held[::4096])
    assert 45 * MB < anonymous_bytes(os.getpid()) - before < 60 * MB
    with pytest.raises(OSError):
        anonymous_bytes(1 << 30)


@pytest.fixture
def run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobResult]:
    """Run a job by a module of some lines, which gets `job` and `result` as paths."""
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def run_lines(lines: str, job: dict[str, Any], limits: ResourceLimits = LIMITS, **options: Any) -> JobResult:
        head = "import json, os, sys, time\nfrom pathlib import Path\njob, result = map(Path, sys.argv[1:])\n"
        (tmp_path / "job_module.py").write_text(head + lines)
        return run_job("job_module", job, limits, **options)

    return run_lines


def test_run_job_returns_what_the_process_wrote(run_code: Callable[..., JobResult], tmp_path: Path) -> None:
    lines = (
        "fields = json.loads(job.read_text())\n"
        "Path(fields['seen']).write_text(str(job.parent))\n"
        "for number in range(5): print(number)\n"
        "result.write_text(json.dumps({'double': 2 * fields['number']}))\n"
    )
    finished = run_code(lines, {"number": 4, "seen": str(tmp_path / "seen")})
    assert (finished.payload, finished.usage.exit_code) == ({"double": 8}, 0)
    assert finished.log_tail == ["2", "3", "4"]
    assert not Path((tmp_path / "seen").read_text()).exists(), "nothing of a job is left"


def test_run_job_without_a_whole_result_has_no_payload(run_code: Callable[..., JobResult]) -> None:
    nothing = run_code("sys.exit('no such model')", {})
    assert (nothing.payload, nothing.usage.exit_code, nothing.log_tail) == (None, 1, ["no such model"])
    half = run_code("result.write_text('{\"half'); os.abort()", {})
    assert (half.payload, half.usage.exit_code) == (None, -6)
    late = run_code("result.write_text('{}'); os.abort()", {})
    assert (late.payload, late.usage.exit_code) == ({}, -6), "a library may crash at its end"


def test_run_job_is_ended_at_its_limit_and_when_told(run_code: Callable[..., JobResult]) -> None:
    slow = run_code("time.sleep(60)", {}, ResourceLimits(wall_s=0.1))
    assert (slow.payload, slow.usage.killed) == (None, "wall")
    assert run_code("time.sleep(60)", {}, stop=lambda: True).usage.killed == "stopped"


def test_job_process_can_end_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        f"import sys\nprint(sys.stdin.read())\nopen({str(tmp_path / 'ended')!r}, 'w').close()\n"
    )
    code = (
        "import os\nfrom sartor.core.resource_limits import ResourceLimits, run_job\n"
        "def kill_parent(): os.kill(os.getpid(), 9)\n"
        "run_job('waits', {}, ResourceLimits(), stop=kill_parent)\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    deadline = time.monotonic() + 60
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
