"""Discrete Gaussian noise (Canonne, Kamath, Steinke 2020, arXiv:2004.00010), drawn from the system's randomness.

Integers only, so the bits of a float tell nothing (Mironov 2012). Each probability is right to a relative 1e-14, the accuracy
of exp in fp64; over P values that adds about P * 2e-14 to epsilon.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError

Source = Callable[[int], bytes]
Integers = NDArray[np.int64]
MOST_SIGMA = 2.0**40


def discrete_gaussian(sigma: float, count: int, source: Source = os.urandom) -> Integers:
    """`count` integers with probabilities proportional to exp(-x^2 / (2 sigma^2)). source: bytes, as many as asked.

    Candidates are discrete Laplace of scale t = floor(sigma) + 1, kept with exp(-(|x| - sigma^2 / t)^2 / (2 sigma^2)).
    Raises ConfigError for a sigma that is not in 0..2^40; 0 gives zeros.
    """
    if not 0 <= sigma <= MOST_SIGMA:
        raise ConfigError(f"the noise has sigma {sigma:g} units of the ring; it must be in 0..2^40", "a coarser step")
    if not sigma:
        return np.zeros(count, np.int64)
    scale, found, missing = math.floor(sigma) + 1, [], count
    while missing > 0:
        drawn = _discrete_laplace(scale, 2 * missing + 16, source)
        away = np.abs(drawn) - sigma**2 / scale
        kept = drawn[_happens(np.exp(-(away**2) / (2 * sigma**2)), source)][:missing]
        found.append(kept)
        missing -= len(kept)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _discrete_laplace(scale: int, count: int, source: Source) -> Integers:
    """Up to `count` integers with probabilities proportional to exp(-|x| / scale): a remainder, a quotient, a sign."""
    low = _below(scale, count, source)
    low = low[_happens(np.exp(-low / scale), source)]
    size = low + scale * _geometric(len(low), source)
    is_negative = np.frombuffer(source(len(size)), np.uint8) < 128
    return np.where(is_negative, -size, size)[~(is_negative & (size == 0))]  # zero has two signs, and one chance


def _geometric(count: int, source: Source) -> Integers:
    """How often in a row something of chance 1/e happens."""
    found, alive = np.zeros(count, np.int64), np.arange(count)
    while len(alive):
        alive = alive[_happens(np.full(len(alive), math.exp(-1)), source)]
        found[alive] += 1
    return found


def _below(bound: int, count: int, source: Source) -> Integers:
    """Integers in 0..bound - 1, each as likely: those at the end of 64 bits that would favour some are left out."""
    drawn = _words(count, source)
    return (drawn[drawn <= np.uint64(2**64 - 2**64 % bound - 1)] % np.uint64(bound)).astype(np.int64)


def _happens(chances: NDArray[np.float64], source: Source) -> NDArray[np.bool_]:
    """True with these chances, to 2^-64."""
    return (chances >= 1) | (_words(len(chances), source) < np.minimum(chances * 2.0**64, 2.0**64 - 2**11).astype(np.uint64))


def _words(count: int, source: Source) -> NDArray[np.uint64]:
    return np.frombuffer(source(8 * count), np.uint64)


def gaussian(sigma: float, count: int, source: Source = os.urandom) -> NDArray[np.float64]:
    """`count` Gaussian values of standard deviation sigma (Box & Muller 1958), for sums that are rounded afterwards."""
    half = (count + 1) // 2
    both = (_words(2 * half, source) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((both[:half] + 1) / 2**53))
    angle = 2 * math.pi * both[half:] / 2**53
    return sigma * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
