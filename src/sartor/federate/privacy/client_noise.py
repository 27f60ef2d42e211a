"""Client-level differential privacy in a secure sum.

The distributed discrete Gaussian (Kairouz, Liu, Steinke 2021, arXiv:2102.06387). The sum of t clients' noise, each of
variance sigma^2 = (z C)^2 / t, is nearly a discrete Gaussian of (z C)^2: how nearly is tau, 10 sum_{k<t} exp(-2 pi^2
sigma^2 k/(k + 1)) in units of the step, and the sum of P values is concentrated-DP as a Gaussian of multiplier 1 / (D
/ (z C) + sqrt(P) tau) is (proposition 14). D is C and what rounding to the nearest step can add, sqrt(P) / 2 steps. We
differ from the paper: no random rotation and no conditional rounding, since the 32-bit ring leaves steps so fine that
D is C within a thousandth.

Dropouts. t is the number of clients that the round needs at least, less those who might tell each other their noise.
If more survive there is more noise than was paid for; if fewer do, the secure sum must not be opened, so t stands in
the signed manifest beside the threshold, and is at most as high. A client that sends no noise takes its share out of
it: t is what is trusted.

Integers only, so the bits of a float tell nothing (Mironov 2012). Each probability is right to a relative 1e-14, the
accuracy of exp in fp64; over P values that adds about P * 2e-14 to epsilon.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, InputError, RoundError
from sartor.federate.privacy.accountant import Spending
from sartor.federate.rounds.round_manifest import Manifest
from sartor.federate.updates import WEIGHT
from sartor.models.lora_tensors import Array, Tensors, norm

Source = Callable[[int], bytes]
Integers = NDArray[np.int64]
MOST_SIGMA = 2.0**40


def discrete_gaussian(sigma: float, count: int, source: Source = os.urandom) -> Integers:
    """`count` integers with probabilities proportional to exp(-x^2 / (2 sigma^2)). source: bytes, as many as asked.

    Candidates are discrete Laplace of scale t = floor(sigma) + 1, kept with exp(-(|x| - sigma^2 / t)^2 / (2 sigma^2)).
    Raises ConfigError for a sigma that is not in 0..2^40; 0 gives zeros.
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
    """Up to `count` integers with probabilities proportional to exp(-|x| / scale): a remainder, a quotient, a sign."""
    low = _below(scale, count, source)
    low = low[_happens(np.exp(-low / scale), source)]
    size = low + scale * _geometric(len(low), source)
    is_negative = np.frombuffer(source(len(size)), np.uint8) < 128
    return np.where(is_negative, -size, size)[~(is_negative & (size == 0))]  # zero has two signs, and one chance


def _geometric(count: int, source: Source) -> Integers:
    """How often in a row something of chance 1/e happens."""
    counts, alive = np.zeros(count, np.int64), np.arange(count)
    while len(alive):
        alive = alive[_happens(np.full(len(alive), math.exp(-1)), source)]
        counts[alive] += 1
    return counts


def _below(bound: int, count: int, source: Source) -> Integers:
    """Integers in 0..bound - 1, each as likely: those at the end of 64 bits that would favour some are left out."""
    drawn = _words(count, source)
    return (drawn[drawn <= np.uint64(2**64 - 2**64 % bound - 1)] % np.uint64(bound)).astype(np.int64)


def _happens(chances: NDArray[np.float64], source: Source) -> NDArray[np.bool_]:
    """True with these chances, to 2^-64."""
    return (chances >= 1) | (
        _words(len(chances), source) < np.minimum(chances * 2.0**64, 2.0**64 - 2**11).astype(np.uint64)
    )


def _words(count: int, source: Source) -> NDArray[np.uint64]:
    return np.frombuffer(source(8 * count), np.uint64)


