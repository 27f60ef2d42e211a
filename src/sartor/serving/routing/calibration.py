"""Router threshold, shared figures, risk-coverage, ECE.

What is foreign cannot be listed, so it is simulated three times: general prompts, each by classifiers that saw none of its
kind; each agent's held-out prompts as the others see them when that agent is not there; and near misses of held-out prompts.
None of these asks for another fit of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sartor.evaluate.metrics import BINS
from sartor.serving.routing.agent_classifier import AgentClassifier, GeneralPrompts
from sartor.serving.routing.router_model import Fitted, Linear, Looked, Shared, best_places
from sartor.serving.routing.text_features import F32, stacked


def risk_coverage(confidence: Any, is_right: Any, weight: Any) -> tuple[Any, Any]:
    """(coverage, risk), (N,) each: of the most confident prompts up to each, their share of all and the share that is wrong.

    A foreign prompt is wrong at any place: whoever gets it is not whom it is for.
    """
    order = np.argsort(-confidence, kind="stable")
    covered = np.cumsum(weight[order])
    return covered / covered[-1], np.cumsum((weight * ~is_right)[order]) / covered


def aurc(confidence: Any, is_right: Any, weight: Any) -> float:
    """The mean risk over coverage (Geifman, Uziel and El-Yaniv 2019, arXiv:1805.08206); less is better."""
    coverage, risk = risk_coverage(confidence, is_right, weight)
    return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def ece(confidence: Any, is_right: Any, weight: Any) -> float:
    """Expected calibration error (Guo et al. 2017) in BINS equal bins of confidence."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weight * (confidence - is_right), BINS)
    return float(np.abs(gap).sum() / weight.sum())


# Held-out prompts of all agents together
MOST_HELD = 2_000
# Where nothing was held out at all
UNLEARNT = Shared(score=6.0, likeness=4.0, base=4.0, foreign=-3.0)
# Of a team without a doubtful prompt the most likely figures are endless
RIDGE = 1e-3
# Sums of both fractions (see `choose`) that so few prompts do not tell apart
SAME = 0.02
# A probability below which nobody is chosen
LEAST = 1e-3
# What a prompt that misses its agent weighs against a foreign one that gets an agent: who asks the team mostly asks its agents
OWN_WEIGHT = 2.0
# By how much an encoder that costs more must be better
GAIN = 0.005
KINDS, AGENTS, MISSES = "kinds", "agents", "near_misses"


@dataclass(frozen=True)
class CalibrationSample:
    """Prompts that no part was fitted on, and whose each is. agent: (N,) its place, -1 for nobody's."""

    name: str
    found: Looked
    agent: Any

    def told(self, shared: Shared) -> tuple[F32, Any]:
        """(N,) the best probability, and whether it is of the right agent."""
        probability = shared.probability(self.found)
        best = probability.argmax(axis=1)[:, None]
        whose = np.take_along_axis(self.found.agents, best, 1)[:, 0]
        return np.take_along_axis(probability, best, 1)[:, 0], whose == self.agent


def assemble(
    agents: Mapping[str, AgentClassifier],
    space: GeneralPrompts,
    target: float,
    risk: float = 1.0,
    unproven: Mapping[str, str] | None = None,
) -> Fitted:
    """The router of these agents. One thread.

    target: fraction of foreign prompts that must be left to the base where the threshold is chosen; risk: the most of those
    that get an agent that may get a wrong one, as many own prompts asked as foreign ones. unproven: agents whose Report shows
    no gain over the base, and its figures.
    """
    with threadpool_limits(1):
        return _assembled(agents, space, (target, risk), unproven or {})


def _assembled(
    agents: Mapping[str, AgentClassifier], space: GeneralPrompts, limits: tuple[float, float], unproven: Mapping[str, str]
) -> Fitted:
    names, parts = tuple(agents), tuple(agents.values())
    held, *foreign = _samples(space, parts)
    foreign = [one for one in foreign if len(one.agent)]
    is_learnt = len(held.agent) > 0 and len(foreign) > 0
    shared = _shared(held, foreign) if is_learnt else UNLEARNT
    fitted = Fitted(names, space, parts, shared, 0.5, {}, unproven)
    if not is_learnt:
        return replace(fitted, figures={"held_out": 0, "accuracy": 0.0, "to_base": 0.0})
    score, is_right = held.told(shared)
    own = [score[held.agent == place] for place in range(len(names))]
    right = [is_right[held.agent == place] for place in range(len(names))]
    strange = {one.name: one.told(shared)[0] for one in foreign}
    threshold = choose(own, right, list(strange.values()), *limits)
    figures = {
        "held_out": len(held.agent),
        "by_agent": {name: _fraction(s[r], threshold, len(s)) for name, s, r in zip(names, own, right, strict=True)},
        "foreign": sum(map(len, strange.values())),
        **{f"to_base_{name}": round(float((found < threshold).mean()), 4) for name, found in strange.items()},
        "general": int(np.isfinite(parts[0].unseen[0]).sum()),
        **_curve(own, right, list(strange.values()), threshold),
    }
    return replace(fitted, threshold=threshold, figures=figures)


