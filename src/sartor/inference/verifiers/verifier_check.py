"""Measurement whether a verifier tells right replies from wrong ones, before a run learns from it.

The right replies are references; the wrong ones are seeded edits of them (`reply_edits.py`). A verifier whose reward
is no better than chance at that would teach noise, or how to please it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from sartor.core.errors import ConfigError, SourceError, about_option
from sartor.core.statistics import Z, area_under_roc
from sartor.inference.verifiers.reply_edits import wrong_reply
from sartor.inference.verifiers.submission import Submission, Verifier
from sartor.inference.verifiers.unit_tests import UnitTestsVerifier

# Fewest labelled replies, half of them wrong
LEAST_REPLIES = 40
# What the lower end of the interval of the AUC must exceed
LEAST_AUC = 0.6
_NAMED = 5
_OPTION = "objective.verifier"


@dataclass(frozen=True)
class VerifierCheck:
    """Rewards of labelled replies, summed up.

    auc: probability that a right reply's reward is above a wrong one's, ties as half; low, high: 95 % interval
        (DeLong et al. 1988).
    right, wrong: mean rewards.
    """

    kind: str
    replies: int
    auc: float
    low: float
    high: float
    right: float
    wrong: float

    def __str__(self) -> str:
        """Return the line for the log."""
        return (
            f"verifier {self.kind}: AUC {self.auc:.2f} in [{self.low:.2f}, {self.high:.2f}] on {self.replies} "
            f"labelled replies; mean reward {self.right:.2f} of right ones, {self.wrong:.2f} of wrong ones"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the check for a manifest."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def check_verifier(verifier: Verifier, rows: Sequence[Submission], seed: int) -> VerifierCheck:
    """Return the check of a verifier on the references of rows and as many wrong replies.

    Raises SourceError for rows that are too few, or lack what the verifier needs; ConfigError for a verifier whose
    rewards are all equal, or whose AUC may be LEAST_AUC or less; and what its rewards raise.
    """
    check_rows(verifier, rows)
    replies = [verifier.right_reply(row) for row in rows]
    right, wrong = [], []
    for row, reply in zip(rows, replies, strict=True):
        edited = wrong_reply(reply, replies, f"{seed}:{row.row}") if reply.strip() else None
        if edited is not None:
            right.append(replace(row, reply=reply))
            wrong.append(replace(row, reply=edited))
    if len(right) + len(wrong) < LEAST_REPLIES:
        raise SourceError(
            f"{len(right)} rows have a reference reply by which the verifier {verifier.kind} can be checked; "
            f"{LEAST_REPLIES // 2} are needed",
            "more rows: sartor curate with more sources, or sartor synthesize",
        )
    rewards = verifier.rewards([*right, *wrong])
    right_rewards, wrong_rewards = rewards[: len(right)], rewards[len(right) :]
    auc, deviation = area_under_roc(right_rewards, wrong_rewards)
    check = VerifierCheck(
        kind=verifier.kind,
        replies=len(rewards),
        auc=auc,
        low=max(0.0, auc - Z * deviation),
        high=min(1.0, auc + Z * deviation),
        right=fmean(right_rewards),
        wrong=fmean(wrong_rewards),
    )
    problem = ""
    if len(set(rewards)) == 1:
        problem = (
            f"the verifier {verifier.kind} gives every reply the reward {rewards[0]:g}, right or wrong "
            f"({len(rewards)} replies)"
        )
    elif check.low <= LEAST_AUC:
        problem = f"{check}: the lower end must be above {LEAST_AUC:g}"
    if problem:
        missed = max(range(len(right)), key=lambda index: wrong_rewards[index] - right_rewards[index])
        remedy = (
            f"objective.verifier: a stricter one, or another kind. It does not tell the right reply to row "
            f"{right[missed].row} from {wrong[missed].reply[:60]!r}"
        )
        if failed := sum(reward < 1 for reward in right_rewards):
            worst = right[min(range(len(right)), key=right_rewards.__getitem__)]
            reason = more_time = ""
            if isinstance(verifier, UnitTestsVerifier):
                reason = f": {verifier.failure(worst)}"
                more_time = f", --{_OPTION}.time_s {2 * verifier.time_s:g} if they are slow,"
            problem += f"; {failed} of {len(right)} right replies have less than 1, as that to row {worst.row}{reason}"
            if 2 * failed >= len(right):
                remedy = f"mend or leave out rows whose own reply fails{more_time} or {_OPTION}: one that passes it"
        raise about_option(ConfigError(problem, remedy), _OPTION)
    return check


def check_rows(verifier: Verifier, rows: Sequence[Submission]) -> None:
    """Raise SourceError if rows lack what a verifier needs, with the first of them."""
    lacking = [(row.row, missing) for row in rows if (missing := verifier.missing(row))]
    if lacking:
        names = ", ".join(name for name, _ in lacking[:_NAMED])
        rest = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise SourceError(
            f"{len(lacking):,} of {len(rows):,} rows lack what the verifier {verifier.kind} needs, {lacking[0][1]}: "
            f"{names}{rest}",
            "give these rows such a reply or leave them out of the curation; or another objective.verifier",
        )
