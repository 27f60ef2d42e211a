"""Seals of database rows: an HMAC under a key that the database does not hold, or a plain checksum.

A seal covers every column of its row. Under a key it reads `hmac:ID:HEX`, where ID names the key; who can write to the
database, but cannot read the key, can then make no row that counts. Without a key it is a sha256 and detects damage
only. A row that is put back as it was at an earlier time keeps its seal in both cases: the registry's head tells.
"""

from __future__ import annotations

import hmac
import os
import secrets
import shlex
from collections.abc import Mapping
from hmac import compare_digest
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.errors import ConfigError
from sartor.core.filesystem import fsync_directory

KEY_BYTES = 32
PREFIX = "hmac"
COLUMN = "checksum"


class RowSeals:
    """Seals by one key.

    key: empty for plain checksums.
    id: 16 hex digits that name the key and do not reveal it; empty without one.
    """

    def __init__(self, key: bytes = b"") -> None:
        self._key = key
        self.id = hmac.digest(key, b"sartor row seals: id", "sha256").hex()[:16] if key else ""

    @property
    def prefix(self) -> str:
        """Beginning of every seal by this key; empty without a key."""
        return f"{PREFIX}:{self.id}:" if self._key else ""

    def seal(self, row: Mapping[str, Any]) -> str:
        """Return the seal of every column of a row except `checksum`.

        A row whose number the database assigns is sealed before it has that number.
        """
        content = {name: value for name, value in row.items() if name != COLUMN}
        if not self._key:
            return records.digest(content)
        return self.prefix + hmac.digest(self._key, records.canonical(content), "sha256").hex()

    def sealed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with its seal, to be written."""
        return {**row, COLUMN: self.seal(row)}

    def is_whole(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row that was read matches its seal."""
        try:
            return compare_digest(self.seal(row).encode(), str(row[COLUMN]).encode())
        except (TypeError, ValueError):  # bytes, or text with a lone surrogate: Sartor never writes these
            return False


def create_key(file: Path) -> bytes:
    """Create a key that only this user may read, or return the one that is there. Raises as `read_key`."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be made: {error.strerror}", "give a directory that can be written to"
        ) from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secrets.token_bytes(KEY_BYTES))
        stream.flush()
        os.fsync(descriptor)
    fsync_directory(file.parent)
    return read_key(file)


def read_key(file: Path) -> bytes:
    """Return the key in a file. Raises ConfigError if it is absent, truncated, or readable by others."""
    quoted = shlex.quote(str(file))
    try:
        mode, key = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}", f"ls -l {quoted}; then cp BACKUP {quoted}"
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{file} can be read by others (mode {mode & 0o777:o})", f"chmod 600 {quoted}")
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{file} has {len(key)} bytes, not {KEY_BYTES}", f"cp BACKUP/{shlex.quote(file.name)} {quoted}"
        )
    return key
