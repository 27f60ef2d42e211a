"""The README's first commands need the extras that it installs, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
INSTALLED = ("tune", "office")
MODULES = (
    "sartor.quickstart.doctor",
    "sartor.quickstart.tailor",
    "sartor.quickstart.show",
    "sartor.quickstart.chat",
    "sartor.quickstart.init",
    "sartor.serving.commands.ask_release",
)
# packages that others of the plain install or of the two extras bring along
BROUGHT = {"anyio", "httpx", "tqdm"}


def distributions(requirements: list[str]) -> set[str]:
    """Names of required distributions, normalised as PEP 503 has it."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def packages_of_other_extras() -> list[str]:
    """Top-level packages that a plain install with INSTALLED does not have."""
    extras = PROJECT["optional-dependencies"]
    needed = distributions([*PROJECT["dependencies"], *(line for extra in INSTALLED for line in extras[extra])])
    others = {
        name for extra, lines in extras.items() if extra not in (*INSTALLED, "all") for name in distributions(lines)
    }
    absent = others - needed - BROUGHT - {"sartor"}
    return sorted(
        package
        for package, owners in packages_distributions().items()
        if distributions(owners) and distributions(owners) <= absent
    )


def test_first_commands_import_no_package_of_another_extra() -> None:
    absent = packages_of_other_extras()
    assert {"uvicorn", "flwr", "xllamacpp"} <= set(absent)
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
