"""The queue of suspicious rows: ranked, each with what speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sartor.curate.steps.contract import Gathered
from sartor.text import encoders

SHOWN_CHARACTERS = 300
SHOWN_NEIGHBOURS = 3
BY_LABEL, BY_REPLY, NOT_JUDGED = "label", "reply", "not_judged"
_NEIGHBOUR = pa.struct([("id", pa.string()), ("label", pa.string()), ("likeness", pa.float32())])
SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("id", pa.string()),
        ("locator", pa.string()),
        ("prompt", pa.string()),
        ("given", pa.string()),
        ("suggested", pa.string()),
        ("score", pa.float64()),
        ("looks_wrong", pa.bool_()),
        ("kind", pa.string()),
        ("evidence", pa.list_(_NEIGHBOUR)),
    ]
)


@dataclass
class Ruling:
    """What was found of N rows. `quality` 0..1 is lowest where most speaks against a row; `kinds` says by what it was judged.

    `given` tells a row's label, or its reply in free text; `suggested` the likelier one of rows that have one; `near` the rows
    that a row was held against, with their likeness, where it was not held against all. `vectors` (N, D) find the others.
    """

    quality: NDArray[np.float64]
    wrong: NDArray[np.bool_]
    kinds: list[str]
    given: Callable[[int], str]
    vectors: Any
    suggested: dict[int, str] = field(default_factory=dict)
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def blank(cls, count: int, given: Callable[[int], str], vectors: Any) -> Ruling:
        """Nothing speaks against any row."""
        return cls(np.ones(count), np.zeros(count, bool), [NOT_JUDGED] * count, given, vectors)

    def sentence(self, row: int) -> str:
        """What speaks against a row, for its Drop."""
        given, suggested = shortened(self.given(row), 80), shortened(self.suggested.get(row, ""), 80)
        return f"labelled {given!r}; the other rows say {suggested!r}"

    def ranked(self) -> list[int]:
        """All rows, most suspicious first; of equals the first read, and last those that were not judged."""
        unknown = np.array([kind == NOT_JUDGED for kind in self.kinds], bool)
        return list(np.lexsort((np.arange(len(self.quality)), self.quality, unknown)).tolist())


def table(gathered: Gathered, ruling: Ruling, most: int) -> Any:
    """The first `most` rows of the queue as evidence."""
    rows = ruling.ranked()[:most]
    ids, locators = gathered.table["id"], gathered.table["locator"]
    near = dict(_nearest(ruling, rows))
    prompts = gathered.table["prompt"]
    return pa.Table.from_pylist(
        [
            {
                "rank": rank,
                "id": ids[row].as_py(),
                "locator": locators[row].as_py(),
                "prompt": shortened(prompts[row].as_py()),
                "given": shortened(ruling.given(row)),
                "suggested": shortened(ruling.suggested.get(row, "")),
                "score": float(ruling.quality[row]),
                "looks_wrong": bool(ruling.wrong[row]),
                "kind": ruling.kinds[row],
                "evidence": [
                    {"id": ids[other].as_py(), "label": shortened(ruling.given(other), 80), "likeness": likeness}
                    for other, likeness in near.get(row, ())
                ],
            }
            for rank, row in enumerate(rows, 1)
        ],
        schema=SCHEMA,
    )


def _nearest(ruling: Ruling, rows: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """(row, nearest rows): those that it was held against where these are known, else the nearest of those with a label."""
    for row in rows:
        if row in ruling.near:
            yield row, sorted(ruling.near[row], key=lambda pair: (-pair[1], pair[0]))[:SHOWN_NEIGHBOURS]
    labelled = np.array([row for row, kind in enumerate(ruling.kinds) if kind == BY_LABEL], np.int64)
    place = {row: number for number, row in enumerate(labelled.tolist())}
    asked = np.array([place[row] for row in rows if row in place], np.int64)
    for found, near, likeness in encoders.nearest(ruling.vectors[labelled], asked, SHOWN_NEIGHBOURS):
        for row, who, how in zip(labelled[found].tolist(), labelled[near].tolist(), likeness.tolist(), strict=True):
            yield row, [(other, score) for other, score in zip(who, how, strict=True) if score > 0]


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text cut for reading, with a sign that it was."""
    return text if len(text) <= most else text[: most - 1] + "…"
