"""Keys are kept from others, never overwritten; a signature is believed only from a key that was trusted before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sartor.core import signing
from sartor.core.errors import ConfigError, SignatureError


def test_private_key_is_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    """keygen writes mode 0600 and refuses a folder that holds a key."""
    made = signing.keygen(tmp_path)
    assert stat.S_IMODE(os.stat(made["private"]).st_mode) == 0o600
    before = Path(made["private"]).read_bytes()
    with pytest.raises(ConfigError, match="holds a key already"):
        signing.keygen(tmp_path)
    assert Path(made["private"]).read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    made = signing.keygen(tmp_path)
    os.chmod(made["private"], 0o644)
    with pytest.raises(ConfigError, match="can be read by others .mode 644"):
        signing.open_private(tmp_path)


def test_a_passphrase_guards_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.PASSPHRASE_VARIABLE, "open sesame")
    signing.keygen(tmp_path)
    assert b"ENCRYPTED" in (tmp_path / "sartor.key").read_bytes()
    signing.open_private(tmp_path)
    monkeypatch.setenv(signing.PASSPHRASE_VARIABLE, "open barley")
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        signing.open_private(tmp_path)
    monkeypatch.delenv(signing.PASSPHRASE_VARIABLE)
    with pytest.raises(ConfigError, match="is encrypted"):
        signing.open_private(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    os.chmod(tmp_path / "k", 0o600)
    with pytest.raises(ConfigError, match="no PEM private key"):
        signing.open_private(tmp_path / "k")
    with pytest.raises(ConfigError, match="no PEM public key"):
        signing.open_public(tmp_path / "k")


def test_a_signature_holds_for_its_bytes_and_its_key_alone(tmp_path: Path) -> None:
    made = signing.keygen(tmp_path / "one")
    signing.keygen(tmp_path / "two")
    public = [signing.open_public(tmp_path / name) for name in ("one", "two")]
    (tmp_path / "signature").write_text(signing.sign(b"document", signing.open_private(tmp_path / "one")))
    assert signing.check(b"document", tmp_path / "signature", public) == made["key_id"]
    with pytest.raises(SignatureError, match="does not sign"):
        signing.check(b"dacument", tmp_path / "signature", public)
    with pytest.raises(SignatureError, match="does not trust"):
        signing.check(b"document", tmp_path / "signature", public[1:])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": 1, "algorithm": "rsa", "key_id": "x", "signature": "y"}', '{"schema": 9}']
)
def test_a_file_that_is_no_signature_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "signature").write_text(content)
    with pytest.raises(SignatureError, match="is not a signature of Sartor"):
        signing.check(b"", tmp_path / "signature", [])


def test_a_missing_key_is_made_for_its_purpose(tmp_path: Path) -> None:
    for purpose in signing.PURPOSES:
        with pytest.raises(ConfigError, match="no private key") as refused:
            signing.open_private(tmp_path / "k", purpose)
        assert refused.value.remedy == f"sartor keygen DIR --purpose {purpose} makes one"


def test_an_encrypted_key_names_a_command_that_sets_the_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bash, `set NAME` sets no variable."""
    monkeypatch.setenv(signing.PASSPHRASE_VARIABLE, "open sesame")
    signing.keygen(tmp_path)
    monkeypatch.delenv(signing.PASSPHRASE_VARIABLE)
    with pytest.raises(ConfigError, match="is encrypted") as refused:
        signing.open_private(tmp_path)
    assert refused.value.remedy == "read -rs SARTOR_KEY_PASSPHRASE; export SARTOR_KEY_PASSPHRASE"


def test_what_is_no_public_key_is_mended_where_it_was_named(tmp_path: Path) -> None:
    """--public-key is an option of some commands alone."""
    (tmp_path / "k.pub").write_text("no key")
    with pytest.raises(ConfigError) as refused:
        signing.open_public(tmp_path / "k.pub")
    assert refused.value.remedy.startswith("--public-key ")
    with pytest.raises(ConfigError) as refused:
        signing.keygen(tmp_path / "new", purposes=("fleet",), upgrade=True)
    assert f"sartor keygen {tmp_path / 'new'} --purpose fleet" in refused.value.remedy
    assert "--public-key" not in refused.value.remedy
