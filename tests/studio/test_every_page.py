"""Each page in Chromium: no serious fault of accessibility, no request to another host, no wider than its window."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sartor.studio.accounts import Role

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from playwright.sync_api import Browser, Error  # noqa: E402

from studio_pictures import SCHEMES, WIDTHS, pages_of, served, visit_of  # noqa: E402
from studio_routes import routes_of  # noqa: E402
from studio_scenes import Scenes  # noqa: E402
from studio_visit import CHROMIUM, Visit, chromium  # noqa: E402
from talking import HeldReplies, talking  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
AXE = Path(__file__).parent.parent / "data" / "axe-core" / "axe.min.js"
# of the package axe-core 4.14.1 of npm
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
RUN = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return found.violations.map(rule => [rule.impact, rule.id, rule.nodes.map(node => node.html.slice(0, 200))]);
}"""
# GET routes without a page of their own: files, and the card as `curate` wrote it
NO_PAGES = ("/static/", "/events", "/media/", "/speech", "/forecast", "/card/")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def site(browser: Browser, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A studio in which every page has something to show; Ada has asked one question."""
    folder = tmp_path_factory.mktemp("scenes") / "work"
    folder.mkdir()
    with talking(folder.parent, HeldReplies()) as replies, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder.parent / "home"))
        scenes = Scenes(folder, replies)
        shutil.copytree(published / "repository", folder / "farm" / "repository")
        with served(folder) as (app, address):
            visit = visit_of(browser, app, address)
            visit.open(f"/talk/{scenes.jobs['served']}")
            visit.page.fill("textarea[name=prompt]", "How do I open an account?")
            visit.page.press("textarea[name=prompt]", "Control+Enter")
            visit.page.wait_for_selector("#talk article .reply-tools")
            visit.close()
            yield app, address


def visits(browser: Browser, site: tuple[Any, str], **options: Any) -> Iterator[tuple[Visit, dict[str, str]]]:
    """A stranger with the pages of strangers, and an owner with all others: {name: path}. options: of Visit."""
    app, address = site
    stranger = Visit(browser, address, **options)
    yield stranger, {"login": "/login", "welcome": f"/welcome/{app.studio.accounts.add_user('New', Role.VIEWER)}"}
    stranger.close()
    owner = visit_of(browser, app, address, **options)
    yield owner, pages_of(app)
    owner.close()


def test_axe_is_what_its_package_holds() -> None:
    assert hashlib.sha256(AXE.read_bytes()).hexdigest() == AXE_SHA256
    assert "Mozilla Public License" in AXE.with_name("LICENSE").read_text()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_page_has_a_serious_fault(browser: Browser, site: tuple[Any, str], scheme: str, width: int) -> None:
    axe, faults = AXE.read_text(encoding="utf-8"), []
    for visit, pages in visits(browser, site, color_scheme=scheme, viewport={"width": width, "height": 900}):
        for name, path in pages.items():
            visit.open(path)
            visit.page.evaluate(axe)
            faults += [
                f"{name}: {rule} {nodes}"
                for impact, rule, nodes in visit.page.evaluate(RUN)
                if impact in ("serious", "critical")
            ]
    assert faults == []


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_asks_another_host_or_is_too_wide(browser: Browser, site: tuple[Any, str], width: int) -> None:
    for visit, pages in visits(browser, site, viewport={"width": width, "height": 900}):
        for name, path in pages.items():
            visit.open(path)
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert [fault for fault in visit.faults if "404" not in fault] == []  # of the page that says what is not there


def test_request_to_another_host_is_found(browser: Browser, site: tuple[Any, str]) -> None:
    """The check itself: a page that asks another host is refused, and named."""
    visit = Visit(browser, site[1])
    with pytest.raises(Error):
        visit.page.goto("http://127.0.0.2:9/picture.png")
    assert "a request to http://127.0.0.2:9/picture.png" in visit.faults
    visit.close()


def test_every_route_is_among_the_pages(site: tuple[Any, str]) -> None:
    """A new page must be added to pages_of of tools/studio_pictures.py, or nothing here looks at it."""
    app, _ = site
    paths = [path.partition("?")[0] for path in pages_of(app).values() if path != "/data/nothing"]
    paths += ["/login", "/welcome/token"]
    routes = list(routes_of(app, "GET"))
    missing = [route.path for route in routes if not any(route.path_regex.match(path) for path in paths)]
    assert len(routes) > 10 and [path for path in missing if not any(part in path for part in NO_PAGES)] == []
