"""Where the key of a person's rows comes from: each source opens what it wrapped, and nothing else does."""

from __future__ import annotations

import base64
import json
import os
import sys
import types
from pathlib import Path

import pytest

from sartor.core.errors import ConfigError, ExtraError, KeyRefusedError, MissingError, StoreError
from sartor.edge.owner import row_keys
from sartor.edge.owner.row_keys import FileKey, Keyring, KeySource, Passphrase, unwrap, wrap

ABOUT = {"schema": 1, "generation": "g"}
SECRET = os.urandom(64)


class Backend(types.ModuleType):
    """What of the package `keyring` is used."""

    def __init__(self) -> None:
        super().__init__("keyring")
        self.held: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, user: str) -> str | None:
        return self.held.get((service, user))

    def set_password(self, service: str, user: str, text: str) -> None:
        self.held[service, user] = text


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend()
    monkeypatch.setitem(sys.modules, "keyring", made)
    return made


@pytest.fixture(params=["file", "keyring", "passphrase"])
def source(request: pytest.FixtureRequest, tmp_path: Path, backend: Backend) -> KeySource:
    made: dict[str, KeySource] = {
        "file": FileKey(tmp_path / "device/key"),
        "keyring": Keyring(),
        "passphrase": Passphrase("six random words", n=16),
    }
    return made[request.param]


def test_a_source_opens_what_it_wrapped(source: KeySource) -> None:
    assert unwrap(wrap(SECRET, ABOUT, source, "mine"), source) == SECRET


def test_the_header_holds_neither_secret_nor_key(source: KeySource) -> None:
    header = json.dumps(wrap(SECRET, ABOUT, source, "mine"))
    said, key = source.fresh("mine")
    assert base64.b64encode(SECRET).decode()[:20] not in header
    assert base64.b64encode(key).decode() not in json.dumps(said)


@pytest.mark.parametrize(
    "change", [{"generation": "h"}, {"wrapped": "AAAA"}, {"wrapped": base64.b64encode(bytes(92)).decode()}]
)
def test_a_header_that_was_changed_does_not_open(source: KeySource, change: dict[str, str]) -> None:
    with pytest.raises(KeyRefusedError, match="does not open"):
        unwrap({**wrap(SECRET, ABOUT, source, "mine"), **change}, source)


def test_a_header_without_its_parts_is_not_whole(source: KeySource) -> None:
    with pytest.raises(StoreError, match="not whole"):
        unwrap({"schema": 1, "wrapped": "AAAA"}, source)


def test_another_kind_of_source_is_named(tmp_path: Path) -> None:
    header = wrap(SECRET, ABOUT, Passphrase("words", n=16), "mine")
    with pytest.raises(KeyRefusedError, match="of the kind 'passphrase'"):
        unwrap(header, FileKey(tmp_path / "key"))


def test_the_key_that_is_left_opens_the_newer_header_alone(source: KeySource) -> None:
    """For a passphrase both open: it is not kept, and so cannot be dropped."""
    old = wrap(SECRET, ABOUT, source, "mine")
    others = wrap(SECRET, ABOUT, source, "theirs")
    new = wrap(SECRET, ABOUT, source, "mine")
    assert unwrap(old, source) == SECRET
    source.settle(new["source"])
    assert unwrap(new, source) == unwrap(others, source) == SECRET
    if source.kind != "passphrase":
        with pytest.raises(KeyRefusedError, match="does not hold the key"):
            unwrap(old, source)


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    source = FileKey(tmp_path / "device/key")
    header = wrap(SECRET, ABOUT, source, "mine")
    assert source.path.stat().st_mode & 0o777 == 0o600 and source.path.parent.stat().st_mode & 0o777 == 0o700
    for rights in (0o640, 0o604, 0o660):
        source.path.chmod(rights)
        with pytest.raises(ConfigError, match="chmod 600"):
            unwrap(header, source)
    source.path.chmod(0o600)
    (tmp_path / "link").symlink_to(source.path)
    with pytest.raises(ConfigError, match="no plain file"):
        unwrap(header, FileKey(tmp_path / "link"))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to somebody else needs root")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    source = FileKey(tmp_path / "key")
    header = wrap(SECRET, ABOUT, source, "mine")
    os.chown(source.path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to the user 12345"):
        unwrap(header, source)


def test_a_file_that_is_gone_or_not_whole_is_said(tmp_path: Path) -> None:
    source = FileKey(tmp_path / "key")
    header = wrap(SECRET, ABOUT, source, "mine")
    for content in (b"", b"[]", b'{"schema": 1, "keys": {"a": "AAAA"}}', b'{"schema": 2, "keys": {}}'):
        source.path.write_bytes(content)
        with pytest.raises(KeyRefusedError, match="no key of a device"):
            unwrap(header, source)
    source.path.unlink()
    with pytest.raises(KeyRefusedError, match="there is no key"):
        unwrap(header, source)


def test_a_wrong_passphrase_is_refused() -> None:
    header = wrap(SECRET, ABOUT, Passphrase("right", n=16), "mine")
    with pytest.raises(KeyRefusedError, match="passphrase does not open"):
        unwrap(header, Passphrase("wrong"))
    with pytest.raises(ConfigError, match="empty"):
        Passphrase("")
    assert "right" not in repr(Passphrase("right"))


@pytest.mark.parametrize("asked", [{"n": 1 << 30}, {"n": 3}, {"n": "many"}, {"salt": "§"}, {"r": None}])
def test_a_header_cannot_take_the_memory(asked: dict[str, object]) -> None:
    header = wrap(SECRET, ABOUT, Passphrase("words", n=16), "mine")
    with pytest.raises(StoreError, match="scrypt"):
        unwrap({**header, "source": {**header["source"], **asked}}, Passphrase("words"))


def test_the_stored_settings_are_those_that_hold() -> None:
    """Fresh keys take the settings of the page, not those of an older header."""
    said, _ = Passphrase("words").fresh("mine")
    assert (
        (said["n"], said["r"], said["p"])
        == (row_keys.SCRYPT_N, row_keys.SCRYPT_R, row_keys.SCRYPT_P)
        == (1 << 15, 8, 3)
    )
    other, _ = Passphrase("words").fresh("mine")
    assert other["salt"] != said["salt"]


def test_without_the_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(ExtraError, match="pip install keyring; or .*--row-key FILE"):
        Keyring().fresh("mine")


def test_a_keyring_that_does_not_answer_or_keeps_nothing_is_said(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "set_password", lambda *_: None)
    with pytest.raises(MissingError, match="did not keep"):
        Keyring().fresh("mine")

    def locked(*_: str) -> None:
        raise RuntimeError("locked")

    monkeypatch.setattr(backend, "get_password", locked)
    with pytest.raises(MissingError, match="RuntimeError: locked"):
        Keyring().fresh("mine")
