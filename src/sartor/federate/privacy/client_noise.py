"""Client-level differential privacy in a secure sum: the distributed discrete Gaussian.

Kairouz, Liu, Steinke 2021, arXiv:2102.06387. t clients each add discrete Gaussian noise of variance sigma^2 = (z C)^2
/ t, in units of the step. C is the clip norm, z the noise multiplier. Their sum is close to one discrete Gaussian of
variance (z C)^2, up to tau. A sum of P values is then concentrated-DP like a Gaussian of multiplier z' (proposition
14):

    tau = 10 sum_{k=1}^{t-1} exp(-2 pi^2 sigma^2 k / (k + 1))
    z' = 1 / (D / (z C) + sqrt(P) tau),   D = C + step sqrt(P) / 2

D is the sensitivity: C, and what rounding to the nearest step can add. Unlike the paper there is no random rotation
and no conditional rounding: the 32-bit ring leaves steps so fine that D is C within a thousandth.

Dropouts and colluders: t is the least number of clients that the round needs (its threshold), less those who might
tell each other or the coordinator their noise, or send none (`rules.assumed_colluders`). If more stay or fewer
collude, there is more noise than was paid for. If fewer than the threshold stay, the secure sum must not be opened.
Both numbers stand in the signed manifest. A client refuses one that assumes fewer colluders than it does itself.

All noise is integer, so the low bits of a float reveal nothing (Mironov 2012). Each probability is right to a relative
1e-14, the accuracy of exp in fp64. Over P values that adds about P * 2e-14 to epsilon.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, InputError, RoundError
from sartor.federate.privacy.accountant import Spending
from sartor.federate.rounds.round_manifest import Manifest
from sartor.federate.secure.secagg_terms import default_colluders
from sartor.federate.updates import WEIGHT
from sartor.models.lora_tensors import Array, Tensors, norm

Source = Callable[[int], bytes]
Integers = NDArray[np.int64]
MOST_SIGMA = 2.0**40


def discrete_gaussian(sigma: float, count: int, source: Source = os.urandom) -> Integers:
    """Draw `count` integers with P[x] proportional to exp(-x^2 / (2 sigma^2)); shape (count,).

    Rejection sampling (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, algorithm 3): candidates are discrete Laplace
    of scale t = floor(sigma) + 1, accepted with probability exp(-(|x| - sigma^2 / t)^2 / (2 sigma^2)).
    sigma: 0..2^40; 0 gives zeros.
    source: returns as many random bytes as requested.
    Raises ConfigError for another sigma.
    """
    if not 0 <= sigma <= MOST_SIGMA:
        raise ConfigError(
            f"the noise has sigma {sigma:g} units of the ring; it must be in 0..2^40",
            "a smaller rules.noise in the recipe, or ClientNoise with a larger step",
        )
    if not sigma:
        return np.zeros(count, np.int64)
    scale, batches, missing = math.floor(sigma) + 1, [], count
    while missing > 0:
        candidates = _discrete_laplace(scale, 2 * missing + 16, source)
        distance = np.abs(candidates) - sigma**2 / scale
        accepted = candidates[_happens(np.exp(-(distance**2) / (2 * sigma**2)), source)][:missing]
        batches.append(accepted)
        missing -= len(accepted)
    return np.concatenate(batches) if batches else np.zeros(0, np.int64)


def _discrete_laplace(scale: int, count: int, source: Source) -> Integers:
    """Draw up to `count` integers with P[x] proportional to exp(-|x| / scale).

    Algorithm 2 of Canonne, Kamath, Steinke 2020, arXiv:2004.00010: |x| = low + scale * k, with low in 0..scale - 1
    accepted with probability exp(-low / scale), P[k] proportional to exp(-k), and a fair sign.
    """
    # |x| = low + scale k:  P[|x|] ~ exp(-low / scale) exp(-k)
    low = _below(scale, count, source)
    low = low[_happens(np.exp(-low / scale), source)]
    size = low + scale * _geometric(len(low), source)
    is_negative = np.frombuffer(source(len(size)), np.uint8) < 128
    return np.where(is_negative, -size, size)[~(is_negative & (size == 0))]  # drop -0, else zero counts twice


def _geometric(count: int, source: Source) -> Integers:
    """Draw `count` geometric numbers, P[k] = (1 - 1/e) e^-k: successes of chance 1/e before the first failure."""
    counts, alive = np.zeros(count, np.int64), np.arange(count)
    while len(alive):
        alive = alive[_happens(np.full(len(alive), math.exp(-1)), source)]
        counts[alive] += 1
    return counts


def _below(bound: int, count: int, source: Source) -> Integers:
    """Draw up to `count` uniform integers in 0..bound - 1.

    Values at the end of the 64-bit range that would favour some remainders are dropped.
    """
    drawn = _words(count, source)
    return (drawn[drawn <= np.uint64(2**64 - 2**64 % bound - 1)] % np.uint64(bound)).astype(np.int64)


def _happens(chances: NDArray[np.float64], source: Source) -> NDArray[np.bool_]:
    """Draw one Bernoulli variable for each probability, with a resolution of 2^-64."""
    return (chances >= 1) | (
        _words(len(chances), source) < np.minimum(chances * 2.0**64, 2.0**64 - 2**11).astype(np.uint64)
    )


def _words(count: int, source: Source) -> NDArray[np.uint64]:
    return np.frombuffer(source(8 * count), np.uint64)


def gaussian(sigma: float, count: int, source: Source = os.urandom) -> NDArray[np.float64]:
    """Draw `count` Gaussian values of standard deviation sigma, shape (count,), fp64.

    Box & Muller 1958: x = sigma sqrt(-2 ln u) cos(2 pi v), y = sigma sqrt(-2 ln u) sin(2 pi v), with u uniform on (0,
    1] and v uniform on [0, 1), both of 53 bits. For sums that are rounded afterwards.
    """
    half = (count + 1) // 2
    uniforms = (_words(2 * half, source) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniforms[:half] + 1) / 2**53))
    angle = 2 * math.pi * uniforms[half:] / 2**53
    return sigma * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


# standard deviations beyond which a Gaussian value is neglected: probability 1e-32 a value
FAR = 12.0


@dataclass(frozen=True)
class ClientNoise:
    """Clipping and noise that every client of a round applies to its update, as in the signed manifest."""

    clip_norm: float = option(REQUIRED, "C: the Euclidean norm that an update has at most")
    noise_multiplier: float = option(REQUIRED, "z: standard deviation of the sum's noise over C")
    sharers: int = option(
        REQUIRED, "t: clients that surely add their share: the threshold, less those who might collude"
    )
    step: float = option(REQUIRED, "the value of one unit of the ring, as `step_of` has it")

    def __post_init__(self) -> None:
        if min(self.clip_norm, self.step) <= 0 or self.noise_multiplier < 0 or self.sharers < 1:
            raise ConfigError(
                f"{self} is no noise", "clip_norm and step above 0, noise_multiplier at least 0, sharers at least 1"
            )

    @property
    def sigma(self) -> float:
        """Standard deviation of one client's share, in units of the ring: z C / sqrt(t) / step."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.sharers) / self.step

    def effective_multiplier(self, values: int) -> float:
        """Return z', the noise multiplier of a Gaussian that reveals no less than the sum of `values` numbers.

        Kairouz, Liu, Steinke 2021, arXiv:2102.06387, proposition 14, with P = `values`; z' is a little below z. Raises
        ConfigError where it is below 0.95 z: the step is then too coarse.
        """
        if not self.noise_multiplier:
            return 0.0
        # D = C + step sqrt(P) / 2; tau = 10 sum_{k=1}^{t-1} exp(-2 pi^2 sigma^2 k / (k + 1)), sigma in steps
        # z' = 1 / (D / (z C) + sqrt(P) tau)
        sensitivity = self.clip_norm + self.step * math.sqrt(values) / 2
        tau = 10 * sum(math.exp(-2 * (math.pi * self.sigma) ** 2 * k / (k + 1)) for k in range(1, self.sharers))
        multiplier = 1 / (sensitivity / (self.noise_multiplier * self.clip_norm) + math.sqrt(values) * tau)
        if multiplier < 0.95 * self.noise_multiplier:
            finest = self.noise_multiplier * self.clip_norm / math.sqrt(self.sharers) / 3
            step = min(0.05 * self.clip_norm / math.sqrt(values), finest)
            problem = (
                f"at a step of {self.step:.3g} the noise counts as {multiplier:.3g}, not {self.noise_multiplier:g}"
            )
            raise ConfigError(problem, f"step: {step:.3g} or finer")
        return multiplier

    def spending(self, name: str, values: int) -> Spending:
        """Return the spending of a round whose upload has `values` numbers."""
        return Spending(name, self.effective_multiplier(values))

    def encoded(self, upload: Tensors, source: Source = os.urandom) -> dict[str, Integers]:
        """Return the update as integers in units of the ring, clipped and noised, in the shapes of `upload`.

        round(u min(1, C / ||u||) / step) + discrete Gaussian of `sigma`: a client's term of the secure sum. The ring
        takes it modulo its size. All weights are equal here (`round_manifest.UpdateRules`). Raises InputError for
        values that are not finite.
        """
        length = norm(upload)
        if not math.isfinite(length):
            raise InputError(f"this update has a norm of {length}", "lower the learning rate, and train again")
        # units = round(u min(1, C / ||u||) / step) + N_Z(0, sigma^2)
        factor = min(1.0, self.clip_norm / length) if length else 1.0
        return {
            name: np.rint(value.astype(np.float64) * (factor / self.step)).astype(np.int64)
            + discrete_gaussian(self.sigma, value.size, source).reshape(value.shape)
            for name, value in upload.items()
        }

    def mean_of(self, summed: Mapping[str, Integers], clients: int) -> dict[str, Array]:
        """Return the mean of the summed clients, in the shapes of `summed`, fp32; summed: in units of the ring."""
        return {name: (value * (self.step / clients)).astype(np.float32) for name, value in summed.items()}


