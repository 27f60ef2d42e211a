"""Data: Datasets, their rows and drops, filtered; one row in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.core.text_differences import TextPiece, differences, pieces
from sartor.studio.dataset_rows import (
    DROPS,
    EXAMPLES,
    RowFilter,
    RowTable,
    plain_messages,
    row_text,
)
from sartor.studio.page_renderer import render
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.visitor import Viewer, studio_of

router = APIRouter()
DROPPED = "dropped"
# characters of a text that a list of rows shows
SHOWN_CHARS = 1200
MAX_QUERY_CHARS = 200


@dataclass(frozen=True)
class DropView:
    """A drop beside the row that was kept in its place, with the differing words marked.

    kept_position: of that row among the Dataset's rows; None if there is none.
    """

    position: int
    drop: dict[str, Any]
    pieces: Sequence[TextPiece]
    kept_pieces: Sequence[TextPiece]
    kept_position: int | None


@router.get("/data")
def datasets(request: Request, visitor: Viewer) -> Response:
    """List the Datasets of the folder."""
    artifacts, is_whole = studio_of(request).folder.scan()
    found = [item for item in artifacts if item.kind == "dataset"]
    dropped = {item.name: _count_dropped(item) for item in found}
    return render(request, visitor, "datasets", found=found, is_whole=is_whole, dropped=dropped)


def _count_dropped(found: FoundArtifact) -> int:
    counts = found.artifact.manifest.get("counts", {}).get("dropped", {}) if found.artifact else {}
    return sum(counts.values()) if isinstance(counts, dict) else 0


@router.get("/data/{name:path}")
def rows(
    request: Request,
    visitor: Viewer,
    name: str,
    split: str = "",
    q: str = "",
    reason: str = "",
    start: int = 0,
) -> Response:
    """Show a page of rows, or of drops with the evidence beside them."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    examples, drops = RowTable(dataset, EXAMPLES), RowTable(dataset, DROPS)
    is_dropped = split == DROPPED
    table = drops if is_dropped else examples
    wanted = RowFilter("" if is_dropped else split, q[:MAX_QUERY_CHARS], reason if is_dropped else "")
    page = table.page(wanted, start)
    context: dict[str, Any] = {}
    if is_dropped:
        context = {"drops": _drop_views(page.rows, examples), "reasons": drops.counts("reason")}
    else:
        context = {"rows": [(position, row, plain_messages(row)) for position, row in page.rows]}
    return render(
        request,
        visitor,
        "rows",
        title=name,
        name=name,
        dataset=dataset,
        splits=dataset.manifest.get("counts", {}).get("splits", {}),
        dropped_total=drops.total,
        split=split,
        q=q[:MAX_QUERY_CHARS],
        reason=reason,
        start=start,
        page=page,
        shown_chars=SHOWN_CHARS,
        **context,
    )


def _drop_views(rows: Sequence[tuple[int, dict[str, Any]]], examples: RowTable) -> list[DropView]:
    positions = examples.find([row.get("kept") or "" for _, row in rows])
    wanted = sorted(set(positions.values()))
    kept_rows = dict(zip(wanted, examples.take(wanted), strict=True))
    views = []
    for position, drop in rows:
        text, kept_position = drop.get("text") or "", positions.get(drop.get("kept") or "")
        shown = pieces(text) if text else []
        kept: list[TextPiece] = []
        if kept_position is not None and text:
            # a drop's text ends at 2,000 characters
            shown, kept = differences(text, row_text(kept_rows[kept_position])[: max(len(text), SHOWN_CHARS)])
        elif kept_position is not None:
            kept = pieces(row_text(kept_rows[kept_position]))
        views.append(DropView(position, drop, shown, kept, kept_position))
    return views


@router.get("/row/{name:path}")
def row_page(request: Request, visitor: Viewer, name: str, at: int) -> Response:
    """Show one row in full, with its origins."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    examples = RowTable(dataset, EXAMPLES)
    page = examples.page(RowFilter(), at, 1)
    row = page.rows[0][1] if page.rows else {}
    return render(
        request,
        visitor,
        "row",
        title=name,
        name=name,
        at=at,
        total=examples.total,
        row=row,
        messages=plain_messages(row),
        rejected=plain_messages(row, "rejected"),
    )
