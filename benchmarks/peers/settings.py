"""Best documented settings of the peers, from settings.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("settings.toml")
KINDS = ("trainer", "environment", "precision")


@dataclass(frozen=True)
class Setting:
    """An option of a peer that its documentation recommends.

    kind: where the option goes, of KINDS. page: the page that documents it. needs: flags of the processor, of which
    one is enough; empty if it needs none.
    """

    peer: str
    kind: str
    option: str
    value: Any
    page: str
    why: str
    needs: tuple[str, ...] = ()

    def applies(self, flags: set[str]) -> bool:
        """Whether a processor with these flags can use it."""
        return not self.needs or bool(flags & set(self.needs))


def read_settings(file: Path = FILE) -> list[Setting]:
    """Return every setting of the file. Raises ValueError for a kind that no side reads."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))["setting"]
    settings = [Setting(**{**table, "needs": tuple(table.get("needs", ()))}) for table in tables]
    if unknown := {setting.kind for setting in settings} - set(KINDS):
        raise ValueError(f"{file.name}: kind {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    return settings


def by_kind(settings: list[Setting]) -> dict[str, dict[str, Any]]:
    """Return the settings as a job holds them: kind -> option -> value."""
    grouped: dict[str, dict[str, Any]] = {}
    for setting in settings:
        grouped.setdefault(setting.kind, {})[setting.option] = setting.value
    return grouped
