"""An example of examples/, from its data to its running server by its one command, and the blocks of its page beside that server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from doc_blocks import RUN, blocks

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def served(name: str, folder: Path, base: Path, commands: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """The folder of the team and the address of its server. base: the tests' tiny one; commands: conftest.py's."""
    home = {**os.environ, **commands}
    command = ["bash", str(EXAMPLES / name / "up.sh"), "--quick", "--base", str(base), "team", "--port", "0", "--json"]
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, cwd=folder, env=home, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        line = server.stdout.readline()  # "" if it ends before it serves
        assert line, (folder / "log.txt").read_text()[-4000:]
        yield folder / "team", json.loads(line)["address"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(600) == 143, (folder / "log.txt").read_text()[-4000:]


def run_blocks(name: str, folder: Path, address: str, commands: Mapping[str, str]) -> list[str]:
    """What each block of the example's page prints."""
    home = {**os.environ, **commands, "TEAM": address}
    printed = []
    for number, (info, _, body) in enumerate(blocks(EXAMPLES / name / "README.md"), 1):
        if info not in RUN:
            continue
        command = ["python", "-c", body] if info == "python" else ["bash", "-euo", "pipefail", "-c", body]
        done = subprocess.run(command, cwd=folder, env=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"block {number}:\n{body}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed
