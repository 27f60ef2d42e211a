"""Ledgers of JSON lines: read completely or refused, written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ArtifactError
from sartor.core.filesystem import PRIVATE, write_file_atomic
from sartor.core.installation import upgrade_command

Line = dict[str, Any]


@dataclass(frozen=True)
class LineLedger:
    """Format of a ledger: one JSON object per line, each with the key `schema`.

    noun: name of the ledger in errors.
    schema: number that this version writes and reads.
    is_whole: tests whether a line has the fields that its reader needs; may raise KeyError, TypeError or ValueError.
    remedy_template: remedy for a damaged file, with `{file}` in place of its path.
    """

    noun: str
    schema: int
    is_whole: Callable[[Line], bool]
    remedy_template: str = "cp BACKUP {file}"

    def read_lines(self, file: Path) -> list[Line]:
        """Return all lines; empty if there is no file. Raises ArtifactError if any line cannot be read."""
        if not file.exists():
            return []
        try:
            lines = [dict(json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()]
            schemas = {line["schema"] for line in lines}
            if schemas - {self.schema}:
                problem = f"{file} has lines of schema {sorted(schemas)}; this reads {self.schema}"
                raise ArtifactError(problem, upgrade_command())
            if not all(self.is_whole(line) for line in lines):
                raise ValueError("a line lacks a value")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{file} is no whole {self.noun}: {error}", self.remedy_template.format(file=file)
            ) from None
        return lines

    def write_lines(self, file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file by these lines atomically. Raises OSError."""
        write_file_atomic(file, "".join(json.dumps(line) + "\n" for line in lines).encode(), mode=PRIVATE)
