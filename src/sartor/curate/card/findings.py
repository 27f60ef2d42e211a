"""What the steps removed and found: drops with their evidence, duplicates, suspicious labels, personal data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sartor.core.html import flat, said
from sartor.core.records import Drop
from sartor.curate.card import plots
from sartor.curate.card.blocks import Block, Dropped, Line, Pictures, Prose, Said, Table
from sartor.curate.card.contents import Contents, place
from sartor.curate.card.words import differences, pieces

OWN = ("near_duplicates", "exact_duplicates", "semantic_duplicates", "suspicious_labels", "personal_data")
_REASONS_SHOWN, _EACH = 14, 2
_LISTED = 8  # items of a list among a step's facts


def dropped(contents: Contents) -> Iterator[Block]:
    """The reasons with their counts, and rows that went for each."""
    if not contents.dropped:
        yield Prose("Nothing was dropped.", "soft")
        return
    yield Pictures([*plots.reasons(contents), *plots.losers(contents)])
    yield _reason_table(contents)
    yield Prose(
        "Rows that were dropped, chosen by lot; of duplicates the least alike pair first. Marked words stand in one row only.",
        "soft",
    )
    order = list(contents.dropped)
    for reason in order[:_REASONS_SHOWN]:
        for drop in _telling(contents, reason)[:_EACH]:
            yield _shown(contents, drop)
    if len(order) > _REASONS_SHOWN:
        yield Prose(f"Rows of {len(order) - _REASONS_SHOWN:,} rarer reasons are in drops/.", "soft")


def _reason_table(contents: Contents) -> Table:
    steps: dict[str, list[str]] = {}
    for step, reason in sorted(contents.drops.by_step):
        steps.setdefault(reason, []).append(step)
    rows: list[Sequence[Line]] = []
    for reason, count in list(contents.dropped.items())[:40]:
        first = next(iter(_telling(contents, reason)), None)
        share = f"{count / contents.read:.2%}".replace("%", " %") if contents.read else ""
        detail = Said(first.detail, 110, prose=True) if first else ""
        rows.append((Said(reason, 60), Said(", ".join(steps.get(reason, [])), 60), f"{count:,}", share, detail))
    return Table(("reason", "step", "rows", "of all read", "for instance"), rows, frozenset({2, 3}))


def _telling(contents: Contents, reason: str) -> list[Drop]:
    """The candidates of a reason, those whose evidence is whole first."""
    held = contents.drops.shown.get(reason, [])
    return sorted(held, key=lambda drop: not drop.text or bool(drop.kept and drop.kept not in contents.rows.wanted))


def _shown(contents: Contents, drop: Drop) -> Dropped:
    title = Said(drop.reason, 60), Said(place(drop.locator or drop.source), 90), Said(drop.detail, 200, prose=True)
    kept = contents.rows.wanted.get(drop.kept)
    if kept is not None:
        one, other = differences(drop.text, kept.text)
        score = f"{drop.score:.3f} " if drop.score is not None else ""
        method = (f" · {score}", Said(drop.method, 40)) if score or drop.method else ()
        same = drop.text == kept.text
        ending = (*method, " · word for word the same") if same else method
        return Dropped(*title, one, ("stays: ", Said(place(kept.locator), 90), *ending), [] if same else other)
    if not drop.text:
        return Dropped(*title, [], "The step wrote no text of it.")
    where = ("stays: row ", Said(drop.kept[:12]), ", which a later step changed or dropped") if drop.kept else ""
    return Dropped(*title, pieces(drop.text), where)


def duplicates(contents: Contents) -> Iterator[Block]:
    """Clusters and scores, and what the steps say of them."""
    pictures = [*plots.clusters(contents), *plots.scores(contents)]
    if pictures:
        yield Pictures(pictures)
    for kind in ("exact_duplicates", "near_duplicates", "semantic_duplicates"):
        if contents.steps.get(kind):
            yield from step(kind, contents.steps[kind])


def suspicious(contents: Contents) -> Iterator[Block]:
    """The head of the queue, and what the step says of the whole."""
    facts = contents.steps.get("suspicious_labels") or {}
    for name, queue in contents.evidence.queues.items():
        total = contents.evidence.files[name]
        errors = facts.get("estimated_errors")
        estimate = f"; about {said(errors)} of the labels are estimated to be wrong" if errors is not None else ""
        yield Prose(f"{total:,} rows are queued for a look, the most suspicious first{estimate}. None was changed or dropped.")
        yield _queue(contents, queue)
    if facts:
        yield from step("suspicious_labels", facts)


def _queue(contents: Contents, queue: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[Sequence[Line]] = []
    for row in queue:
        kept = contents.rows.wanted.get(str(row["id"]))
        asked = next((text for role, text in kept.turns if role == "user"), kept.text) if kept else "(row is not in examples/)"
        score = row.get("score")
        rows.append(
            (
                f"{row['rank']:,}",
                Said(asked, 140),
                Said(str(row.get("given") or ""), 60),
                Said(str(row.get("suggested") or ""), 60),
                f"{score:.3f}" if isinstance(score, float) else "",
            )
        )
    return Table(("rank", "row", "given", "suggested", "score"), rows, frozenset({0, 4}))


def personal_data(contents: Contents) -> Iterator[Block]:
    """Counts by kind; the values themselves are in no file of a Dataset."""
    facts = contents.steps.get("personal_data")
    if facts:
        yield Prose("What was found was masked or dropped before anything was written; here are counts alone.", "soft")
        yield from step("personal_data", facts)


def step(kind: str, facts: Mapping[str, Any]) -> Iterator[Block]:
    """Whatever a step says of itself: counts as bars, lists cut, the rest as names and values."""
    plain: dict[str, Any] = {}
    pictures = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and len(value) > 1 and all(type(count) is int and count >= 0 for count in value.values()):
            pictures.append(plots.found(kind, str(key), {str(name): count for name, count in value.items()}))
        elif isinstance(value, Mapping):
            plain |= {f"{key}.{inner}": found for inner, found in flat(value).items()}
        else:
            plain[str(key)] = value
    rows: list[Sequence[Line]] = [
        (Said(key.replace("_", " "), 60, prose=True), Said(_listed(value), 400)) for key, value in plain.items()
    ]
    if pictures:
        yield Pictures(pictures)
    if rows:
        yield Table((kind.replace("_", " "), ""), rows, names=True)


def _listed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = "; ".join(said(item)[:120] for item in value[:_LISTED])
        return shown + (f"; and {len(value) - _LISTED:,} more" if len(value) > _LISTED else "")
    return said(value)