def bound_of(clip_norm: float, noise_multiplier: float, sharers: int) -> float:
    """Return the largest magnitude of one client's value with its noise: C (1 + 12 z / sqrt(t)).

    A ring's scale has to leave room for it.
    """
    return clip_norm * (1 + FAR * noise_multiplier / math.sqrt(sharers))


def step_of(clip_norm: float, noise_multiplier: float, sharers: int, clients: int, bits: int = 32) -> float:
    """Return the finest step at which the noised values of all clients fit into the ring.

    step = n bound / (2^(bits - 1) - 1 - n) for n = `clients`, so that their sum cannot wrap.
    """
    return clients * bound_of(clip_norm, noise_multiplier, sharers) / (2 ** (bits - 1) - 1 - clients)


def sharers_of(threshold: int, colluders: int) -> int:
    """Return t, the clients that surely add noise which nobody else knows. Raises ConfigError if there are none."""
    if colluders >= threshold:
        raise ConfigError(
            f"{threshold} clients have to stay in the sum, and {colluders} might collude: nobody's noise is sure",
            f"rules: {{assumed_colluders: {max(0, threshold - 1)}}} or fewer, or more clients",
        )
    return threshold - colluders


def colluders_of(manifest: Manifest) -> int:
    """Return the assumed colluders of a manifest; one of an older version counts with the default."""
    stated, cohort_size = manifest.rules.assumed_colluders, len(manifest.terms.cohort)
    # the default of a cohort of one, which only a simulated attack has, would leave nobody
    return min(default_colluders(cohort_size), manifest.terms.threshold - 1) if stated is None else stated


