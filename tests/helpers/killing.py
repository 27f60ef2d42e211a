"""kill -9 at a random moment of Python code, and what must hold afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from sartor.core.artifacts import open_artifact


def run_killed(code: str, moment_s: float, commands: dict[str, str]) -> None:
    """Run Python code and kill it that long after it says READY (its imports are done)."""
    environment = {**os.environ, **commands}
    process = subprocess.Popen(
        ["python", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "READY"
    time.sleep(moment_s)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # until what it was has ended, too, which holds the other end


def check(out: Path, again: Any) -> None:
    """What stands is whole; and what a killed run left is not in the way of the next."""
    if out.exists():
        open_artifact(out)
    again()
    open_artifact(out)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []


def moments(longest_s: float, count: int) -> list[float]:
    """Random moments, the same in every run."""
    rng = random.Random(7)
    return [round(rng.uniform(0, longest_s), 3) for _ in range(count)]
