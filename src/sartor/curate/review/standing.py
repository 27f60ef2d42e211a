"""What becomes of an item, by the decisions of one, two or more people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.curate.review.items import Decision

State = Literal["open", "conflict", "decided"]


@dataclass(frozen=True)
class Standing:
    """`decision` is the one that holds, of a decided item; `by` who stands behind it."""

    state: State
    decision: Decision | None = None
    by: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """accept, edit or reject; empty until it is decided."""
        return self.decision.verdict if self.decision else ""


def newest(decisions: Sequence[Decision]) -> dict[str, Decision]:
    """What each person thinks now: of several decisions of one, the last."""
    return {decision.by: decision for decision in sorted(decisions, key=lambda one: one.at)}


def first(decisions: Sequence[Decision]) -> dict[str, Decision]:
    """What each person thought before there was anything to settle: agreement is measured by it."""
    own = sorted((one for one in decisions if not one.settles), key=lambda one: one.at, reverse=True)
    return {decision.by: decision for decision in own}


def standing(decisions: Sequence[Decision], reviewers: int = 1) -> Standing:
    """Open until `reviewers` people have decided; in conflict while they differ, until one of them or another settles it.

    A settled item stays so, whatever is said later, until it is settled anew.
    """
    ordered = sorted(decisions, key=lambda one: one.at)
    settled = [one for one in ordered if one.settles]
    if settled:
        return Standing("decided", settled[-1], (settled[-1].by,))
    now = newest(ordered)
    if len({one.outcome for one in now.values()}) > 1:
        return Standing("conflict")
    if len(now) < max(1, reviewers):
        return Standing("open")
    return Standing("decided", max(now.values(), key=lambda one: one.at), tuple(sorted(now)))
