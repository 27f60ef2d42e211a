"""A person's decision about an item: made, checked against the item, signed where there is a key, and kept."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import signing
from sartor.core.errors import ConfigError, ConflictError
from sartor.core.home import home
from sartor.curate.review.changing import changed, masked_text
from sartor.curate.review.items import VERDICTS, Decision, Item, check_change
from sartor.curate.review.rows import rows_of
from sartor.curate.review.standing import newest
from sartor.curate.review.view import Entry, View

KEY = "keys/review"  # below SARTOR_HOME: it signs where no key is named and one is there
MOST_NAME = 200


@dataclass(frozen=True)
class Opinion:
    """What a person thinks of an item: the row stays as it is (accept), is changed (edit) or goes (reject).

    change: what an edit says (see items.CHANGES), by default what was suggested. settles: it ends a disagreement. key: a
    private key that signs it, by default that of SARTOR_HOME/keys/review where there is one.
    """

    verdict: str
    by: str
    reason: str = ""
    change: Mapping[str, Any] | None = None
    settles: bool = False
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ConfigError(f"there is no verdict {self.verdict!r}", f"one of {', '.join(VERDICTS)}")
        if not self.by.strip():
            raise ConfigError("a decision has a person's name", "--by 'Ada Lovelace'")
        if not self.by.isprintable() or len(self.by) > MOST_NAME:
            raise ConfigError(f"{self.by[:40]!a} is no name", "--by 'Ada Lovelace'")


def decide(view: View, key: str, opinion: Opinion) -> tuple[Entry, bool]:
    """Keep what a person decided; returns the item as it stands then, and whether that is new.

    The same decision of the same person about the same item is kept once. Raises ConfigError for a decision that the item
    cannot have, ConflictError where there is nothing to settle.
    """
    assert view.queue is not None
    entry = view.entry(key)
    item = entry.item
    said = _change(view, item, opinion)
    if opinion.settles and entry.standing.state != "conflict" and not any(one.settles for one in entry.decisions):
        people = ", ".join(sorted({one.by for one in entry.decisions})) or "nobody"
        raise ConflictError(f"there is nothing to settle about {item.id}: {people} decided, none differs", "without --settle")
    reason = masked_text(opinion.reason) if item.kind == "personal" else opinion.reason
    decision = Decision(item.id, opinion.verdict, opinion.by.strip(), _now(), reason, said, opinion.settles)
    before = newest([one for one in entry.decisions if one.settles == opinion.settles]).get(decision.by)
    if before is not None and replace(before, at="", signature={}) == replace(decision, at=""):
        return entry, False
    decision = _signed(decision, opinion.key)
    view.queue.add(view.dataset.id, [item], [decision])
    decisions = (*entry.decisions, decision)
    return Entry(item, decisions, view.stand(list(decisions))), True


def _change(view: View, item: Item, opinion: Opinion) -> dict[str, Any]:
    """What an edit says, tried on the row; nothing of another verdict."""
    if opinion.verdict != "edit":
        if opinion.verdict == "reject" and not item.examples:
            raise ConfigError(
                f"{item.id} is about {item.slice!r} and names no row that could go",
                "mend the data (sources, steps, weights) and curate again; or accept it with a reason",
            )
        return {}
    if len(item.examples) != 1:
        raise ConfigError(f"{item.id} is about {len(item.examples)} rows; an edit is of one", "accept or reject it")
    said = dict(item.suggestion if opinion.change is None else opinion.change)
    if not said:
        raise ConfigError(f"{item.id} suggests no change", "say what is to stand there: --reply TEXT, or --prompt TEXT")
    check_change(said)
    example = item.proposed or rows_of(view.dataset, item.examples).get(item.examples[0])
    if example is None:
        raise ConfigError(f"row {item.examples[0]} is not in {view.dataset.path.name}", "sartor review list DATASET")
    changed(example, said)
    return said


def _signed(decision: Decision, signed_with: Path | None) -> Decision:
    path = signed_with or (home() / KEY if (home() / KEY).is_dir() else None)
    if path is None:
        return decision
    return replace(decision, signature=signing.signature_of(decision.document, signing.open_private(path)))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
