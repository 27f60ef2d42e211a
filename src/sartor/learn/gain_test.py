"""Test of a gain over the live version, corrected for kinds of rows and for earlier looks at them.

Three kinds of rows may show a gain. Only of one the live version is a fair opponent:

    held_out    rows of the live version's own Dataset, chosen by nobody        against the live version
    feedback    corrections, chosen because the live version failed on them     against the control, and the live
                version
    ratings     replies that the live version gave itself, and people rated     against the control, and the live
                version

On rows where the live version failed any version with other faults looks better (regression to the mean). A reply that
the live version gave is less likely under any other version. So both are held against a control: the live version,
tuned as often and at the same rate on rehearsal rows alone. The control alone is no fair opponent either: it forgets
corrections that the live version has learnt since they were held out, which the new version rehearses. So a claim has
to show a gain over both,
each at its whole level: a version without a gain over one of the two is refused by that one.

Of ratings it is the margin that counts, the mean log-likelihood of good replies less that of bad ones: a change that
makes every reply less likely moves it by nothing.

The level is divided twice (Bonferroni 1936, unequal parts as in Rosenthal & Rubin 1983): between the kinds by SHARES,
and between looks, 6 / (pi^2 k^2) for look k, which sums to 1. So a row, however often retrains look at it, makes
versions without a gain pass with a probability of ALPHA at most. docs/decisions/024-gain.md has what was tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.splits import group_of_stored, least_groups
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison, FlipTest

Row = Mapping[str, Any]
# one-sided probability that any look at a row makes a version pass that is no better
ALPHA = 0.05
# of the level, where a kind beside the held-out rows can show a gain; the other kinds divide the rest
HELD_OUT_SHARE = 0.8
LIVE, CONTROL = "live", "control"
OPPONENTS = {"held_out": LIVE, "feedback": CONTROL, "ratings": CONTROL}


@dataclass(frozen=True)
class Claim:
    """A comparison that may show a gain.

    opponent: LIVE or CONTROL. rows: those compared. look: 1 where none of them was looked at before. level: one-sided.
    result: None where the control was not measured. over_live: of a claim against the control; None before it is
    judged.
    """

    kind: str
    opponent: str
    rows: tuple[Row, ...]
    look: int
    level: float
    result: Comparison | None = None
    over_live: Comparison | None = None

    @property
    def is_gain(self) -> bool:
        """Whether the interval at this level lies above 0; of a claim against the control that over the live version
        too.
        """
        return _is_above_zero(self.result) and self.may_be_gain

    @property
    def may_be_gain(self) -> bool:
        """Whether a comparison with the control can still show a gain: the live version is beaten, or the only
        opponent.
        """
        return self.opponent == LIVE or _is_above_zero(self.over_live)

    @property
    def confidence(self) -> float:
        """Of the two-sided interval."""
        return 1 - 2 * self.level

    def as_json(self) -> dict[str, Any]:
        """For the record of a retrain."""
        fields = {
            "of": self.kind,
            "against": self.opponent,
            "rows": len(self.rows),
            "look": self.look,
            "confidence": self.confidence,
        }
        if self.result is None:
            return fields
        over_live = {} if self.over_live is None else {"over_live": _interval(self.over_live)}
        return {**fields, **_interval(self.result), **over_live}


def _interval(result: Comparison) -> dict[str, float]:
    return {"estimate": result.difference, "low": result.low, "high": result.high}


def _is_above_zero(result: Comparison | None) -> bool:
    return result is not None and math.isfinite(result.difference) and result.low > 0


def level_of_look(look: int) -> float:
    """Return the one-sided level of the k-th look at the same rows: ALPHA 6 / (pi k)^2, in all ALPHA."""
    return ALPHA * 6 / (math.pi * look) ** 2


def plan_claims(kinds: Mapping[str, Sequence[Row]], looks: Mapping[str, int]) -> list[Claim]:
    """Return the claims that the rows of each kind can bear out, not yet tested; by counts alone, never by scores.

    looks: of each row, by its id, how often other retrains looked at it.
    """
    shares = _shares(kinds, looks)
    claims = []
    for kind, share in shares.items():
        rows, look = _choose_rows(kinds[kind], looks)
        claims.append(Claim(kind, OPPONENTS[kind], tuple(rows), look, share * level_of_look(look)))
    return claims


def judge_claims(claims: Sequence[Claim]) -> list[Claim]:
    """Return the claims with their results, as far as their opponent was measured on their rows."""
    return [
        replace(
            claim,
            result=_compare(claim, claim.opponent) if all(claim.opponent in row for row in claim.rows) else None,
            over_live=_compare(claim, LIVE) if claim.opponent == CONTROL else None,
        )
        for claim in claims
    ]


def rating_margins(rows: Sequence[Row], opponent: str, tail: float) -> Comparison:
    """Compare by how much likelier good replies are than bad ones, in nats per token.

    Rows hold `rating` and, of each version, the rating times the mean log-likelihood.
    """
    ratings = np.asarray([row["rating"] for row in rows], float)
    is_good, weights = ratings > 0, np.abs(ratings)

    def sums(version: str) -> NDArray[np.float64]:
        values = np.asarray([row[version] for row in rows], float)
        return np.stack([is_good * values, is_good * weights, ~is_good * values, ~is_good * weights], 1)

    before, after = sums(opponent), sums("new")
    nats = np.abs([row[version] / row["rating"] for row in rows for version in (opponent, "new")])
    widest = max(bootstrap.LEAST_WIDTH, 2 * float(nats.max()))
    groups = [group_of_stored(row) for row in rows]
    return bootstrap.corpus_bootstrap(
        before, after, groups, _margin, widest=widest, is_bounded=False, test=FlipTest(tail)
    )


def _margin(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, 4) sums of values and weights, of good replies and of bad ones -> (R,) margins; a bad reply's value has its
    sign.
    """
    return np.asarray(sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3])


