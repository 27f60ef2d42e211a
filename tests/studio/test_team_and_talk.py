"""Promote and roll back on the page Team while replies stream to the page Talk, both in Chromium, on the tiny base."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from release_fixtures import quiet_gates, switch_team
from sartor.studio.jobs.job_control import JobControl

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from studio_circle import end_jobs  # noqa: E402

from studio_pictures import served, visit_of  # noqa: E402
from studio_visit import CHROMIUM, Visit, chromium  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.circle,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
# the commands without a judgement of what a random base says, on which no admission would let it pass
COMMAND = """
import sys
from sartor.serving.admission import admission
admission.canary_prompts.judge_canaries = lambda canaries, said: "not judged"
from sartor.cli import main
sys.exit(main())
"""
SETTINGS = "engine: {kind: local, threads: 1}\nworkers: {count: 1, spare: 0}\nhttp: {port: 0}\n"
PATIENCE_S = 600.0


@pytest.fixture
def work(adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a team of one agent, whose version 1.0 it names, and the Release of version 1.1."""
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "sartor-home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    quiet_gates(monkeypatch)
    folder = tmp_path / "work"
    folder.mkdir()
    switch_team(folder, adapter, tiny_base, SETTINGS)
    yield folder
    end_jobs(folder)


def ask(visit: Visit) -> int:
    """Send a question and return the number of its turn, whose reply may still be written.

    The conversation is begun anew: the base has room for one reply.
    """
    page = visit.page
    if page.locator("#talk article").count():
        page.reload()
        page.click("form[action$='/clear'] button")
        page.wait_for_selector("#talk article", state="detached")
        page.wait_for_load_state()  # before its script is loaded a page takes no keys
    turns = page.locator("#talk article").count()
    page.fill("textarea[name=prompt]", f"hi {turns}")
    page.press("textarea[name=prompt]", "Control+Enter")
    page.wait_for_selector(f"#reply-{turns}-0")
    return turns


def ended(visit: Visit, turn: int) -> str:
    """The version whose reply has ended, whole."""
    visit.page.wait_for_selector(f"#reply-{turn}-0 .reply-tools .thumb")
    assert not visit.page.locator("#talk article .warn, #talk article .worse").count()
    return visit.page.locator(f"#reply-{turn}-0 h4").inner_text().partition(" ")[0]


def change(visit: Visit, team: str, button: str, reason: str, version: str = "") -> None:
    """Press a button of the page of a team."""
    page = visit.open(f"/team/{team}")
    form = page.locator("main form").filter(has=page.locator(f"button[value={button}]"))
    form.locator("input[name=reason]").fill(reason)
    if version:
        form.locator("select[name=version]").select_option(version)
    form.locator(f"button[value={button}]").click()


def until(visit: Visit, version: str) -> None:
    """Ask until a version answers; each reply meanwhile ends whole."""
    end = time.monotonic() + PATIENCE_S
    while ended(visit, ask(visit)) != version:
        assert time.monotonic() < end, f"{version} does not answer"


def test_streamed_replies_survive_promote_and_rollback(work: Path) -> None:
    [team] = [file.name for file in work.glob("*.yaml")]
    with served(work) as (app, address), chromium() as browser:
        app.studio.jobs = JobControl(work / ".studio" / "jobs", (sys.executable, "-c", COMMAND))
        talker, changer = visit_of(browser, app, address), Visit(browser, address)
        changer.log_in()
        talker.open("/talk")
        _open_team(talker, team)
        assert ended(talker, ask(talker)) == "switch@1.0"
        add = ["agents", "add", str(work / "switch-1.1"), f"--team={work / team}"]
        job = app.studio.jobs.start(add, title="add", by="Ada", cwd=work, is_heavy=False)
        while not app.studio.jobs.files.status(job.id).state.is_over:
            time.sleep(0.2)
        for button, reason, version in (("promote", "better", "1.1"), ("rollback", "worse", "1.0")):
            turn = ask(talker)
            change(changer, team, button, reason, version if button == "promote" else "")
            assert ended(talker, turn) in ("switch@1.0", "switch@1.1")
            until(talker, f"switch@{version}")
        page = changer.open(f"/team/{team}")
        events = page.locator("section[aria-labelledby=events]").inner_text()
        assert "1.0 → 1.1" in events and "1.1 → 1.0" in events and "Ada" in events and "worse" in events
        assert talker.faults == changer.faults == []


def _open_team(visit: Visit, team: str) -> None:
    page = visit.page
    page.locator(f"form:has(input[name=artefact][value='{team}']) button").first.click()
    page.wait_for_url("**/talk/*")
    page.wait_for_selector("textarea[name=prompt]", timeout=PATIENCE_S * 1000)
    page.select_option("select[name=second]", "")
