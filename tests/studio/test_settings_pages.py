"""Settings: users by one-time links, keys without secrets, licences, storage, doctor, backup; for owners alone."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import sartor
from page_markup import Tags
from sartor.core.home import home
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.pages import settings_pages
from studio_artefacts import write_specialist
from studio_operations import ended, make_team
from studio_site import PASSWORD, Site

TABS = ("/settings", "/settings/keys", "/settings/licences", "/settings/storage", "/settings/doctor")
DOCTOR = {
    "cpu": {"name": "<b>Z80</b>", "cores": 1},
    "memory_bytes": 64_000,
    "free_disk_bytes": 1,
    "gpu": None,
    "compiler": None,
    "extras": {"tune": {"installed": False, "missing": ["torch"]}, "serve": {"installed": True, "missing": []}},
    "advice": ["apt-get install g++"],
}
ECHO = f"import json, sys; print(json.dumps({{'ran': sys.argv[1:], **{DOCTOR!r}}}))"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(made.folder / ".studio" / "jobs", (sys.executable, "-c", ECHO))
    yield made
    made.close()


def users(site: Site) -> dict[str, Role]:
    return {user.name: user.role for user in site.app.studio.accounts.list_users()}


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("path", TABS)
@pytest.mark.parametrize("is_full", [False, True])
def test_each_tab_is_shown_in_both_languages(site: Site, path: str, language: str, is_full: bool) -> None:
    if is_full:
        write_specialist(site.folder)
        make_team(site.folder / "team.yaml")
        sartor.keygen(home() / "keys" / "default", trust=True)
    page = site.page(path, **{"accept-language": language})
    assert f'<html lang="{language}">' in page and len(page) < 150_000
    assert not Tags(page).acting({"style", "srcdoc"})
    for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", page):
        before = page[: match.start()]
        assert "type=hidden" in match[0] or before.rfind("<label") > before.rfind("</label>"), match[0]


@pytest.mark.parametrize("role", [Role.VIEWER, Role.REVIEWER])
def test_settings_are_for_owners(site: Site, role: Role) -> None:
    site.client = site.new_client()
    site.log_in(role, "ben")
    assert "/settings" not in site.page("/")
    for path in TABS:
        assert site.client.get(path).status_code == 403
    for path in ("/settings/users", "/settings/backup", "/settings/storage", "/settings/doctor"):
        assert site.post(path, from_page="/", action="add", name="eve", role="owner").status_code == 403
    assert users(site) == {"ada": Role.OWNER, "ben": role}


def test_link_of_a_new_user_is_shown_once_and_works(site: Site) -> None:
    answer = site.post("/settings/users", from_page="/settings", action="add", name="ben", role="reviewer")
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    link = re.search(r"http://127\.0\.0\.1:8765(/welcome/[\w-]+)", answer.text)
    assert link and link[1] not in site.page("/settings") and "link not used yet" in site.page("/settings")
    assert site.app.studio.jobs.files.ids() == []
    guest = Site(site.folder)
    fields = {"password": PASSWORD, "repeated": PASSWORD}
    assert guest.post(link[1], from_page=link[1], **fields).status_code == 303
    assert guest.client.get(link[1]).status_code == 403
    guest.close()
    assert users(site) == {"ada": Role.OWNER, "ben": Role.REVIEWER}


def test_role_is_changed_and_user_removed(site: Site) -> None:
    site.post("/settings/users", from_page="/settings", action="add", name="ben", role="viewer")
    answer = site.post("/settings/users", from_page="/settings", action="change", name="ben", role="reviewer")
    assert answer.status_code == 303 and users(site)["ben"] is Role.REVIEWER
    assert site.post("/settings/users", from_page="/settings", action="remove", name="ben").status_code == 400
    site.post("/settings/users", from_page="/settings", action="remove", name="ben", sure="1")
    assert users(site) == {"ada": Role.OWNER}


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "remove", "sure": "1"},
        {"action": "change", "role": "viewer"},
        {"action": "add", "role": "viewer"},
        {"action": "add", "role": "god"},
        {"action": "burn", "role": "owner"},
        {"action": "add", "role": "viewer", "name": "<b>"},
        {"action": "change", "role": "owner", "name": "nobody"},
    ],
)
def test_last_owner_stays_and_wrong_forms_change_nothing(site: Site, fields: dict[str, str]) -> None:
    answer = site.post("/settings/users", from_page="/settings", **{"name": "ada", **fields})
    assert answer.status_code == 400 and users(site) == {"ada": Role.OWNER}


def test_invitation_follows_a_changed_role(site: Site) -> None:
    accounts = site.app.studio.accounts
    token = accounts.add_user("ben", Role.OWNER)
    accounts.change_role("ben", Role.VIEWER)
    invitation = accounts.invitation(token)
    assert invitation is not None and invitation.role is Role.VIEWER


def test_keys_show_ids_modes_and_no_secret(site: Site) -> None:
    made = sartor.keygen(home() / "keys" / "default", trust=True)
    other = site.folder / "keys"
    sartor.keygen(other)
    (other / "sartor.key").chmod(0o644)
    team = make_team(site.folder / "team.yaml")
    api = sartor.make_key(team, ["faq"])
    sartor.revoke_key(team, sartor.make_key(team, ["*"])["id"])
    page = site.page("/settings/keys")
    assert "SARTOR_HOME/keys/default/sartor.key" in page and made["key_id"] in page and "release" in page
    assert "keys/sartor.key" in page and "others can read it" in page and "chmod 600 keys/sartor.key" in page
    assert api["id"] in page and "revoked" in page and "registry.key" in page
    assert api["key"] not in page and api["key"].rpartition("-")[2] not in page
    for file in (home() / "keys" / "default" / "sartor.key", other / "sartor.key", team.parent / ".team/registry.key"):
        for line in file.read_bytes().splitlines():
            assert len(line) < 20 or line.startswith((b"-----", b"sartor-key")) or line.decode("latin-1") not in page


def test_damaged_key_is_named(site: Site) -> None:
    (site.folder / "keys").mkdir()
    for name in ("sartor.key", "sartor.pub"):
        (site.folder / "keys" / name).write_text("<script>")
    page = site.page("/settings/keys")
    assert "is no PEM public key" in page and "<script>" not in page.replace("<script defer", "")


def test_licences_show_what_they_permit(site: Site) -> None:
    write_specialist(site.folder)
    manifest = site.folder / "faq" / "data" / "manifest.json"
    assert "MIT" in manifest.read_text()
    page = site.page("/settings/licences")
    assert "faq/data" in page and "commercial, non-commercial, research, internal" in page
    row = settings_pages._licence_row("x", "dataset", [{"source": "x", "licence": "CC-BY-NC-4.0"}])
    assert "commercial" not in row.uses and row.objection
    assert "commercial" not in settings_pages._licence_row("x", "base", [{"source": "x", "licence": "???"}]).uses


def test_storage_counts_bytes_and_warns(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    write_specialist(site.folder)
    (site.folder / "faq" / "data" / "large.bin").write_bytes(b"x" * 3_300_000)
    (home() / "assets" / "old-0123").mkdir(parents=True)
    (home() / "assets" / "old-0123" / "weights").write_bytes(b"x" * 2_100_000)
    monkeypatch.setattr(settings_pages, "LITTLE_DISK_BYTES", 1 << 60)
    page = site.page("/settings/storage")
    text = Tags(page).text
    files = [file for file in (site.folder / "faq" / "data").rglob("*") if file.is_file()]
    size = sum(len(file.read_bytes()) for file in files)
    assert f"faq/data Dataset {size / 1e6:.1f} MB" in text and size > 3_300_000, text
    assert "Assets of older versions: 2.1 MB" in text and "may stop for want of room" in text, text
    assert site.post("/settings/storage", from_page="/settings/storage", cache="1").status_code == 303
    assert ended(site).result["ran"] == ["assets", "prune", "--cache", "--json"]
    assert "Commands lately" in site.page("/settings/storage")
    assert (home() / "assets" / "old-0123").is_dir(), "looking removes nothing"


def test_doctor_runs_as_a_job_and_its_advice_is_shown(site: Site) -> None:
    assert "not examined yet" in site.page("/settings/doctor")
    assert site.post("/settings/doctor", from_page="/settings/doctor").status_code == 303
    assert ended(site).result["ran"] == ["doctor", "--json"]
    page = site.page("/settings/doctor")
    assert "apt-get install g++" in page and "&lt;b&gt;Z80" in page and "torch" in page and "not installed:" in page


def test_backup_is_downloaded_without_sessions(site: Site, tmp_path: Path) -> None:
    answer = site.post("/settings/backup", from_page="/settings")
    assert (
        answer.headers["content-type"] == "application/zip" and "attachment" in answer.headers["content-disposition"]
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        (tmp_path / "copy.sqlite").write_bytes(archive.read("accounts.sqlite"))
    connection = sqlite3.connect(tmp_path / "copy.sqlite")
    assert connection.execute("select name from users").fetchall() == [("ada",)]
    assert connection.execute("select count(*) from sessions").fetchone() == (0,)
    connection.close()
    assert json.dumps(PASSWORD) not in answer.text
