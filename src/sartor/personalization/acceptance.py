"""Acceptance test of a personal adapter: on its owner's rows, and non-inferior on a probe.

Both tests use the sign-flip interval of `evaluate/bootstrap.py`, over groups of rows with one prompt. A device and a
server decide by the same test under limits of their own (`AcceptanceRule`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.core.splits import LEAST_GROUPS
from sartor.evaluate.bootstrap import LEAST_WIDTH, Comparison, paired_bootstrap
from sartor.models.packing import TokenizedExample

# Fewer held-out prompts cannot reach the level: every verdict on them would be "cannot tell"
LEAST_HELD_OUT, LEAST_TRAINED = LEAST_GROUPS, 5


@dataclass(frozen=True)
class JudgedRows:
    """Rows to judge by, and their groups: rows of one prompt are one group."""

    encoded: Sequence[TokenizedExample]
    groups: Sequence[str]

    @property
    def tokens(self) -> list[float]:
        """Supervised tokens of each row."""
        return [float(row.supervised_tokens) for row in self.encoded]


@dataclass(frozen=True)
class PairedLosses:
    """Losses of the same rows under two adapters.

    before, after: (N,) nats per supervised token.
    """

    rows: JudgedRows
    before: Sequence[float]
    after: Sequence[float]

    def compare(self) -> Comparison:
        """Return the mean losses, weighted by tokens, and the 95 % interval of after - before."""
        return paired_bootstrap(self.before, self.after, self.rows.groups, self.rows.tokens, is_bounded=False)


@dataclass(frozen=True)
class AcceptanceRule:
    """Limits of an acceptance, in nats per token, for the upper ends of the intervals.

    private_max_nats: largest rise on the person's own rows; None if they must improve.
    probe_max_nats: largest rise on the probe.
    more_probe: instruction that gives a larger probe.
    """

    private_max_nats: float | None
    probe_max_nats: float
    more_probe: str

    def probe_problem(self, groups: Sequence[str]) -> str:
        """Return why nothing that is tuned can pass a probe of these groups; empty if something can."""
        too_few = _too_few_prompts(groups)
        if not too_few or self.probe_max_nats >= LEAST_WIDTH:
            return ""
        return f"{too_few}: nothing that is tuned could be shown not to forget"


@dataclass(frozen=True)
class AcceptanceResult:
    """Mean losses in nats per token, before and after, and the decision.

    why: reason for a refusal; empty if the adapter may answer.
    """

    private: Comparison
    probe: Comparison
    why: str


def accept(private: PairedLosses, probe: PairedLosses, rule: AcceptanceRule) -> AcceptanceResult:
    """Return the decision on an adapter by the person's own rows and the probe.

    Where own rows must improve, their whole interval lies below 0. A limit holds if the upper end is at most the
    limit, which an end that is no number never is.
    """
    on_private, on_probe = private.compare(), probe.compare()
    reason = _private_reason(on_private, rule) or _probe_reason(on_probe, probe.rows, rule)
    return AcceptanceResult(on_private, on_probe, reason)


def _private_reason(comparison: Comparison, rule: AcceptanceRule) -> str:
    """Return the reason against an adapter on the person's own rows; empty if there is none."""
    limit = rule.private_max_nats
    if limit is None:
        verdict = comparison.verdict(higher_is_better=False)
        interval = f"{comparison.low:+.3f} to {comparison.high:+.3f} nats a token"
        return "" if verdict == "better" else f"on the person's own rows: {verdict} ({interval})"
    if comparison.high <= limit:
        return ""
    return f"on the person's own rows it may be worse by {comparison.high:.3f} nats a token; the limit is {limit:g}"


def _probe_reason(comparison: Comparison, rows: JudgedRows, rule: AcceptanceRule) -> str:
    """Return the reason against an adapter on the probe; empty if there is none."""
    if comparison.high <= rule.probe_max_nats:
        return ""
    if too_few := _too_few_prompts(rows.groups):
        return f"cannot tell whether the probe's loss has risen: {too_few}: {rule.more_probe}"
    return (
        f"on {len(rows.encoded)} rows of the probe it may be worse by {comparison.high:.3f} nats a token; "
        f"the limit is {rule.probe_max_nats:g}"
    )


def _too_few_prompts(groups: Sequence[str]) -> str:
    """Return a message for a probe with too few prompts to decide anything; empty for enough."""
    prompts = len(set(groups))
    return (
        f"the probe has {prompts} prompts, and {LEAST_GROUPS} are the least that tell"
        if prompts < LEAST_GROUPS
        else ""
    )


def too_few_rows(trained: int, held_out_groups: Sequence[str]) -> str:
    """Return why a person has too few rows to tune on, or to judge by; empty for enough."""
    held_out = len(set(held_out_groups))
    if trained >= LEAST_TRAINED and held_out >= LEAST_HELD_OUT:
        return ""
    return (
        f"{trained} rows to tune on and {held_out} held-out prompts are too few: {LEAST_TRAINED} and {LEAST_HELD_OUT} "
        "are needed"
    )