def noise_of(manifest: Manifest) -> ClientNoise:
    """Return the noise of a manifest, in units of the ring; t is its threshold less its assumed colluders.

    Raises RoundError if its tensors have different units, ConfigError if all who must stay might collude.
    """
    units = {slot.scale for slot in manifest.terms.layout if slot.name != WEIGHT}
    if len(units) != 1:
        problem = f"the tensors of the round have {len(units)} different units, and noise is fitted to one"
        raise RoundError(problem, "make the layout by terms_for(...), which gives all tensors one unit", "noise")
    sharers = sharers_of(manifest.terms.threshold, colluders_of(manifest))
    return ClientNoise(manifest.rules.clip, manifest.rules.noise, sharers, units.pop())


def without_collusion(spent: Sequence[Spending], manifests: Mapping[str, Manifest]) -> list[Spending]:
    """Return the spendings as they are if nobody colludes.

    The threshold's clients then share the noise instead of t: z' sqrt(threshold / t). manifests: of the spendings, by
    name; others are returned as they are.
    """

    def scaled(spending: Spending) -> Spending:
        manifest = manifests.get(spending.name)
        if manifest is None:
            return spending
        threshold = manifest.terms.threshold
        factor = math.sqrt(threshold / sharers_of(threshold, colluders_of(manifest)))
        return replace(spending, noise_multiplier=spending.noise_multiplier * factor)

    return [scaled(spending) for spending in spent]


def values_of(manifest: Manifest) -> int:
    """Return the number of summed values of an update, P, without its weight."""
    return sum(slot.size for slot in manifest.terms.layout if slot.name != WEIGHT)


def noised(tensors: Tensors, manifest: Manifest) -> Tensors:
    """Return the update in whole units of the ring with this client's noise, in the shapes of `tensors`.

    Raises RoundError or ConfigError if the units do not suit the noise.
    """
    noise = noise_of(manifest)
    noise.effective_multiplier(values_of(manifest))
    return {name: units * noise.step for name, units in noise.encoded(tensors).items()}
