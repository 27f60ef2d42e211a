"""A home of a test's own for commands that are run as processes: nothing of the machine's but assets and compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sartor.core.home import home


def environment_in(folder: Path, commands: Mapping[str, str]) -> dict[str, str]:
    """The environment of commands whose SARTOR_HOME is `folder`. commands: of the fixture of that name."""
    folder.mkdir()
    for name in ("assets", "kernels"):
        (home() / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(home() / name)
    return {**os.environ, **commands, "SARTOR_HOME": str(folder)}
