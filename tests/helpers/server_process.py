"""Processes of tests: `sartor serve`, its address and its workers; and the command of a small tool server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

SMALL = (sys.executable, str(Path(__file__).with_name("tool_server.py")))

# its workers are started by the first argument in place of sys.executable
_SERVE = "import sys; sys.executable = sys.argv.pop(1); from sartor.cli import main; sys.exit(main())"


def serve_command(commands: Mapping[str, str] | None = None) -> list[str]:
    """`sartor serve team.yaml` at any port. commands: conftest.py's, for workers that are forks; none for ones as users have."""
    if commands is None:
        start = [sys.executable, "-m", "sartor"]
    else:
        start = [sys.executable, "-c", _SERVE, str(Path(commands["PATH"].split(os.pathsep)[0]) / "python")]
    return [*start, "serve", "team.yaml", "--port", "0", "--json"]


@contextmanager
def serve(
    state: Path, base: str, *flags: str, commands: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The process, and the file of its log. Killed at the end, if it still runs. commands: as `serve_command`."""
    state.mkdir()
    members = "agents: [{name: nobody, release: nowhere}]"
    (state / "team.yaml").write_text(
        f"base: {base}\nworkers: {{count: 1, spare: 0, start_s: 600, hang_s: 300}}\n{members}\n"
    )
    command = [*serve_command(commands), *flags]
    with (state / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=state, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            yield process, state / "log"
        finally:
            process.kill()


def children(process: subprocess.Popen[str]) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with suppress(OSError):  # a thread that has ended since
            found += map(int, (task / "children").read_text().split())
    return found


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    assert line, "the server ended before it answered"
    said = json.loads(line)
    assert (said["keys"], said["agents"], said["engine"]) == (False, [], "local")
    return str(said["address"])
