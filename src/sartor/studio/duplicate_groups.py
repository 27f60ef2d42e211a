"""Groups of duplicates of a Dataset: the rows that were dropped for one row that stayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from sartor.core.errors import ArtifactError
from sartor.studio.dataset_rows import RowTable

PAGE_GROUPS, GROUP_ROWS = 10, 8


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows that were dropped for one other.

    kept: id of the row that stayed. size: number of dropped rows.
    positions: of the first GROUP_ROWS of them among the drops, the least similar first.
    """

    kept: str
    size: int
    positions: Sequence[int]


@dataclass(frozen=True)
class GroupPage:
    """A page of groups, the largest first. total: number of all groups. rows: number of dropped rows in them."""

    groups: Sequence[DuplicateGroup]
    total: int
    rows: int


def duplicate_groups(drops: RowTable, reason: str = "", start: int = 0) -> GroupPage:
    """Return the groups of duplicates from a number on. reason: of the drops; empty for all reasons.

    Raises ArtifactError for a file that cannot be read.
    """
    if not drops.files:
        return GroupPage([], 0, 0)
    rows = pl.scan_parquet(drops.files, row_index_name="position").filter(pl.col("kept").str.len_bytes() > 0)
    if reason:
        rows = rows.filter(pl.col("reason") == reason)
    sizes = rows.group_by("kept").agg(pl.len().alias("size"))
    try:
        counted = sizes.collect()
        shown = counted.sort("size", "kept", descending=[True, False]).slice(max(0, start), PAGE_GROUPS)
        # only the groups of the page: of all groups a list each would cost a hundred times the memory
        chosen = rows.filter(pl.col("kept").is_in(shown["kept"].implode()))
        members = chosen.select("kept", "position", "score").collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(
            f"the drops are not readable Parquet: {error}", "make the Dataset again: sartor curate --replace"
        ) from None
    members = members.sort("score", "position", nulls_last=True)
    groups = []
    for kept, size in shown.rows():
        positions = members.filter(pl.col("kept") == kept)["position"].head(GROUP_ROWS).to_list()
        groups.append(DuplicateGroup(kept, size, positions))
    return GroupPage(groups, counted.height, int(counted["size"].sum()))
