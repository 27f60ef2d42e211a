"""Privacy attacks: epsilon audit, canary exposure, gradient inversion, and their report.

`one_run`: fair coins decide which of m canaries are trained on, in a single run. The audit guesses them from their
scores (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846). `many_runs`: one row is in or out of each of many runs
(Jagielski et al. 2020, arXiv:2006.07709). The rows of one run are not independent runs, so rates of the first must not
go into the second.

A lower bound below the claim proves nothing; one above it refutes the claim.

Exposure is log2 |R| - log2 rank (Carlini et al. 2019, arXiv:1802.08232). R are all candidates including the canary,
ordered by loss. A model that never saw the canary gives it any rank with the same probability, so P[exposure >= x] <=
2^-x. The largest exposure that can be seen is log2 |R|.

An embedding's gradient has a row for each token that was read, and zeros elsewhere. The gradient of a LoRA factor
shows them less directly. The change of B is a sum over tokens t of g_t (A x_t)^T, so its rows lie in the span of A
x_t. For the first layer the server knows x_v, the normalised embedding, of each token v of the vocabulary. Tokens with
A x_v in the span were read (DAGER, Petrov et al. 2024, arXiv:2405.15586, there for full gradients). The attack is
blind once the rows have more tokens than the adapter has ranks. It is also blind for a sum of clients, which has all
their tokens. Several steps of an optimiser such as Adam bend the span.

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
    """Result of an audit.

    epsilon_low: lower bound of epsilon, with 95 % confidence.
    most: that bound if every guess were right.
    trials: number of canaries, or of runs.
    """

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
    """Draw a fair coin for each canary, shape (canaries,); True: it is trained on."""
    return np.random.default_rng(seed).random(canaries) < 0.5


def one_run(scores: Sequence[float], is_in: Sequence[bool], delta: float, guess_fraction: float = 0.5) -> Audit:
    """Audit epsilon by guessing which canaries one run was trained on.

    scores: (M,), higher for canaries that seem to have been trained on.
    is_in: (M,), the coins.
    guess_fraction: fraction of M that is guessed, chosen before anybody looks; half are the highest scores, guessed
    in, and half the lowest, guessed out.
    Raises ConfigError for fewer than 10 canaries.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_in, bool)
    if len(values) != len(truth) or len(values) < 10 or not 0 < guess_fraction <= 1 or not np.isfinite(values).all():
        problem = f"{len(values)} scores and {len(truth)} coins, guess_fraction {guess_fraction}"
        raise ConfigError(problem, "finite scores of at least 10 canaries, each with its coin; guess_fraction in 0..1")
    n_each = max(1, int(len(values) * guess_fraction / 2))
    order = np.argsort(values, kind="stable")
    right = int(truth[order[-n_each:]].sum() + (~truth[order[:n_each]]).sum())
    low, max_epsilon = (_least_epsilon(len(values), 2 * n_each, count, delta) for count in (right, 2 * n_each))
    return Audit(epsilon_low=low, most=max_epsilon, right=right, guesses=2 * n_each, trials=len(values), delta=delta)


def many_runs(scores_in: Sequence[float], scores_out: Sequence[float], delta: float, threshold: float) -> Audit:
    """Audit epsilon by the scores of one row in runs with it and in runs without it.

    threshold: a score above it is a guess of "in"; choose it on other runs. Raises ConfigError without runs.
    """
    true_positives, false_positives = (
        int((np.asarray(scores, float) > threshold).sum()) for scores in (scores_in, scores_out)
    )
    runs, runs_without = len(scores_in), len(scores_out)
    if not (runs and runs_without):
        raise ConfigError(
            f"{runs} runs with the row and {runs_without} without", "scores_in and scores_out of one run or more each"
        )
    all_runs = runs + runs_without
    return Audit(
        epsilon_low=_of_rates(true_positives, runs, false_positives, runs_without, delta),
        most=_of_rates(runs, runs, 0, runs_without, delta),
        right=true_positives + runs_without - false_positives,
        guesses=all_runs,
        trials=all_runs,
        delta=delta,
    )


def _of_rates(true_positives: int, runs: int, false_positives: int, runs_without: int, delta: float) -> float:
    """Return the lower bound of epsilon from true and false positive rates.

    epsilon >= max(ln((TPR - delta) / FPR), ln((1 - FPR - delta) / (1 - TPR))), with the lower Clopper-Pearson end of
    TPR and the upper one of FPR. Each is one-sided at 97.5 %, so both hold together with 95 %.
    """
    low = float(binomtest(true_positives, runs).proportion_ci(CONFIDENCE, "exact").low)
    high = float(binomtest(false_positives, runs_without).proportion_ci(CONFIDENCE, "exact").high)
    ratios = [(low - delta) / high, (1 - high - delta) / (1 - low)]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


