"""Who may come in: keys, the admin, foreign hosts and pages, rates, connections, and where a server may listen at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import serving
from sartor.core.errors import ConfigError, KeyRefusedError
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.http.auth_middleware import is_loopback
from sartor.serving.http.server import HttpServer, bind
from serving import chat

COMPLETIONS = "/v1/chat/completions"
FAQ, ALL, ADMIN = ({"authorization": f"Bearer key-{name}"} for name in ("faq", "all", "admin"))


async def ask(
    tmp_path: Path, *calls: tuple[str, str, Any, dict[str, str]], made: dict[str, Any] | None = None, **parts: Any
) -> Any:
    parts = {"keys": serving.KEYS, **parts}

    async with serving.client(serving.house(**parts), serving.team(tmp_path, **(made or {}))) as client:
        return [
            await client.request(method, path, json=body, headers=headers) for method, path, body, headers in calls
        ]


def statuses(answers: list[Any]) -> list[int]:
    assert all(answer.json()["error"]["remedy"] for answer in answers if answer.status_code >= 400)
    return [answer.status_code for answer in answers]


async def test_without_a_key_nothing_opens_but_health(tmp_path: Path) -> None:
    wrong = [{}, {"authorization": "Bearer nobody"}, {"authorization": "Basic a2V5"}, {"authorization": "Bearer "}]
    answers = await ask(tmp_path, *(("POST", COMPLETIONS, chat(), headers) for headers in wrong))
    assert statuses(answers) == [401] * 4
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    paths = ("/v1/models", "/metrics", "/v1/agents", "/v1/receipts/r1", "/nothing")
    assert statuses(await ask(tmp_path, *(("GET", path, None, {}) for path in paths))) == [401] * 5
    health, wrong_key = await ask(tmp_path, ("GET", "/health", None, {}), ("GET", "/health", None, wrong[1]))
    assert (health.status_code, health.json()["agents"], wrong_key.status_code) == (200, {}, 401)


async def test_the_key_of_one_agent_does_not_open_another(tmp_path: Path) -> None:
    replies = serving.Replies()
    own, version, base, auto, other, unknown = await ask(
        tmp_path,
        *(
            ("POST", COMPLETIONS, chat(model=model), FAQ)
            for model in ("faq", "faq@0.9", "base", "auto", "home", "nobody")
        ),
        replies=replies,
    )
    assert statuses([own, version, auto]) == [200] * 3
    assert statuses([base, other, unknown]) == [403, 403, 404]
    assert "home" not in unknown.text
    assert {request.openable for request in replies.asked} == {frozenset({"faq", "auto"})}
    models, one, health = await ask(
        tmp_path,
        ("GET", "/v1/models", None, FAQ),
        ("GET", "/v1/models/home", None, FAQ),
        ("GET", "/health", None, FAQ),
    )
    assert [model["id"] for model in models.json()["data"]] == ["auto", "faq", "faq@1.0", "faq@0.9"]
    assert one.status_code == 403
    assert list(health.json()["agents"]) == ["faq@1.0"]


async def test_vectors_need_a_key_of_what_makes_them(tmp_path: Path) -> None:
    body = {"model": "base", "input": "a"}
    answers = await ask(tmp_path, *(("POST", "/v1/embeddings", body, headers) for headers in (FAQ, ALL)))
    assert statuses(answers) == [403, 200]


async def test_receipts_and_feedback_need_a_key_of_their_agent(tmp_path: Path) -> None:
    receipt, feedback, own = (
        await ask(
            tmp_path,
            ("POST", COMPLETIONS, chat(model="home"), ALL),
            ("GET", "/v1/receipts/r1", None, FAQ),
            ("POST", "/v1/feedback", {"receipt": "r1", "rating": 1}, FAQ),
            ("GET", "/v1/receipts/r1", None, ALL),
        )
    )[1:]
    assert statuses([receipt, feedback, own]) == [403, 403, 200]


async def test_what_the_house_refuses_by_its_keys_is_403(tmp_path: Path) -> None:
    refused = serving.Replies(fail=KeyRefusedError("not for you", "another key"))
    assert statuses(await ask(tmp_path, ("POST", COMPLETIONS, chat(), ALL), replies=refused)) == [403]


async def test_metrics_are_for_whoever_may_know_of_every_agent(tmp_path: Path) -> None:
    answers = await ask(tmp_path, *(("GET", "/metrics", None, headers) for headers in (FAQ, ALL, ADMIN)))
    assert [answer.status_code for answer in answers] == [403, 200, 200]


async def test_the_admin_changes_agents_and_nobody_else(tmp_path: Path) -> None:
    roster = serving.Roster()
    calls = [
        ("/v1/agents/faq/promote", {"version": "1.1", "expected_version": "1.0"}),
        ("/v1/agents/faq/promote", {"version": "1.2", "expected_version": "1.0"}),
        ("/v1/agents/faq/promote", {"release": "/releases/bad"}),
        ("/v1/agents/faq/promote", {}),
        ("/v1/agents/faq/promote", {"version": "1", "release": "x"}),
        ("/v1/agents/none/promote", {"version": "1.1"}),
        ("/v1/agents/faq/rollback", {"expected_version": "1.1"}),
        ("/v1/agents/faq/drain", None),
        ("/v1/agents/faq/release", None),
    ]
    answers = await ask(tmp_path, *(("POST", path, body, ADMIN) for path, body in calls), agent_admin=roster)
    assert statuses(answers) == [200, 409, 422, 400, 400, 404, 200, 200, 200]
    assert answers[0].json() == {"name": "faq", "live": "1.1"}
    assert roster.live == {"faq": "0.9", "home": "2.0"}
    for headers in (FAQ, ALL):
        assert set(statuses(await ask(tmp_path, *(("POST", path, body, headers) for path, body in calls)))) == {403}
    (listed,) = await ask(tmp_path, ("GET", "/v1/agents", None, ADMIN))
    assert [(agent["name"], agent["live"]) for agent in listed.json()["agents"]] == [("faq", "1.0"), ("home", "2.0")]


@pytest.mark.parametrize("keys", [{}, {"key-all": serving.KEYS["key-all"]}])
async def test_without_an_admin_key_the_admins_routes_are_off(tmp_path: Path, keys: Any) -> None:
    paths = ("/v1/agents/faq/promote", "/v1/agents/faq/drain")
    answers = await ask(tmp_path, *(("POST", path, {"version": "1"}, ALL) for path in paths), keys=keys)
    assert statuses(answers) == [403, 403]
    assert "--admin" in answers[0].text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8440"}, 200),
        ({"host": "[::1]:8440"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "["}, 403),
        ({"host": "evil.example@127.0.0.1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8440"}, 200),
        ({"origin": "https://page.example"}, 200),
        ({"x-forwarded-for": "192.0.2.1"}, 403),
        ({"x-forwarded-proto": "https"}, 403),
        ({"x-forwarded-port": "443"}, 403),
        ({"forwarded": "for=192.0.2.1"}, 403),
        ({"x-real-ip": "127.0.0.1"}, 403),
        ({"via": "1.1 proxy"}, 403),
    ],
)
async def test_without_keys_foreign_hosts_and_pages_are_refused(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    made = {"http": {"cors": ("https://page.example",)}}
    assert statuses(await ask(tmp_path, ("POST", COMPLETIONS, chat(), headers), keys={}, made=made)) == [status]


async def test_cors_header_is_sent_only_for_named_origins(tmp_path: Path) -> None:
    """By default a preflight request gets no access-control-allow-origin."""
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
    (named,) = await ask(
        tmp_path, ("OPTIONS", COMPLETIONS, None, preflight), made={"http": {"cors": ("https://page.example",)}}
    )
    assert named.headers["access-control-allow-origin"] == "https://page.example"
    (by_default,) = await ask(tmp_path, ("OPTIONS", COMPLETIONS, None, preflight))
    assert "access-control-allow-origin" not in by_default.headers


async def test_a_body_that_a_form_could_send_is_refused(tmp_path: Path) -> None:
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        form = await client.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"})
        none = await client.post(COMPLETIONS, content=b"{}")
        result = [form, none]
    assert statuses(result) == [415, 415]


async def test_a_packed_body_is_refused(tmp_path: Path) -> None:
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(), {**ALL, "content-encoding": "gzip"}))
    assert answer.status_code == 415 and "without the header Content-Encoding" in answer.json()["error"]["remedy"]


async def test_a_rate_that_is_used_up_says_when_to_come_again(tmp_path: Path) -> None:
    rates = serving.Rates(most=1)
    first, second = await ask(tmp_path, *[("POST", COMPLETIONS, chat(), FAQ)] * 2, rates=rates)
    assert (first.status_code, second.status_code, second.headers["retry-after"]) == (200, 429, "13")
    assert rates.tokens == {"k1": 11}


async def test_too_many_connections_and_a_server_that_closes(tmp_path: Path) -> None:
    async with serving.client(serving.house(), serving.team(tmp_path, limits={"connections": -1})) as client:
        crowded = await client.get("/health")
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        client.server.lifetime.is_closing = True
        answers = [crowded, await client.post(COMPLETIONS, json=chat())]
    assert statuses(answers) == [503, 503]
    assert [answer.headers["retry-after"] for answer in answers] == ["5", "5"]
    assert "is stopping" in answers[1].json()["error"]["message"] and "in 5 s" in answers[1].json()["error"]["remedy"]


async def test_the_team_s_own_keys_open_the_door(tmp_path: Path) -> None:
    keys = ApiKeyStore.of(serving.team(tmp_path))
    agent, made = keys.make(["faq"])
    admin, _ = keys.make([], is_admin=True)

    async with serving.client(serving.house(authenticator=keys), serving.team(tmp_path)) as client:
        found = []
        for secret in (agent, admin, "sartor-000000000000-" + "a" * 43):
            headers = {"authorization": f"Bearer {secret}"}
            found.append((await client.post(COMPLETIONS, json=chat(), headers=headers)).status_code)
            found.append((await client.get("/v1/agents", headers=headers)).status_code)
        keys.revoke(made.id)
        found.append((await client.get("/v1/models", headers={"authorization": f"Bearer {agent}"})).status_code)
    result = found
    assert result == [200, 403, 403, 200, 401, 401, 401]
    keys.close()


def test_loopback_is_what_others_cannot_reach() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"))
    assert not any(
        is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "", "127.0.0.1.x")
    )


def test_without_keys_a_server_listens_on_loopback_only(tmp_path: Path) -> None:
    for http in ({"host": "0.0.0.0"}, {"host": "::"}, {"host": "example.org"}, {"cors": ("*",)}):
        with pytest.raises(ConfigError):
            HttpServer(serving.house(), serving.team(tmp_path, http=http))
        HttpServer(serving.house(keys=serving.KEYS), serving.team(tmp_path, http=http)).close()


def test_an_address_that_cannot_be_had_is_a_config_error(tmp_path: Path) -> None:
    with bind(serving.team(tmp_path)) as taken:
        taken.listen()
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"port": taken.getsockname()[1]}, "--port 0"),
            ({"port": 70_000}, "--port 0"),
            ({"host": "no.such.host.invalid"}, "--host 127.0.0.1"),
            ({"host": "192.0.2.1"}, "--host 127.0.0.1"),
        ]
        for http, remedy in wrong:
            with pytest.raises(ConfigError, match="cannot be listened on") as refused:
                bind(serving.team(tmp_path, http=http)).close()
            assert refused.value.remedy.startswith(remedy)
