"""Intent of an erasure that has begun: what must still be looked for, and what was tuned on it.

    STATE/deletions/.pending-<person>.json    mode 0600; it exists until an erasure ends that did not fail

An erasure removes the lines that it knows the user's words from. If it is killed then, or finds words elsewhere, the
next one would have nothing left to search for, and would call everything removed. The words are therefore kept here
until they are found nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.errors import ArtifactError
from sartor.core.filesystem import fsync_directory, write_file_atomic

FOLDER = "deletions"
SCHEMA = 1
Descended = dict[str, Any]


@dataclass
class DeletionIntent:
    """Intent to erase a user's data.

    words: texts of the user, to be searched for.
    lines: locations of the user's lines in the inbox, as Datasets name them.
    tuned_on_it: artefacts made of Datasets with such rows; their owner decides on them.
    since: date of the user's first line; empty if there was none.
    has_media: whether the user sent pictures or recordings.
    """

    file: Path
    words: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    tuned_on_it: list[Descended] = field(default_factory=list)
    since: str = ""
    has_media: bool = False

    @classmethod
    def of(cls, state: Path, person: str) -> DeletionIntent:
        """Return the intent that an earlier erasure left, or an empty one. Raises ArtifactError if it is damaged."""
        file = state / FOLDER / f".pending-{person}.json"
        try:
            fields = json.loads(file.read_bytes())
            if fields.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            return cls(file, **fields)
        except FileNotFoundError:
            return cls(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{file} is not whole ({error}): the words of an erasure that did not end are not known"
            raise ArtifactError(
                problem, f"cp BACKUP {file}; or rm it, and search for the user's words yourself"
            ) from None

    def add(self, words: Iterable[str], lines: Mapping[str, str], *, has_media: bool) -> None:
        """Add words and lines, and write the intent, durably.

        lines: location -> date.
        """
        self.words = list(dict.fromkeys([*self.words, *(word for word in words if word.strip())]))
        self.lines = list(dict.fromkeys([*self.lines, *lines]))
        self.since = min(
            [*([self.since] if self.since else []), *(date for date in lines.values() if date)], default=""
        )
        self.has_media |= has_media
        self.write()

    def add_descendants(self, descended: Iterable[Descended]) -> None:
        """Add what was tuned on the user's rows, and write the intent, durably, before those rows are removed."""
        known = {(item["id"], item["path"]) for item in self.tuned_on_it}
        new = [item for item in descended if (item["id"], item["path"]) not in known]
        if new:
            self.tuned_on_it += new
            self.write()

    def write(self) -> None:
        """Write the intent, durably."""
        self.file.parent.mkdir(mode=0o700, exist_ok=True)
        fields = {name: value for name, value in asdict(self).items() if name != "file"}
        write_file_atomic(self.file, json.dumps({"schema": SCHEMA, **fields}).encode(), mode=0o600)

    def remove(self) -> None:
        """Remove the intent: nothing is left to be searched for."""
        self.file.unlink(missing_ok=True)
        fsync_directory(self.file.parent)
