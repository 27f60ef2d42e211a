"""A team that had keys never opens by itself, and keys that cannot be read again hold for a minute: by a clock of the test's own."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import serving
from clock import Clock, clock  # noqa: F401
from sartor.core.errors import ArtifactError, ConfigError, KeyRefusedError, MissingError, UnavailableError
from sartor.serving import api_keys
from sartor.serving import api_keys as keys_module
from sartor.serving.api_keys import ApiKeyStore, KeyCache, KeyTable, remove_keys
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import open_database
from sartor.serving.team_config import CardTerms, McpTerms, Team
from serving import chat


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def opened(state: Path, clock: Clock, database_in: Path | None = None) -> ApiKeyStore:
    """As a server that starts has them. database_in: where the registry lies, if not in the state directory."""
    return ApiKeyStore(open_database(f"sqlite:///{(database_in or state) / 'registry.sqlite'}"), clock, state=state)


@pytest.fixture
def keys(state: Path, clock: Clock) -> Iterator[ApiKeyStore]:
    with closing(opened(state, clock)) as made:
        yield made


def change(state: Path, *statements: str) -> None:
    with closing(sqlite3.connect(state / "registry.sqlite")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def empty(state: Path) -> None:
    change(state, "delete from keys")


def lose_database(state: Path) -> None:
    """Another registry stands in its place, with nothing in it."""
    for file in state.glob("registry.sqlite*"):
        file.unlink()
    open_database(f"sqlite:///{state / 'registry.sqlite'}").close()


def is_lost(keys: ApiKeyStore, secret: str = "sartor-000000000000-" + "A" * 43) -> bool:
    """Whether everybody is refused, whatever is sent, with something to type."""
    for refused in (lambda: keys.is_open, lambda: keys.admit(secret)):
        with pytest.raises(UnavailableError) as caught:
            refused()
        assert "sartor agents key" in caught.value.remedy or "restart" in caught.value.remedy
    return True


def test_emptied_table_refuses_everybody_until_a_key_is_made(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    secret, _ = keys.make(["faq"])
    assert not keys.is_open
    empty(state)
    clock.now += keys_module.FRESH_S
    assert is_lost(keys, secret)
    with closing(opened(state, clock)) as restarted:
        assert is_lost(restarted, secret)
    with closing(opened(state, clock)) as elsewhere:
        new, _ = elsewhere.make(["faq"])
    clock.now += keys_module.FRESH_S
    assert not keys.is_open and keys.admit(new).agents == {"faq"}
    with pytest.raises(KeyRefusedError):
        keys.admit(secret)


@pytest.mark.parametrize("left", ["file", "registry", "memory"])
def test_each_mark_is_enough_alone(left: str, keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    keys.make(["faq"])
    assert not keys.is_open
    if left == "registry":
        (state / api_keys.FILE).unlink()
        empty(state)
    else:
        lose_database(state)
    if left == "memory":
        (state / api_keys.FILE).unlink()
        clock.now += keys_module.FRESH_S
        assert is_lost(keys)
    with closing(opened(state, clock)) as restarted:
        assert is_lost(restarted)


def test_new_key_ends_lost_state_after_registry_is_emptied(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    """The registry was replaced by an empty file; a key that is created elsewhere is admitted."""
    keys.make(["faq"])
    keys.listed()
    for file in state.glob("registry.sqlite*"):
        file.unlink()
    (state / "registry.sqlite").touch()
    clock.now += keys_module.STALE_S + 1
    assert is_lost(keys)
    with closing(opened(state, clock)) as elsewhere:
        new, _ = elsewhere.make(["faq"])
    clock.now += keys_module.FRESH_S
    assert keys.admit(new).agents == {"faq"} and not keys.is_open


def test_lost_mark_is_written_again(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    keys.make(["faq"])
    lose_database(state)
    clock.now += keys_module.MARK_AGAIN_S + 1
    assert is_lost(keys)
    (state / api_keys.FILE).unlink()
    with closing(opened(state, clock)) as restarted:
        assert is_lost(restarted), "the new registry has the mark too"


def test_keys_made_by_an_older_version_are_marked(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    keys.make(["faq"])
    change(state, "drop trigger events_delete", "delete from events")
    (state / api_keys.FILE).unlink()
    with closing(opened(state, clock)) as server:
        assert not server.is_open
    empty(state)
    assert (state / api_keys.FILE).exists()
    (state / api_keys.FILE).unlink()
    with closing(opened(state, clock)) as restarted:
        assert is_lost(restarted)


def test_events_say_when_keys_began_and_ended(state: Path, keys: ApiKeyStore) -> None:
    keys.make(["faq"])
    keys.make(["home"])
    keys.remove_all()
    with closing(Registry.open(f"sqlite:///{state / 'registry.sqlite'}")) as registry:
        assert [event.what for event in registry.events()] == [api_keys.KEYED, api_keys.UNKEYED]


def test_team_that_never_had_keys_stays_open(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    assert keys.is_open
    clock.now += 10 * keys_module.STALE_S
    assert keys.is_open
    (state / "registry.sqlite").write_bytes(b"no database" * 1000)
    clock.now += 10 * keys_module.STALE_S
    assert keys.is_open and not (state / api_keys.FILE).exists() and keys.troubles() == {}


def test_registry_of_an_older_version_without_keys_stays_open(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    with closing(opened(state, clock)) as other:
        assert other.is_open and other.listed() == []
    with closing(Registry.open(f"sqlite:///{state / 'registry.sqlite'}")) as registry:
        assert registry.events() == [], "to look at it marks nothing"


def test_stale_keys_hold_for_a_minute_and_come_back(
    keys: ApiKeyStore, state: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failed read is tried again a second later; none of them makes what is known any younger."""
    secret, _ = keys.make(["faq"])
    keys.admit(secret)
    whole = (state / "registry.sqlite").read_bytes()
    (state / "registry.sqlite").write_bytes(b"no database" * 1000)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a wall clock that is set back changes nothing
    for _ in range(60):
        clock.now += 1
        assert keys.admit(secret).agents == {"faq"} and not keys.is_open
    assert "cannot be read" in keys.troubles()[keys_module.TROUBLE]
    clock.now += 1
    assert is_lost(keys, secret)
    with pytest.raises(ArtifactError):
        keys.make(["home"])
    (state / "registry.sqlite").write_bytes(whole)
    clock.now += 1
    assert keys.admit(secret).agents == {"faq"} and not keys.is_open and keys.troubles() == {}