def gaussian(sigma: float, count: int, source: Source = os.urandom) -> NDArray[np.float64]:
    """`count` Gaussian values of standard deviation sigma (Box & Muller 1958), for sums that are rounded
    afterwards.
    """
    half = (count + 1) // 2
    uniforms = (_words(2 * half, source) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniforms[:half] + 1) / 2**53))
    angle = 2 * math.pi * uniforms[half:] / 2**53
    return sigma * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


# Gaussian values further out than this many standard deviations do not occur: 1e-32 a value
FAR = 12.0


@dataclass(frozen=True)
class ClientNoise:
    """What every client of a round does to its update, as the signed manifest says it."""

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
        """Standard deviation of one client's share, in units of the ring."""
        return self.noise_multiplier * self.clip_norm / math.sqrt(self.sharers) / self.step

    def effective_multiplier(self, values: int) -> float:
        """The noise multiplier of a Gaussian that tells no less than the sum of so many values does: a little below z.

        Raises ConfigError where it is below 0.95 z, since the step is too coarse.
        """
        if not self.noise_multiplier:
            return 0.0
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
        """What a round costs, whose upload has so many values."""
        return Spending(name, self.effective_multiplier(values))

    def encoded(self, upload: Tensors, source: Source = os.urandom) -> dict[str, Integers]:
        """The update as integers in units of the ring, clipped and noised: what a client puts into the secure sum.

        The ring takes them modulo its size. Weights are equal here (`round_manifest.UpdateRules`). Raises InputError
        for values that are not finite.
        """
        length = norm(upload)
        if not math.isfinite(length):
            raise InputError(f"this update has a norm of {length}", "lower the learning rate, and train again")
        factor = min(1.0, self.clip_norm / length) if length else 1.0
        return {
            name: np.rint(value.astype(np.float64) * (factor / self.step)).astype(np.int64)
            + discrete_gaussian(self.sigma, value.size, source).reshape(value.shape)
            for name, value in upload.items()
        }

    def mean_of(self, summed: Mapping[str, Integers], clients: int) -> dict[str, Array]:
        """The mean of the clients that were summed, from the sum in units."""
        return {name: (value * (self.step / clients)).astype(np.float32) for name, value in summed.items()}


def bound_of(clip_norm: float, noise_multiplier: float, sharers: int) -> float:
    """The largest magnitude that a value of one client has, its noise included: what a ring's scale has to leave room
    for.
    """
    return clip_norm * (1 + FAR * noise_multiplier / math.sqrt(sharers))


def step_of(clip_norm: float, noise_multiplier: float, sharers: int, clients: int, bits: int = 32) -> float:
    """The finest step at which so many clients each fit, noise included, into a ring of so many bits: their sum cannot
    wrap.
    """
    return clients * bound_of(clip_norm, noise_multiplier, sharers) / (2 ** (bits - 1) - 1 - clients)


def noise_of(manifest: Manifest) -> ClientNoise:
    """The noise that a manifest asks for: shared by as many clients as must stay to the end, in units of the ring.

    Raises RoundError where its tensors have unlike units, or units too coarse for the noise.
    """
    units = {slot.scale for slot in manifest.terms.layout if slot.name != WEIGHT}
    if len(units) != 1:
        problem = f"the tensors of the round have {len(units)} different units, and noise is fitted to one"
        raise RoundError(problem, "make the layout by terms_for(...), which gives all tensors one unit", "noise")
    return ClientNoise(manifest.rules.clip, manifest.rules.noise, manifest.terms.threshold, units.pop())


def values_of(manifest: Manifest) -> int:
    """How many values of an update are summed."""
    return sum(slot.size for slot in manifest.terms.layout if slot.name != WEIGHT)


def noised(tensors: Tensors, manifest: Manifest) -> Tensors:
    """The update in whole units of the ring, with this client's share added."""
    noise = noise_of(manifest)
    noise.effective_multiplier(values_of(manifest))
    return {name: units * noise.step for name, units in noise.encoded(tensors).items()}
