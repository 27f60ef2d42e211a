"""`exact_duplicates`: rows of equal content become one Example with every origin; by option rows of the same words too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from sartor.core.config import option
from sartor.core.records import Example
from sartor.curate.dedup import shingles
from sartor.curate.steps.contract import Gathered, Removal, Verdicts
from sartor.curate.steps.survivor import FIELD_HELP, KEEP_HELP, Field, Keep, is_apart, ranks, text_of


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows of equal content become one; each further row is a Drop that names it.

    With `match: words` rows also go that differ in case, white space and punctuation only (`dedup/shingles.py` has the normal
    form). Their content is not the same, so the survivor does not take over their origins. Rows with an image, a recording or a
    rating go by their content alone.
    """

    match: Literal["content", "words"] = option(
        "content", "equal content, or also the same words (case, spaces, punctuation apart)"
    )
    field: Field = option("both", f"with `match: words`: {FIELD_HELP}")
    keep: Keep = option("first", f"with `match: words`: {KEEP_HELP}")
    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep. Columns: words, rank. Of `match: content` the id says it all."""
        if self.match == "content":
            return pa.table({"words": pa.nulls(len(examples), pa.string()), "rank": pa.nulls(len(examples), pa.float64())})
        plain = shingles.resolve("words", 0, ())
        found = shingles.sketch([text_of(example, self.field) for example in examples], plain)
        empty = found.offsets[1:] == found.offsets[:-1]
        apart = [none or is_apart(example) for none, example in zip(empty, examples, strict=True)]
        words = [None if alone else row.tobytes().hex() for row, alone in zip(found.digests, apart, strict=True)]
        return pa.table({"words": pa.array(words, pa.string()), "rank": ranks(examples, self.keep, self.field)})

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep."""
        columns = [pl.Series(name, gathered.table[name]) for name in ("id", "words", "rank")]
        table = pl.DataFrame(columns).with_row_index("row")
        twins = _later(table, "id")
        removals = self._removals(twins, gathered, "the same content as", merge=True)
        if self.match == "words":
            gone = {removal.row for removal in removals}
            rest = table.filter(pl.col("words").is_not_null() & ~pl.col("row").is_in(sorted(gone)))
            best = rest.sort("rank", "row", descending=[True, False])
            removals += self._removals(_later(best, "words"), gathered, "the same words as", merge=False)
        return Verdicts(removals, facts={"removed": len(removals)} if removals else {})

    @staticmethod
    def _removals(found: pl.DataFrame, gathered: Gathered, said: str, *, merge: bool) -> list[Removal]:
        locators = gathered.table["locator"].take(pa.array(found["kept"].to_list(), pa.int64())).to_pylist()
        method = "equal content" if merge else "equal words"
        return [
            Removal(row, "exact_duplicate", f"{said} {locator}", kept, 1.0, method, merge=merge)
            for row, kept, locator in zip(found["row"].to_list(), found["kept"].to_list(), locators, strict=True)
        ]


def _later(table: pl.DataFrame, key: str) -> pl.DataFrame:
    """(row, kept) of every row whose key an earlier one has; `table` is in the order that decides."""
    first = pl.col("row").first().over(key).alias("kept")
    return table.select("row", first).filter(pl.col("row") != pl.col("kept")).sort("row")