def test_key_revoked_while_registry_was_lost_is_refused_later(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    """While the registry is lost the key still works; it is refused once the registry is back."""
    secret, made = keys.make(["faq"])
    keys.admit(secret)
    hidden = state / "hidden.sqlite"
    (state / "registry.sqlite").rename(hidden)
    with closing(ApiKeyStore(open_database(f"sqlite:///{hidden}"), clock)) as elsewhere:
        elsewhere.revoke(made.id)
    clock.now += 30
    assert keys.admit(secret), "nothing is known of it here"
    (state / "registry.sqlite").unlink(missing_ok=True)
    hidden.rename(state / "registry.sqlite")
    clock.now += 1
    with pytest.raises(KeyRefusedError, match="is revoked"):
        keys.admit(secret)


def test_remove_all_opens_a_server_that_starts_and_no_other(keys: ApiKeyStore, state: Path, clock: Clock) -> None:
    keys.make(["faq"])
    keys.make(["home"])
    with closing(opened(state, clock)) as running:
        assert not running.is_open
        with closing(opened(state, clock)) as command:
            assert command.remove_all() == 2
        clock.now += keys_module.FRESH_S
        assert is_lost(running)
        clock.now += keys_module.MARK_AGAIN_S + 1
        assert is_lost(running) and not (state / api_keys.FILE).exists(), "what was taken back is not marked again"
        with closing(opened(state, clock)) as restarted:
            assert restarted.is_open
            restarted.make(["faq"])
            assert not restarted.is_open
            empty(state)
            clock.now += keys_module.FRESH_S
            assert is_lost(restarted), "and from a new key on it is as before"


def test_servers_with_one_registry_and_two_states(tmp_path: Path, clock: Clock) -> None:
    one, other, shared = tmp_path / "one", tmp_path / "other", tmp_path / "shared"
    shared.mkdir()
    with closing(opened(one, clock, shared)) as first, closing(opened(other, clock, shared)) as second:
        first.make(["faq"])
        assert not second.is_open and (other / api_keys.FILE).exists(), "a server marks its own state directory too"
        empty(shared)
        with closing(opened(tmp_path / "third", clock, shared)) as third:
            assert is_lost(third), "the registry's mark is everybody's"
        first.remove_all()
    with closing(opened(one, clock, shared)) as first, closing(opened(other, clock, shared)) as second:
        assert first.is_open
        with pytest.raises(UnavailableError) as caught:
            second.is_open  # noqa: B018
        assert "--remove-all" in caught.value.remedy


def test_remove_keys_is_a_verb(tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text("base: starter\n")
    keys = ApiKeyStore.of(Team(base="starter", state=str(tmp_path / ".team")))
    keys.make(["faq"])
    keys.close()
    assert remove_keys(tmp_path / "team.yaml")["removed"] == 1
    assert remove_keys(tmp_path / "team.yaml")["removed"] == 0


def test_keys_are_removed_where_there_is_no_state_directory(
    keys: ApiKeyStore, state: Path, tmp_path: Path, clock: Clock
) -> None:
    keys.make(["faq"])
    with closing(opened(tmp_path / "absent", clock, database_in=state)) as elsewhere:
        assert elsewhere.remove_all() == 1
    assert not (tmp_path / "absent").exists()


def test_mark_that_cannot_be_removed_is_named(keys: ApiKeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.make(["faq"])

    def refuse(state: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(api_keys, "remove_file", refuse)
    with pytest.raises(ConfigError, match="cannot be removed: Permission denied"):
        keys.remove_all()


TABLE = KeyTable({"a": None}, {}, api_keys.KEYED, False)


class Slow:
    """A database that answers when it is let; `failing`: then it does so with an error."""

    def __init__(self) -> None:
        self.let, self.failing = threading.Event(), False
        self.running = self.most = self.reads = 0
        self.lock = threading.Lock()

    def __call__(self) -> KeyTable:
        with self.lock:
            self.running, self.reads = self.running + 1, self.reads + 1
            self.most = max(self.most, self.running)
        self.let.wait(20)
        with self.lock:
            self.running -= 1
        if self.failing:
            raise MissingError("no server", "start it")
        return TABLE


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(api_keys, "WAIT_S", 0.2)
    return 0.2


def test_many_requests_share_one_read_and_wait_for_it_a_moment(clock: Clock, patient: float) -> None:
    slow = Slow()
    cache = KeyCache(slow, clock)
    slow.let.set()
    cache.table(1.0)
    slow.let.clear()
    clock.now += 5
    answers: list[KeyTable] = []
    threads = [threading.Thread(target=lambda: answers.append(cache.table(1.0))) for _ in range(24)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == [TABLE] * 24 and time.monotonic() - began < 5, "what was read last, since the database hangs"
    assert (slow.most, slow.reads, cache.age_s) == (1, 2, 5.0)
    began = time.monotonic()
    assert cache.table(1.0) == TABLE and time.monotonic() - began < patient, "nobody waits for the same read twice"
    slow.let.set()
    while cache.age_s:
        time.sleep(0.01)
    assert slow.reads == 2


def test_key_that_was_made_while_a_read_ran_is_looked_for_again(clock: Clock) -> None:
    slow = Slow()
    slow.let.set()
    cache = KeyCache(slow, clock)
    cache.table(1.0)
    slow.let.clear()
    clock.now += 5
    cache.poke(1.0)
    clock.now += 0.2  # it began before the key was made
    asking = threading.Thread(target=cache.table, args=(0.1,))
    asking.start()
    slow.let.set()
    asking.join(10)
    assert slow.reads == 3


def test_no_thread_left_is_a_read_that_failed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    slow.let.set()
    cache = KeyCache(slow, clock)
    cache.table(1.0)
    clock.now += 61

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert cache.table(1.0) == TABLE and cache.age_s == 61
    clock.now += 1
    assert cache.table(1.0) == TABLE and cache.age_s == 0


def test_first_read_raises_what_went_wrong(clock: Clock) -> None:
    slow = Slow()
    slow.failing = True
    slow.let.set()
    cache = KeyCache(slow, clock)
    for _ in range(2):
        with pytest.raises(MissingError, match="no server"):
            cache.table(1.0)
    slow.failing = False
    clock.now += 1
    assert cache.table(1.0) == TABLE


def test_read_that_began_before_a_change_is_not_believed(clock: Clock) -> None:
    slow = Slow()
    cache = KeyCache(slow, clock)
    cache.poke(1.0)
    cache.expire()
    slow.let.set()
    while not slow.reads or slow.running:
        time.sleep(0.01)
    assert cache.table(1.0) == TABLE and slow.reads == 2


CARD = "/.well-known/agent-card.json"
PUBLIC = ("/health", "/openapi.json", CARD)


def routes_of(description: Any) -> list[tuple[str, str]]:
    """Every method and path of the server, parameters filled in; and paths that the OpenAPI does not describe."""
    described = [
        (method.upper(), re.sub(r"{\w+}", "faq", path))
        for path, methods in description["paths"].items()
        for method in methods
    ]
    return [*described, ("POST", "/mcp"), ("GET", "/mcp"), ("POST", "/mcp/faq"), ("POST", "/nothing")]


async def test_every_route_is_shut_while_keys_are_lost(tmp_path: Path, state: Path, clock: Clock) -> None:
    pytest.importorskip("mcp")
    keys = opened(state, clock)
    secret, _ = keys.make(["*"])
    admin, _ = keys.make([], is_admin=True)
    team = serving.team(state, mcp=McpTerms(serve=True), a2a=CardTerms(card=True))

    async with serving.client(serving.house(authenticator=keys), team) as client:
        empty(state)
        clock.now += keys_module.FRESH_S
        routes = routes_of((await client.get("/openapi.json")).json())
        sent = [
            {},
            {"authorization": f"Bearer {secret}"},
            {"authorization": f"Bearer {admin}"},
            {"authorization": "Basic x"},
        ]
        shut = [
            (path, await client.request(method, path, json=chat(stream=True), headers=headers))
            for method, path in routes
            if path not in PUBLIC
            for headers in sent
        ]
        known = [await client.get(path, headers=headers) for path in PUBLIC for headers in sent[:2]]
        new, _ = keys.make(["*"])
        again = [
            await client.post("/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {new}"}),
            await client.post("/v1/chat/completions", json=chat(), headers=sent[1]),
            await client.post("/v1/chat/completions", json=chat()),
            await client.get("/health"),
        ]
    shut, known, again = shut, known, again
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/audio/speech",
        "/v1/feedback",
        "/v1/agents",
        "/v1/receipts/faq",
        "/mcp",
        "/metrics",
        "/v1/models",
    } <= {path for path, _ in shut}
    assert {(path, answer.status_code) for path, answer in shut if answer.status_code != 503} == set()
    errors = [answer.json()["error"] for _, answer in shut]
    assert all((error["kind"], error["code"]) == ("UnavailableError", "unavailable") for error in errors)
    assert all("sartor agents key NAME" in error["remedy"] and "had API keys" in error["message"] for error in errors)
    assert all(answer.headers["retry-after"] for _, answer in shut)
    health, _, description, _, card, _ = known
    assert (health.status_code, health.json()["status"]) == (503, "unavailable")
    assert "had API keys" in health.json()["troubles"]["API keys"]
    assert (description.status_code, card.status_code) == (200, 200) and "securitySchemes" in card.json()
    assert [answer.status_code for answer in again] == [200, 401, 401, 200]
    keys.close()


async def test_server_whose_keys_are_lost_starts_and_refuses(state: Path, clock: Clock) -> None:
    keys = opened(state, clock)
    keys.make(["faq"])
    empty(state)
    keys.close()
    for http in ({}, {"host": "0.0.0.0"}, {"cors": ("*",)}):
        restarted = opened(state, clock)
        house, team = serving.house(authenticator=restarted), serving.team(state, http=http)
        async with serving.client(house, team) as client:
            assert (await client.post("/v1/chat/completions", json=chat())).status_code == 503
        restarted.close()


async def test_card_asks_for_a_key_where_there_are_keys_alone(tmp_path: Path) -> None:
    team = serving.team(tmp_path, a2a=CardTerms(card=True))
    async with serving.client(serving.house(), team) as client:
        assert "securitySchemes" not in (await client.get(CARD)).json()
    async with serving.client(serving.house(keys=serving.KEYS), team) as client:
        assert "securitySchemes" in (await client.get(CARD)).json()
