"""Keys: shown once, stored as a digest, opening what they name and nothing else; rates by a clock of the test's own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from clock import Clock, clock  # noqa: F401
from sartor.core.errors import ArtifactError, BusyError, ConfigError, KeyRefusedError
from sartor.serving import api_keys as keys_module
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.rate_limits import MOST_KEYS, RateLimiter
from sartor.serving.registry.registry_schema import open_database
from sartor.serving.team_config import RequestLimits, Team


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "registry.sqlite"


@pytest.fixture
def keys(file: Path, clock: Clock) -> Iterator[ApiKeyStore]:
    opened = ApiKeyStore(open_database(Team(base="starter", state=str(file.parent)).registry_url), clock)
    yield opened
    opened.close()


def test_a_key_opens_the_agents_that_it_names_and_no_other(keys: ApiKeyStore) -> None:
    assert keys.is_open and not keys.has_admin
    secret, key = keys.make(["faq", "base"])
    assert not keys.is_open
    opened = keys.check(f"Bearer {secret}")
    assert (opened.key, opened.is_admin) == (key.id, False)
    assert [name for name in ("faq", "base", "auto", "faq2", "home", "*", "") if opened.opens(name)] == ["faq", "base"]
    everything = keys.admit(keys.make(["*"])[0])
    assert everything.agents is None and everything.opens("whatever") and not everything.is_admin


def test_admin_key_opens_no_agent_and_agent_key_is_no_admin(keys: ApiKeyStore) -> None:
    secret, _ = keys.make([], is_admin=True)
    opened = keys.admit(secret)
    assert opened.is_admin and keys.has_admin and not opened.opens("faq") and opened.agents == frozenset()
    assert not keys.admit(keys.make(["faq"])[0]).is_admin


def test_a_secret_is_nowhere_but_with_who_got_it(keys: ApiKeyStore, file: Path) -> None:
    secret, key = keys.make(["faq"])
    assert secret.startswith(f"sartor-{key.id}-") and len(secret.split("-", 2)[2]) == 43
    assert len({keys.make(["faq"])[0] for _ in range(5)}) == 5
    stored = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert secret.split("-", 2)[2].encode() not in stored and key.id.encode() in stored
    assert secret.split("-", 2)[2] not in json.dumps([one.as_json() for one in keys.listed()])


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer sk-1234",
        "Bearer sartor-000000000000-" + "A" * 43,
        "Bearer " + "x" * 9999,
        "Bearer sartor-\u0663\u0663\u0663-\udcff",
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(header: str, keys: ApiKeyStore) -> None:
    keys.make(["faq"])
    with pytest.raises(KeyRefusedError) as caught:
        keys.check(header)
    sent = header.partition(" ")[2]
    assert not sent.strip() or sent.strip() not in str(caught.value)


def test_wrong_secret_is_refused_in_constant_time(keys: ApiKeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret, an unknown id and nonsense each compare two digests of 64 characters."""
    secret, _ = keys.make(["faq"])
    compared = []
    compare = keys_module.hmac.compare_digest
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    other = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    for wrong in (other, "sartor-000000000000-" + "A" * 43, "nonsense"):
        with pytest.raises(KeyRefusedError, match="nobody has that API key"):
            keys.admit(wrong)
    assert len(compared) == 3 and all(len(digest) == 64 for pair in compared for digest in pair)


def test_revoked_key_is_refused_within_a_second(keys: ApiKeyStore, file: Path, clock: Clock) -> None:
    """A revocation by another process counts too, new keys are known sooner, and the server stays closed."""
    secret, key = keys.make(["faq"])
    assert keys.admit(secret)
    elsewhere = ApiKeyStore(open_database(f"sqlite:///{file}"))
    assert elsewhere.revoke(key.id).state == "revoked"
    new, _ = elsewhere.make(["home"])
    elsewhere.close()
    clock.now += keys_module.SOONER_S
    assert keys.admit(new).agents == {"home"}, "a key that was just made is known sooner"
    clock.now += keys_module.FRESH_S
    with pytest.raises(KeyRefusedError, match=f"{key.id} is revoked"):
        keys.admit(secret)
    assert not keys.is_open
    revoked = {one.id: one for one in keys.listed()}[key.id].revoked
    assert keys.revoke(key.id).revoked == revoked, "the first time counts"
    with pytest.raises(ConfigError, match=f"there are: .*{key.id}"):
        keys.revoke("nothing")


