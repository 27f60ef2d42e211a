"""Protocols RowStep, SetStep and AugmentStep.

Of a `RowStep` each row is its own affair: `open` returns a function Example -> Example | Drop. It runs in worker
processes, on this machine or on a Ray cluster.

A `SetStep` needs all rows. `sketch` runs in the workers and makes a few columns of each row; `decide` runs once, sees
the sketches of all rows in their order, never the rows themselves, and returns Verdicts: which rows go and why, what
shows it, and perhaps a RowStep (`then`) that the verdict asks for, such as taking the lines out that every row has.

A `CopyStep` makes further rows of training rows, when all other steps are done and it is known which rows are held
out.

A new step is one new file with its class, and its name in the union in `steps/__init__.py`.
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
    """A RowFunction that counts as it goes: `isinstance(function, Counting)`. What a row adds depends on the row
    alone. The worker reads and clears `tally`.
    """

    tally: Counter[str]

    def __call__(self, example: Example) -> Example | Drop:
        """As any RowFunction."""
        ...


class RowStep(Protocol):
    """A step that looks at one row."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def open(self, folder: Path) -> RowFunction:
        """The function, made once per worker: here models are opened and patterns compiled. Raises ConfigError,
        MissingError.

        `folder` is what the media paths of an Example (`media/<digest>.png`) are relative to. The function must be a
        pure one of the Example (and of the options): the same on every machine, whatever rows came before.
        """
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A step that reads files beside the rows. What a worker makes follows from what they hold, not from their
    names.
    """

    def files(self) -> Sequence[Path]:
        """Those that are there; one that is not is the step's own error later."""
        ...


@dataclass(frozen=True)
class StepInput:
    """What `decide` sees of N rows.

    `table` is an Arrow table of N rows in the order of reading: the sketch's columns, and always `id` (of the
    Example),
    `source` (index into `sources`) and `locator`. It is memory-mapped: take columns, not the whole. `sources` names
    the input sources as declared. `examples` fetches a few whole rows by number, for a second look or for evidence.
    `folder` is a place for scratch files, removed with the work. `notice` says a line to the person who waits;
    `workers` is how many processes the step may use.
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
    """Row number `row` goes. `kept_row` is the row number that stands in its place, -1 where none does.

    `score` (0..1) and `method` say how alike the two are. With `merge` (rows of equal content) the kept row takes over
    the origins of the removed one.
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
    """What a SetStep found.

    evidence: file name -> Arrow table, written into the Dataset as `evidence/<name>.parquet` (pairs, queues for
    review). Rows stand there by their Example's id. `facts` go into the manifest and the card under the step's kind.
    With `set_aside` the removed rows are kept whole in `set_aside/*.parquet`, so that another threshold needs no
    second reading.
    """

    removals: list[Removal] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    then: RowStep | None = None
    set_aside: bool = False


class SetStep(Protocol):
    """A step that needs all rows."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """An Arrow table with one row per Example, in order: what `decide` needs of each. As pure as
        `RowStep.open`'s.
        """
        ...

    def decide(self, step_input: StepInput) -> StepResult:
        """What becomes of the rows. Deterministic. Raises GuardError when it would remove too much."""
        ...


@dataclass(frozen=True, slots=True)
class AugmentedRow:
    """A row made of another: the same origins, group and split, and `changes` in words ("copy 2: rotated by 3.1
    degrees").
    """

    row: Example
    changes: str


CopyFunction = Callable[[Example], Iterator[AugmentedRow | Drop]]


class AugmentStep(Protocol):
    """A step that makes further rows of training rows. Of a held-out row none is made."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    @property
    def rehearsal(self) -> bool:
        """Whether rows of rehearsal sources are copied too."""
        ...

    def open(self, folder: Path) -> CopyFunction:
        """The function, made once per worker, as pure as `RowStep.open`'s. It yields nothing for a row that has
        nothing to change, and a Drop for a copy that cannot be made; the row itself stays as it is. Raises
        ConfigError, MissingError.
        """
        ...
