"""The page Team: what is live and how well it answers, changes by commands under the user's name, and refusals."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

import serving
from page_markup import HOSTILE, Tags
from sartor.core.errors import DeadlineError
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.server_presence import ServerPresence
from sartor.serving.team_config import load
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.server_traffic import local_address, quantile, read_server
from studio_operations import ECHO, TEAM, ended, make_team, version_of
from studio_site import Site, TestClient


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(made.folder / ".studio" / "jobs", (sys.executable, "-c", ECHO))
    yield made
    made.close()


@pytest.fixture
def team(site: Site) -> Path:
    return make_team(site.folder / "shop" / "team.yaml")


def act(site: Site, action: str, **fields: str) -> Any:
    path = "/team/shop/team.yaml"
    return site.post(path, from_page=path, agent="faq", action=action, **fields)


def test_folder_without_a_team_says_what_one_is(site: Site) -> None:
    (site.folder / "recipe.yaml").write_text("base: starter\ndata: faq\n")
    (site.folder / "broken.yaml").write_text("base: [\n")
    assert "class=empty" in site.page("/team")


@pytest.mark.parametrize("language", ["en", "de"])
def test_team_shows_versions_digests_and_the_log(site: Site, team: Path, language: str) -> None:
    listed = site.page("/team", **{"accept-language": language})
    assert 'href="/team/shop/team.yaml"' in listed and "<b>1.1</b>" in listed
    page = site.page("/team/shop/team.yaml", **{"accept-language": language})
    assert {"en": "live", "de": "gilt"}[language] in page
    for number in ("1.0", "1.1", "1.2"):
        assert f"{number}{'a' * 60}"[:12] in page and f"{number}{'d' * 60}"[:12] in page
    reasons = [page.index(reason) for reason in ("better on refunds", "release 1.2", "release 1.1", "release 1.0")]
    assert reasons == sorted(reasons)
    assert not Tags(page).acting({"style", "srcdoc"}) and len(page) < 150_000
    for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", page):
        before = page[: match.start()]
        assert "type=hidden" in match[0] or before.rfind("<label") > before.rfind("</label>"), match[0]


def test_team_that_never_ran_begins_nothing(site: Site) -> None:
    (site.folder / "team.yaml").write_text("base: starter\nagents: [{name: faq, release: faq-1.0}]\n")
    assert "ever started" in site.page("/team/team.yaml")
    assert not (site.folder / ".team").exists()


def test_promotion_is_a_command_with_author_and_expected_version(site: Site, team: Path) -> None:
    answer = act(site, "promote", version="1.2", expected="1.1", reason="--better")
    assert answer.status_code == 303 and answer.headers["location"] == "/team/shop/team.yaml"
    expected = ["agents", "promote", "faq", "1.2", "--expected-version=1.1", "--reason=--better", "--by=ada"]
    assert ended(site).result["ran"] == [*expected, f"--team={team}", "--json"]
    assert "Commands lately" in site.page("/team/shop/team.yaml")


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        (
            {"action": "canary", "version": "1.2", "percent": "12,5", "expected": "1.1"},
            ["promote", "faq", "1.2", "--canary=0.125", "--expected-version=1.1"],
        ),
        ({"action": "rollback", "expected": "1.1"}, ["rollback", "faq", "--expected-version=1.1"]),
        ({"action": "drain"}, ["drain", "faq"]),
    ],
)
def test_other_changes_are_commands(site: Site, team: Path, fields: dict[str, str], arguments: list[str]) -> None:
    assert act(site, **fields).status_code == 303
    assert ended(site).result["ran"] == ["agents", *arguments, "--by=ada", f"--team={team}", "--json"]


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "promote", "version": "9.9"},
        {"action": "promote", "version": "--help"},
        {"action": "canary", "version": "1.2", "percent": "0"},
        {"action": "canary", "version": "1.2", "percent": "nan"},
        {"action": "canary", "version": "1.2", "percent": "101"},
        {"action": "remove"},
        {"action": "rollback", "agent": "other"},
        {"action": "rollback", "reason": "x" * 501},
    ],
)
def test_wrong_form_starts_nothing(site: Site, team: Path, fields: dict[str, str]) -> None:
    path = "/team/shop/team.yaml"
    answer = site.post(path, from_page=path, **{"agent": "faq", **fields})
    assert answer.status_code == 400 and "Try:" in answer.text
    assert site.app.studio.jobs.files.ids() == []


def test_only_owners_change_and_only_by_the_page(site: Site, team: Path) -> None:
    path = "/team/shop/team.yaml"
    answer = site.client.post(path, data={"csrf": "0" * 64, "agent": "faq", "action": "rollback"})
    assert answer.status_code == 403
    for role, name in ((Role.REVIEWER, "ben"), (Role.VIEWER, "eve")):
        site.client = site.new_client()
        site.log_in(role, name)
        page = site.page(path)
        assert set(re.findall(r'<form[^>]*method=post action="([^"]+)"', page)) <= {"/logout", "/language"}
        assert site.post(path, from_page="/", agent="faq", action="rollback").status_code == 403
    assert site.app.studio.jobs.files.ids() == []


@pytest.mark.parametrize(
    "name", ["../team.yaml", "shop/../../team.yaml", "linked.yaml", "shop", "shop/.team.yaml", "x"]
)
def test_only_teams_below_the_folder_are_shown(site: Site, team: Path, name: str, tmp_path: Path) -> None:
    outside = make_team(tmp_path / "team.yaml")
    (site.folder / "linked.yaml").symlink_to(outside)
    assert site.client.get(f"/team/{name}").status_code == 404
    assert "linked" not in site.page("/team")


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], "\u202egnp.exe\x1b[31m", "word" * 200])
def test_hostile_names_and_reasons_are_shown_as_text(site: Site, team: Path, name: str) -> None:
    with closing(Registry.of(load(team))) as registry:
        registry.add(version_of(name, "1.0", facts={"licence": name}), cause=ChangeCause(name, name * 3))
        registry.note("faq", name)
    for path in ("/team", "/team/shop/team.yaml"):
        page = site.page(path)
        assert not Tags(page).acting(set()) and "\u202e" not in page and "\x1b" not in page
        assert not {tag for tag, _ in Tags(page).tags} & {"img", "style", "iframe"}, path
        scripts = [attributes for tag, attributes in Tags(page).tags if tag == "script"]
        assert all(attributes.get("src", "").startswith("/static/") for attributes in scripts)


def test_row_changed_from_outside_is_named_and_repaired(site: Site, team: Path) -> None:
    with closing(sqlite3.connect(team.parent / ".team" / "registry.sqlite")) as connection, connection:
        connection.execute("update agents set live = '1.0' where name = 'faq'")
    page = site.page("/team/shop/team.yaml")
    assert "changed from outside" in page and "value=repair" in page
    assert act(site, "repair").status_code == 303
    assert ended(site).result["ran"][:3] == ["agents", "repair", "faq"]


def test_frozen_trial_asks_the_owner(site: Site, team: Path) -> None:
    with closing(Registry.of(load(team))) as registry:
        registry.start_canary("faq", "1.2", 0.1, expected="1.1")
        registry.freeze("faq", "1.2", cause=ChangeCause("monitors", "2 of 3 keys disagree"))
    page = site.page("/team/shop/team.yaml")
    assert "1.2 is on trial: it answers 10 % of the requests" in page
    assert "The monitors ask you about 1.2" in page and "2 of 3 keys disagree" in page
    assert "End the trial" in page and '<option value="1.2" selected>' in page


@pytest.mark.services
def test_real_command_promotes_and_a_stale_page_is_refused(
    site: Site, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    site.app.studio.jobs = JobControl(site.folder / ".studio" / "jobs")
    act(site, "promote", version="1.2", expected="1.1", reason="fewer errors")
    assert ended(site).state.value == "done", site.app.studio.jobs.log_lines(ended(site).job.id)
    page = site.page("/team/shop/team.yaml")
    assert "1.1 → 1.2" in page and "<td>ada</td>" in page and "fewer errors" in page
    act(site, "rollback", expected="1.1")
    assert ended(site).result["error"]["kind"] == "ConflictError"
    page = site.page("/team/shop/team.yaml")
    assert "nothing was changed" in page and "Try:" in page and "1.2 → 1.1" not in page


def serve_scripted(team: Path, **parts: Any) -> HttpServer:
    return HttpServer(serving.house(**parts), serving.team(Path(load(team).state)), log=RequestLog(serving.Log()))


def test_traffic_and_health_come_from_the_server(site: Site) -> None:
    file = site.folder / "shop" / "team.yaml"
    make_team(file)
    replies = serving.Replies()
    with (
        serving.running(serve_scripted(file, replies=replies)) as address,
        closing(ServerPresence(Path(load(file).state))),
    ):
        file.write_text(TEAM.replace("PORT", address.rpartition(":")[2]))
        for number in range(5):
            replies.fail = DeadlineError("too slow", "ask for less") if number == 4 else None
            httpx.post(f"{address}/v1/chat/completions", json=serving.chat(), trust_env=False)
        page = site.page("/team/shop/team.yaml")
        listed = site.page("/team")
        assert f"{address} · 5 requests" in page or f"{address} · 4 requests" in page
        row = page[page.index(">1.0<") :][:1500]
        assert "<td class=n>4</td>" in row and re.search(r">\d\.\d\d s<", row) and "2 answered now, 1 wait" in row
    assert "degraded" in listed or "well" in listed
    assert "but does not answer" not in page


def test_server_with_keys_shows_its_traffic_to_the_admin_alone(
    site: Site, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SARTOR_STUDIO_KEY", raising=False)
    with serving.running(serve_scripted(team, keys=serving.KEYS)) as address:
        hidden = read_server(address)
        assert hidden is not None and not hidden.has_traffic and hidden.versions == {}
        monkeypatch.setenv("SARTOR_STUDIO_KEY", "key-admin")
        shown = read_server(address)
        assert shown is not None and shown.has_traffic
    assert read_server(address) is None


def test_server_that_shows_the_studio_is_on_its_page(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    team = make_team(tmp_path / "elsewhere" / "team.yaml")
    site = Site(tmp_path / "work", team=team)
    outer = Starlette()
    outer.mount("/studio", site.app)
    site.client = TestClient(outer, base_url="http://127.0.0.1:8765/studio", follow_redirects=False)
    site.log_in()
    assert 'href="/studio/team/server"' in site.page("/team")
    assert "1.1" in site.page("/team/server")
    site.close()


@pytest.mark.parametrize(
    ("buckets", "fraction", "expected"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, float("inf"): 0.0}, 0.5, None),
        ({1.0: 5.0, 2.0: 10.0, float("inf"): 10.0}, 0.5, 1.0),
        ({1.0: 5.0, 2.0: 10.0, float("inf"): 10.0}, 0.75, 1.5),
        ({1.0: 0.0, 2.0: 4.0, float("inf"): 4.0}, 0.5, 1.5),
        ({1.0: 1.0, float("inf"): 100.0}, 0.95, 1.0),
    ],
)
def test_quantile_is_interpolated(buckets: dict[float, float], fraction: float, expected: float | None) -> None:
    assert quantile(buckets, fraction) == expected


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("127.0.0.1", 8440, "http://127.0.0.1:8440"),
        ("0.0.0.0", 80, "http://127.0.0.1:80"),
        ("::1", 80, "http://[::1]:80"),
        ("evil.example", 80, ""),
        ("10.0.0.7", 80, ""),
        ("127.0.0.1", 0, ""),
    ],
)
def test_only_this_machine_is_asked(host: str, port: int, address: str) -> None:
    assert local_address(host, port) == address
