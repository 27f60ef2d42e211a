"""The browser tier: Debian's Chromium through the real server, with a fake command behind the jobs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sartor.studio.jobs.job_control import JobControl
from studio_artefacts import write_specialist

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from studio_pictures import served, visit_of  # noqa: E402
from studio_visit import CHROMIUM, chromium  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
# says that it works, then ends when the file is there
COMMAND = """
import json, pathlib, sys, time
for step in range(600):
    print(f"step {step}", file=sys.stderr, flush=True)
    if pathlib.Path("go").exists():
        break
    time.sleep(0.1)
print(json.dumps({"gate": {"gain": "cannot tell"}, "release": None}))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    folder = tmp_path / "work"
    folder.mkdir()
    write_specialist(folder)
    with served(folder) as (app, address):
        app.studio.jobs = JobControl(folder / ".studio" / "jobs", (sys.executable, "-c", COMMAND))
        yield app, address
        (folder / "go").touch()


def open_page(browser: Browser, site: tuple[Any, str], **options: Any) -> tuple[Page, list[str]]:
    """A page of a logged-in owner, and what it complains of (Visit.faults)."""
    app, address = site
    visit = visit_of(browser, app, address, **options)
    return visit.page, visit.faults


def test_file_becomes_a_job_that_is_followed_live(browser: Browser, site: tuple[Any, str], tmp_path: Path) -> None:
    page, faults = open_page(browser, site)
    rows = tmp_path / "fragen.csv"
    rows.write_text("Frage;Antwort\nWas kostet das?;Nichts.\nWann?;Heute.\n")
    page.click("text=New")
    page.set_input_files("input[type=file]", rows)
    page.click("text=Look at its rows")
    page.select_option("select[name=prompt]", "Frage")
    page.select_option("select[name=completion]", "Antwort")
    page.click("text=Show the rows")
    expect(page.locator("article .learnt").first).to_have_text("Nichts.")
    page.fill("input[name=name]", "fragen")
    page.click("button:text-is('Start')")
    expect(page.locator(".state")).to_have_text("running", timeout=120_000)
    first = page.locator(".log").inner_text()
    page.wait_for_function("text => document.querySelector('.log').innerText !== text", arg=first)
    (site[0].studio.folder.root / "go").touch()
    expect(page.locator(".state")).to_have_text("done", timeout=120_000)
    expect(page.locator("table.gate")).to_contain_text("cannot tell")
    page.goto(f"{site[1]}/")
    expect(page.locator(".needs")).to_contain_text("holds the release back")
    assert faults == []


def test_rows_are_filtered_by_keyboard_without_a_reload(browser: Browser, site: tuple[Any, str]) -> None:
    page, faults = open_page(browser, site)
    page.goto(f"{site[1]}/data/faq/data")
    page.evaluate("window.isSame = true")
    page.keyboard.press("/")
    page.keyboard.type("question 123")
    page.keyboard.press("Enter")
    expect(page.locator("article.row")).to_have_count(1)
    assert page.evaluate("window.isSame") and re.search(r"q=question(\+|%20)123", page.url)
    page.go_back()
    expect(page.locator("article.row")).to_have_count(25)
    assert faults == []


def test_pages_work_without_javascript(browser: Browser, site: tuple[Any, str]) -> None:
    page, faults = open_page(browser, site, java_script_enabled=False)
    page.goto(f"{site[1]}/data/faq/data?split=dropped")
    page.select_option("select[name=reason]", "too_long")
    page.click("text=Filter")
    expect(page.locator("article.row")).to_have_count(1)
    page.goto(f"{site[1]}/artefact/faq/adapter")
    page.click("button:text-is('Evaluate')")
    expect(page.locator("pre.command")).to_contain_text("sartor evaluate")
    page.click("noscript a")  # Playwright finds no text there
    page.click("button:text-is('Stop')")
    expect(page.locator(".state")).to_be_visible()
    assert faults == []


def test_each_control_is_reached_by_tab_and_seen(browser: Browser, site: tuple[Any, str]) -> None:
    page, faults = open_page(browser, site)
    page.goto(f"{site[1]}/evaluate/faq/report")
    reachable = page.locator("a[href], button, input:not([type=hidden]), select, textarea, summary").count()
    seen = set()
    for _ in range(reachable + 20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement === document.body")
    assert len(seen) >= reachable * 0.8
    assert faults == []


def test_error_of_a_form_is_shown_without_a_reload(browser: Browser, site: tuple[Any, str]) -> None:
    page, faults = open_page(browser, site)
    page.goto(f"{site[1]}/data/faq/data")
    page.evaluate("document.querySelector('form.filter').setAttribute('hx-get', '/data/nothing')")
    page.evaluate("htmx.process(document.querySelector('form.filter'))")
    page.click("text=Filter")
    expect(page.locator("h1")).to_have_text("That did not work")
    assert [fault for fault in faults if "404" not in fault] == []
