"""Faults of the machine, seen in the browser: killed jobs, too little memory, a full disk, a killed studio."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.jobs.job_files import PROCESS, read_json
from studio_artefacts import write_specialist
from studio_scenes import write_findings

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from studio_pictures import served, visit_of  # noqa: E402
from studio_visit import CHROMIUM, NAME, StudioProcess, Visit, chromium  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
ROWS = "prompt,completion\nWhat does it cost?,Nothing.\nWhen?,Today.\n"
# runs until the file `go` is there
WAITING = """
import json, pathlib, time
while not pathlib.Path("go").exists():
    time.sleep(0.05)
print(json.dumps({"out": "there"}))
"""
GREEDY = "held = bytearray(1 << 34)"
MEMORY_BYTES = 1 << 30


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@contextmanager
def site_of(browser: Browser, folder: Path, program: tuple[str, ...]) -> Iterator[tuple[Any, Visit]]:
    """A studio whose jobs are this program, and its owner's browser."""
    with served(folder) as (app, address):
        app.studio.jobs = JobControl(folder / ".studio" / "jobs", program)
        visit = visit_of(browser, app, address)
        yield app, visit
        visit.close()


def start_job(visit: Visit) -> Page:
    """The page of a job: an evaluation of the Adapter of `write_specialist`."""
    visit.open("/artefact/faq/adapter")
    visit.page.click("form[action='/evaluate'] button")
    visit.page.wait_for_url("**/jobs/*")
    return visit.page


def test_job_killed_by_the_system_says_so(browser: Browser, work: Path) -> None:
    write_specialist(work)
    with site_of(browser, work, (sys.executable, "-c", WAITING)) as (app, visit):
        page = start_job(visit)
        expect(page.locator(".state")).to_have_text("running", timeout=120_000)
        job_id = page.url.rpartition("/")[2]
        os.kill(int(read_json(app.studio.jobs.files.path(job_id) / PROCESS)["pid"]), signal.SIGKILL)
        expect(page.locator(".state")).to_have_text("failed", timeout=120_000)
        expect(page.locator("#live .warn")).to_contain_text("signal 9")
        visit.open("/")
        expect(page.locator(".needs")).to_contain_text("failed: look at its log")
        (work / "go").touch()
        visit.open(f"/jobs/{job_id}")
        page.click("text=Start again")
        expect(page.locator(".state")).to_have_text("done", timeout=120_000)
        visit.open("/")
        expect(page.locator(".needs")).to_have_count(0)
        assert visit.faults == []


def test_job_out_of_memory_says_so(browser: Browser, work: Path) -> None:
    """Its memory is limited, so that the allocation fails and no signal ends it."""
    write_specialist(work)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, 2 * ({MEMORY_BYTES},)); {GREEDY}"
    with site_of(browser, work, (sys.executable, "-c", limited)) as (_, visit):
        page = start_job(visit)
        expect(page.locator(".state")).to_have_text("failed", timeout=120_000)
        expect(page.locator("#live .warn")).to_contain_text("ended with code 1")
        expect(page.locator(".log")).to_contain_text("MemoryError")
        assert visit.faults == []


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk of its own at a path, of which uploads leave 64 MiB free."""
    path.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root: sudo -E make test")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path) -> Path:
    """Write to a file until nothing more fits on the disk."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def test_full_disk_is_said_and_loses_nothing(browser: Browser, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        write_specialist(disk)
        write_findings(disk / "faq" / "data", 3, with_suggestion=True)
        with site_of(browser, disk, (sys.executable, "-c", "print('{}')")) as (app, visit):
            page = visit.open("/new")
            rows = tmp_path / "rows.csv"
            rows.write_text(ROWS)
            page.set_input_files("input[type=file]", rows)
            page.click("form.drop button")
            page.wait_for_url("**/new?file=*")
            visit.open("/review/faq/data")
            page.keyboard.press("a")
            page.wait_for_url("**decided=*")
            visit.faults.clear()

            filler = fill(disk)
            for act in (_upload, _review, _evaluate):
                act(visit, rows)
                expect(page.locator("[role=alert]").first).to_contain_text("disk", timeout=120_000)
            other = Visit(browser, visit.address)
            other.open("/login")
            other.page.fill("input[name=name]", NAME)
            other.page.fill("input[name=password]", "four words are enough")
            other.page.click("main button")
            expect(other.page.locator("[role=alert]")).to_contain_text("disk", timeout=120_000)
            other.close()
            for path in ("/", "/data/faq/data", "/evaluate/faq/report", "/jobs"):
                visit.open(path)
                expect(page.locator("[role=alert]")).to_have_count(0)
            # SQLite makes a file for each reader of a queue, so the queue waits until there is room
            visit.open("/review/faq/data")
            expect(page.locator("[role=alert]")).to_contain_text("nothing was changed")
            assert [fault for fault in visit.faults if "the server responded with a status of" not in fault] == []

            filler.unlink()
            assert sartor.review_counts(disk / "faq" / "data")["accepted"] == 1
            assert [file.read_text() for file in (disk / "uploads").iterdir()] == [ROWS]
            assert app.studio.jobs.files.ids() == []
            _review(visit, rows)
            page.wait_for_url("**decided=*")
            assert sartor.review_counts(disk / "faq" / "data")["accepted"] == 2
            page = start_job(visit)
            expect(page.locator(".state")).to_have_text("done", timeout=120_000)


