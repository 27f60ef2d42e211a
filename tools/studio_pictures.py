"""Screenshots of the studio's pages at 390 and 1,280 px, dark and light.

    python tools/studio_pictures.py work --out studio-pictures
    python tools/studio_pictures.py work --out docs/images --only home report --widths 1280 --schemes light

`work` is a folder of artefacts, such as `sartor tailor ... --out work/faq` and `sartor studio work` leave. A user is
added to a copy of its accounts, not to its own. Chromium is the system's, driven by Playwright
(`pip install playwright`, no download). Look at the pictures before you show them.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import Page, sync_playwright

from sartor.studio import studio_folder
from sartor.studio.accounts import Role
from sartor.studio.studio_app import StudioApp
from sartor.studio.studio_server import StudioServer

CHROMIUM = "/usr/bin/chromium"
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
HEIGHT = 900
NAME, PASSWORD = "Ada", "four words are enough"


@contextmanager
def served(folder: Path) -> Iterator[tuple[StudioApp, str]]:
    """The studio of a folder on a free port, and its address."""
    app = StudioApp(folder)
    server = StudioServer(app, "127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        yield app, server.address
    finally:
        server.stop()
        thread.join(20)
        app.close()


def log_in(page: Page, app: StudioApp, address: str, name: str = NAME, role: Role = Role.OWNER) -> None:
    """Choose a password by a one-time link, as a new user does."""
    token = app.studio.accounts.add_user(name, role)
    page.goto(f"{address}/welcome/{token}")
    page.fill("input[name=password]", PASSWORD)
    page.fill("input[name=repeated]", PASSWORD)
    page.click("main button")
    page.wait_for_url(f"{address}/")


def pages_of(app: StudioApp) -> dict[str, str]:
    """Paths of the pages to photograph, by name: of each kind of artefact the first one."""
    found, _ = app.studio.folder.scan()
    first: dict[str, str] = {}
    for item in found:
        if item.artifact:
            first.setdefault(item.kind, item.name)
    pages = {"home": "/", "data": "/data", "evaluate": "/evaluate", "jobs": "/jobs", "new": "/new", "talk": "/talk"}
    pages |= {"tune": "/tune", "tune-new": "/tune/new"}
    if name := first.get("dataset"):
        pages |= {"rows": f"/data/{name}", "drops": f"/data/{name}?split=dropped", "row": f"/row/{name}?at=0"}
    if name := first.get("report"):
        pages |= {"report": f"/evaluate/{name}", "won": f"/evaluate/{name}?rows=won"}
    if name := first.get("adapter"):
        pages |= {"adapter": f"/artefact/{name}", "tuning": f"/tune/run/{name}"}
        pages |= {
            "compare": f"/tune/compare?{urlencode([('run', item.name) for item in found if item.kind == 'adapter'])}"
        }
    if files := app.studio.folder.data_files():
        pages |= {"preview": f"/new?file={files[0]}"}
    for status in app.studio.jobs.files.statuses():
        pages.setdefault(
            "served" if status.job.verb == "serve" else f"job-{status.job.verb}", f"/jobs/{status.job.id}"
        )
        if status.job.verb == "serve":
            pages.setdefault("conversation", f"/talk/{status.job.id}")
    pages["error"] = "/data/nothing"
    return pages


def photograph(page: Page, address: str, pages: dict[str, str], out: Path, end: str) -> None:
    """One picture a page, of its whole height up to three screens."""
    for name, path in pages.items():
        page.goto(f"{address}{path}", wait_until="load")
        size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        viewport: Any = page.viewport_size
        if size[0] > viewport["width"]:
            print(f"{name}: {size[0]} px wide at {viewport['width']}")
        clip = {"x": 0, "y": 0, "width": viewport["width"], "height": min(size[1], 3 * HEIGHT)}
        page.screenshot(path=out / f"{name}-{end}.png", clip=clip, full_page=True)


def main() -> None:
    """Make the pictures and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("studio-pictures"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--language", default="en")
    parser.add_argument("--browser", default=CHROMIUM)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        studio_folder.ACCOUNTS = str(Path(scratch) / "accounts.sqlite")
        with served(arguments.folder) as (app, address), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox"])
            foreign: list[str] = []
            for width in arguments.widths:
                for scheme in arguments.schemes:
                    context = browser.new_context(
                        viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, locale=arguments.language
                    )
                    page = context.new_page()
                    page.on("request", lambda request: foreign.append(request.url))
                    page.goto(f"{address}/login")
                    page.screenshot(path=arguments.out / f"login-{width}-{scheme}.png")
                    log_in(page, app, address)
                    pages = {
                        name: path
                        for name, path in pages_of(app).items()
                        if not arguments.only or name in arguments.only
                    }
                    photograph(page, address, pages, arguments.out, f"{width}-{scheme}")
                    context.close()
            browser.close()
    others = sorted({url for url in foreign if not re.match(rf"{re.escape(address)}/|data:", url)})
    count = len(list(arguments.out.glob("*.png")))
    print(f"{count} pictures in {arguments.out}; requests to other hosts: {others or 'none'}")


if __name__ == "__main__":
    main()
