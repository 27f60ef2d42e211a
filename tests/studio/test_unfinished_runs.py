"""Tunings in work on disk, of real processes: which run, which were killed, and which of the studio's jobs they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.studio.jobs.job_files import JobState
from sartor.studio.jobs.unfinished_runs import unfinished_runs

# stands for `sartor tune --out ADAPTER`: takes the lock, fills the hidden folder, waits
TUNING = """
import json, sys, time
from pathlib import Path
from sartor.core.artifacts import write_artifact
def fill(part):
    with (part / "log.jsonl").open("w") as log:
        for update in (1, 2, 3):
            progress = {"fraction": update / 10, "left_s": 70.0 if update == 3 else None}
            line = {"wall_s": update, "update": update, "loss": 3.0 - update, "learning_rate": 1e-3, "tokens": 10,
                    "tokens_per_s": 10.0, "memory_bytes": 1 << 30, "progress": progress}
            log.write(json.dumps(line) + "\\n")
        log.flush()
        print("begun", flush=True)
        time.sleep(60)
write_artifact(Path(sys.argv[1]), "adapter", fill)
"""


@pytest.fixture
def tuning(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    adapter = tmp_path / "work" / "faq" / "adapter"
    adapter.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", TUNING, str(adapter)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield adapter, process
        process.kill()


def test_run_of_a_terminal_is_found_until_it_is_killed(tuning: tuple[Path, subprocess.Popen[str]]) -> None:
    adapter, process = tuning
    (run,) = unfinished_runs([adapter.parent.parent, adapter.parent]).values()
    assert (run.adapter, run.pid, run.is_running) == (adapter, process.pid, True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = unfinished_runs([adapter.parent]).values()
    assert not run.is_running


def test_another_process_with_the_number_is_not_the_run(tmp_path: Path) -> None:
    """This process lives, and has the lock of no such output open."""
    for name in (f".adapter.part-{os.getpid()}-1-2", ".other.part-99999999999-1-2", ".third.part-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"update": 1}))
    (run,) = unfinished_runs([tmp_path, tmp_path / "absent"]).values()
    assert run.adapter == tmp_path / "adapter" and not run.is_running


def test_page_shows_the_run_of_a_terminal_without_a_stop_button(
    tuning: tuple[Path, subprocess.Popen[str]],
) -> None:
    from studio_site import Site

    adapter, process = tuning
    site = Site(adapter.parent.parent)
    site.log_in()
    page = site.page("/tune")
    assert "faq/adapter" in page and "running" in page and "30 %" in page and "left" in page
    assert "/tune/run/faq/adapter" in site.page("/jobs")
    page = site.page("/tune/run/faq/adapter")
    assert "It runs at a terminal" in page and 'action="/tune/stop"' not in page and "data-events" in page
    assert 'value="0.3"' in page and "10 tokens/s" in page
    assert site.post("/tune/stop", from_page="/tune", run="faq/adapter").status_code == 400
    process.send_signal(signal.SIGKILL)
    process.wait()
    page = site.page("/tune/run/faq/adapter")
    assert "It ended without an Adapter" in page and JobState.LOST.value in page and "data-events" not in page
    assert "/tune/run/faq/adapter" not in site.page("/jobs")
    site.close()
