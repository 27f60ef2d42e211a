"""A studio as a process of its own, and a user's browser on it: for the pictures, the tests and the benchmark.

Chromium is the system's, driven by Playwright (`pip install playwright`, no download).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, sync_playwright

CHROMIUM = "/usr/bin/chromium"
NAME, PASSWORD = "Ada", "four words are enough"
# milliseconds that a page of a busy machine has
PATIENCE_MS = 300_000
_STUDIO = (sys.executable, "-P", "-m", "sartor")


@contextmanager
def chromium(executable: str = CHROMIUM) -> Iterator[Browser]:
    """Open a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


class StudioProcess:
    """`sartor studio` on a folder as a process, which can be killed and started again at the same address.

    environment: of the process, and so of the jobs that it starts. program: what is executed before the arguments.
    address: its URL. owner_link: one-time link that the first start printed.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], program: Sequence[str] = _STUDIO) -> None:
        self._folder, self._environment, self._program = folder, dict(environment), tuple(program)
        self._process: subprocess.Popen[str] | None = None
        self.address = self.owner_link = ""

    def __enter__(self) -> StudioProcess:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the studio and wait until it listens. Raises RuntimeError if it ends before that."""
        port = self.address.rpartition(":")[2] or "0"
        command = [*self._program, "studio", str(self._folder), "--port", port, "--json"]
        self._process = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the studio ended with {self._process.wait()}")
        facts = json.loads(line)
        self.address = facts["address"]
        self.owner_link = facts.get("owner_link", self.owner_link)

    def kill(self) -> None:
        """End the studio by SIGKILL; the jobs that it started go on."""
        if self._process is None:
            return
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None


class Visit:
    """A user's browser window on a studio, with cookies of its own.

    options: of Playwright's `new_context`, such as viewport and color_scheme.
    faults: errors and warnings of the console, errors of scripts, and requests to other hosts, which are refused.
    """

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.address = address
        self.faults: list[str] = []
        self._context = browser.new_context(**{"locale": "en", **options})
        self._context.route(lambda url: not url.startswith((f"{address}/", "data:")), self._refuse)
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._note_foreign)

    def _refuse(self, route: Route) -> None:
        self.faults.append(f"a request to {route.request.url}")
        route.abort()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _note_foreign(self, request: Request) -> None:
        if not request.url.startswith((f"{self.address}/", "data:")):
            self.faults.append(f"a request to {request.url}")

    def open(self, path: str) -> Page:
        """Open a page of the studio by its path."""
        self.page.goto(f"{self.address}{path}")
        return self.page

    def accept(self, link: str, name: str = "") -> None:
        """Choose the password of a one-time link, as a new user does; the browser is then logged in.

        link: its address or its path. name: where the link leaves it open.
        """
        choose_password(self.page, self.address, link.removeprefix(self.address), name)

    def log_in(self, name: str = NAME) -> None:
        """Log in with the name and the password."""
        self.open("/login")
        self.page.fill("input[name=name]", name)
        self.page.fill("input[name=password]", PASSWORD)
        self.page.click("main button")
        self.page.wait_for_url(f"{self.address}/")

    def close(self) -> None:
        """Close the window and forget its cookies."""
        self._context.close()


def choose_password(page: Page, address: str, path: str, name: str = "") -> None:
    """Fill in the form of a one-time link below an address. name: where the link leaves it open."""
    page.goto(f"{address}{path}")
    if name:
        page.fill("input[name=name]", name)
    page.fill("input[name=password]", PASSWORD)
    page.fill("input[name=repeated]", PASSWORD)
    page.click("main button")
    page.wait_for_url(f"{address}/")
