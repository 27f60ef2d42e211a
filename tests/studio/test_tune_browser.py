"""Tune in Chromium: the form by keyboard alone, pages at two widths, and what moves while a job runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.studio.jobs.job_control import JobControl
from studio_artefacts import write_specialist

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

from studio_pictures import CHROMIUM, log_in, served  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
# stands for `sartor plan` at once, and for a `sartor tune` that goes on until the file is there
COMMAND = """
import json, os, pathlib, sys, time
if sys.argv[1] == "plan":
    interval = {"estimate": 100.0, "low": 80.0, "high": 130.0}
    print(json.dumps({"time_s": interval, "evaluation_s": interval, "peak_memory_bytes": None, "refusals": []}))
    sys.exit()
for step in range(600):
    line = {"at": time.time(), "what": "tune", "fraction": step / 600, "text": "", "left_s": 60.0 - step / 10}
    with open(os.environ["SARTOR_PROGRESS_FILE"], "a") as stream:
        stream.write(json.dumps(line) + "\\n")
    if pathlib.Path("go").exists():
        break
    time.sleep(0.1)
print("{}")
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Page, str, list[str]]]:
    folder = tmp_path / "work"
    folder.mkdir()
    write_specialist(folder)
    faults: list[str] = []
    with served(folder) as (app, address), sync_playwright() as playwright:
        app.studio.jobs = JobControl(folder / ".studio" / "jobs", (sys.executable, "-c", COMMAND))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(locale="en").new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith(address) else faults.append(request.url))
        log_in(page, app, address)
        yield page, address, faults
        (folder / "go").touch()
        browser.close()


def test_form_is_filled_by_keyboard_alone(site: tuple[Page, str, list[str]]) -> None:
    """Each control comes by Tab, once its fold is opened; an error stands beside its field; the forecast comes by itself."""
    page, address, faults = site
    page.goto(f"{address}/tune/new")
    for summary in page.locator("summary").all():
        summary.focus()
        page.keyboard.press("Enter")
    names = page.evaluate(
        "[...document.querySelectorAll('main form [name]:not([type=hidden])')].map(item => item.name)"
    )
    page.locator("main").focus()
    reached = set()
    for _ in range(3 * len(names)):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.name || ''"))
    assert set(names) - reached == set()
    rank = page.locator("[name='method.rank@lora']")
    rank.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("0")
    page.keyboard.press("Enter")
    expect(page.locator("[id='fault-method.rank@lora']")).to_contain_text("at least 1")
    assert page.locator("[name='method.rank@lora']").get_attribute("aria-invalid") == "true"
    page.locator("[name='method.rank@lora']").fill("8")
    page.keyboard.press("Enter")
    expect(page.locator("#forecast")).to_contain_text("80 s … 2 min", timeout=120_000)
    expect(page.locator("pre.command").first).to_contain_text("rank: 8")
    assert [fault for fault in faults if "400" not in fault] == []


def test_running_tuning_moves_on_its_page_and_on_home(site: tuple[Page, str, list[str]]) -> None:
    page, address, faults = site
    page.goto(f"{address}/tune/new")
    page.click("button:text-is('Start')")
    expect(page.locator("progress")).to_be_visible(timeout=120_000)
    first = page.locator("#live").inner_text()
    page.wait_for_function("text => document.querySelector('#live').innerText !== text", arg=first)
    page.goto(f"{address}/")
    first = page.locator("#live .card .soft").first.inner_text()
    page.wait_for_function("text => document.querySelector('#live .card .soft').innerText !== text", arg=first)
    page.goto(f"{address}/tune")
    page.click("a:text-is('faq-tuned/adapter')")
    page.click("button:text-is('Stop')")
    expect(page.locator("button:text-is('Resume')")).to_be_visible(timeout=120_000)
    assert faults == []


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_of_tune_is_wider_than_its_window(site: tuple[Page, str, list[str]], width: int) -> None:
    page, address, faults = site
    page.set_viewport_size({"width": width, "height": 800})
    for path in ("/tune", "/tune/new", "/tune/run/faq/adapter", "/tune/compare?run=faq/adapter"):
        page.goto(f"{address}{path}")
        if path == "/tune/new":
            page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    assert faults == []
