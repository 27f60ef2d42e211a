"""Epsilon audit, canary exposure, inversion, report.

`one_run`: coins decide which of m canaries are trained on, once; their scores are guessed from (Steinke, Nasr,
Jagielski 2023, arXiv:2305.08846). `many_runs`: one row is in or out of each of many runs (Jagielski et al. 2020,
arXiv:2006.07709). The rows of one run are no independent runs, so its rates must not go into the second.

A bound below the claim proves nothing; one above it refutes it.

Exposure is log2 |R| - log2 rank, where R are all candidates, the canary with them, ordered by loss. A model that never
saw the canary gives it any rank, so an exposure of x or more has a chance of 2^-x. The most that can be seen is log2
|R|.

An embedding's gradient has a row for each token that was read, and zeros elsewhere. A factor's does not say it so
plainly: the change of B is a sum over tokens t of g_t (A x_t)^T, so its rows lie in the span of A x_t, and of the
first layer's x_v, the normalised embedding, the server knows one for each word v of the vocabulary: those with A x_v
in the span were read (DAGER, Petrov et al. 2024, arXiv:2405.15586, there for full gradients). It is blind once the
rows have more tokens than the adapter has ranks, and for a sum of clients, since that has all their tokens; several
steps of an optimiser such as Adam bend the span.

attacks.json    {"schema": 1, "kind": "attack-report", "adapter": {file: sha256}, "claimed": ..., what each attack
                found}
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from sartor.core.artifacts import digests
from sartor.core.errors import ArtifactError, ConfigError, GateError
from sartor.core.filesystem import write_file_atomic
from sartor.evaluate.audit.membership_inference import Membership
from sartor.federate.privacy.accountant import PrivacyBudget
from sartor.models.lora_tensors import Array
from sartor.release import gate
from sartor.release.gate import FILE, KIND, SCHEMA

CONFIDENCE = 0.95
MOST_EPSILON = 60.0


@dataclass(frozen=True)
class Audit:
    """epsilon_low: with 95 % confidence; most: if every guess were right. trials: canaries, or runs."""

    epsilon_low: float
    most: float
    right: int
    guesses: int
    trials: int
    delta: float

    def __str__(self) -> str:
        return (
            f"audit: {self.right} of {self.guesses} guesses right on {self.trials} canaries, so epsilon is at least "
            f"{self.epsilon_low:.2f} at delta {self.delta:g} (95 % confidence; could have shown {self.most:.2f})"
        )


def coins(canaries: int, seed: int) -> NDArray[np.bool_]:
    """Which canaries are trained on: each with a fair coin of its own."""
    return np.random.default_rng(seed).random(canaries) < 0.5


def one_run(scores: Sequence[float], is_in: Sequence[bool], delta: float, guess_fraction: float = 0.5) -> Audit:
    """scores (m,): higher for canaries that seem to have been trained on; is_in: the coins.

    Half of the guesses are the highest, taken for in, half the lowest, taken for out. guess_fraction: of m, chosen
    before anybody looked. Raises ConfigError for fewer than 10 canaries.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_in, bool)
    if len(values) != len(truth) or len(values) < 10 or not 0 < guess_fraction <= 1 or not np.isfinite(values).all():
        problem = f"{len(values)} scores and {len(truth)} coins, guess_fraction {guess_fraction}"
        raise ConfigError(problem, "finite scores of at least 10 canaries, each with its coin; guess_fraction in 0..1")
    n_each = max(1, int(len(values) * guess_fraction / 2))
    order = np.argsort(values, kind="stable")
    right = int(truth[order[-n_each:]].sum() + (~truth[order[:n_each]]).sum())
    low, max_epsilon = (_least_epsilon(len(values), 2 * n_each, count, delta) for count in (right, 2 * n_each))
    return Audit(low, max_epsilon, right, 2 * n_each, len(values), delta)


