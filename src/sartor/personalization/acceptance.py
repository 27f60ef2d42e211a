"""Acceptance test of a personal adapter: superior on own rows, non-inferior on a probe.

Both tests use the sign-flip interval of `evaluate/bootstrap.py`, over groups of rows with one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.core.splits import LEAST_GROUPS
from sartor.evaluate.bootstrap import Comparison, paired_bootstrap
from sartor.models.packing import TokenizedExample


@dataclass(frozen=True)
class JudgedRows:
    """Rows to judge by, and their groups: rows of one prompt are one group."""

    rows: Sequence[TokenizedExample]
    groups: Sequence[str]


@dataclass(frozen=True)
class AcceptanceResult:
    """Mean losses in nats per token, before and after, and the decision.

    why: empty if the delta may be made current.
    """

    private: Comparison
    probe: Comparison
    why: str


def judge(
    private: tuple[JudgedRows, Sequence[float], Sequence[float]],
    probe: tuple[JudgedRows, Sequence[float], Sequence[float]],
    most_probe_loss: float,
) -> AcceptanceResult:
    """Return the decision on (rows, losses before, losses after) of a person's rows and of the probe.

    The person's rows must improve: the whole 95 % interval of loss after - loss before, weighted by tokens, lies
    below 0 (`bootstrap.paired_bootstrap`). The probe must be non-inferior: the upper end of its interval is at most
    the margin `most_probe_loss`.
    """
    private_comparison, probe_comparison = (
        paired_bootstrap(
            before, after, judged_rows.groups, [row.supervised_tokens for row in judged_rows.rows], is_bounded=False
        )
        for judged_rows, before, after in (private, probe)
    )
    verdict = private_comparison.verdict(higher_is_better=False)
    reason = ""
    if verdict != "better":
        reason = (
            f"on the person's own rows: {verdict} ({private_comparison.low:+.3f} to {private_comparison.high:+.3f} "
            "nats a token)"
        )
    elif not probe_comparison.high <= most_probe_loss:
        reason = (
            f"the probe's loss may have risen by {probe_comparison.high:.3f} nats a token, over {most_probe_loss:g}"
        )
        if too_few := too_few_prompts(probe[0].groups):
            reason = f"cannot tell whether the probe's loss has risen: {too_few}: --probe FILE"
    return AcceptanceResult(private_comparison, probe_comparison, reason)


def too_few_prompts(groups: Sequence[str]) -> str:
    """Return a message for a probe with too few prompts to decide anything; empty for enough."""
    prompts = len(set(groups))
    return (
        f"the probe has {prompts} prompts, and {LEAST_GROUPS} are the least that tell"
        if prompts < LEAST_GROUPS
        else ""
    )


# Fewer held-out prompts cannot reach the level: every verdict on them would be "cannot tell"
LEAST_HELD_OUT, LEAST_TRAINED = LEAST_GROUPS, 5
