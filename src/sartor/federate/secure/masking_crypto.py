"""Pairwise masks and Shamir secret shares.

Every derived key is bound to the digest of the round's manifest, to what it is for and to whom: a key of one round,
pair or use is no key of another.

Any `threshold` shares rebuild the secret; fewer say nothing of it, as every secret fits them equally well.
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
# 256 KiB at a time: the key stream and the part of the vector stay in the cache
_CHUNK = 1 << 16
_ZEROS = bytes(4 * _CHUNK)


def derive(secret: bytes, round_digest: str, *purpose: str, length: int = KEY_BYTES) -> bytes:
    """`length` bytes for one purpose of one round."""
    return HKDF(hashes.SHA256(), length, bytes.fromhex(round_digest), records.canonical(purpose)).derive(secret)


def private_key(secret: bytes, round_digest: str, purpose: str) -> X25519PrivateKey:
    """The X25519 key that this secret makes for a purpose."""
    return X25519PrivateKey.from_private_bytes(derive(secret, round_digest, purpose))


def agree(private: X25519PrivateKey, public_bytes: bytes, name: str) -> bytes:
    """The secret that both sides share. Raises RoundError for a key of `name` that is none, or of small order."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public_bytes))
    except ValueError:
        raise RoundError(f"the key of {name} agrees on nothing", "leave that client out", "keys") from None


def pair_key(agreed: bytes, round_digest: str, name: str, other: str) -> bytes:
    """The key of the mask between two clients, the same for both."""
    return derive(agreed, round_digest, "mask", *sorted((name, other)))


def sign_between(name: str, other: str) -> int:
    """Which of two clients adds their mask (1) and which takes it away (-1)."""
    return 1 if name < other else -1


def add_stream(vector: Vector, key: bytes, sign: int) -> None:
    """Add (1) or take away (-1), modulo 2**32 and in place, the numbers that the key streams. A key makes one mask,
    ever.
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
    """A key's stream: each call gives as many bytes as asked for, on from where the last one stopped."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: encryptor.update(bytes(count))


def stream_bytes(key: bytes, count: int) -> bytes:
    """`count` bytes of a key's stream, from its beginning."""
    return stream(key)(count)


def seal(plain: bytes, agreed: bytes, round_digest: str, sender: str, recipient: str) -> bytes:
    """ChaCha20-Poly1305 under a key of this direction, pair and round, which seals one message: its nonce may be
    fixed.
    """
    key, associated_data = _box(agreed, round_digest, sender, recipient)
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, associated_data)


def unseal(sealed: bytes, agreed: bytes, round_digest: str, sender: str, recipient: str) -> bytes:
    """What `seal` sealed. Raises SignatureError where it was changed, or is of another round, sender or recipient."""
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
# bytes of randomness a coefficient: what is left modulo the prime is even to 2**-127
COEFFICIENT_BYTES = 48


def split_secret(secret: bytes, threshold: int, indices: Iterable[int], randomness: bytes) -> dict[int, bytes]:
    """A share for each place (from 1). `randomness`: (threshold - 1) * 48 secret, uniform bytes, of no other use."""
    if len(secret) != SECRET_BYTES or len(randomness) != (threshold - 1) * COEFFICIENT_BYTES:
        raise ValueError("a secret has 32 bytes, and each coefficient 48 of randomness")
    pieces = (randomness[start : start + COEFFICIENT_BYTES] for start in range(0, len(randomness), COEFFICIENT_BYTES))
    coefficients = [int.from_bytes(piece, "big") % PRIME for piece in pieces]
    return {
        index: _evaluate(coefficients, int.from_bytes(secret, "big"), index).to_bytes(SHARE_BYTES, "big")
        for index in indices
    }


def _evaluate(coefficients: list[int], constant: int, index: int) -> int:
    """The polynomial at a place, by Horner's rule."""
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * index % PRIME
    return (value + constant) % PRIME


def combine_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the `threshold` shares at the lowest places.

    Raises RoundError where there are fewer, or where what comes out is no secret: a share was false.
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
    """Lagrange's weights of these places for the value at 0."""
    weights = []
    for index in indices:
        numerator, denominator = 1, 1
        for other in indices:
            if other != index:
                numerator, denominator = numerator * other % PRIME, denominator * (other - index) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(weights)