def _compare(claim: Claim, opponent: str) -> Comparison:
    rows = claim.rows
    if claim.kind == "ratings":
        return rating_margins(rows, opponent, claim.level)
    return bootstrap.paired_bootstrap(
        [row[opponent] for row in rows],
        [row["new"] for row in rows],
        [group_of_stored(row) for row in rows],
        tail=claim.level,
    )


def _shares(kinds: Mapping[str, Sequence[Row]], looks: Mapping[str, int]) -> dict[str, float]:
    """Return the part of the level that each kind has. A kind of too few groups for its part has none."""
    others = [kind for kind in OPPONENTS if kind != "held_out" and kinds.get(kind)]
    others = [kind for kind in others if _can_tell(kind, kinds[kind], looks, (1 - HELD_OUT_SHARE) / len(others))]
    if not kinds.get("held_out"):
        return {kind: 1 / len(others) for kind in others}
    if not others:
        return {"held_out": 1.0}
    return {"held_out": HELD_OUT_SHARE, **dict.fromkeys(others, (1 - HELD_OUT_SHARE) / len(others))}


def _can_tell(kind: str, rows: Sequence[Row], looks: Mapping[str, int], share: float) -> bool:
    """Whether so many groups can reach the level at all; of ratings so many of good replies, and of bad ones."""
    chosen, look = _choose_rows(rows, looks)
    fewest = least_groups(share * level_of_look(look))
    if kind != "ratings":
        return len({group_of_stored(row) for row in chosen}) >= fewest
    good, bad = ({group_of_stored(row) for row in chosen if sign * row.get("rating", 0) > 0} for sign in (1, -1))
    return min(len(good), len(bad)) >= fewest


def _choose_rows(rows: Sequence[Row], looks: Mapping[str, int]) -> tuple[list[Row], int]:
    """Return the rows that can tell most, and which look at them this is.

    Those of few looks have a larger level, all of them are more: the most groups for each nat of evidence that is
    asked for.
    """
    counts = Counter(looks.get(str(row["id"]), 0) for row in rows)
    best: tuple[float, int] = (-1.0, 0)
    for most in sorted(counts):
        groups = {group_of_stored(row) for row in rows if looks.get(str(row["id"]), 0) <= most}
        best = max(best, (len(groups) / -math.log(level_of_look(most + 1)), most))
    return [row for row in rows if looks.get(str(row["id"]), 0) <= best[1]], best[1] + 1
