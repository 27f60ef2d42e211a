"""Pairwise masks and Shamir secret shares.

Every derived key is bound to the digest of the round's manifest, to its purpose and to its participants. A key of one
round, pair or use is therefore no key of another.

Shamir (CACM 1979): share i of secret s is f(i) = s + c_1 i + .. + c_{t-1} i^{t-1} mod p, p = 2**256 + 297. Any t =
`threshold` shares rebuild s; fewer reveal nothing of it, as every secret fits them equally well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import islice

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sartor.core import records
from sartor.core.errors import RoundError, SignatureError
from sartor.federate.secure.fixed_point import Vector

KEY_BYTES = 32
# numbers processed at a time, 256 KiB: the key stream and the part of the vector stay in the cache
_CHUNK = 1 << 16
_ZEROS = bytes(4 * _CHUNK)


def derive(secret: bytes, round_digest: str, *purpose: str, length: int = KEY_BYTES) -> bytes:
    """Return `length` bytes for one purpose of one round: HKDF-SHA256, salted with the round's digest."""
    return HKDF(hashes.SHA256(), length, bytes.fromhex(round_digest), records.canonical(purpose)).derive(secret)


def private_key(secret: bytes, round_digest: str, purpose: str) -> X25519PrivateKey:
    """Return the X25519 key that is derived from this secret for a purpose."""
    return X25519PrivateKey.from_private_bytes(derive(secret, round_digest, purpose))


def agree(private: X25519PrivateKey, public_bytes: bytes, name: str) -> bytes:
    """Return the X25519 secret that both sides share.

    Raises RoundError if the public key of `name` is malformed or of small order.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public_bytes))
    except ValueError:
        raise RoundError(f"the key of {name} agrees on nothing", "leave that client out", "keys") from None


def pair_key(agreed: bytes, round_digest: str, name: str, other: str) -> bytes:
    """Return the key of the mask between two clients, the same for both."""
    return derive(agreed, round_digest, "mask", *sorted((name, other)))


def sign_between(name: str, other: str) -> int:
    """Return 1 if `name` adds the mask of the pair, -1 if it subtracts it."""
    return 1 if name < other else -1


def add_stream(vector: Vector, key: bytes, sign: int) -> None:
    """Add (sign 1) or subtract (-1) the key's stream of numbers, modulo 2**32, in place.

    vector: (S,) uint32. The stream is ChaCha20 with a zero nonce, so a key may mask one vector only.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        numbers = np.frombuffer(stream.update(_ZEROS[: 4 * part.size]), "<u4")
        if sign > 0:
            part += numbers
        else:
            part -= numbers


def stream(key: bytes) -> Callable[[int], bytes]:
    """Return a reader of a key's stream: each call gives the next `count` bytes."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: encryptor.update(bytes(count))


def stream_bytes(key: bytes, count: int) -> bytes:
    """Return the first `count` bytes of a key's stream."""
    return stream(key)(count)


def seal(plain: bytes, agreed: bytes, round_digest: str, sender: str, recipient: str) -> bytes:
    """Return a message encrypted with ChaCha20-Poly1305 under a key of this round, pair and direction.

    The key seals one message only, so the nonce may be fixed.
    """
    key, associated_data = _box(agreed, round_digest, sender, recipient)
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, associated_data)


def unseal(sealed: bytes, agreed: bytes, round_digest: str, sender: str, recipient: str) -> bytes:
    """Decrypt what `seal` encrypted.

    Raises SignatureError if it was changed, or belongs to another round, sender or recipient.
    """
    key, associated_data = _box(agreed, round_digest, sender, recipient)
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, associated_data)
    except InvalidTag:
        raise SignatureError(
            f"the shares of {sender} for {recipient} were changed, or are of another round", "begin a new round"
        ) from None


def _box(agreed: bytes, round_digest: str, sender: str, recipient: str) -> tuple[bytes, bytes]:
    return derive(agreed, round_digest, "box", sender, recipient), records.canonical([round_digest, sender, recipient])


PRIME = (1 << 256) + 297
SECRET_BYTES, SHARE_BYTES = 32, 33
# bytes of randomness a coefficient: 384 bits modulo the prime are uniform to 2**-127
COEFFICIENT_BYTES = 48


def split_secret(secret: bytes, threshold: int, indices: Iterable[int], randomness: bytes) -> dict[int, bytes]:
    """Return the Shamir share at each index, from 1.

    randomness: (threshold - 1) * 48 secret, uniform bytes, used for nothing else. Raises ValueError for a secret or a
    randomness of another length.
    """
    if len(secret) != SECRET_BYTES or len(randomness) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError("a secret has 32 bytes, and each coefficient 48 of randomness")
    pieces = (randomness[start : start + COEFFICIENT_BYTES] for start in range(0, len(randomness), COEFFICIENT_BYTES))
    coefficients = [int.from_bytes(piece, "big") % PRIME for piece in pieces]
    return {
        index: _evaluate(coefficients, int.from_bytes(secret, "big"), index).to_bytes(SHARE_BYTES, "big")
        for index in indices
    }


def _evaluate(coefficients: list[int], constant: int, index: int) -> int:
    """Return the polynomial's value at an index modulo PRIME, by Horner's rule; coefficients: from
    the highest power.
    """
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * index % PRIME
    return (value + constant) % PRIME


def combine_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret from the `threshold` shares with the lowest indices.

    s = sum_i f(i) w_i mod p, with Lagrange weights w_i. Raises RoundError if there are fewer shares, or if the result
    is no secret because a share was false.
    """
    if len(shares) < threshold:
        raise RoundError(
            f"{len(shares)} shares are there; {threshold} rebuild the secret", "wait for more clients", "threshold"
        )
    indices = tuple(islice(sorted(shares), threshold))
    secret = (
        sum(
            int.from_bytes(shares[index], "big") * weight
            for index, weight in zip(indices, _weights(indices), strict=True)
        )
        % PRIME
    )
    if secret >= 1 << (8 * SECRET_BYTES):
        raise RoundError("the shares rebuild no secret: one of them is false", "begin the round anew", "shares")
    return secret.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=256)
def _weights(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return the Lagrange weights of these indices for the value at 0: w_i = prod_{j != i} j / (j - i) mod p."""
    weights = []
    for index in indices:
        numerator, denominator = 1, 1
        for other in indices:
            if other != index:
                numerator, denominator = numerator * other % PRIME, denominator * (other - index) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
