"""What a tuning holds before it has anything of its own: Python, torch, our modules, the loop. Measured once a machine.

`smallest.py` tunes a base of a few numbers and says what it then holds. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import MissingError
from sartor.core.filesystem import write_file_atomic
from sartor.core.home import folder

SCHEMA = 1
# as `models/kernels/cpu.py` looks for them
COMPILERS = (os.environ.get("CXX") or "g++", "g++", "c++", "clang++")


@dataclass(frozen=True)
class Floor:
    """held_bytes: always held; is_native: there are C++ kernels, which hold less than torch's own operations."""

    held_bytes: int
    is_native: bool


def floor() -> Floor:
    """From the file below SARTOR_HOME, or measured now. Raises MissingError where the tuner does not run here."""
    return _floor(str(folder("edge")))


@functools.cache
def _floor(kept: str) -> Floor:
    versions = [importlib.metadata.version(name) for name in ("torch", "sartor")]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), "no compiler")
    key = " ".join([str(SCHEMA), *versions, _sources(), platform.python_version(), platform.machine(), threads, compiler])
    file = Path(kept) / "floor.json"
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = _measured()
        write_file_atomic(file, json.dumps(known).encode())
    return Floor(**known[key])


def _sources() -> str:
    """Our own modules, by their sizes: a checkout changes without its version."""
    root = Path(__file__).parents[2]
    sizes = [f"{file.relative_to(root)} {file.stat().st_size}" for file in sorted(root.rglob("*.py"))]
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:12]


def _measured() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sartor-floor-") as place:
        command = [sys.executable, "-m", "sartor.edge.tuning.smallest", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = f"the tuner does not run on this machine: {done.stderr.strip().splitlines()[-1:]}"
        raise MissingError(problem, "pip install 'sartor[edge]'")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def held_bytes() -> int:
    """Anonymous and shared memory of this process now."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