def _least_epsilon(trials: int, guesses: int, right: int, delta: float) -> float:
    """Return the largest epsilon that this number of right guesses refutes, by bisection to 1e-4; at most 60."""
    if _chance(trials, guesses, right, 0.0, delta) >= 1 - CONFIDENCE:
        return 0.0
    low, high = 0.0, MOST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        is_refuted = _chance(trials, guesses, right, middle, delta) < 1 - CONFIDENCE
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def _chance(trials: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return a bound on P[`right` or more right guesses] under (epsilon, delta)-DP.

    Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2. With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)), r
    guesses, m trials and v = `right`:

        P <= P[W >= v] + 2 m delta max_{i = 1..v} P[v > W >= v - i] / i

    Guesses are at best right like independent coins; delta allows some canaries to be revealed outright, which helps
    most where it lifts a likely count above v.
    """
    coin = 1 / (1 + math.exp(-epsilon))
    # below[i - 1] = P[v > W >= v - i]; lifted = max_i below[i - 1] / i
    below = np.cumsum(
        binom.pmf(np.arange(right - 1, -1, -1), guesses, coin)
    )  # of right - i .. right - 1, for i = 1 ..
    lifted = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, coin)) + 2 * trials * delta * lifted)


@dataclass(frozen=True)
class Exposure:
    """Exposure of one canary, in bits.

    repeats: how often it was trained on.
    chance: probability of this exposure or more if it was not trained on.
    """

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
    """Compute the exposure of a canary from its loss and the losses of other candidates.

    candidates: losses of the same row with other secrets, drawn as the canary's was. Ties count against the model.
    Raises ConfigError without candidates.
    """
    if not len(candidates):
        raise ConfigError(
            f"canary {name!r} has no candidates to be compared with", "255 other secrets show up to 8 bits"
        )
    rank, count = 1 + int((np.asarray(candidates, float) < loss).sum()), len(candidates) + 1
    bits, most_bits = math.log2(count / rank), math.log2(count)
    return Exposure(name, repeats, bits=bits, most_bits=most_bits, chance=rank / count)


@dataclass(frozen=True)
class Inversion:
    """Result of an inversion attack.

    attack: name of what was attacked.
    named: number of tokens that the attack named.
    precision: fraction of the named tokens that were there, 0..1.
    recall: fraction of the tokens that were there that were named, 0..1.
    is_blind: True if the update spans everything, so that the attack names no token.
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
    """Return the tokens whose row of the embedding's gradient is not zero.

    gradient: (V, D). tolerance: least norm of a row, relative to the largest one.
    """
    rows = np.linalg.norm(gradient.astype(np.float64), axis=1)
    return set(np.flatnonzero(rows > tolerance * rows.max()).tolist()) if rows.any() else set()


def from_factor(change: Array, a: Array, inputs: Array, tolerance: float = 1e-3) -> set[int] | None:
    """Return the tokens v whose A x_v lies in the row space of the change of B; None if it is blind.

    It is blind if the span has all R dimensions, or as many as `change` can have and names no token.
    change: (out, R), of B.
    a: (R, in).
    inputs: x_v (V, in), what the module reads where token v is alone, as in a first layer.
    tolerance: largest distance from the span, relative to the length of A x_v.
    Raises ConfigError for shapes that do not fit.
    """
    if change.shape[1] != a.shape[0] or a.shape[1] != inputs.shape[1]:
        shapes = f"change {change.shape}, A {a.shape}, inputs {inputs.shape}"
        raise ConfigError(f"{shapes} do not fit each other", "give all three of one module")
    _, sizes, rows = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    # change = U S V^T; span: (S, R), the rows of V^T whose singular value counts
    span = rows[sizes > tolerance * sizes[0]] if len(sizes) and sizes[0] else rows[:0]
    if len(span) == change.shape[1]:
        return None
    # mapped: (V, R), rows A x_v; outside: (V,), ||A x_v - span^T span A x_v||
    mapped = inputs.astype(np.float64) @ a.astype(np.float64).T
    outside = np.linalg.norm(mapped - mapped @ span.T @ span, axis=1)
    lengths = np.linalg.norm(mapped, axis=1)
    tokens = set(np.flatnonzero((outside <= tolerance * lengths) & (lengths > 0)).tolist())
    # a module with few outputs spans at most as many tokens; with more tokens it is blind, as one with few ranks is
    return None if not tokens and len(span) == min(change.shape) else tokens


def score_inversion(attack: str, predicted: Collection[int] | None, actual: Collection[int]) -> Inversion:
    """Compare the named tokens with those that were there; `predicted` None: the attack was blind."""
    if predicted is None:
        return Inversion(attack, 0, 0.0, 0.0, is_blind=True)
    right = len(set(predicted) & set(actual))
    return Inversion(
        attack, len(predicted), right / len(predicted) if predicted else 0.0, right / len(actual) if actual else 0.0
    )


@dataclass(frozen=True)
class AttackReport:
    """Report of the attacks on an adapter.

    claimed: privacy that is claimed for the adapter; None for none.
    skipped: attack -> reason why it was not made.
    """

    claimed: PrivacyBudget | None
    membership: tuple[Membership, ...] = ()
    canaries: tuple[Exposure, ...] = ()
    inversions: tuple[Inversion, ...] = ()
    audit: Audit | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise GateError if the audit refutes the claimed epsilon, or a claimed epsilon was not audited."""
        claimed, audit = (asdict(item) if item else None for item in (self.claimed, self.audit))
        if refutation := gate.audit_refutes_claim(claimed, audit):
            raise GateError(*refutation)

    def sentences(self) -> Iterator[str]:
        """Yield the findings, one line each."""
        yield (f"claimed: {gate.claim(asdict(self.claimed))}" if self.claimed else "no privacy is claimed")
        for finding in (*self.membership, *self.canaries, *self.inversions):
            yield str(finding)
        if "audit" not in self.skipped:
            yield str(self.audit) if self.audit else "no audit was made"
        for attack, reason in self.skipped.items():
            yield f"{attack}: not measured, {reason}"

    def write(self, folder: Path) -> Path:
        """Write the report beside the adapter in `folder`, atomically, and return the file.

        It is written even where `check` raises. Raises ArtifactError if `folder` holds no adapter.
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
    """Return the report beside an adapter.

    Raises ArtifactError if it is absent, incomplete, or about other files than those beside it.
    """
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
