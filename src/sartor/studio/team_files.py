"""Files of teams below the folder: YAML with options of a team, and agents, plans or a registry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

import sartor
from sartor.studio.studio_folder import StudioFolder

SUFFIXES = (".yaml", ".yml")
MAX_FILE_BYTES = 256 << 10
MAX_TEAMS = 50


def team_files(folder: StudioFolder) -> dict[str, Path]:
    """Return the first MAX_TEAMS files of teams by their paths below the folder, sorted; none inside artefacts."""
    found: dict[str, Path] = {}
    for path in folder.walk():
        for file in sorted({file for suffix in SUFFIXES for file in path.glob(f"*{suffix}")}):
            if not file.name.startswith(".") and is_team(file):
                found[folder.name_of(file)] = file
            if len(found) >= MAX_TEAMS:
                return dict(sorted(found.items()))
    return dict(sorted(found.items()))


def is_team(file: Path) -> bool:
    """Return whether a file is a team's."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            return False
        fields = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False
    if not isinstance(fields, dict) or "base" not in fields:
        return False
    options = {field.name for field in dataclasses.fields(sartor.Team)}
    has_registry = (file.parent / f".{file.stem}" / "registry.sqlite").is_file()
    return fields.keys() <= options and (bool({"agents", "plans"} & fields.keys()) or has_registry)
