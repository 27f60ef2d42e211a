"""The circle tier: examples/team from data to a running server by its one command, and every block of its page beside that server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_docs import RUN, blocks

pytestmark = pytest.mark.circle
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/team"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[tuple[Path, str]]:
    """The folder of the team and the address of its server. The base is the tests' tiny one: `auto` goes by prompts alone."""
    folder = tmp_path_factory.mktemp("example")
    home = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    home.pop("OMP_NUM_THREADS", None)  # all cores, as users run it
    command = ["bash", str(EXAMPLE / "up.sh"), "--quick", "--base", str(tiny_base), "team", "--port", "0", "--json"]
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=home, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        line = server.stdout.readline()  # "" if it ends before it serves
        assert line, (folder / "log.txt").read_text()[-4000:]
        yield folder / "team", json.loads(line)["address"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143, (folder / "log.txt").read_text()[-4000:]


def test_every_block_of_the_page_runs_beside_the_server(team: tuple[Path, str]) -> None:
    folder, address = team
    page = EXAMPLE / "README.md"
    home = {**os.environ, "TEAM": address, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for number, (info, _, body) in enumerate(blocks(page), 1):
        if info not in RUN:
            continue
        command = [sys.executable, "-c", body] if info == "python" else ["bash", "-euo", "pipefail", "-c", body]
        done = subprocess.run(command, cwd=folder, env=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"block {number}:\n{body}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 6


def test_auto_sends_held_out_prompts_to_their_agent_and_small_talk_to_the_base(team: tuple[Path, str]) -> None:
    command = [sys.executable, "benchmarks/route.py", "--json", "--team", str(team[0]), "--rounds", "1", "--chitchat", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["accuracy"] >= 0.95
    assert said["abstain_out_of_domain"] >= 0.9
    assert min(said["by_agent"].values()) >= 0.75
