"""Shamir's secret sharing (1979) of 32-byte secrets, over the integers modulo the smallest prime above 2**256.

Any `threshold` shares rebuild the secret; fewer say nothing of it, as every secret fits them equally well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice

from sartor.core.errors import RoundError

PRIME = (1 << 256) + 297
SECRET_BYTES, SHARE_BYTES = 32, 33
# bytes of randomness a coefficient: what is left modulo the prime is even to 2**-127
COEFFICIENT_BYTES = 48


def split(secret: bytes, threshold: int, places: Iterable[int], randomness: bytes) -> dict[int, bytes]:
    """A share for each place (from 1). `randomness`: (threshold - 1) * 48 secret, uniform bytes, of no other use."""
    if len(secret) != SECRET_BYTES or len(randomness) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError("a secret has 32 bytes, and each coefficient 48 of randomness")
    pieces = (randomness[start : start + COEFFICIENT_BYTES] for start in range(0, len(randomness), COEFFICIENT_BYTES))
    coefficients = [int.from_bytes(piece, "big") % PRIME for piece in pieces]
    return {place: _value(coefficients, int.from_bytes(secret, "big"), place).to_bytes(SHARE_BYTES, "big") for place in places}


def _value(coefficients: list[int], constant: int, place: int) -> int:
    """The polynomial at a place, by Horner's rule."""
    found = 0
    for coefficient in coefficients:
        found = (found + coefficient) * place % PRIME
    return (found + constant) % PRIME


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the `threshold` shares at the lowest places.

    Raises RoundError where there are fewer, or where what comes out is no secret: a share was false.
    """
    if len(shares) < threshold:
        raise RoundError(
            f"{len(shares)} shares are there; {threshold} rebuild the secret", "wait for more clients", "threshold"
        )
    used = tuple(islice(sorted(shares), threshold))
    found = (
        sum(int.from_bytes(shares[place], "big") * weight for place, weight in zip(used, _weights(used), strict=True)) % PRIME
    )
    if found >= 1 << (8 * SECRET_BYTES):
        raise RoundError("the shares rebuild no secret: one of them is false", "begin the round anew", "shares")
    return found.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=256)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of these places for the value at 0."""
    weights = []
    for place in places:
        over, under = 1, 1
        for other in places:
            if other != place:
                over, under = over * other % PRIME, under * (other - place) % PRIME
        weights.append(over * pow(under, -1, PRIME) % PRIME)
    return tuple(weights)