def many_runs(scores_in: Sequence[float], scores_out: Sequence[float], delta: float, threshold: float) -> Audit:
    """Scores of one row in runs with it and in runs without. threshold: above it is a guess of in; chosen on other
    runs.

    Raises ConfigError without runs.
    """
    true_positives, false_positives = (
        int((np.asarray(scores, float) > threshold).sum()) for scores in (scores_in, scores_out)
    )
    runs, runs_without = len(scores_in), len(scores_out)
    if not (runs and runs_without):
        raise ConfigError(
            f"{runs} runs with the row and {runs_without} without", "scores_in and scores_out of one run or more each"
        )
    low, max_epsilon = (
        _of_rates(true_positives, runs, false_positives, runs_without, delta),
        _of_rates(runs, runs, 0, runs_without, delta),
    )
    return Audit(
        low,
        max_epsilon,
        true_positives + runs_without - false_positives,
        runs + runs_without,
        runs + runs_without,
        delta,
    )


def _of_rates(true_positives: int, runs: int, false_positives: int, runs_without: int, delta: float) -> float:
    """Both rates at the ends of intervals that hold together with 95 %: each is one-sided with half of the rest."""
    low = float(binomtest(true_positives, runs).proportion_ci(CONFIDENCE, "exact").low)
    high = float(binomtest(false_positives, runs_without).proportion_ci(CONFIDENCE, "exact").high)
    ratios = [(low - delta) / high, (1 - high - delta) / (1 - low)]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


def _least_epsilon(trials: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon that so many right guesses refute."""
    if _chance(trials, guesses, right, 0.0, delta) >= 1 - CONFIDENCE:
        return 0.0
    low, high = 0.0, MOST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        is_refuted = _chance(trials, guesses, right, middle, delta) < 1 - CONFIDENCE
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def _chance(trials: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Of so many right guesses or more, at most, under (epsilon, delta): theorem 5.2 there.

    Guesses are at best right as independent coins of e^epsilon / (1 + e^epsilon); delta lets some of the canaries be
    told outright, which is worth most where it lifts a likely count over `right`.
    """
    coin = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(
        binom.pmf(np.arange(right - 1, -1, -1), guesses, coin)
    )  # of right - i .. right - 1, for i = 1 ..
    lifted = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, coin)) + 2 * trials * delta * lifted)


@dataclass(frozen=True)
class Exposure:
    """Of one canary, in bits. repeats: how often it was trained on; chance: of so much or more where it was not."""

    name: str
    repeats: int
    bits: float
    most_bits: float
    chance: float

    def __str__(self) -> str:
        return (
            f"canary {self.name}, trained on {self.repeats} times: {self.bits:.1f} of at most {self.most_bits:.1f} "
            "bits"
        )


def exposure(name: str, repeats: int, loss: float, candidates: Sequence[float]) -> Exposure:
    """candidates: losses of the same row with other secrets, drawn as the canary's was. Ties count against the model.

    Raises ConfigError without candidates.
    """
    if not len(candidates):
        raise ConfigError(
            f"canary {name!r} has no candidates to be compared with", "255 other secrets show up to 8 bits"
        )
    rank, count = 1 + int((np.asarray(candidates, float) < loss).sum()), len(candidates) + 1
    return Exposure(name, repeats, math.log2(count / rank), math.log2(count), rank / count)


@dataclass(frozen=True)
class Inversion:
    """attack: of what; precision: of the tokens that were named, recall: of those that were there, both 0..1.

    is_blind: the update spans everything, and nothing can be said of it.
    """

    attack: str
    named: int
    precision: float
    recall: float
    is_blind: bool = False

    def __str__(self) -> str:
        if self.is_blind:
            return f"inversion of the {self.attack}: blind, more tokens than ranks"
        scores = f"precision {self.precision:.2f}, recall {self.recall:.2f}"
        return f"inversion of the {self.attack}: {self.named} tokens named, {scores}"


def from_embedding(gradient: Array, tolerance: float = 1e-6) -> set[int]:
    """Tokens with a gradient (V, D), beside the largest row's norm."""
    rows = np.linalg.norm(gradient.astype(np.float64), axis=1)
    return set(np.flatnonzero(rows > tolerance * rows.max()).tolist()) if rows.any() else set()


