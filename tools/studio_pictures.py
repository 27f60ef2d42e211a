"""Screenshots of the studio's pages at 390 and 1,280 px, dark and light.

    python tools/studio_pictures.py work --out studio-pictures
    python tools/studio_pictures.py work --out docs/images --only home report --widths 1280 --schemes light --screens 1

`work` is a folder of artefacts, such as `sartor tailor ... --out work/faq` and `sartor studio work` leave. A user is
added to a copy of its accounts, not to its own. Look at the pictures before you show them. `--colours 128` makes them
small enough for a page of the documentation.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page

from sartor.studio import studio_folder
from sartor.studio.accounts import Role
from sartor.studio.pages.team_pages import teams_of
from sartor.studio.served_talk import Talk
from sartor.studio.studio_app import StudioApp
from sartor.studio.studio_server import StudioServer
from studio_visit import CHROMIUM, NAME, Visit, choose_password, chromium

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
HEIGHT = 900


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
    choose_password(page, address, f"/welcome/{app.studio.accounts.add_user(name, role)}")


def visit_of(browser: Browser, app: StudioApp, address: str, **options: Any) -> Visit:
    """Open an owner's browser window on a studio, logged in. options: of Visit."""
    visit = Visit(browser, address, **options)
    log_in(visit.page, app, address)
    return visit


def pages_of(app: StudioApp) -> dict[str, str]:
    """Return {name: path} of the pages: of each kind of artefact and of each state of a job the newest one."""
    names = ("data", "review", "evaluate", "jobs", "new", "talk", "tune", "team", "devices", "settings")
    pages = {"home": "/", **{name: f"/{name}" for name in names}, "tune-new": "/tune/new"}
    pages |= {f"settings-{tab}": f"/settings/{tab}" for tab in ("keys", "licences", "storage", "doctor")}
    if files := app.studio.folder.data_files():
        pages |= {"preview": f"/new?file={files[0]}", "recipe": f"/recipe?file={files[0]}"}
    return {**pages, **_artefact_pages(app), **_job_pages(app), **_operation_pages(app), "error": "/data/nothing"}


def _artefact_pages(app: StudioApp) -> dict[str, str]:
    found, _ = app.studio.folder.scan()
    first: dict[str, str] = {}
    for item in found:
        if item.artifact:
            first.setdefault(item.kind, item.name)
    pages = {}
    if name := first.get("dataset"):
        pages |= {"rows": f"/data/{name}", "drops": f"/data/{name}?split=dropped", "row": f"/row/{name}?at=0"}
        pages |= {"sources": f"/sources/{name}", "duplicates": f"/duplicates/{name}"}
        pages |= {"finding": f"/review/{name}", "agreement": f"/agreement/{name}"}
    if name := first.get("report"):
        pages |= {"report": f"/evaluate/{name}", "won": f"/evaluate/{name}?rows=won", "slices": f"/slices/{name}"}
    for kind in ("adapter", "release"):
        if name := first.get(kind):
            pages |= {kind: f"/artefact/{name}"}
    if name := first.get("adapter"):
        runs = [("run", item.name) for item in found if item.kind == "adapter"]
        pages |= {"tuning": f"/tune/run/{name}", "compare": f"/tune/compare?{urlencode(runs)}"}
    for item in found:
        run = item.artifact.manifest.get("run", {}) if item.artifact else {}
        if isinstance(run, dict) and "federated" in run:
            pages.setdefault("rounds", f"/devices/rounds/{item.name}")
    return pages


def _job_pages(app: StudioApp) -> dict[str, str]:
    pages: dict[str, str] = {}
    for status in app.studio.jobs.files.statuses():
        state = "killed" if status.signal else status.state.value
        pages.setdefault("server" if status.job.verb == "serve" else f"job-{state}", f"/jobs/{status.job.id}")
        if status.job.verb == "serve" and "conversation" not in pages:
            pages["conversation"] = f"/talk/{status.job.id}"
            talk = Talk(app.studio.talks, status.job.id, NAME)
            if any(reply.receipt for turn in talk.turns()[:1] for reply in turn.replies[:1]):
                pages["receipt"] = f"/talk/{status.job.id}/receipts/0/0"
    for name in sorted(path.name for path in (app.studio.folder.hidden / "questions").glob("*")):
        pages |= {"why": f"/why/{name}", "why-proof": f"/why/{name}/proof", "why-fix": f"/why/{name}/fix"}
    for path in (app.studio.folder.hidden / "drafts").glob("*"):
        pages["draft"] = f"/tune/draft/{path.name}"
    return pages


def _operation_pages(app: StudioApp) -> dict[str, str]:
    pages = {f"team-{file.stem}": f"/team/{name}" for name, file in teams_of(app.studio).items()}
    for folder in app.studio.folder.walk():
        if (folder / "metadata" / "1.root.json").is_file():
            pages.setdefault("fleet", f"/devices/fleet/{app.studio.folder.name_of(folder)}")
    return pages


def photograph(page: Page, file: Path, *, screens: int, colours: int) -> None:
    """Write a picture of a page's whole height, up to so many screens. colours: of its palette; 0 for all of them."""
    size = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    viewport: Any = page.viewport_size
    if size[0] > viewport["width"]:
        print(f"{file.stem}: {size[0]} px wide at {viewport['width']}")
    clip = {"x": 0, "y": 0, "width": viewport["width"], "height": viewport["height"]}
    clip["height"] = min(max(size[1], viewport["height"]), screens * viewport["height"])
    page.screenshot(path=file, clip=clip, full_page=True)
    if colours:
        with Image.open(file) as picture:
            small = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        small.save(file, optimize=True)


def main() -> None:
    """Make the pictures and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("studio-pictures"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--height", type=int, default=HEIGHT, help="of the window")
    parser.add_argument("--screens", type=int, default=3, help="at most so many windows of a long page")
    parser.add_argument("--colours", type=int, default=0, help="of a palette, 2 to 256; all without it")
    parser.add_argument("--language", default="en")
    parser.add_argument("--browser", default=CHROMIUM)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    count, style = 0, {"screens": arguments.screens, "colours": arguments.colours}
    with tempfile.TemporaryDirectory() as scratch:
        studio_folder.ACCOUNTS = str(Path(scratch) / "accounts.sqlite")
        with served(arguments.folder) as (app, address), chromium(arguments.browser) as browser:
            for width in arguments.widths:
                for scheme in arguments.schemes:
                    options = {"viewport": {"width": width, "height": arguments.height}, "color_scheme": scheme}
                    visit = Visit(browser, address, locale=arguments.language, **options)
                    if not arguments.only or "login" in arguments.only:
                        visit.open("/login")
                        photograph(visit.page, arguments.out / f"login-{width}-{scheme}.png", **style)
                        count += 1
                    log_in(visit.page, app, address)
                    for name, path in pages_of(app).items():
                        if arguments.only and name not in arguments.only:
                            continue
                        answer = visit.page.goto(f"{address}{path}", wait_until="load")
                        if name != "error" and answer is not None and answer.status == 404:
                            print(f"{name}: there is no page {path}")
                            continue
                        photograph(visit.page, arguments.out / f"{name}-{width}-{scheme}.png", **style)
                        count += 1
                    faults += visit.faults
                    visit.close()
    print(f"{count} pictures in {arguments.out}; faults: {sorted(set(faults)) or 'none'}")


if __name__ == "__main__":
    main()
