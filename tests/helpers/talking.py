"""A studio whose page Talk reaches a real server with scripted replies; other commands print what a test has written."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.inference.engine import Event
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer
from sartor.serving.types import AgentListing, AgentRequest
from sartor.studio.jobs.job_control import JobControl
from serving import Log, Replies, Roster, house, running, team
from studio_site import Site

# `serve` says its address and goes on until it is stopped; other verbs print what results.json says of them, or fail
COMMAND = """
import json, pathlib, sys, time
verb, folder = sys.argv[2], pathlib.Path(sys.argv[1])
if verb == "serve":
    print(json.dumps(json.loads((folder / "address.json").read_text())), flush=True)
    time.sleep(600)
result = json.loads((folder / "results.json").read_text()).get(verb, {"ran": sys.argv[2:]})
print(json.dumps(result))
sys.exit(3 if "error" in result else 0)
"""


@dataclass
class HeldReplies(Replies):
    """Replies that stop after their first piece while `is_held`."""

    is_held: bool = False

    async def _events(self, request: AgentRequest, receipt: str) -> AsyncIterator[Event]:
        count = 0
        async for event in super()._events(request, receipt):
            while count and self.is_held:
                await asyncio.sleep(0.01)
            count += 1
            yield event


@dataclass
class SeeingRoster(Roster):
    """Agents that read pictures and recordings."""

    reads: tuple[str, ...] = field(default=("audio", "image"))

    async def listed(self) -> list[AgentListing]:
        return [
            AgentListing(name, live, (live, "0.9"), {"state": "serving"}, reads={live: self.reads})
            for name, live in self.live.items()
        ]


@contextmanager
def talking(folder: Path, replies: Replies, **parts: Any) -> Iterator[str]:
    """The address of a server of the agents faq and home, whose state is folder/state; jobs of `talk_jobs` name it."""
    made = team(folder / "state")
    server = HttpServer(house(replies=replies, **parts), made, log=RequestLog(Log()))
    with running(server) as address:
        agents = ["faq", "home"]
        (folder / "address.json").write_text(json.dumps({"address": address, "agents": agents, "keys": False}))
        (folder / "results.json").write_text("{}")
        yield address


def talk_jobs(site: Site, folder: Path) -> None:
    """Let the jobs of a studio be those of `talking`."""
    program = (sys.executable, "-c", COMMAND, str(folder))
    site.app.studio.jobs = JobControl(site.folder / ".studio" / "jobs", program)


def opened(site: Site, artefact: str, **fields: str) -> str:
    """The path of a conversation whose server answers."""
    answer = site.post("/talk", from_page="/talk", artefact=artefact, **fields)
    assert answer.status_code == 303, answer.text
    path = str(answer.headers["location"])
    for _ in range(500):
        if "data-send" in site.page(path):
            return path
        time.sleep(0.02)
    raise AssertionError(site.page(path))


def choices(page: str) -> dict[str, str]:
    """Value of each option of the lists of models, by its text."""
    return {text: value for value, text in re.findall(r'<option value="([^"]+:[^"]+)"[^>]*>([^<]*)</option>', page)}


def ask(site: Site, path: str, prompt: str, *sides: str, **fields: str) -> str:
    """Ask as a browser without JavaScript does; return the page with the whole replies."""
    named = dict(zip(("first", "second"), sides, strict=False))
    answer = site.post(path, from_page=path, prompt=prompt, **named, **fields)
    assert answer.status_code == 303, answer.text
    return site.page(path)


def close_servers(site: Site) -> None:
    for status in site.app.studio.jobs.files.statuses():
        if not status.state.is_over:
            site.app.studio.jobs.stop(status.job.id, by="ada")


def job_ended(site: Site, verb: str) -> Any:
    """The newest job of a verb, once it has ended."""
    for _ in range(1000):
        found = [status for status in site.app.studio.jobs.files.statuses() if status.job.verb == verb]
        if found and found[0].state.is_over:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(verb)
