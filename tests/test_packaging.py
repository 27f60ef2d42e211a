"""What `make test` installs is what pyproject offers: an extra that no venv of CI has is one that no check sees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIG_AND_UNTESTED = {"studio"}
OF_ONE_PLATFORM = {"cuda"}
INSTEAD_OF_THE_SYSTEMS = {"compiler"}
OURS = {"bench", "dev", "all"}


def test_the_venv_of_the_checks_has_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = set(re.fullmatch(r"sartor\[(.+)\]", extras["all"][0]).group(1).split(","))
    assert everything == set(extras) - OURS - OF_ONE_PLATFORM - INSTEAD_OF_THE_SYSTEMS
    tested = re.search(r"^TESTED := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert set(tested.split(",")) == everything - BIG_AND_UNTESTED
