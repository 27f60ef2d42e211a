"""Password hashes: Argon2id where `cryptography` has it, otherwise scrypt."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import threading
from typing import Any

from cryptography.exceptions import InvalidKey, UnsupportedAlgorithm

from sartor.core.errors import ConfigError

try:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
except ImportError:  # cryptography below 44
    Argon2id = None  # type: ignore[assignment, misc]

MIN_PASSWORD_CHARS = 10
MAX_PASSWORD_CHARS = 1000
# RFC 9106, section 4, second recommended option: 64 MiB, 3 passes, 4 lanes
_ARGON2: dict[str, Any] = {"length": 32, "iterations": 3, "lanes": 4, "memory_cost": 64 << 10}
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 15, 8, 3
# a hash takes 64 MiB: more at once would let a flood of logins fill the memory
_hashing = threading.BoundedSemaphore(2)


def hash_password(password: str) -> str:
    """Return the salted hash of a password, with its parameters, as text.

    Raises ConfigError for a password that is too short or too long.
    """
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise ConfigError(
            f"the password has {len(password)} characters; it must have {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS}",
            "choose a longer one, such as four words",
        )
    salt, secret = os.urandom(16), password.encode("utf-8", "surrogatepass")
    with _hashing:
        if Argon2id is not None:
            try:
                return Argon2id(salt=salt, **_ARGON2).derive_phc_encoded(secret)
            except (UnsupportedAlgorithm, AttributeError):  # an OpenSSL without it; cryptography below 45
                pass
        digest = _scrypt(secret, salt, (_SCRYPT_N, _SCRYPT_R, _SCRYPT_P))
    parts = [str(number) for number in (_SCRYPT_N, _SCRYPT_R, _SCRYPT_P)]
    parts += [base64.b64encode(data).decode() for data in (salt, digest)]
    return "scrypt$" + "$".join(parts)


def is_password(password: str, stored: str) -> bool:
    """Return whether a password is the one that was hashed. The comparison takes constant time.

    stored: result of `hash_password`; empty for an unknown user, for whom a hash is computed all the same, so that the
        time does not tell which users exist.
    """
    secret = password[: MAX_PASSWORD_CHARS + 1].encode("utf-8", "surrogatepass")
    if not stored:
        stored = _nobody()
        secret = b"\0" + secret  # never the password of the stand-in
    with _hashing:
        if stored.startswith("$argon2id$"):
            if Argon2id is None:  # cryptography became older: an owner makes a new link
                return False
            try:
                Argon2id.verify_phc_encoded(secret, stored)
            except (InvalidKey, ValueError):
                return False
            return True
        _, *numbers, salt, digest = stored.split("$")
        cost = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
        return hmac.compare_digest(_scrypt(secret, base64.b64decode(salt), cost), base64.b64decode(digest))


def _nobody() -> str:
    """Return a hash of a random password, made once for the process."""
    global _stand_in
    if not _stand_in:
        _stand_in = hash_password(base64.b64encode(os.urandom(24)).decode())
    return _stand_in


_stand_in = ""


def _scrypt(secret: bytes, salt: bytes, cost: tuple[int, int, int]) -> bytes:
    n, r, p = cost
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=256 << 20, dklen=32)
