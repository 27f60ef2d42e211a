"""Protocols of curation steps: RowStep, SetStep and AugmentStep.

A `RowStep` decides on each row by itself: `open` returns a function Example -> Example | Drop. It runs in worker
processes, on this machine or on a Ray cluster.

A `SetStep` needs all rows. `sketch` runs in the workers and computes a few columns for each row. `decide` runs once
and sees the sketches of all rows in order, never the rows themselves. It returns a StepResult: the rows to remove, the
reasons, the evidence, and optionally a RowStep (`then`) to run next, such as one that removes lines common to all
rows.

An `AugmentStep` makes further rows from training rows. It runs after all other steps, when the held-out rows are
known.

To add a step, write one file with its class and add the class to a union in `steps/__init__.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sartor.core.records import Drop, Example

RowFunction = Callable[[Example], Example | Drop]


@runtime_checkable
class Counting(Protocol):
    """A RowFunction that keeps counts; test with `isinstance(function, Counting)`.

    tally: counts, read and cleared by the worker. A row's contribution depends on that row alone.
    """

    tally: Counter[str]

    def __call__(self, example: Example) -> Example | Drop:
        """Apply the step to one row, as any RowFunction."""
        ...


class RowStep(Protocol):
    """A step that looks at one row at a time."""

    @property
    def kind(self) -> str:
        """Name of the step in a recipe."""
        ...

    def open(self, folder: Path) -> RowFunction:
        """Load models, compile patterns and return the row function; called once per worker.

        folder: the directory that media paths of an Example (`media/<digest>.png`) are relative to.

        The function must be pure: its result depends only on the Example and the options, not on the machine or on
        earlier rows. Raises ConfigError, MissingError.
        """
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A step that reads further files. The result of a worker depends on their contents, not on their names."""

    def files(self) -> Sequence[Path]:
        """Return the files that exist. A missing file is not an error here; the step itself raises later."""
        ...


@dataclass(frozen=True)
class StepInput:
    """Input of `SetStep.decide` for N rows.

    table: memory-mapped Arrow table of N rows in reading order: the sketch's columns and always `id` (of the Example),
    `source` (index into `sources`) and `locator`. Take columns, not the whole table.
    sources: names of the input sources, as declared.
    examples: fetches a few whole rows by row number, for a closer check or for evidence.
    folder: directory for scratch files; removed with the work directory.
    workers: number of processes that the step may use.
    notice: shows a line of text to the user.
    """

    table: Any
    sources: Sequence[str]
    examples: Callable[[Sequence[int]], list[Example]]
    folder: Path = Path()
    workers: int = 1
    notice: Callable[[str], None] = lambda line: None

    def __len__(self) -> int:
        return int(self.table.num_rows)


@dataclass(frozen=True, slots=True)
class Removal:
    """Removal of one row.

    row: number of the removed row.
    kept_row: number of the row kept in its place; -1 if there is none.
    score: similarity of the two rows, 0..1. method: the measure that gave it.
    merge: the rows have equal content, and the kept row takes over the origins of the removed one.
    """

    row: int
    reason: str
    detail: str = ""
    kept_row: int = -1
    score: float | None = None
    method: str = ""
    merge: bool = False


@dataclass
class StepResult:
    """Result of `SetStep.decide`.

    evidence: file name -> Arrow table, written to the Dataset as `evidence/<name>.parquet` (pairs, queues for review).
    Rows are identified by the id of their Example.
    facts: written to the manifest and the card under the step's kind.
    then: row step to run on the remaining rows next, or None.
    set_aside: keep the removed rows whole in `set_aside/*.parquet`, so that another threshold needs no second reading.
    """

    removals: list[Removal] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    then: RowStep | None = None
    set_aside: bool = False


class SetStep(Protocol):
    """A step that needs all rows before it decides."""

    @property
    def kind(self) -> str:
        """Name of the step in a recipe."""
        ...

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return an Arrow table with the columns that `decide` needs: one row per Example, in order.

        It must be as pure as the function of `RowStep.open`.
        """
        ...

    def decide(self, step_input: StepInput) -> StepResult:
        """Return the rows to remove, deterministically. Raises GuardError if it would remove too many."""
        ...


@dataclass(frozen=True, slots=True)
class AugmentedRow:
    """A row made from another, with the same origins, group and split.

    changes: a description of the change, such as "copy 2: rotated by 3.1 degrees".
    """

    row: Example
    changes: str


CopyFunction = Callable[[Example], Iterator[AugmentedRow | Drop]]


class AugmentStep(Protocol):
    """A step that makes further rows from training rows. It is never applied to held-out rows."""

    @property
    def kind(self) -> str:
        """Name of the step in a recipe."""
        ...

    @property
    def rehearsal(self) -> bool:
        """Whether rows of rehearsal sources are copied too."""
        ...

    def open(self, folder: Path) -> CopyFunction:
        """Return the copy function; called once per worker. It must be as pure as that of `RowStep.open`.

        The function yields nothing for a row with nothing to change, and a Drop for a copy that cannot be made. The
        row itself is not changed. Raises ConfigError, MissingError.
        """
        ...
