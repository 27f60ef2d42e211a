"""Dockerfile and .dockerignore: what they name exists, and the image does not run as root. Nothing is built here."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import sartor

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its lines joined."""

    name: str
    arguments: str


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def arguments() -> dict[str, str]:
    pairs = [instruction.arguments.partition("=") for instruction in instructions() if instruction.name == "ARG"]
    return {name: shlex.split(value)[0] for name, _, value in pairs}


def is_sent(path: str) -> bool:
    """Return whether .dockerignore lets a path into the build: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().lstrip("!").removeprefix("**/")
        if line.strip() and not line.startswith("#") and fnmatch.fnmatchcase(path, pattern):
            sent = line.startswith("!")
    return sent


def test_instructions_are_known_and_run_parts_are_bash() -> None:
    names = [instruction.name for instruction in instructions()]
    assert set(names) <= INSTRUCTIONS
    assert names[0] == "ARG" and names.count("FROM") == 2
    scripts = [instruction.arguments for instruction in instructions() if instruction.name == "RUN"]
    assert len(scripts) >= 5
    for script in scripts:
        done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_copied_files_exist_and_are_sent_to_the_build() -> None:
    copied = []
    for instruction in instructions():
        if instruction.name == "COPY" and "--from" not in instruction.arguments:
            copied += shlex.split(instruction.arguments)[:-1]
    assert {"src", "pyproject.toml", "tools/package_metadata.py"} <= set(copied)
    assert [path for path in copied if not (ROOT / path).exists() or not is_sent(path)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"README.md", *project["license-files"]} <= set(copied)
    assert not any(is_sent(path) for path in (".git", "data", "keys", "adapters", "tests", ".venv"))


def test_defaults_name_extras_and_assets_that_exist() -> None:
    defaults = arguments()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(defaults["EXTRAS"].split(",")) | {"tune", "demo", "cuda"} <= set(extras)
    assert set(defaults["ASSETS"].split()) <= set(sartor.assets())
    page = (ROOT / "docs/docker.md").read_text()
    for name, default in defaults.items():
        assert f"| `{name}` | `{default}` |" in page


def test_image_runs_without_root_and_without_a_network() -> None:
    last_stage = instructions()[[instruction.name for instruction in instructions()].index("FROM", 2) :]
    users = [instruction.arguments for instruction in last_stage if instruction.name == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    after_user = [instruction.name for instruction in last_stage[[i.name for i in last_stage].index("USER") :]]
    assert "RUN" not in after_user
    environment = " ".join(instruction.arguments for instruction in last_stage if instruction.name == "ENV")
    assert "HF_HUB_OFFLINE=1" in environment
    assert last_stage[-2:] == [Instruction("ENTRYPOINT", '["sartor"]'), Instruction("CMD", '["--help"]')]


def test_locked_requirements_are_installed_by_hash() -> None:
    scripts = " ".join(instruction.arguments for instruction in instructions() if instruction.name == "RUN")
    for lock in ("torch-cpu.lock", "demo.lock"):
        assert re.search(rf"--require-hashes --no-deps [^;]*--requirement requirements/{lock}", scripts), lock
