"""Encrypted store of the owner's rows.

    FOLDER/diary   {"schema": 1, "kind": "diary", "name": ..., "generation": ..., "source": {...}, "wrapped": ...}
                   ID base64(nonce, ciphertext)          one line a row, ChaCha20-Poly1305 (RFC 8439)

The header wraps two secrets (`row_keys.py`): the key of the rows, and the key of their names in manifests. A row is
bound to its file, generation, index and id. One that is moved, repeated, removed from the middle or copied from an
older file cannot be decrypted. Rows are padded, so that their lengths reveal little. An older copy of the whole file,
or a missing end, cannot be detected.

A row is on the disk when `add` returns. A power cut can damage at most the last line, which is left out and reported.
`add_all` stores many rows or none of them.
`forget` writes the other rows under a new key into a new file, which replaces the old one in one rename. Then the old
key is removed.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from sartor.core import records
from sartor.core.errors import BudgetError, BusyError, ConfigError, MissingError, SourceError, StoreError
from sartor.core.filesystem import DISK_FULL, FileSystem, PrivateFileSystem
from sartor.core.installation import upgrade_command
from sartor.core.records import Example
from sartor.edge.owner.row_keys import KEY_BYTES, NONCE_BYTES, KeySource, unwrap, wrap
from sartor.personalization.user_rows import UserRow, example_of, now

SCHEMA = 1
LIMIT_BYTES = 16 << 20
ROW_BYTES = 1 << 18
# Plaintexts are padded to multiples of this, which hides their exact lengths
PAD_BYTES = 256
# Maximum wait for another process
LOCK_S = 10.0
_LINE = re.compile(rb"[0-9a-f]{16} [A-Za-z0-9+/]+=*")
_TORN = "the last row is not whole and was left out: the power went while it was written, or it was changed since"


@dataclass
class _StoreState:
    """Content of the file.

    secret: key of the rows, then key of their names.
    is_torn: whether the last row is incomplete.
    """

    header: bytes
    secret: bytes
    lines: list[bytes] = field(default_factory=list)
    is_torn: bool = False

    @cached_property
    def header_fields(self) -> dict[str, Any]:
        """Header as a mapping."""
        result: dict[str, Any] = json.loads(self.header)
        return result

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + 1 + sum(len(line) + 1 for line in self.lines)

    @property
    def content(self) -> bytes:
        """Whole file as bytes."""
        return b"".join(line + b"\n" for line in (self.header, *self.lines))

    def seal(self, row: UserRow, index: int) -> bytes:
        """Return a row encrypted as the line at an index. Raises SourceError for a lone surrogate."""
        try:
            plaintext = records.canonical(row.as_json())
        except UnicodeEncodeError:
            raise SourceError(
                "the row holds half of a surrogate pair, which no file can",
                r"delete the lone \ud800 to \udfff from the line of the JSONL file, then sartor edge add NAME ROWS",
            ) from None
        plaintext += b" " * (-len(plaintext) % PAD_BYTES)
        nonce = os.urandom(NONCE_BYTES)
        sealed = ChaCha20Poly1305(self.secret[:KEY_BYTES]).encrypt(
            nonce, plaintext, self._associated_data(row.id, index)
        )
        return row.id.encode() + b" " + base64.b64encode(nonce + sealed)

    def decrypt(self, index: int) -> bytes | None:
        """Return the plaintext of the row at an index, or None if it cannot be decrypted."""
        try:
            id, _, sealed = self.lines[index].partition(b" ")
            content = base64.b64decode(sealed, validate=True)
            associated_data = self._associated_data(id.decode("ascii"), index)
            return ChaCha20Poly1305(self.secret[:KEY_BYTES]).decrypt(
                content[:NONCE_BYTES], content[NONCE_BYTES:], associated_data
            )
        except (InvalidTag, ValueError):
            return None

    def rows(self) -> list[UserRow]:
        """Return every row."""
        rows = []
        for index, line in enumerate(self.lines):
            content = self.decrypt(index)
            if content is not None:
                name = line.partition(b" ")[0].decode()
                rows.append(UserRow.from_json(name, json.loads(content)))
        return rows

    def _associated_data(self, id: str, index: int) -> bytes:
        """Return the data that bind a row to its file, generation, index and id."""
        return records.canonical([self.header_fields["name"], self.header_fields["generation"], index, id])


def _check_rating(rating: float | None) -> None:
    """Raise ConfigError for a rating outside -1..1."""
    if rating is not None and not -1 <= rating <= 1:
        raise ConfigError(f"the rating is {rating}; it is between -1 (bad) and 1 (good)", "rating=1.0")


class EncryptedRowStore:
    """Rows in a folder, which is created if absent.

    limit_bytes: of its file.
    notes: damage that was found, in words.

    Any number of processes may open it; each call holds it exclusively. Every call raises KeyRefusedError for a wrong
    key, StoreError if the file was changed, MissingError if the disk fails, and BusyError if another process holds it
    too long.
    """

    def __init__(
        self, folder: Path, source: KeySource, *, limit_bytes: int = LIMIT_BYTES, disk: FileSystem | None = None
    ) -> None:
        self.folder, self.limit_bytes, self.notes = folder.absolute(), limit_bytes, list[str]()
        self._source, self._disk = source, disk or PrivateFileSystem()
        self._file = self.folder / "diary"
        self._thread_lock = threading.Lock()
        self._cached_secret: tuple[bytes | None, bytes] = (None, b"")  # header, secret: a passphrase takes a second

    def add(self, row: Mapping[str, Any] | Example, rating: float | None = None, correction: str = "") -> str:
        """Store a row in any form that `curate` reads, with its rating, and return its id.

        The row is then on the disk. Raises ConfigError for a rating outside -1..1, SourceError for a row that cannot
        be read, BudgetError above the limit: nothing is dropped to make room.
        """
        _check_rating(rating)
        with self._exclusive("a row"):
            state = self._load()
            user_row = UserRow(secrets.token_hex(8), now(), example_of(row), rating=rating, correction=correction)
            line = state.seal(user_row, len(state.lines))
            self._check_size(state, [line])
            if state.is_torn:
                self._disk.replace(self._file, state.content)
            try:
                self._disk.append(self._file, line + b"\n")
                self._disk.sync(self._file)
            except OSError:
                with suppress(OSError):  # after a failed fsync, the cache may differ from the disk
                    self._disk.replace(self._file, state.content)
                raise
        return user_row.id

    def add_all(self, rows: Sequence[tuple[Mapping[str, Any] | Example, float | None, str]]) -> list[str]:
        """Store rows, each with its rating and correction, and return their ids.

        The file is replaced in one rename: a kill, a power cut, a full disk or an error leaves none of them. Raises
        what `add` raises.
        """
        for _, rating, _ in rows:
            _check_rating(rating)
        with self._exclusive("the rows"):
            state = self._load()
            earlier_content = state.content
            ids, lines = [], []
            for index, (row, rating, correction) in enumerate(rows, len(state.lines)):
                user_row = UserRow(secrets.token_hex(8), now(), example_of(row), rating=rating, correction=correction)
                ids.append(user_row.id)
                lines.append(state.seal(user_row, index))
            self._check_size(state, lines)
            state.lines += lines
            try:
                self._disk.replace(self._file, state.content)
            except OSError:
                with suppress(OSError):  # the rename may be done, and only the sync of the folder have failed
                    self._disk.replace(self._file, earlier_content)
                raise
        return ids

    def rows(self) -> list[UserRow]:
        """Return every row, the oldest first, in memory alone."""
        with self._exclusive("the rows"):
            return self._load().rows()

    def count(self) -> int:
        """Return the number of rows."""
        with self._exclusive("the rows"):
            return len(self._load().lines)

    def forget(self, chosen: Callable[[UserRow], bool]) -> tuple[str, ...]:
        """Erase the rows for which `chosen` is true, and give the others another key.

        Returns the ids of the erased rows. Nothing is written if none is chosen. A kill or a power cut leaves all
        rows under the old key, or the remaining ones under the new key.
        """
        with self._exclusive("the rows that stay"):
            state = self._load()
            rows = state.rows()
            removed_ids = tuple(row.id for row in rows if chosen(row))
            if removed_ids:
                removed = set(removed_ids)
                self._rewrite(state, [row for row in rows if row.id not in removed], self._source)
        return removed_ids

    def rekey(self, source: KeySource) -> None:
        """Encrypt the rows under the key of another source, or of another passphrase.

        The old one no longer decrypts them.
        """
        with self._exclusive("the rows"):
            state = self._load()
            self._rewrite(state, state.rows(), source)
            self._source = source

    def names(self, ids: Iterable[str]) -> dict[str, str]:
        """Return id -> name of the row in manifests.

        Names are keyed (HMAC-SHA-256, 128 bits), so that nobody else finds a row by its name. `forget` does not
        change them.
        """
        with self._exclusive("the rows"):
            key = self._load().secret[KEY_BYTES:]
        return {id: hmac.digest(key, id.encode(), "sha256").hex()[:32] for id in ids}

    def _rewrite(self, state: _StoreState, rows: Sequence[UserRow], source: KeySource) -> None:
        """Replace the file by these rows under a new key, then drop the old key."""
        fresh_state = self._fresh(state.header_fields["name"], state.secret[KEY_BYTES:], source)
        fresh_state.lines = [fresh_state.seal(row, index) for index, row in enumerate(rows)]
        self._disk.replace(self._file, fresh_state.content)
        source.settle(fresh_state.header_fields["source"])
        self._cached_secret = (fresh_state.header, fresh_state.secret)

    def _fresh(self, name: str, naming_key: bytes, source: KeySource) -> _StoreState:
        """Return the state of an empty file with a new key of the rows."""
        secret = secrets.token_bytes(KEY_BYTES) + naming_key
        header_fields = {"schema": SCHEMA, "kind": "diary", "name": name, "generation": secrets.token_hex(8)}
        return _StoreState(records.canonical(wrap(secret, header_fields, source, name)), secret)

    def _load(self) -> _StoreState:
        """Return the file's content, every row checked. Raises StoreError if it was changed."""
        if self._disk.stat(self._file) is None:
            fresh_state = self._fresh(secrets.token_hex(8), secrets.token_bytes(KEY_BYTES), self._source)
            self._disk.replace(self._file, fresh_state.content)
        with self._disk.open(self._file) as stream:
            header, *lines = stream.read().split(b"\n")
        is_torn = bool(lines and lines[-1])  # a whole file ends with a line end
        state = _StoreState(header, self._secret(header), [line for line in lines if line], is_torn)
        broken = 0
        while broken < len(state.lines) and state.decrypt(broken) is not None:
            broken += 1
        if tail := state.lines[broken:]:
            # one row that was being written is cut off, or garbage
            may_be_torn = sum(map(len, tail)) <= ROW_BYTES and not any(map(_LINE.fullmatch, tail[1:]))
            if not may_be_torn:
                raise StoreError(
                    f"row {broken + 1} of {self._file} was changed, moved or brought from elsewhere",
                    f"cp BACKUP/{self._file.name} {self._file}",
                )
            state.is_torn = True
            del state.lines[broken:]
            if _TORN not in self.notes:
                self.notes.append(_TORN)
        return state

    def _secret(self, header: bytes) -> bytes:
        """Return the secrets of a header. Raises StoreError, and KeyRefusedError for a wrong key."""
        cached_header, secret = self._cached_secret
        if header == cached_header:
            return secret
        try:
            fields = json.loads(header)
            is_ours = (
                fields["kind"] == "diary" and isinstance(fields["name"], str) and isinstance(fields["generation"], str)
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise StoreError(
                f"{self._file} is no diary, or its first line was changed", f"cp BACKUP/{self._file.name} {self._file}"
            )
        if fields.get("schema") != SCHEMA:
            raise StoreError(
                f"{self._file} has schema {fields.get('schema')!r}; this reads {SCHEMA}", upgrade_command()
            )
        secret = unwrap(fields, self._source)
        # a rename by a killed process is visible but maybe not durable: sync it before the old file's key is dropped
        self._disk.sync_folder(self.folder)
        self._source.settle(fields["source"])
        self._cached_secret = (header, secret)
        return secret

    def _check_size(self, state: _StoreState, lines: Sequence[bytes]) -> None:
        """Raise BudgetError if a new line, or the file with all of them, would be too large."""
        largest_bytes = max(map(len, lines), default=0)
        if largest_bytes > ROW_BYTES:
            raise BudgetError(
                f"the row takes {largest_bytes:,} bytes; a row may take {ROW_BYTES:,}",
                "cut the row into several lines of the JSONL file, then sartor edge add NAME ROWS",
            )
        new_bytes = sum(len(line) + 1 for line in lines)
        if state.size + new_bytes > self.limit_bytes:
            new_rows = f", and {len(lines):,} more take {new_bytes:,}" if len(lines) > 1 else ""
            raise BudgetError(
                f"{self._file} holds {len(state.lines):,} rows in {state.size:,} bytes{new_rows}; it may take "
                f"{self.limit_bytes:,}",
                "sartor edge forget NAME --before DATE erases older rows",
            )

    @contextmanager
    def _exclusive(self, subject: str) -> Iterator[None]:
        """Hold the folder exclusively. An OSError inside becomes a MissingError about `subject`."""
        with self._thread_lock:
            try:
                self._make_folder()
                unlock = self._lock()
                try:
                    self._disk.remove_leftovers(self._file)  # of a killed rewrite: they may hold erased rows
                    yield
                finally:
                    unlock()
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise MissingError(
                        f"the disk is full: {subject} could not be written",
                        f"df -h {self.folder} shows the full disk: remove something there",
                    ) from error
                raise MissingError(
                    f"{self._file} could not be used: {error.strerror or error}",
                    f"ls -ld {self.folder}; df -h {self.folder}; then the same command again",
                ) from error

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if self._disk.stat(path) is None]
        for path in reversed(missing):
            with suppress(FileExistsError):  # another process created it meanwhile
                self._disk.mkdir(path)
            self._disk.sync_folder(path.parent)

    def _lock(self) -> Callable[[], None]:
        """Return the unlock function of the folder. Raises BusyError after LOCK_S."""
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                return self._disk.lock(self.folder / "lock")
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)
