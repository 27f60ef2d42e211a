"""Data: Datasets with rows, drops, sources, duplicates and card; one row in full, and its media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from sartor.core.artifacts import Artifact, check_file
from sartor.core.html import flat
from sartor.core.text_differences import TextPiece, differences, pieces
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.dataset_media import find_media
from sartor.studio.dataset_rows import (
    DROPS,
    EXAMPLES,
    RowFilter,
    RowTable,
    plain_messages,
    row_media,
    row_text,
)
from sartor.studio.duplicate_groups import PAGE_GROUPS, duplicate_groups
from sartor.studio.page_renderer import render
from sartor.studio.recipe_form import recipe_yaml
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.visitor import Viewer, studio_of

router = APIRouter()
DROPPED = "dropped"
# characters of a text that a list of rows shows
SHOWN_CHARS = 1200
MAX_QUERY_CHARS = 200
CARD = "card.html"
# a card has styles and pictures within it; nothing that acts, whoever wrote it
CARD_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"
MEDIA_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
MAX_SOURCES = 200


@dataclass(frozen=True)
class DropView:
    """A drop beside the row that was kept in its place, with the differing words marked.

    kept_position: of that row among the Dataset's rows; None if there is none.
    kept_files: its pictures and recordings.
    """

    position: int
    drop: dict[str, Any]
    pieces: Sequence[TextPiece]
    kept_pieces: Sequence[TextPiece]
    kept_position: int | None
    kept_files: Sequence[dict[str, Any]] = ()


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
        context = {"drops": _drop_views(page.rows, examples), "reasons": _by_reason(drops)}
    else:
        context = {"rows": [(position, row, plain_messages(row)) for position, row in page.rows]}
    return render(
        request,
        visitor,
        "rows",
        title=name,
        name=name,
        dataset=dataset,
        splits=_splits(dataset),
        dropped_total=drops.total,
        split=split,
        q=q[:MAX_QUERY_CHARS],
        reason=reason,
        start=start,
        page=page,
        shown_chars=SHOWN_CHARS,
        **context,
    )


def _splits(dataset: Artifact) -> dict[str, int]:
    """Return the rows of each split by the manifest, which may be written by anybody."""
    counts = dataset.manifest.get("counts")
    splits = counts.get("splits") if isinstance(counts, Mapping) else None
    if not isinstance(splits, Mapping):
        return {}
    return {str(name)[:60]: count for name, count in splits.items() if isinstance(count, int)}


def _by_reason(drops: RowTable, *, only_duplicates: bool = False) -> dict[str, int]:
    counts = drops.counts("reason", only_duplicates=only_duplicates)
    return {reason: count for (reason,), count in counts.items()}


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
        files = row_media(kept_rows[kept_position]) if kept_position is not None else []
        views.append(DropView(position, drop, shown, kept, kept_position, files))
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


@router.get("/media/{name:path}")
def media(request: Request, visitor: Viewer, name: str, at: int, number: int = 0) -> Response:
    """Send a picture or recording of a row: `number` counts those of the row at `at`."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    found = find_media(dataset, at, number)
    return FileResponse(
        found.path,
        media_type=found.media_type,
        filename=found.path.name,
        content_disposition_type="inline",
        headers={"content-security-policy": MEDIA_POLICY},
    )


@router.get("/card/{name:path}")
def card(request: Request, visitor: Viewer, name: str) -> Response:
    """Send the card of a Dataset, as it was written, without any right to act."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    if CARD not in dataset.manifest["files"]:
        raise NotFoundError(f"{name} has no card", "sartor curate writes one")
    check_file(dataset, CARD)
    return FileResponse(
        dataset.path / CARD, media_type="text/html; charset=utf-8", headers={"content-security-policy": CARD_POLICY}
    )


@router.get("/sources/{name:path}")
def sources(request: Request, visitor: Viewer, name: str) -> Response:
    """Show the sources of a Dataset with their rows, the reasons of the dropped ones, and the recipe."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    drops = RowTable(dataset, DROPS)
    listed = [source for source in dataset.manifest.get("sources") or [] if isinstance(source, Mapping)]
    recipe, counts = dataset.manifest.get("recipe"), dataset.manifest.get("counts")
    return render(
        request,
        visitor,
        "data_sources",
        title=name,
        name=name,
        dataset=dataset,
        sources=listed[:MAX_SOURCES],
        more_sources=len(listed) - MAX_SOURCES,
        reasons=_reasons_by_source(drops),
        splits=_splits(dataset),
        dropped_total=drops.total,
        counts=counts if isinstance(counts, Mapping) else {},
        steps=list(flat(dataset.manifest.get("steps") or {}).items())[:100],
        obligations=dataset.manifest.get("obligations") or [],
        conflicts=dataset.manifest.get("licence_conflicts") or [],
        recipe=recipe_yaml(recipe) if isinstance(recipe, Mapping) else "",
        has_card=CARD in dataset.manifest["files"],
    )


def _reasons_by_source(drops: RowTable) -> dict[str, Counter[str]]:
    """Return {declared source: {reason: dropped rows}}."""
    result: dict[str, Counter[str]] = {}
    for (source, reason), count in drops.counts("source", "reason").items():
        result.setdefault(source, Counter())[reason] += count
    return result


@router.get("/duplicates/{name:path}")
def duplicates(request: Request, visitor: Viewer, name: str, reason: str = "", start: int = 0) -> Response:
    """Show groups of duplicates: each row that stayed with the rows that were dropped for it, side by side."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    examples, drops = RowTable(dataset, EXAMPLES), RowTable(dataset, DROPS)
    page = duplicate_groups(drops, reason, start)
    positions = sorted({position for group in page.groups for position in group.positions})
    shown = list(zip(positions, drops.take(positions), strict=True))
    views = {view.position: view for view in _drop_views(shown, examples)}
    groups = [(group, [views[position] for position in group.positions]) for group in page.groups]
    return render(
        request,
        visitor,
        "data_duplicates",
        title=name,
        name=name,
        splits=_splits(dataset),
        dropped_total=drops.total,
        groups=groups,
        page=page,
        reason=reason,
        reasons=_by_reason(drops, only_duplicates=True),
        start=max(0, start),
        next_start=start + PAGE_GROUPS if start + PAGE_GROUPS < page.total else None,
    )