def from_factor(change: Array, a: Array, inputs: Array, tolerance: float = 1e-3) -> set[int] | None:
    """Tokens v whose A x_v lies in the row space of `change`; None where that is everything, or full without one of
    them.

    change: (out, R) of B; a: (R, in); inputs: x_v (V, in), what the module reads where token v is alone, as in a first
    layer.
    tolerance: distance from the span over length. Raises ConfigError for shapes that do not fit.
    """
    if change.shape[1] != a.shape[0] or a.shape[1] != inputs.shape[1]:
        shapes = f"change {change.shape}, A {a.shape}, inputs {inputs.shape}"
        raise ConfigError(f"{shapes} do not fit each other", "give all three of one module")
    _, sizes, rows = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    span = rows[sizes > tolerance * sizes[0]] if len(sizes) and sizes[0] else rows[:0]
    if len(span) == change.shape[1]:
        return None
    mapped = inputs.astype(np.float64) @ a.astype(np.float64).T
    outside = np.linalg.norm(mapped - mapped @ span.T @ span, axis=1)
    lengths = np.linalg.norm(mapped, axis=1)
    tokens = set(np.flatnonzero((outside <= tolerance * lengths) & (lengths > 0)).tolist())
    # a module of few outputs spans no more than so many tokens, and of more says as little as one of few ranks
    return None if not tokens and len(span) == min(change.shape) else tokens


def score_inversion(attack: str, predicted: Collection[int] | None, actual: Collection[int]) -> Inversion:
    """Held against the tokens that were there."""
    if predicted is None:
        return Inversion(attack, 0, 0.0, 0.0, is_blind=True)
    right = len(set(predicted) & set(actual))
    return Inversion(
        attack, len(predicted), right / len(predicted) if predicted else 0.0, right / len(actual) if actual else 0.0
    )


@dataclass(frozen=True)
class AttackReport:
    """claimed: the privacy that the adapter is said to have, None for none. skipped: attack -> why it was not made."""

    claimed: PrivacyBudget | None
    membership: tuple[Membership, ...] = ()
    canaries: tuple[Exposure, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    audit: Audit | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise GateError where epsilon was shown to be above the claimed one, or is claimed and was not audited."""
        claimed, audit = (asdict(item) if item else None for item in (self.claimed, self.audit))
        if refutation := gate.audit_refutes_claim(claimed, audit):
            raise GateError(*refutation)

    def sentences(self) -> Iterator[str]:
        """What was found, a line each."""
        yield (f"claimed: {gate.claim(asdict(self.claimed))}" if self.claimed else "no privacy is claimed")
        for finding in (*self.membership, *self.canaries, *self.inversions):
            yield str(finding)
        if "audit" not in self.skipped:
            yield str(self.audit) if self.audit else "no audit was made"
        for attack, reason in self.skipped.items():
            yield f"{attack}: not measured, {reason}"

    def write(self, folder: Path) -> Path:
        """Write it beside the adapter in `folder`, whole, also where `check` refuses. Returns the file.

        Raises ArtifactError where no adapter lies there.
        """
        bound = digests(folder)
        if not bound:
            raise ArtifactError(
                f"{folder} holds no adapter, so there is nothing to report of", "give the adapter's folder"
            )
        fields = {"schema": SCHEMA, "kind": KIND, "adapter": bound, **asdict(self)}
        write_file_atomic(folder / FILE, json.dumps(fields, indent=1).encode() + b"\n")
        return folder / FILE


def open_report(folder: Path) -> AttackReport:
    """The report beside an adapter. Raises ArtifactError where it is absent, not whole, or of other files."""
    file = folder / FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if (fields["schema"], fields["kind"]) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        report = AttackReport(
            claimed=PrivacyBudget(**fields["claimed"]) if fields["claimed"] else None,
            membership=tuple(Membership(**item) for item in fields["membership"]),
            canaries=tuple(Exposure(**item) for item in fields["canaries"]),
            inversions=tuple(Inversion(**item) for item in fields["inversions"]),
            audit=Audit(**fields["audit"]) if fields["audit"] else None,
            skipped=dict(fields.get("skipped", {})),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no attack report: {error!r}", "attack the adapter, and write one") from None
    if fields["adapter"] != digests(folder):
        raise ArtifactError(f"{file} speaks of other files than lie beside it", "attack the adapter again")
    return report
