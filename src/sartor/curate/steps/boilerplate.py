"""Step boilerplate: removes lines and sentences that many rows share.

It also removes lines and sentences that match given patterns.

A row counts for a line or sentence only if its text has more than that: "Yes." as a whole answer is an answer. Code
blocks and JSON are left alone. The facts list the removed lines with their numbers of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.curate.step import RowFunction, StepInput, StepResult
from sartor.curate.steps.regex_rules import BoundedPattern, Clock, RuleTimeout, compiled, timed_out
from sartor.text.example_text import FIELD_TEXT, Field, is_json, normal_line, rewritten, sentences, split_code, texts

_MOST_LINES = 1000  # most shared lines that are listed and removed, most frequent first


@dataclass(frozen=True)
class Boilerplate:
    """Remove lines and sentences that occur in many rows; a row without remaining text is a Drop."""

    min_rows: int = option(20, "rows in which a line must stand to be boilerplate")
    min_fraction: float = option(0.01, "fraction of the rows in which it must stand as well, 0..1")
    min_words: int = option(4, "words that a line must have to be boilerplate")
    patterns: tuple[str, ...] = option(
        (), "regular expressions; a line or sentence in which one matches goes, however rare"
    )
    shared: bool = option(True, "look for shared lines; false takes out the patterns alone")
    field: Field = option("replies", FIELD_TEXT)
    kind: Literal["boilerplate"] = "boilerplate"

    def __post_init__(self) -> None:
        is_wrong = {
            "min_rows: 20": self.min_rows < 2,
            "min_words: 4": self.min_words < 1,
            "min_fraction: 0.01": not 0 <= self.min_fraction <= 1,
        }
        if any(is_wrong.values()):
            text = f"min_rows {self.min_rows}, min_words {self.min_words}, min_fraction {self.min_fraction}"
            remedy = ", ".join(line for line in is_wrong if is_wrong[line])
            raise ConfigError(f"{text}: they must be at least 2, at least 1, and 0 to 1", remedy)
        for index, pattern in enumerate(self.patterns):
            compiled(pattern, f"patterns[{index}]")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the hashes of each row's lines and sentences, each once."""
        rows = [sorted(set(map(_hashed, self._units(example)))) for example in examples]
        return pa.table({"lines": pa.array(rows, pa.list_(pa.uint64()))})

    def decide(self, step_input: StepInput) -> StepResult:
        """Find the shared lines, which the following step removes; no row is removed here."""
        min_rows = max(self.min_rows, int(np.ceil(self.min_fraction * len(step_input))))
        shared_lines = self._shared_lines(step_input, min_rows) if self.shared else []
        facts: dict[str, Any] = {
            "rows_needed": min_rows,
            "lines": [{"text": text, "rows": count} for text, count in shared_lines[:_MOST_LINES]],
        }
        if len(shared_lines) > _MOST_LINES:
            facts["lines_left_in"] = len(shared_lines) - _MOST_LINES
            step_input.notice(
                f"boilerplate: {len(shared_lines):,} shared lines; the {_MOST_LINES:,} commonest are taken out"
            )
        lines = tuple(text for text, _ in shared_lines[:_MOST_LINES])
        return StepResult(
            facts=facts, then=RemoveLines(lines, self.patterns, self.field) if lines or self.patterns else None
        )

    def _units(self, example: Example) -> Iterator[str]:
        if not self.shared:
            return
        for text in texts(example, self.field):
            units = [unit for unit in _units(text) if len(unit.split()) >= self.min_words]
            whole = normal_line(text)
            yield from (unit for unit in units if unit != whole)

    def _shared_lines(self, step_input: StepInput, min_rows: int) -> list[tuple[str, int]]:
        """Return (normalised line, rows) of the shared lines, most frequent first."""
        column = step_input.table["lines"].combine_chunks()
        hashes = column.flatten().to_numpy(zero_copy_only=False)
        unique_hashes, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        frequent = np.flatnonzero(counts >= min_rows)
        if not len(frequent):
            return []
        parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        rows = [int(row) for row in parents[first[frequent]]]
        row_counts = {int(unique_hashes[index]): int(counts[index]) for index in frequent}
        shared_lines: dict[str, int] = {}
        distinct = sorted(set(rows))
        for start in range(0, len(distinct), 1000):
            for example in step_input.examples(distinct[start : start + 1000]):
                shared_lines.update(
                    {unit: count for unit in self._units(example) if (count := row_counts.get(_hashed(unit), 0))}
                )
        return sorted(shared_lines.items(), key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True)
class RemoveLines:
    """Remove the lines and sentences that `boilerplate` found; it follows that step and is in no recipe."""

    lines: tuple[str, ...] = option((), "normalised lines and sentences")
    patterns: tuple[str, ...] = option((), "regular expressions")
    field: Field = option("replies", FIELD_TEXT)
    kind: Literal["boilerplate"] = "boilerplate"

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""
        lines = frozenset(self.lines)
        patterns = [compiled(pattern, f"patterns[{index}]") for index, pattern in enumerate(self.patterns)]

        def apply(example: Example) -> Example | Drop:
            remover = _LineRemover(lines, patterns, Clock())
            try:
                return rewritten(example, remover.without, self.field, self.kind)
            except RuleTimeout as timeout:
                return timed_out(example, timeout, self.kind)

        return apply


def _hashed(unit: str) -> int:
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little")


def _units(text: str) -> Iterator[str]:
    """Yield the normalised lines and sentences of the prose in a text."""
    if is_json(text):
        return
    for is_code, piece in split_code(text):
        if is_code:
            continue
        for line in piece.split("\n"):
            if line.strip():
                parts = sentences(line)
                yield normal_line(line)
                if len(parts) > 1:
                    yield from map(normal_line, parts)


@dataclass(frozen=True)
class _LineRemover:
    """Remover of lines and sentences from a text, within the time limit of a row.

    lines: normal forms of the lines and sentences.
    patterns: a sentence that one of them matches is removed.
    """

    lines: frozenset[str]
    patterns: Sequence[BoundedPattern]
    clock: Clock

    def without(self, text: str) -> str:
        """Return the text without the lines and sentences.

        Raises RuleTimeout.
        """
        if is_json(text):
            return text
        cleaned = "".join(piece if is_code else self._prose(piece) for is_code, piece in split_code(text))
        return text if cleaned == text else cleaned.strip()

    def _prose(self, prose: str) -> str:
        lines: list[str] = []
        is_changed = False
        for line in prose.split("\n"):
            cleaned = "" if normal_line(line) in self.lines else "".join(filter(self._stays, sentences(line)))
            if cleaned == line:
                lines.append(line)
                continue
            is_changed = True
            if cleaned.strip(" \t-*•>"):
                lines.append(cleaned.rstrip())
            elif lines and not lines[-1].strip():
                lines.pop()  # the blank line before a removed line
        return "\n".join(lines) if is_changed else prose

    def _stays(self, sentence: str) -> bool:
        return normal_line(sentence) not in self.lines and not any(
            pattern.search(sentence, self.clock) for pattern in self.patterns
        )