def test_unreadable_database_keeps_the_keys_last_read(keys: ApiKeyStore, file: Path, clock: Clock) -> None:
    """Unknown keys are refused meanwhile, and no key can be created."""
    secret, _ = keys.make(["faq"])
    keys.admit(secret)
    file.write_bytes(b"no database" * 1000)
    clock.now += 60
    assert keys.admit(secret).agents == {"faq"} and not keys.is_open
    with pytest.raises(KeyRefusedError, match="nobody"):
        keys.admit("sartor-000000000000-" + "A" * 43)
    with pytest.raises(ArtifactError):
        keys.make(["home"])


def test_a_key_ends_when_it_was_said_to(keys: ApiKeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_now", lambda: "2027-01-01T12:00:00Z")
    ends = {
        expires: keys.make(["faq"], expires=expires)
        for expires in ("2027-01-31", "2027-01-02T13:00:00+01:00", "400d", "12h")
    }
    assert ends["2027-01-31"][1].expires == "2027-02-01T00:00:00Z", "the last day is whole"
    secret, key = ends["2027-01-02T13:00:00+01:00"]
    assert key.expires == "2027-01-02T12:00:00Z" and keys.admit(secret)
    monkeypatch.setattr(keys_module, "_now", lambda: "2027-01-02T12:00:00Z")
    with pytest.raises(KeyRefusedError, match="is expired"):
        keys.admit(secret)
    assert [one.state for one in keys.listed()].count("expired") >= 1


@pytest.mark.parametrize(
    ("agents", "options", "said"),
    [
        ([], {}, "one of the two"),
        (["faq"], {"is_admin": True}, "one of the two"),
        (["../x"], {}, "cannot be an agent's name"),
        (["faq"], {"expires": "soon"}, "no span and no date"),
        (["faq"], {"expires": "2020-01-01"}, "is over already"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(agents: list[str], options: dict, said: str, keys: ApiKeyStore) -> None:
    with pytest.raises(ConfigError, match=said):
        keys.make(agents, **options)
    assert keys.is_open


def test_a_row_that_was_changed_from_outside_opens_nothing(keys: ApiKeyStore, file: Path, clock: Clock) -> None:
    secret, key = keys.make(["faq"])
    other, _ = keys.make(["home"])
    with sqlite3.connect(file) as connection:
        keys.admit(secret)
        connection.execute("update keys set agents = '[\"*\"]' where id = ?", (key.id,))
    connection.close()
    clock.now += keys_module.FRESH_S
    with pytest.raises(KeyRefusedError, match="changed from outside"):
        keys.admit(secret)
    with pytest.raises(ArtifactError, match="changed from outside"):
        keys.revoke(key.id)
    assert keys.admit(other).agents == {"home"} and len(keys.listed()) == 1 and not keys.is_open


def test_requests_and_tokens_are_limited_per_key() -> None:
    """A long reply is charged afterwards; idle time saves up no more than one minute."""
    clock = Clock()
    rates = RateLimiter(RequestLimits(requests_per_minute=6, tokens_per_minute=100), clock)
    for _ in range(6):
        rates.begin("one")
    with pytest.raises(BusyError, match="6 requests per minute") as caught:
        rates.begin("one")
    assert caught.value.retry_after_s == pytest.approx(10) and "limits.requests_per_minute" in caught.value.remedy
    rates.begin("two")
    clock.now += 10
    rates.begin("one")
    rates.count("two", 350)  # a long reply is paid for afterwards
    with pytest.raises(BusyError, match="100 tokens per minute") as caught:
        rates.begin("two")
    assert caught.value.retry_after_s == pytest.approx(251 * 60 / 100)
    clock.now += 251 * 60 / 100
    rates.begin("two")
    clock.now += 1e9
    for _ in range(6):
        rates.begin("two")
    with pytest.raises(BusyError):
        rates.begin("two")


def test_no_limit_is_none_and_the_memory_of_keys_is_bounded() -> None:
    free = RateLimiter(RequestLimits())
    for _ in range(1000):
        free.begin("")
    free.count("", 10**9)
    rates = RateLimiter(RequestLimits(requests_per_minute=1), Clock())
    for number in range(MOST_KEYS + 5):
        rates.begin(str(number))
    assert len(rates._buckets) == MOST_KEYS
