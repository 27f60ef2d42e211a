"""Ledgers of JSON lines: read completely or refused, written atomically."""

from __future__ import annotations

import json
import shlex
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
    remedy_template: remedy for a damaged file, with `{file}` in place of its path, quoted for a shell.
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
            texts = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise self._damage(file, str(error)) from None
        return [self._parse_line(file, number, text) for number, text in enumerate(texts, 1)]

    def _parse_line(self, file: Path, number: int, text: str) -> Line:
        """Return the line; number counts from 1. Raises ArtifactError, which names it."""
        try:
            line = dict(json.loads(text))
            if line["schema"] != self.schema:
                problem = f"{file} has schema {line['schema']!r} in line {number}; this reads {self.schema}"
                raise ArtifactError(problem, upgrade_command())
            if not self.is_whole(line):
                raise self._damage(file, f"line {number} lacks a value")
        except json.JSONDecodeError as error:
            raise self._damage(file, f"line {number}, column {error.colno}: {error.msg}") from None
        except KeyError as error:
            raise self._damage(file, f"line {number} lacks {error}") from None
        except (ValueError, TypeError) as error:
            raise self._damage(file, f"line {number}: {error}") from None
        return line

    def _damage(self, file: Path, detail: str) -> ArtifactError:
        remedy = self.remedy_template.format(file=shlex.quote(str(file)))
        return ArtifactError(f"{file} is no whole {self.noun}: {detail}", remedy)

    def write_lines(self, file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file by these lines atomically. Raises OSError."""
        write_file_atomic(file, "".join(json.dumps(line) + "\n" for line in lines).encode(), mode=PRIVATE)
