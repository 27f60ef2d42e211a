"""Users, links, sessions and lock-out of the studio, on a real SQLite file and a clock of the test's own."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sartor.core.errors import ConfigError, KeyRefusedError
from sartor.studio import passwords
from sartor.studio.accounts import (
    IDLE_S,
    INVITATION_S,
    LOCK_S,
    MAX_FAILURES,
    SESSION_S,
    Accounts,
    Role,
)
from sartor.studio.studio_folder import StudioFolder, back_up, restore

PASSWORD = "four words are enough"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def cheap_hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash takes a millisecond, but in the test of hashes."""
    cost = {"iterations": 3, "lanes": 4, "memory_cost": 64 << 10}
    if "hash" not in request.node.name:
        cost = {"iterations": 1, "lanes": 1, "memory_cost": 1024}
    monkeypatch.setattr(passwords, "_ARGON2", {"length": 32, **cost})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(tmp_path: Path, clock: Clock) -> Iterator[Accounts]:
    opened = Accounts(tmp_path / "hidden" / "accounts.sqlite", clock)
    yield opened
    opened.close()


def add(accounts: Accounts, name: str = "ada", role: Role = Role.OWNER) -> None:
    accounts.accept(accounts.add_user(name, role), name, PASSWORD)


@pytest.mark.parametrize("has_argon2", [True, False])
def test_hash_verifies_its_password_alone(has_argon2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_argon2:
        monkeypatch.setattr(passwords, "Argon2id", None)
    hashed = passwords.hash_password(PASSWORD)
    assert hashed.startswith("$argon2id$" if has_argon2 else "scrypt$")
    assert PASSWORD not in hashed and hashed != passwords.hash_password(PASSWORD)
    assert passwords.is_password(PASSWORD, hashed)
    assert not passwords.is_password(PASSWORD + "!", hashed)
    assert not passwords.is_password(PASSWORD, "")


@pytest.mark.parametrize("password", ["short", "x" * 1001])
def test_password_of_a_wrong_length_is_refused(password: str) -> None:
    with pytest.raises(ConfigError):
        passwords.hash_password(password)


def test_accounts_file_is_for_its_owner_alone(accounts: Accounts) -> None:
    assert stat.S_IMODE(accounts.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(accounts.file.parent.stat().st_mode) == 0o700


def test_no_secret_is_stored(accounts: Accounts) -> None:
    invitation = accounts.add_user("ada", Role.OWNER)
    session_before = accounts.file.read_bytes()
    accounts.accept(invitation, "ada", PASSWORD)
    session = accounts.log_in("ada", PASSWORD)
    content = session_before + b"".join(file.read_bytes() for file in accounts.file.parent.glob("accounts.sqlite*"))
    for secret in (invitation, session, PASSWORD):
        assert secret.encode() not in content


def test_link_works_once_and_within_a_day(accounts: Accounts, clock: Clock) -> None:
    token = accounts.add_user("ada", Role.REVIEWER)
    accounts.accept(token, "", PASSWORD)
    with pytest.raises(KeyRefusedError):
        accounts.accept(token, "", PASSWORD)
    late = accounts.add_user("bob", Role.VIEWER)
    clock.now += INVITATION_S + 1
    assert accounts.invitation(late) is None
    with pytest.raises(KeyRefusedError):
        accounts.accept(late, "", PASSWORD)


def test_first_owner_is_invited_until_there_is_one(accounts: Accounts) -> None:
    first, second = accounts.invite_owner(), accounts.invite_owner()
    assert accounts.invitation(first) is None
    owner = accounts.accept(second, "ada", PASSWORD)
    assert owner.role is Role.OWNER and accounts.invite_owner() == ""


def test_link_of_the_owner_takes_no_name_of_another(accounts: Accounts) -> None:
    add(accounts, "bob", Role.VIEWER)
    with pytest.raises(ConfigError):
        accounts.accept(accounts.invite_owner(), "bob", PASSWORD)


def test_session_ends_when_idle_and_after_a_week(accounts: Accounts, clock: Clock) -> None:
    add(accounts)
    token = accounts.log_in("ada", PASSWORD)
    assert accounts.user_of(token) is not None and accounts.user_of(token + "x") is None
    clock.now += IDLE_S + 1
    assert accounts.user_of(token) is None
    token = accounts.log_in("ada", PASSWORD)
    for _ in range(int(SESSION_S / IDLE_S) * 2):
        clock.now += IDLE_S / 2
        accounts.user_of(token)
    clock.now += 10
    assert accounts.user_of(token) is None


def test_log_out_and_new_password_end_sessions(accounts: Accounts) -> None:
    add(accounts)
    first, second = accounts.log_in("ada", PASSWORD), accounts.log_in("ada", PASSWORD)
    accounts.log_out(first)
    assert accounts.user_of(first) is None and accounts.user_of(second) is not None
    add(accounts)
    assert accounts.user_of(second) is None


@pytest.mark.parametrize("name", ["ada", "nobody"])
def test_failures_lock_a_name_ever_longer(accounts: Accounts, clock: Clock, name: str) -> None:
    add(accounts)
    for _ in range(MAX_FAILURES):
        with pytest.raises(KeyRefusedError, match="wrong"):
            accounts.log_in(name, "not the password")
    with pytest.raises(KeyRefusedError, match="locked for 60 s"):
        accounts.log_in(name, PASSWORD)
    clock.now += LOCK_S + 1
    with pytest.raises(KeyRefusedError, match="wrong"):
        accounts.log_in(name, "not the password")
    with pytest.raises(KeyRefusedError, match="locked for 120 s"):
        accounts.log_in(name, PASSWORD)


def test_success_forgets_failures(accounts: Accounts) -> None:
    add(accounts)
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            with pytest.raises(KeyRefusedError):
                accounts.log_in("ada", "not the password")
        accounts.log_in("ada", PASSWORD)


def test_last_owner_is_not_removed(accounts: Accounts) -> None:
    add(accounts)
    with pytest.raises(ConfigError):
        accounts.remove_user("ada")
    add(accounts, "bob")
    accounts.remove_user("ada")
    assert [user.name for user in accounts.list_users()] == ["bob"]


@pytest.mark.parametrize("name", ["", " ", "<b>", "a\u202eb", "x" * 61, "a\nb"])
def test_name_that_is_none_is_refused(accounts: Accounts, name: str) -> None:
    with pytest.raises(ConfigError):
        accounts.add_user(name, Role.VIEWER)


def test_roles_include_those_below() -> None:
    assert Role.OWNER.includes(Role.REVIEWER) and Role.REVIEWER.includes(Role.VIEWER)
    assert not Role.VIEWER.includes(Role.REVIEWER) and not Role.REVIEWER.includes(Role.OWNER)


def test_backup_restores_users_and_no_session(tmp_path: Path) -> None:
    folder = StudioFolder(tmp_path)
    accounts = Accounts(folder.accounts_file)
    add(accounts)
    session = accounts.log_in("ada", PASSWORD)
    file = tmp_path / "studio.zip"
    back_up(folder, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    add(accounts, "bob", Role.VIEWER)
    accounts.close()
    restore(folder, file)
    again = Accounts(folder.accounts_file)
    assert [user.name for user in again.list_users()] == ["ada"]
    assert again.user_of(session) is None and again.log_in("ada", PASSWORD)
    again.close()


def test_restore_refuses_what_is_no_backup(tmp_path: Path) -> None:
    folder = StudioFolder(tmp_path)
    Accounts(folder.accounts_file).close()
    file = tmp_path / "x.zip"
    file.write_bytes(b"no zip")
    with pytest.raises(ConfigError):
        restore(folder, file)
    with sqlite3.connect(folder.accounts_file) as connection:
        assert connection.execute("pragma quick_check").fetchone() == ("ok",)
