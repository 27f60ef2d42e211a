"""The circle tier: examples/team from data to a running server by its one command, and every block of its page beside that server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from served_example import run_blocks, served

pytestmark = pytest.mark.circle
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, commands: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    """The folder of the team and the address of its server. The base is the tests' tiny one: `auto` goes by prompts alone."""
    with served("team", tmp_path_factory.mktemp("example"), tiny_base, commands) as running:
        yield running


def test_every_block_of_the_page_runs_beside_the_server(team: tuple[Path, str], commands: dict[str, str]) -> None:
    assert len(run_blocks("team", *team, commands)) >= 6


def test_auto_routes_prompts_to_agents_and_small_talk_to_base(
    team: tuple[Path, str], commands: dict[str, str]
) -> None:
    """At least 0.95 of prompts reach their agent, 0.75 of each agent, and 0.9 of small talk the base."""
    alone = ["--draws", "0", "--encoders"]  # of no encoder: the team's figures without the benchmark's other parts
    team_of = ["--team", str(team[0]), "--rounds", "1", "--chitchat", "200"]
    command = ["python", "benchmarks/route.py", "--json", *alone, *team_of]
    environment = {**os.environ, **commands}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])["team"]
    assert said["accuracy"] >= 0.95
    assert said["abstain_out_of_domain"] >= 0.9
    assert min(said["by_agent"].values()) >= 0.75
