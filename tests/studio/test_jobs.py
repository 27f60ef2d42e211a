"""Jobs as real processes: they outlive the studio, their state is the true one after any kill, and heavy ones wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ConfigError
from sartor.core.processes import ProcessId
from sartor.studio.jobs import job_control, training_logs
from sartor.studio.jobs.job_control import JobControl, time_left
from sartor.studio.jobs.job_files import LOG, PROCESS, RUNNER, JobFiles, JobState, read_json, write_json
from sartor.studio.jobs.training_logs import read_losses

# stands for the command: notes that it runs, waits for the file that its first argument names, then ends as it says
COMMAND = """
import json, os, signal, sys, time
verb, go = sys.argv[1:3]
print("begun", file=sys.stderr, flush=True)
while not os.path.exists(go):
    time.sleep(0.01)
if verb == "fail":
    print(json.dumps({"error": {"kind": "ConfigError", "problem": "p", "remedy": "r"}}))
    sys.exit(2)
print(json.dumps({"out": "there"}))
"""


@pytest.fixture
def control(tmp_path: Path) -> JobControl:
    return JobControl(tmp_path / "jobs", (sys.executable, "-c", COMMAND))


def start(control: JobControl, tmp_path: Path, verb: str = "work", go: str = "go", **options: Any) -> str:
    arguments = [verb, str(tmp_path / go)]
    return control.start(arguments, title="a job", by="ada", cwd=tmp_path, **options).id


def wait_for(control: JobControl, job_id: str, *states: JobState) -> Any:
    for _ in range(1500):
        status = control.files.status(job_id)
        if status.state in states:
            return status
        time.sleep(0.02)
    raise AssertionError(f"{status}\n{control.log_lines(job_id)}")


def process_of(control: JobControl, job_id: str, name: str = PROCESS) -> int:
    return int(read_json(control.files.path(job_id) / name)["pid"])


def test_job_runs_to_its_end_with_its_result(control: JobControl, tmp_path: Path) -> None:
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.RUNNING)
    (tmp_path / "go").touch()
    status = wait_for(control, job_id, JobState.DONE)
    assert (status.exit_code, status.result) == (0, {"out": "there"})
    assert status.ended_at >= status.started_at > 0
    assert control.log_lines(job_id) == ["begun"]
    assert status.job.arguments[-1] == "--json" and status.job.by == "ada"


def test_failed_job_has_its_error(control: JobControl, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    status = wait_for(control, start(control, tmp_path, "fail"), JobState.FAILED)
    assert status.exit_code == 2 and status.result["error"]["remedy"] == "r"


def test_heavy_jobs_run_one_at_a_time_in_order(control: JobControl, tmp_path: Path) -> None:
    first, second, third = (start(control, tmp_path, go=name) for name in ("one", "two", "three"))
    light = start(control, tmp_path, go="four", is_heavy=False)
    for job_id in (first, light):
        wait_for(control, job_id, JobState.RUNNING)
    time.sleep(0.5)
    assert [control.files.status(job_id).state for job_id in (second, third)] == [JobState.WAITING] * 2
    (tmp_path / "one").touch()
    wait_for(control, second, JobState.RUNNING)
    assert control.files.status(third).state is JobState.WAITING
    for name in ("two", "three", "four"):
        (tmp_path / name).touch()
    for job_id in (first, second, third, light):
        wait_for(control, job_id, JobState.DONE)


def test_waiting_job_stops_before_it_runs(control: JobControl, tmp_path: Path) -> None:
    first, second = (start(control, tmp_path, go=name) for name in ("one", "two"))
    wait_for(control, first, JobState.RUNNING)
    control.stop(second, by="bob")
    assert wait_for(control, second, JobState.STOPPED).started_at == 0
    (tmp_path / "one").touch()
    wait_for(control, first, JobState.DONE)


def test_stop_ends_the_command(control: JobControl, tmp_path: Path) -> None:
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.RUNNING)
    control.stop(job_id, by="bob")
    assert wait_for(control, job_id, JobState.STOPPED).signal == signal.SIGTERM
    with pytest.raises(ConfigError):
        control.stop(job_id, by="bob")


def test_command_that_ended_by_a_signal_of_elsewhere_was_stopped(tmp_path: Path) -> None:
    control = JobControl(tmp_path / "jobs", (sys.executable, "-c", "import sys; sys.exit(143)"))
    assert wait_for(control, start(control, tmp_path), JobState.STOPPED).exit_code == 143


def test_second_stop_after_its_grace_kills(
    control: JobControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('x', file=sys.stderr, flush=True); time.sleep(60)"
    control = JobControl(tmp_path / "jobs", (sys.executable, "-c", stubborn))
    job_id = start(control, tmp_path)
    for _ in range(500):
        if control.log_lines(job_id):
            break
        time.sleep(0.02)
    control.stop(job_id, by="bob")
    control.stop(job_id, by="bob")
    assert control.files.status(job_id).state is JobState.RUNNING
    monkeypatch.setattr(job_control, "GRACE_S", 0.0)
    control.stop(job_id, by="bob")
    assert wait_for(control, job_id, JobState.STOPPED).signal == signal.SIGKILL


def test_job_killed_by_the_system_is_failed_with_its_signal(control: JobControl, tmp_path: Path) -> None:
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.RUNNING)
    os.kill(process_of(control, job_id), signal.SIGKILL)
    status = wait_for(control, job_id, JobState.FAILED)
    assert (status.signal, status.exit_code) == (signal.SIGKILL, None)


def test_job_outlives_a_killed_studio(control: JobControl, tmp_path: Path) -> None:
    """Another process starts the job and is killed; this one sees it run and end."""
    code = f"""