def _samples(space: GeneralPrompts, parts: tuple[AgentClassifier, ...]) -> list[CalibrationSample]:
    """Own held-out prompts, and three kinds of foreign ones."""
    linear = Linear.of(space, parts)
    most = max(2, MOST_HELD // len(parts))
    counts = [min(most, part.held.count) for part in parts]
    agent = np.repeat(np.arange(len(parts)), counts)
    held = linear.look(stacked([part.held.at(slice(0, most)) for part in parts]))
    missed = linear.look(stacked([part.missed.at(slice(0, most)) for part in parts]))
    unseen = np.stack([part.unseen for part in parts], axis=2)
    scores = np.where(np.isnan(unseen[0]), -np.inf, unseen[0])
    places = best_places(scores)
    likeness = np.take_along_axis(unseen[1], places, 1)
    general = Looked(places, np.take_along_axis(scores, places, 1), likeness, space.foreign)
    nobody = np.full(len(missed.foreign), -1)
    others = replace(held, score=np.where(held.agents == agent[:, None], -np.inf, held.score))
    samples = [CalibrationSample("own", held, agent), CalibrationSample(MISSES, missed, nobody)]
    samples.append(CalibrationSample(KINDS, general, np.full(len(space.foreign), -1)))
    return [*samples, CalibrationSample(AGENTS, others, np.full(len(agent), -1))] if len(parts) > 1 else samples


def _shared(held: CalibrationSample, foreign: Sequence[CalibrationSample]) -> Shared:
    """The most likely figures; own prompts weigh as much as foreign ones, and each kind of these the same."""
    from scipy.optimize import minimize

    def chance(values: Any, sample: CalibrationSample) -> Any:
        probability = Shared(*values).probability(sample.found)
        is_own = sample.found.agents == sample.agent[:, None]
        own = (probability * is_own).sum(axis=1)
        return np.where(sample.agent >= 0, own, 1 - probability.sum(axis=1))

    def loss(values: Any) -> float:
        parts = [np.log(chance(values, one) + 1e-9).mean() for one in foreign]
        return float(-np.log(chance(values, held) + 1e-9).mean() - np.mean(parts) + RIDGE * np.sum(values**2))

    start = [UNLEARNT.score, UNLEARNT.likeness, UNLEARNT.base, UNLEARNT.foreign]
    return Shared(*(float(value) for value in minimize(loss, start, method="BFGS", options={"maxiter": 60}).x))


def choose(own: Sequence[F32], right: Sequence[Any], foreign: Sequence[F32], target: float, risk: float = 1.0) -> float:
    """The threshold: of those that leave `target` of the foreign prompts to the base and route at most `risk` wrongly, the
    lowest with the largest sum (but for SAME) of own prompts that get their agent, times OWN_WEIGHT, less those that get
    another one, and foreign ones left to the base.

    own: by agent, the best probabilities of held-out prompts; right: whether that is the agent's; each agent counts the same,
    and each kind of foreign prompts. Where nothing keeps both limits, what breaks them least. It lies midway between a
    probability and the next one below.
    """
    found = np.unique(np.concatenate([*own, *foreign, [1.0]]))
    found = found[found > LEAST]
    marks = (np.concatenate([[LEAST], found[:-1]]) + found) / 2
    counts, pairs = [len(one) for one in own], list(zip(own, right, strict=True))
    hits = _routed([one[is_right] for one, is_right in pairs], marks, counts)
    astray = _routed([one[~is_right] for one, is_right in pairs], marks, counts)
    taken = _routed(foreign, marks, [len(one) for one in foreign])
    wrong = (astray + taken) / np.maximum(astray + taken + hits, 1e-9)
    short = np.maximum(target - (1 - taken), 0) + np.maximum(wrong - risk, 0)
    is_kept = short <= short.min() + 1e-9
    worth = np.where(is_kept, OWN_WEIGHT * hits - astray + 1 - taken, -np.inf)
    return float(marks[np.flatnonzero(worth >= worth.max() - SAME)[0]])


def _routed(scores: Sequence[F32], marks: F32, counts: Sequence[int]) -> F32:
    """(M,): fraction that reaches each mark, the mean over the parts that hold any."""
    parts = [
        (len(one) - np.searchsorted(np.sort(one), marks)) / count for one, count in zip(scores, counts, strict=True) if count
    ]
    return np.asarray(np.mean(parts, axis=0))


def _curve(own: Sequence[F32], right: Sequence[Any], foreign: Sequence[F32], threshold: float) -> dict[str, Any]:
    """Figures of the risk-coverage curve with own and foreign prompts half each, and at the threshold."""
    score = np.concatenate([*own, *foreign])
    is_right = np.concatenate([*right, *(np.zeros(len(one), dtype=bool) for one in foreign)])
    held = [one for one in own if len(one)]
    weight = np.concatenate(
        [
            *(np.full(len(one), 0.5 / len(held) / len(one)) for one in held),
            *(np.full(len(o), 0.5 / len(foreign) / len(o)) for o in foreign),
        ]
    )
    is_routed, is_own = score >= threshold, np.arange(len(score)) < sum(map(len, own))
    coverage = float(weight[is_routed].sum())
    return {
        "accuracy": round(2 * float(weight[is_routed & is_right].sum()), 4),
        "to_base": round(2 * float(weight[~is_routed & ~is_own].sum()), 4),
        "coverage": round(coverage, 4),
        "risk": round(float(weight[is_routed & ~is_right].sum()) / max(coverage, 1e-9), 4),
        "aurc": round(aurc(score, is_right, weight), 4),
        "ece": round(ece(score, is_right, weight), 4),
    }


def _fraction(right: F32, threshold: float, count: int) -> float | None:
    return round(float((right >= threshold).sum()) / count, 4) if count else None


def best_of(found: Sequence[Fitted]) -> Fitted:
    """The router with the best mean of both fractions, weighted; one that costs more (stands later) must be better by GAIN."""
    best = found[0]
    for other in found[1:]:
        if _merit(other) >= _merit(best) + GAIN:
            best = other
    return best


def _merit(fitted: Fitted) -> float:
    own, left = fitted.figures["accuracy"], fitted.figures["to_base"]
    return float(OWN_WEIGHT * own + left) / (OWN_WEIGHT + 1)
