"""Router threshold, shared weights, risk-coverage curve and ECE.

Foreign prompts cannot be listed, so they are simulated in three ways: general prompts, scored by classifiers that saw
none of their kind; each agent's held-out prompts as the other agents score them; and near misses of held-out prompts.
None of these needs another fit of a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sartor.evaluate.metrics import BINS
from sartor.serving.routing.agent_classifier import AgentClassifier, GeneralPrompts
from sartor.serving.routing.router_model import CandidateScores, FittedRouter, Linear, SharedWeights, best_columns
from sartor.serving.routing.text_features import F32, stacked


def risk_coverage(confidence: Any, is_right: Any, weight: Any) -> tuple[Any, Any]:
    """Return (coverage, risk), (N,) each, over the prompts sorted by falling confidence.

        coverage_n = sum_{i <= n} w_i / sum_i w_i;  risk_n = sum_{i <= n} w_i [wrong_i] / sum_{i <= n} w_i

    confidence, is_right, weight: (N,). A foreign prompt is always wrong, because no agent is right for it.
    """
    order = np.argsort(-confidence, kind="stable")
    covered = np.cumsum(weight[order])
    return covered / covered[-1], np.cumsum((weight * ~is_right)[order]) / covered


def aurc(confidence: Any, is_right: Any, weight: Any) -> float:
    """Return the mean risk over coverage (Geifman, Uziel and El-Yaniv 2019, arXiv:1805.08206).

    confidence, is_right, weight: (N,). Less is better.
    """
    coverage, risk = risk_coverage(confidence, is_right, weight)
    return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def ece(confidence: Any, is_right: Any, weight: Any) -> float:
    """Return the expected calibration error (Guo et al. 2017) in BINS equal bins of confidence.

        ECE = sum_b |sum_{i in b} w_i (confidence_i - right_i)| / sum_i w_i

    confidence, is_right, weight: (N,).
    """
    bin_index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_index, weight * (confidence - is_right), BINS)
    return float(np.abs(gap).sum() / weight.sum())


# Most held-out prompts of all agents together
MOST_HELD_OUT = 2_000
# Weights if nothing was held out
UNLEARNT = SharedWeights(score=6.0, likeness=4.0, base=4.0, foreign=-3.0)
# Ridge penalty: for a team without a doubtful prompt the likelihood has no finite maximum
RIDGE = 1e-3
# Difference of utilities (see `choose`) that is within the noise of so few prompts
SAME = 0.02
# Smallest threshold that is considered
LEAST = 1e-3
# Weight of a prompt that misses its agent, relative to a foreign one that gets an agent: most requests to a team are
# for its agents
OWN_WEIGHT = 2.0
# Least improvement for which a more expensive encoder is used
GAIN = 0.005
KINDS, AGENTS, MISSES = "kinds", "agents", "near_misses"


@dataclass(frozen=True)
class CalibrationSample:
    """Prompts that no classifier was fitted on, with their agents.

    agent: (N,) index of the right agent, -1 for none.
    """

    name: str
    candidates: CandidateScores
    agent: Any

    def best_probability(self, shared: SharedWeights) -> tuple[F32, Any]:
        """Return (N,) best probabilities, and (N,) whether each is of the right agent."""
        probability = shared.probability(self.candidates)
        best = probability.argmax(axis=1)[:, None]
        best_agent = np.take_along_axis(self.candidates.agents, best, 1)[:, 0]
        return np.take_along_axis(probability, best, 1)[:, 0], best_agent == self.agent


def assemble(
    agents: Mapping[str, AgentClassifier],
    space: GeneralPrompts,
    target: float,
    risk: float = 1.0,
    unproven: Mapping[str, str] | None = None,
) -> FittedRouter:
    """Return the router of these agents, using one thread.

    target: fraction of foreign prompts that the threshold must leave to the base.
    risk: largest fraction of wrong agents among routed prompts, with own and foreign prompts in equal shares.
    unproven: agents whose Report shows no gain over the base, with its figures.
    """
    with threadpool_limits(1):
        return _assembled(agents, space, (target, risk), unproven or {})


def _assembled(
    agents: Mapping[str, AgentClassifier],
    space: GeneralPrompts,
    limits: tuple[float, float],
    unproven: Mapping[str, str],
) -> FittedRouter:
    names, parts = tuple(agents), tuple(agents.values())
    held_out, *foreign = _samples(space, parts)
    foreign = [sample for sample in foreign if len(sample.agent)]
    is_learnt = len(held_out.agent) > 0 and len(foreign) > 0
    shared = _shared(held_out, foreign) if is_learnt else UNLEARNT
    fitted = FittedRouter(
        agents=names, space=space, parts=parts, shared=shared, threshold=0.5, figures={}, unproven=unproven
    )
    if not is_learnt:
        return replace(fitted, figures={"held_out": 0, "accuracy": 0.0, "to_base": 0.0})
    score, is_right = held_out.best_probability(shared)
    agent_scores = [score[held_out.agent == index] for index in range(len(names))]
    right = [is_right[held_out.agent == index] for index in range(len(names))]
    foreign_scores = {sample.name: sample.best_probability(shared)[0] for sample in foreign}
    threshold = choose(agent_scores, right, list(foreign_scores.values()), *limits)
    by_agent: dict[str, float | None] = {}
    for name, own_scores, is_own_right in zip(names, agent_scores, right, strict=True):
        right_scores = own_scores[is_own_right]
        count = len(own_scores)
        by_agent[name] = round(float((right_scores >= threshold).sum()) / count, 4) if count else None
    figures = {
        "held_out": len(held_out.agent),
        "by_agent": by_agent,
        "foreign": sum(map(len, foreign_scores.values())),
        **{f"to_base_{name}": round(float((scores < threshold).mean()), 4) for name, scores in foreign_scores.items()},
        "general": int(np.isfinite(parts[0].unseen[0]).sum()),
        **_curve(agent_scores, right, list(foreign_scores.values()), threshold),
    }
    return replace(fitted, threshold=threshold, figures=figures)


def _samples(space: GeneralPrompts, parts: tuple[AgentClassifier, ...]) -> list[CalibrationSample]:
    """Return a sample of the agents' held-out prompts, then the samples of foreign prompts."""
    linear = Linear.of(space, parts)
    limit = max(2, MOST_HELD_OUT // len(parts))
    counts = [min(limit, part.held_out_features.count) for part in parts]
    agent = np.repeat(np.arange(len(parts)), counts)
    held_out = linear.look(stacked([part.held_out_features.at(slice(0, limit)) for part in parts]))
    missed = linear.look(stacked([part.near_miss_features.at(slice(0, limit)) for part in parts]))
    unseen = np.stack([part.unseen for part in parts], axis=2)
    scores = np.where(np.isnan(unseen[0]), -np.inf, unseen[0])
    columns = best_columns(scores)
    likeness = np.take_along_axis(unseen[1], columns, 1)
    general = CandidateScores(columns, np.take_along_axis(scores, columns, 1), likeness, space.foreign)
    nobody = np.full(len(missed.foreign), -1)
    others = replace(held_out, score=np.where(held_out.agents == agent[:, None], -np.inf, held_out.score))
    samples = [CalibrationSample("own", held_out, agent), CalibrationSample(MISSES, missed, nobody)]
    samples.append(CalibrationSample(KINDS, general, np.full(len(space.foreign), -1)))
    return [*samples, CalibrationSample(AGENTS, others, np.full(len(agent), -1))] if len(parts) > 1 else samples


def _shared(held_out: CalibrationSample, foreign: Sequence[CalibrationSample]) -> SharedWeights:
    """Return the maximum-likelihood weights; own and foreign prompts weigh the same, and so does each foreign kind.

    loss(w) = -mean_own log p(agent) - mean_kinds mean log p(base) + RIDGE ||w||^2
    """
    from scipy.optimize import minimize

    def chance(values: Any, sample: CalibrationSample) -> Any:
        probability = SharedWeights(*values).probability(sample.candidates)
        is_own = sample.candidates.agents == sample.agent[:, None]
        own_probability = (probability * is_own).sum(axis=1)
        return np.where(sample.agent >= 0, own_probability, 1 - probability.sum(axis=1))

    def loss(values: Any) -> float:
        parts = [np.log(chance(values, sample) + 1e-9).mean() for sample in foreign]
        return float(-np.log(chance(values, held_out) + 1e-9).mean() - np.mean(parts) + RIDGE * np.sum(values**2))

    start = [UNLEARNT.score, UNLEARNT.likeness, UNLEARNT.base, UNLEARNT.foreign]
    return SharedWeights(*(float(value) for value in minimize(loss, start, method="BFGS", options={"maxiter": 60}).x))


def choose(
    agent_scores: Sequence[F32], right: Sequence[Any], foreign: Sequence[F32], target: float, risk: float = 1.0
) -> float:
    """Return the threshold with the largest utility among those that keep both limits.

        utility = OWN_WEIGHT * hits - misrouted + (1 - foreign_routed)

    The limits are: at least `target` of the foreign prompts stay at the base, and at most `risk` of the routed prompts
    are wrong. Of thresholds within SAME of the largest utility the lowest is taken. If none keeps both limits, those
    that break them least compete. A threshold lies midway between a probability and the next lower one.
    agent_scores: for each agent, (N,) best probabilities of its held-out prompts.
    right: for each agent, (N,) whether that probability is the agent's own.
    foreign: for each kind, (N,) best probabilities of foreign prompts.
    Each agent counts the same, and so does each kind.
    """
    probabilities = np.unique(np.concatenate([*agent_scores, *foreign, [1.0]]))
    probabilities = probabilities[probabilities > LEAST]
    thresholds = (np.concatenate([[LEAST], probabilities[:-1]]) + probabilities) / 2
    counts, pairs = [len(scores) for scores in agent_scores], list(zip(agent_scores, right, strict=True))
    hits = _routed([scores[is_right] for scores, is_right in pairs], thresholds, counts)
    misrouted = _routed([scores[~is_right] for scores, is_right in pairs], thresholds, counts)
    foreign_routed = _routed(foreign, thresholds, [len(scores) for scores in foreign])
    wrong_fraction = (misrouted + foreign_routed) / np.maximum(misrouted + foreign_routed + hits, 1e-9)
    shortfall = np.maximum(target - (1 - foreign_routed), 0) + np.maximum(wrong_fraction - risk, 0)
    is_allowed = shortfall <= shortfall.min() + 1e-9
    utility = np.where(is_allowed, OWN_WEIGHT * hits - misrouted + 1 - foreign_routed, -np.inf)
    return float(thresholds[np.flatnonzero(utility >= utility.max() - SAME)[0]])


def _routed(scores: Sequence[F32], thresholds: F32, counts: Sequence[int]) -> F32:
    """Return (M,) fractions of scores that reach each of M thresholds, averaged over the non-empty parts."""
    parts = [
        (len(values) - np.searchsorted(np.sort(values), thresholds)) / count
        for values, count in zip(scores, counts, strict=True)
        if count
    ]
    return np.asarray(np.mean(parts, axis=0))


def _curve(
    agent_scores: Sequence[F32], right: Sequence[Any], foreign: Sequence[F32], threshold: float
) -> dict[str, Any]:
    """Return figures of the risk-coverage curve, and at the threshold.

    Own and foreign prompts have half of the weight each.
    """
    score = np.concatenate([*agent_scores, *foreign])
    is_right = np.concatenate([*right, *(np.zeros(len(scores), dtype=bool) for scores in foreign)])
    nonempty = [scores for scores in agent_scores if len(scores)]
    weight = np.concatenate(
        [
            *(np.full(len(scores), 0.5 / len(nonempty) / len(scores)) for scores in nonempty),
            *(np.full(len(o), 0.5 / len(foreign) / len(o)) for o in foreign),
        ]
    )
    is_routed, is_own = score >= threshold, np.arange(len(score)) < sum(map(len, agent_scores))
    coverage = float(weight[is_routed].sum())
    return {
        "accuracy": round(2 * float(weight[is_routed & is_right].sum()), 4),
        "to_base": round(2 * float(weight[~is_routed & ~is_own].sum()), 4),
        "coverage": round(coverage, 4),
        "risk": round(float(weight[is_routed & ~is_right].sum()) / max(coverage, 1e-9), 4),
        "aurc": round(aurc(score, is_right, weight), 4),
        "ece": round(ece(score, is_right, weight), 4),
    }


def best_of(routers: Sequence[FittedRouter]) -> FittedRouter:
    """Return the router with the best weighted mean of own accuracy and base fraction.

    The base fraction is that of foreign prompts left to the base. A router that costs more (later in the list) must be
    better by GAIN.
    """
    best = routers[0]
    for other in routers[1:]:
        if _merit(other) >= _merit(best) + GAIN:
            best = other
    return best


def _merit(fitted: FittedRouter) -> float:
    accuracy, to_base = fitted.figures["accuracy"], fitted.figures["to_base"]
    return float(OWN_WEIGHT * accuracy + to_base) / (OWN_WEIGHT + 1)
