"""A venv per peer, made when it is first needed and kept below SARTOR_PEERS (else ~/.cache/sartor-peers).

    python benchmarks/peers/venvs.py trl unsloth    # make these now

The peers' pins exclude one another, and Sartor's. A peer's `requirements.txt` is installed with what it depends on;
its
`no-deps.txt`, where there is one, without. Where pip finds a CPU build of torch (PIP_FIND_LINKS), the same pins take
it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL_S = 1800


class NotInstalled(Exception):
    """A peer's packages could not be installed; the message is pip's."""


def root() -> Path:
    """Where the venvs are."""
    return Path(os.environ.get("SARTOR_PEERS") or Path.home() / ".cache" / "sartor-peers")


def interpreter(peer: str) -> Path:
    """The Python of a peer's venv, which is made if it is not there or its pins have changed. Raises NotInstalled."""
    place = root() / peer
    stamp, pins = place / "pins.txt", _pins(peer)
    python = place / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == pins and python.exists():
        return python
    print(f"making the venv of {peer} in {place}", file=sys.stderr)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(place)])
    for name, options in (("requirements.txt", []), ("no-deps.txt", ["--no-deps"])):
        if (HERE / peer / name).is_file():
            _run([str(python), "-m", "pip", "install", "--quiet", *options, "-r", str(HERE / peer / name)])
    stamp.write_text(pins)
    return python


def _pins(peer: str) -> str:
    return "".join(
        (HERE / peer / name).read_text()
        for name in ("requirements.txt", "no-deps.txt")
        if (HERE / peer / name).is_file()
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"the install took more than {INSTALL_S} s") from None
    if done.returncode:
        raise NotInstalled(" ".join(done.stderr.split())[-600:] or f"{command[-1]}: exit code {done.returncode}")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        print(interpreter(asked))
