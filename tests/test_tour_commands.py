"""The circle tier: commands of docs/tour.md in order, those that the docs test passes over among them, succeed as written.

On the tiny base in place of `starter`; a command of which the tiny base makes nothing is named below with the reason.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from doc_blocks import blocks
from own_home import environment_in

pytestmark = pytest.mark.circle
ROOT = Path(__file__).parent.parent
INSTALLS = ("pip install", "make demo", "make quick")
NOT_ON_THE_TINY_BASE = {
    "--speak": "its replies have no words",
}
START_S = 600


def scripts(body: str) -> list[str]:
    """A block's commands one by one, so that the one that fails is named; a here-document whole."""
    if "<<" in body:
        return [body]
    return [line for line in body.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def steps_of_the_tour(base: Path) -> Iterator[tuple[str, str, str]]:
    """(file to write, program, text) of each block, in order."""
    for info, file, body in blocks(ROOT / "docs/tour.md"):
        body = re.sub(r"\bstarter\b", str(base), body)
        if file:
            yield file, "", body
        elif info == "python":
            yield "", "python", body
        elif info.startswith("bash") and not any(word in body for word in INSTALLS):
            yield from (("", "bash", script) for script in scripts(body))


# It serves until Ctrl-C; here until it has printed its address. `kill -0` ends the script if it ended before.
STUDIO = (
    "sartor studio . --port 0 >studio.out 2>&1 & until grep -q http:// studio.out; do kill -0 $!; sleep 0.2; done; "
    "kill $!; wait $! || true; rm studio.out; "
)


def wait_until_listening(output: Path, server: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while "listening" not in output.read_text():
        assert server.poll() is None and time.monotonic() < give_up, "the server does not listen"
        time.sleep(0.2)


def test_commands_of_the_tour_succeed(tmp_path: Path, tiny_base: Path, commands: dict[str, str]) -> None:
    environment = environment_in(tmp_path / "home", commands)
    work = tmp_path / "work"
    work.mkdir()
    servers = []
    try:
        for file, program, text in steps_of_the_tour(tiny_base):
            if file:
                (work / file).write_text(text, encoding="utf-8")
                continue
            if any(mark in text for mark in NOT_ON_THE_TINY_BASE):
                continue
            if "sartor serve team.yaml" in text:  # 8440 may be taken here
                text = text.replace("team.yaml", "team.yaml --port 0")
                output = work / "serve.out"
                with output.open("wb") as stream:
                    servers.append(
                        subprocess.Popen(["bash", "-c", f"exec {text}"], cwd=work, env=environment, stdout=stream)
                    )
                wait_until_listening(output, servers[-1])
                continue
            text = text.replace("sartor studio .", STUDIO)
            command = ["python", "-c", text] if program == "python" else ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    finally:
        for server in servers:
            server.terminate()
            server.wait(600)
    assert (work / "adapters/faq-1.1").is_dir() and (work / "store").is_dir() and (work / "adapters/homes").is_dir()
