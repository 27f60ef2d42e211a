"""Test of a gain over the live version, corrected for kinds of rows and for earlier looks at them.

Three kinds of rows may show a gain. On only one of them is the live version a fair opponent:

    held_out    rows of the live version's own Dataset, chosen by nobody        against the live version
    feedback    corrections, chosen because the live version failed on them     against the control, and the live
                version
    ratings     replies that the live version gave itself, and people rated     against the control, and the live
                version

On rows where the live version failed, any version with other errors looks better (regression to the mean). A reply
that the live version gave is less likely under any other version. Both kinds are therefore compared with a control:
the live version, tuned as often and at the same rate on rehearsal rows alone. The control alone is no fair opponent
either. It forgets corrections that the live version has learnt since they were held out, and that the new version
rehearses. A claim must therefore show a gain over both, each at its whole level. A version without a gain over one of
the two is refused by that one.

For ratings the margin counts: the mean log-likelihood of good replies less that of bad ones. A change that makes every
reply less likely by the same amount does not move it.

The level is divided twice (Bonferroni 1936, unequal parts as in Rosenthal & Rubin 1983), between kinds and looks:

    level(kind, k) = share(kind) ALPHA 6 / (pi k)^2,   sum over kinds of share <= 1,   sum_{k >= 1} 6 / (pi k)^2 = 1

However often retrains look at a row, versions without a gain therefore pass with a probability of ALPHA at most.
docs/decisions/024-gain.md describes what was tried.
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
# one-sided probability, over all looks at a row, that a version passes that is no better
ALPHA = 0.05
# share of the level of held-out rows, if another kind can show a gain too; the other kinds divide the rest
HELD_OUT_SHARE = 0.8
LIVE, CONTROL = "live", "control"
OPPONENTS = {"held_out": LIVE, "feedback": CONTROL, "ratings": CONTROL}


@dataclass(frozen=True)
class Claim:
    """Comparison that may show a gain.

    opponent: LIVE or CONTROL.
    rows: the compared rows.
    look: number of this look at the rows; 1 if none was looked at before.
    level: one-sided.
    result: None if the control was not measured.
    over_live: comparison with the live version, of a claim against the control; None before it is judged.
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
        """True if the interval at this level lies above 0; against the control, also that over the live version."""
        return _is_above_zero(self.result) and self.may_be_gain

    @property
    def may_be_gain(self) -> bool:
        """True if the live version is beaten or is the only opponent, so that the claim can still show a gain."""
        return self.opponent == LIVE or _is_above_zero(self.over_live)

    @property
    def confidence(self) -> float:
        """Confidence of the two-sided interval: 1 - 2 level."""
        return 1 - 2 * self.level

    def as_json(self) -> dict[str, Any]:
        """Return the claim as the record of a retrain holds it."""
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
    """Return the one-sided level of the k-th look at the same rows: ALPHA 6 / (pi k)^2, which sums to ALPHA."""
    return ALPHA * 6 / (math.pi * look) ** 2


def plan_claims(kinds: Mapping[str, Sequence[Row]], looks: Mapping[str, int]) -> list[Claim]:
    """Return the claims that the rows of each kind allow, not yet tested; by counts alone, never by scores.

    looks: row id -> number of other retrains that looked at it.
    """
    shares = _shares(kinds, looks)
    claims = []
    for kind, share in shares.items():
        rows, look = _choose_rows(kinds[kind], looks)
        level = share * level_of_look(look)
        claims.append(Claim(kind, OPPONENTS[kind], rows=tuple(rows), look=look, level=level))
    return claims


def judge_claims(claims: Sequence[Claim]) -> list[Claim]:
    """Return the claims with their results, as far as their opponent was measured on their rows."""
    judged = []
    for claim in claims:
        is_measured = all(claim.opponent in row for row in claim.rows)
        result = _compare(claim, claim.opponent) if is_measured else None
        over_live = _compare(claim, LIVE) if claim.opponent == CONTROL else None
        judged.append(replace(claim, result=result, over_live=over_live))
    return judged


def rating_margins(rows: Sequence[Row], opponent: str, tail: float) -> Comparison:
    """Compare the rating margins of the new version and an opponent, in nats per token.

    With rating r_i and mean log-likelihood l_i of reply i, weighted by |r_i|:

        margin = sum_{good} r_i l_i / sum_{good} |r_i| + sum_{bad} r_i l_i / sum_{bad} |r_i|

    rows: hold `rating` r_i and, for each version, r_i l_i. tail: one-sided level.
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
    """Return margins (R,) from sums (R, 4): values and weights of good replies, then of bad ones.

    A bad reply's value has its rating's negative sign, so the two quotients are added.
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
    """Return the share of the level that each kind has. A kind with too few groups for its share has none."""
    others = [kind for kind in OPPONENTS if kind != "held_out" and kinds.get(kind)]
    others = [kind for kind in others if _can_tell(kind, kinds[kind], looks, (1 - HELD_OUT_SHARE) / len(others))]
    if not kinds.get("held_out"):
        return {kind: 1 / len(others) for kind in others}
    if not others:
        return {"held_out": 1.0}
    return {"held_out": HELD_OUT_SHARE, **dict.fromkeys(others, (1 - HELD_OUT_SHARE) / len(others))}


def _can_tell(kind: str, rows: Sequence[Row], looks: Mapping[str, int], share: float) -> bool:
    """Return whether the rows have enough groups to reach the level at all.

    For ratings the groups of good replies must suffice, and those of bad ones.
    """
    chosen, look = _choose_rows(rows, looks)
    fewest = least_groups(share * level_of_look(look))
    if kind != "ratings":
        return len({group_of_stored(row) for row in chosen}) >= fewest
    good = {group_of_stored(row) for row in chosen if row.get("rating", 0) > 0}
    bad = {group_of_stored(row) for row in chosen if row.get("rating", 0) < 0}
    return min(len(good), len(bad)) >= fewest


def _choose_rows(rows: Sequence[Row], looks: Mapping[str, int]) -> tuple[list[Row], int]:
    """Return the rows with the most evidence, and the number of this look at them.

    Rows with few looks have a larger level, but all rows have more groups. The rows with at most k - 1 looks are
    chosen for the k that maximises groups / -ln(level_of_look(k)).
    """
    counts = Counter(looks.get(str(row["id"]), 0) for row in rows)
    best: tuple[float, int] = (-1.0, 0)
    for most in sorted(counts):
        groups = {group_of_stored(row) for row in rows if looks.get(str(row["id"]), 0) <= most}
        best = max(best, (len(groups) / -math.log(level_of_look(most + 1)), most))
    return [row for row in rows if looks.get(str(row["id"]), 0) <= best[1]], best[1] + 1