import os, signal
from pathlib import Path
from sartor.studio.jobs.job_control import JobControl
control = JobControl(Path({str(control.files.folder)!r}), {control._program!r})
control.start(["work", {str(tmp_path / "go")!r}], title="a job", by="ada", cwd=Path({str(tmp_path)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    (job_id,) = control.files.ids()
    wait_for(control, job_id, JobState.RUNNING)
    (tmp_path / "go").touch()
    assert wait_for(control, job_id, JobState.DONE).result == {"out": "there"}


def test_command_outlives_its_runner_and_keeps_others_waiting(control: JobControl, tmp_path: Path) -> None:
    first = start(control, tmp_path, go="one")
    wait_for(control, first, JobState.RUNNING)
    os.kill(process_of(control, first, RUNNER), signal.SIGKILL)
    second = start(control, tmp_path, go="two")
    time.sleep(0.7)
    assert control.files.status(first).state is JobState.RUNNING
    assert control.files.status(second).state is JobState.WAITING
    (tmp_path / "one").touch()
    assert wait_for(control, first, JobState.DONE, JobState.LOST).result == {"out": "there"}
    wait_for(control, second, JobState.RUNNING)
    (tmp_path / "two").touch()
    wait_for(control, second, JobState.DONE)


def test_both_killed_is_lost(control: JobControl, tmp_path: Path) -> None:
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.RUNNING)
    for name in (RUNNER, PROCESS):
        os.kill(process_of(control, job_id, name), signal.SIGKILL)
    assert wait_for(control, job_id, JobState.LOST).exit_code is None


def test_another_process_with_the_number_is_not_the_job(control: JobControl, tmp_path: Path) -> None:
    """After a restart of the machine the number of the process may be another's."""
    (tmp_path / "go").touch()
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.DONE)
    folder = control.files.path(job_id)
    own = ProcessId.of(os.getpid())
    (folder / "end.json").unlink()
    (folder / "output.txt").unlink()
    for name in (RUNNER, PROCESS):
        write_json(folder / name, {"pid": own.pid, "started": "another boot:1", "at": 1.0})
    write_json(folder / "job.json", {**read_json(folder / "job.json"), "created_at": 1.0})
    assert control.files.status(job_id).state is JobState.LOST


def test_ended_job_starts_again(control: JobControl, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job_id = start(control, tmp_path, "tune")
    wait_for(control, job_id, JobState.DONE)
    again = control.again(job_id, by="bob")
    assert again.arguments == ("tune", str(tmp_path / "go"), "--resume", "--json") and again.by == "bob"
    wait_for(control, again.id, JobState.DONE)


@pytest.mark.parametrize("job_id", ["", "..", "../jobs", "a/b", "x" * 80, "20260101-000000-000000000-abcdef"])
def test_unknown_job_is_refused(control: JobControl, job_id: str) -> None:
    with pytest.raises(ConfigError):
        control.files.status(job_id)


def test_damaged_journal_does_not_hide_other_jobs(control: JobControl, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.DONE)
    for name, content in (("20990101-000000-000000001-aaaaaa", b"{"), ("20990101-000000-000000002-aaaaaa", b"[1]")):
        (control.files.folder / name).mkdir()
        (control.files.folder / name / "job.json").write_bytes(content)
    assert [status.job.id for status in control.files.statuses()] == [job_id]


def test_time_left_counts_from_where_this_run_began() -> None:
    """A run that was resumed at 40 % and made 10 % in 60 s has 50 % to go: 300 s."""
    points = [(1000.0, 0.4), (1030.0, 0.45), (1060.0, 0.5)]
    assert time_left(points, 1060.0) == pytest.approx(300.0)
    assert time_left(points, 1070.0) == pytest.approx(290.0)
    assert time_left(points[:1], 1060.0) is None


def test_losses_are_read_from_a_growing_log(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    lines = [{"path": "fast"}, *({"update": step, "loss": 3.0 - step / 1000} for step in range(1, 1001))]
    lines.append({"update": 1000, "eval_loss": 2.5})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 1001, "lo')
    losses = read_losses(file)
    assert losses is not None
    assert len(losses.updates) == training_logs.MAX_POINTS and losses.updates[-1][0] == 1000
    assert losses.held_out == [(1000, 2.5)]
    assert read_losses(tmp_path / "none") is None


def test_losses_of_a_run_in_work_are_found(control: JobControl, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".adapter.part-1-2-3"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"update": 1, "loss": 2.0}\n{"update": 2, "loss": 1.0}\n')
    losses = control.losses_of(tmp_path / "out" / "adapter")
    assert losses is not None and losses.updates == [(1, 2.0), (2, 1.0)]


def test_log_shows_no_terminal_control(control: JobControl, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.DONE)
    (control.files.path(job_id) / LOG).write_text("\x1b[31mred\x1b[0m\n10%\r20%\n\n")
    assert control.log_lines(job_id) == ["red", "20%"]


def test_journal_is_for_its_owner_alone(control: JobControl, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job_id = start(control, tmp_path)
    wait_for(control, job_id, JobState.DONE)
    files: JobFiles = control.files
    for path in (files.folder, *files.path(job_id).rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
