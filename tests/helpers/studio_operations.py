"""Teams with a real registry, and the jobs that pages of a studio start."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.team_config import load
from studio_site import Site

# a command that prints its arguments
ECHO = "import json, sys; print(json.dumps({'ran': sys.argv[1:]}))"
TEAM = "base: starter\nagents: [{name: faq, release: faq-1.0}]\nhttp: {port: PORT}\n"


def version_of(agent: str, number: str, **changes: Any) -> AgentVersion:
    made = AgentVersion(agent, number, f"/releases/{agent}-{number}", f"{number}{'a' * 60}", f"{number}{'d' * 60}")
    return replace(made, **changes)


def make_team(file: Path, *, port: int = 0) -> Path:
    """A team with three versions of `faq`, of which 1.1 is live."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TEAM.replace("PORT", str(port)))
    with closing(Registry.of(load(file))) as registry:
        for number in ("1.0", "1.1", "1.2"):
            registry.add(version_of("faq", number), cause=ChangeCause("ada", f"release {number}"))
        registry.promote("faq", "1.1", expected="1.0", cause=ChangeCause("ada", "better on refunds"))
    return file


def ended(site: Site) -> Any:
    """The newest job of the studio, once it has ended."""
    for _ in range(1500):
        status = site.app.studio.jobs.files.statuses()[0]
        if status.state.is_over:
            return status
        time.sleep(0.02)
    raise AssertionError(status)
