"""Talk in Debian's Chromium: replies that appear word by word, the stop button, the microphone, and no JavaScript."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_artefacts import write_specialist
from studio_site import Site
from talking import HeldReplies, SeeingRoster, close_servers, talk_jobs, talking

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from studio_pictures import CHROMIUM, log_in, served  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
MICROPHONE = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=MICROPHONE)
        yield opened
        opened.close()


@pytest.fixture
def replies() -> HeldReplies:
    return HeldReplies()


@pytest.fixture
def studio(tmp_path: Path, replies: HeldReplies) -> Iterator[tuple[Any, str]]:
    """The studio's application and its address."""
    (tmp_path / "work").mkdir()
    write_specialist(tmp_path / "work")
    with talking(tmp_path, replies, agent_admin=SeeingRoster()), served(tmp_path / "work") as (app, address):
        site = Site.__new__(Site)
        site.folder, site.app = tmp_path / "work", app
        talk_jobs(site, tmp_path)
        yield app, address
        close_servers(site)


def conversation(browser: Browser, studio: tuple[Any, str], **options: Any) -> tuple[Page, list[str]]:
    """The page of a conversation whose server answers, and what it complains of."""
    app, address = studio
    page = browser.new_context(locale="en", **options).new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(f"{address}/") else faults.append(request.url))
    log_in(page, app, address)
    page.goto(f"{address}/talk")
    page.locator(".card", has_text="faq/adapter").locator("button").click()
    page.wait_for_url("**/talk/*")
    if options.get("java_script_enabled", True):
        expect(page.locator("textarea[name=prompt]")).to_be_visible(timeout=120_000)
    return page, faults


def test_replies_appear_word_by_word(browser: Browser, studio: tuple[Any, str], replies: HeldReplies) -> None:
    page, faults = conversation(browser, studio)
    replies.is_held = True
    page.select_option("select[name=second]", label="base")
    page.fill("textarea[name=prompt]", "why")
    page.press("textarea[name=prompt]", "Control+Enter")
    texts = page.locator(".side .said")
    expect(texts).to_have_count(2)
    expect(texts.first).to_have_text("the ")
    assert texts.first.get_attribute("aria-busy") == "true"
    page.evaluate("window.isSame = true")
    page.fill("textarea[name=prompt]", "the next question")
    page.reload()  # the replies go on, and the new page follows them
    expect(texts.first).to_have_text("the ")
    replies.is_held = False
    expect(texts.first).to_have_text("the sky is blue ", timeout=120_000)
    expect(page.locator(".side button", has_text="Good")).to_have_count(1)  # of the agent; the base is not rated
    page.locator(".side button", has_text="Bad").click()
    expect(page.locator(".side code").first).to_contain_text("inbox")
    page.locator("summary", has_text="Correct it").click()
    page.fill("textarea[name=correction]", "it is grey")
    page.click("text=Send the correction")
    expect(page.locator("textarea[name=correction]")).to_have_value("it is grey")
    assert faults == []


def test_reply_is_stopped(browser: Browser, studio: tuple[Any, str], replies: HeldReplies) -> None:
    page, faults = conversation(browser, studio)
    replies.is_held = True
    page.fill("textarea[name=prompt]", "why")
    page.click("button:text-is('Ask')")
    expect(page.locator(".side .said").first).to_have_text("the ")
    for _ in range(page.locator("button:text-is('Stop')").count()):
        page.locator("button:text-is('Stop')").first.click()
    replies.is_held = False
    expect(page.locator("text=You stopped this reply.").first).to_be_visible(timeout=120_000)
    expect(page.locator(".side .said").first).to_have_text("the ")
    assert faults == []


def test_hostile_pieces_stay_text(browser: Browser, studio: tuple[Any, str], replies: HeldReplies) -> None:
    page, faults = conversation(browser, studio)
    replies.text = "<img src=x onerror=alert(1)> <script>alert(1)</script> \u202e"
    replies.is_held = True
    page.fill("textarea[name=prompt]", "why")
    page.click("button:text-is('Ask')")
    expect(page.locator(".side .said").first).to_contain_text("<img")
    replies.is_held = False
    expect(page.locator(".side .said").first).to_contain_text("‹U+202E›", timeout=120_000)
    assert page.locator(".side img, .side script").count() == 0
    assert faults == []


def test_microphone_becomes_a_recording_that_the_server_takes(
    browser: Browser, studio: tuple[Any, str], replies: HeldReplies
) -> None:
    page, faults = conversation(browser, studio, permissions=["microphone"])
    page.click("button:text-is('Record')")
    expect(page.locator("button[data-record]")).to_have_text("End the recording")
    page.wait_for_timeout(600)
    page.click("button[data-record]")
    expect(page.locator("[data-recorded]")).to_contain_text(" s", timeout=120_000)
    page.select_option("select[name=second]", value="")
    page.click("button:text-is('Ask')")
    expect(page.locator("article audio[aria-label='attached recording']")).to_have_count(1)
    expect(page.locator(".side .said").first).to_have_text("the sky is blue ", timeout=120_000)
    (part,) = replies.asked[-1].messages[0]["content"]
    assert str(part).startswith("{'type': 'audio'") and "data:audio/wav;base64,UklGR" in str(part)
    assert faults == []


def test_conversation_works_without_javascript(browser: Browser, studio: tuple[Any, str]) -> None:
    page, faults = conversation(browser, studio, java_script_enabled=False)
    for _ in range(100):
        if page.locator("textarea[name=prompt]").count():
            break
        page.wait_for_timeout(100)
        page.reload()
    assert page.locator("button[data-record]").is_hidden()
    page.fill("textarea[name=prompt]", "why")
    page.click("button:text-is('Ask')")
    expect(page.locator(".side .said").first).to_have_text("the sky is blue ")
    assert faults == []


@pytest.mark.parametrize("width", [390, 1280])
def test_conversation_fits_its_window(
    browser: Browser, studio: tuple[Any, str], replies: HeldReplies, width: int
) -> None:
    replies.text = "word" * 5000
    page, faults = conversation(browser, studio, viewport={"width": width, "height": 800})
    page.fill("textarea[name=prompt]", "x" * 3000)
    page.click("button:text-is('Ask')")
    expect(page.locator("text=Why this model:").first).to_be_visible(timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto(f"{studio[1]}/talk")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert faults == []