def _upload(visit: Visit, rows: Path) -> None:
    visit.open("/new")
    visit.page.set_input_files("input[type=file]", rows)
    visit.page.click("form.drop button")


def _review(visit: Visit, rows: Path) -> None:
    visit.open("/review/faq/data")
    visit.page.keyboard.press("a")


def _evaluate(visit: Visit, rows: Path) -> None:
    visit.open("/artefact/faq/adapter")
    visit.page.click("form[action='/evaluate'] button")


def test_upload_too_large_is_said_before_and_after_it_is_sent(browser: Browser, work: Path, tmp_path: Path) -> None:
    with site_of(browser, work, (sys.executable, "-c", "pass")) as (app, visit):
        app.studio.max_upload_bytes = 1000
        rows = tmp_path / "rows.csv"
        rows.write_text(ROWS * 100)
        _upload(visit, rows)
        message = visit.page.evaluate("document.querySelector('input[type=file]').validationMessage")
        assert message == "This file is larger than the studio takes." and visit.page.url.endswith("/new")
        app._asgi._max_upload_bytes = 1000
        visit.page.evaluate("delete document.querySelector('input[type=file]').dataset.maxBytes")
        visit.page.evaluate("document.querySelector('input[type=file]').setCustomValidity('')")
        visit.page.click("form.drop button")
        expect(visit.page.locator("[role=alert]")).to_contain_text("limit", timeout=120_000)
        assert not (work / "uploads").exists()


def test_wrong_password_is_said_on_the_page(browser: Browser, work: Path) -> None:
    with site_of(browser, work, (sys.executable, "-c", "pass")) as (_, visit):
        stranger = Visit(browser, visit.address)
        page = stranger.open("/data")
        assert "/login?next=" in page.url
        for password, text in (("wrong password", "wrong"), ("four words are enough", "")):
            page.fill("input[name=name]", NAME)
            page.fill("input[name=password]", password)
            page.click("main button")
            if text:
                expect(page.locator("[role=alert]")).to_contain_text(text)
        page.wait_for_url("**/data")
        stranger.close()


def test_running_job_outlives_a_killed_studio(
    browser: Browser, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command starts the studio; the session, the job and its page are there after kill -9 and a new start."""
    write_specialist(work)
    job = JobControl(work / ".studio" / "jobs", (sys.executable, "-c", WAITING)).start(
        ["evaluate"], title="a job", by=NAME, cwd=work
    )
    environment = {**os.environ, "SARTOR_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    with StudioProcess(work, environment) as studio:
        visit = Visit(browser, studio.address)
        visit.accept(studio.owner_link, NAME)
        page = visit.open(f"/jobs/{job.id}")
        expect(page.locator(".state")).to_have_text("running")
        visit.faults.clear()
        studio.kill()
        time.sleep(1)
        studio.start()
        # the page's stream finds the new studio by itself
        (work / "go").touch()
        expect(page.locator(".state")).to_have_text("done", timeout=120_000)
        visit.open("/jobs")
        expect(page.locator(".state.done")).to_have_count(1)
        visit.close()


@pytest.mark.circle
def test_real_command_out_of_memory_says_so(browser: Browser, work: Path, tiny_base: Path) -> None:
    (work / "rows.csv").write_text(ROWS)
    limited = (shutil.which("prlimit") or "", f"--as={MEMORY_BYTES}", sys.executable, "-P", "-m", "sartor")
    if not limited[0]:
        pytest.skip("no prlimit here: apt-get install util-linux")
    with site_of(browser, work, limited) as (_, visit):
        page = visit.open("/new?file=rows.csv")
        page.fill("input[name=base]", str(tiny_base))
        page.click("form[action='/new'] button:not(.second)")
        expect(page.locator(".state")).to_have_text("failed", timeout=120_000)
        assert page.locator("#live .warn").inner_text().strip()
        assert "emory" in page.locator("main").inner_text()
