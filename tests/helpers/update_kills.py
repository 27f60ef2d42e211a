"""An update that is killed before each of its operations, and what must stand then."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from edge_disks import STEPS, check_after
from sartor.core.filesystem import FileSystem

Kill = tuple[int, str, str]


def kill_each(root: Path, each: int) -> list[Kill]:
    script = Path(__file__).with_name("killed_update.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(each)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def check_each(root: Path, kills: list[Kill]) -> None:
    steps = {step.name: step for step in STEPS}
    for number, step, operation in kills:
        folder = root / str(number)
        try:
            check_after(FileSystem(), folder, steps[step])
        except Exception as error:
            raise AssertionError(f"killed before {operation!r} ({number}) of {step}") from error
        shutil.rmtree(folder)
