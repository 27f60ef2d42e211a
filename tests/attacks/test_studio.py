"""The studio: strangers, foreign pages, forged forms, paths, uploads and hostile rows get nothing and change nothing."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from page_markup import HOSTILE, Tags
from sartor.core.errors import MissingError
from sartor.core.records import Drop, Example, Message, Origin
from sartor.studio.accounts import MAX_FAILURES, SEEN_S, Role
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.request_guard import MAX_FORM_BYTES
from studio_artefacts import adapter_of, dataset_with, report_of, report_row, write_specialist
from studio_routes import routes_of
from studio_site import ADDRESS, PASSWORD, Site

READING = (
    "/",
    "/data",
    "/data/faq/data",
    "/row/faq/data?at=1",
    "/tune",
    "/tune/run/faq/adapter",
    "/tune/compare?run=faq/adapter",
    "/evaluate",
    "/evaluate/faq/report",
    "/artefact/faq/adapter",
    "/jobs",
    "/team",
    "/devices",
)
ACTING = {
    "/new/upload": Role.OWNER,
    "/new": Role.OWNER,
    "/new/forecast": Role.OWNER,
    "/tune/forecast": Role.OWNER,
    "/tune/start": Role.OWNER,
    "/tune/stop": Role.OWNER,
    "/tune/resume": Role.OWNER,
    "/evaluate": Role.OWNER,
    "/release": Role.OWNER,
    "/jobs/20260101-000000-000000000-abcdef/again": Role.OWNER,
    "/jobs/20260101-000000-000000000-abcdef/stop": Role.REVIEWER,
    "/talk": Role.REVIEWER,
    "/review/faq/data": Role.REVIEWER,
    "/talk/20260101-000000-000000000-abcdef": Role.REVIEWER,
    "/talk/20260101-000000-000000000-abcdef/clear": Role.REVIEWER,
    "/talk/20260101-000000-000000000-abcdef/stop": Role.REVIEWER,
    "/talk/20260101-000000-000000000-abcdef/feedback": Role.REVIEWER,
    "/talk/20260101-000000-000000000-abcdef/why": Role.REVIEWER,
    "/why/0123456789abcdef/trace": Role.REVIEWER,
    "/why/0123456789abcdef/suspects": Role.REVIEWER,
    "/why/0123456789abcdef/key": Role.OWNER,
    "/why/0123456789abcdef/ablate": Role.OWNER,
    "/why/0123456789abcdef/fix": Role.OWNER,
    "/team/team.yaml": Role.OWNER,
    "/devices/fleet/repository": Role.OWNER,
    "/devices/resume/wards.rounds": Role.OWNER,
    "/settings/users": Role.OWNER,
    "/settings/backup": Role.OWNER,
    "/settings/storage": Role.OWNER,
    "/settings/doctor": Role.OWNER,
}
# what a visitor without a session may ask or send
PUBLIC = ("/login", "/welcome", "/logout", "/language", "/static")
JOB = "20260101-000000-000000000-abcdef"


def paths_of(site: Site, method: str) -> list[str]:
    """Paths of all routes of a method that are for users alone, with names in place of their parameters."""
    paths = []
    for route in routes_of(site.app, method):
        if not route.path.startswith(PUBLIC):
            path = route.path.replace("{job_id}", JOB).replace("{name:path}", "faq/data")
            paths.append(re.sub(r"\{[^}]*\}", "1", path))
    assert len(paths) > 8
    return paths


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work", max_upload_bytes=20_000)
    made.app.studio.jobs = JobControl(tmp_path / "work" / ".studio" / "jobs", (sys.executable, "-c", "pass"))
    write_specialist(made.folder)
    yield made
    made.close()


def jobs_of(site: Site) -> list[str]:
    return site.app.studio.jobs.files.ids()


@pytest.mark.parametrize("path", [*READING, "/new", "/talk", "/tune/new", "/tune/draft/0123456789abcdef"])
def test_stranger_sees_no_page(site: Site, path: str) -> None:
    answer = site.client.get(path)
    assert answer.status_code == 303 and answer.headers["location"].startswith("/login?next=")
    assert answer.text == ""


def test_stranger_gets_no_stream_and_starts_nothing(site: Site) -> None:
    assert site.client.get("/jobs/x/events").status_code == 303
    assert site.client.get("/tune/events/faq/adapter").status_code == 303
    for path in paths_of(site, "GET"):
        answer = site.client.get(path)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/login"), path
    csrf = site.csrf("/login")
    for path in (*ACTING, *paths_of(site, "POST")):
        answer = site.client.post(path, data={"csrf": csrf, "adapter": "faq/adapter"}, headers={"origin": ADDRESS})
        assert answer.status_code == 303 and answer.headers["location"].startswith("/login"), path
    assert jobs_of(site) == []


@pytest.mark.parametrize("role", [Role.VIEWER, Role.REVIEWER])
def test_role_does_only_what_it_may(site: Site, role: Role) -> None:
    site.log_in(role)
    for path in READING:
        site.page(path)
    assert site.client.get("/new").status_code == 403
    assert site.client.get("/tune/new").status_code == 403
    assert site.client.get("/talk").status_code == (200 if role is Role.REVIEWER else 403)
    csrf = site.csrf("/")
    if role is Role.VIEWER:  # who only looks sends no form at all
        for path in paths_of(site, "POST"):
            assert site.client.post(path, data={"csrf": csrf}).status_code == 403, path
    for path, needed in ACTING.items():
        if not role.includes(needed):
            answer = site.client.post(path, data={"csrf": csrf, "adapter": "faq/adapter", "artefact": "faq/adapter"})
            assert answer.status_code == 403, path
    assert jobs_of(site) == []


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8765",
        "10.0.0.1",
        "[",
        "",
        "evil.example:8765@127.0.0.1",
    ],
)
def test_foreign_host_name_is_refused(site: Site, host: str) -> None:
    """DNS rebinding: the address is this machine's, the name is another's."""
    site.log_in()
    answer = site.client.get("/", headers={"host": host})
    assert answer.status_code in (400, 403) and "faq" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765"])
def test_names_of_this_machine_are_taken(site: Site, host: str) -> None:
    assert site.client.get("/login", headers={"host": host}).status_code == 200


def test_named_host_is_taken(tmp_path: Path) -> None:
    site = Site(tmp_path, hosts=["studio.example"])
    assert site.client.get("/login", headers={"host": "Studio.example"}).status_code == 200
    assert site.client.get("/login", headers={"host": "other.example"}).status_code == 403
    site.close()


@pytest.mark.parametrize("token", ["", "0" * 64, "é", None])
def test_form_without_its_token_changes_nothing(site: Site, token: str | None) -> None:
    site.log_in()
    fields = {"adapter": "faq/adapter"} | ({} if token is None else {"csrf": token})
    for path in (*ACTING, *paths_of(site, "POST"), "/logout", "/language"):
        assert site.client.post(path, data=fields).status_code == 403, path
    assert jobs_of(site) == [] and site.client.get("/").status_code == 200


def test_token_of_another_session_is_refused(site: Site) -> None:
    site.log_in()
    first = site.csrf("/")
    site.client = site.new_client()
    site.log_in(name="bob")
    assert site.client.post("/evaluate", data={"csrf": first, "adapter": "faq/adapter"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_form_of_a_foreign_page_is_refused_with_any_token(site: Site, headers: dict[str, str]) -> None:
    site.log_in()
    csrf = site.csrf("/")
    answer = site.client.post("/evaluate", data={"csrf": csrf, "adapter": "faq/adapter"}, headers=headers)
    assert answer.status_code == 403 and jobs_of(site) == []


def test_reading_changes_nothing(site: Site) -> None:
    """No GET acts, so a picture or a link of a foreign page cannot."""
    site.log_in()
    for path in (*ACTING, *paths_of(site, "GET")):
        assert site.client.get(path).status_code != 500
    assert jobs_of(site) == []


def test_cookies_are_strict_and_out_of_scripts_reach(site: Site) -> None:
    anonymous = site.client.get("/login").headers["set-cookie"]
    site.log_in()
    session = next(cookie for cookie in site.client.cookies.jar if "session" in cookie.name)
    assert len(session.value or "") >= 40
    for line in (anonymous, *_set_cookies(site)):
        assert "HttpOnly" in line and re.search("samesite=strict", line, re.IGNORECASE), line


def _set_cookies(site: Site) -> list[str]:
    client = site.new_client()
    page = client.get("/login").text
    csrf = re.search(r'name=csrf value="([0-9a-f]{64})"', page)
    assert csrf
    answer = client.post("/login", data={"csrf": csrf[1], "name": "ada", "password": PASSWORD, "next": "/"})
    assert answer.status_code == 303
    return answer.headers.get_list("set-cookie")


@pytest.mark.parametrize("cookie", ["x", "../../etc", "a" * 5000, "' or 1=1 --" + "a" * 20])
def test_invented_session_opens_nothing(site: Site, cookie: str) -> None:
    name = site.app.studio.session_cookie
    answer = site.client.get("/", headers={"cookie": f"{name}={cookie}"})
    assert answer.status_code == 303


def test_logged_out_session_opens_nothing(site: Site) -> None:
    site.log_in()
    kept = dict(site.client.cookies)
    assert site.post("/logout", from_page="/").status_code == 303
    site.client.cookies.update(kept)
    assert site.client.get("/").status_code == 303


def test_guessing_passwords_is_locked_out(site: Site) -> None:
    site.log_in()
    site.client = site.new_client()
    answers = [
        site.post("/login", from_page="/login", name="ada", password="wrong password", next="/")
        for _ in range(MAX_FAILURES + 1)
    ]
    assert {answer.status_code for answer in answers} == {403} and "locked" in answers[-1].text
    right = site.post("/login", from_page="/login", name="ada", password=PASSWORD, next="/")
    assert right.status_code == 403 and "locked" in right.text


def test_login_tells_not_which_users_exist(site: Site) -> None:
    site.log_in()
    site.client = site.new_client()
    pages = []
    for name in ("ada", "nobody"):
        answer = site.post("/login", from_page="/login", name=name, password="wrong password", next="/")
        pages.append(re.sub(r'(csrf value=|value=)"[^"]*"', "", answer.text))
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/x\r\nset-cookie: a=b",
        "\t//evil.example",
    ],
)
def test_login_leads_to_no_other_host(site: Site, target: str) -> None:
    site.app.studio.accounts.accept(site.app.studio.accounts.add_user("ada", Role.VIEWER), "ada", PASSWORD)
    answer = site.post("/login", from_page="/login", name="ada", password=PASSWORD, next=target)
    location = answer.headers["location"]
    assert answer.status_code == 303 and location.startswith("/") and not location.startswith(("//", "/\\"))
    assert "a=b" not in str(answer.headers.get_list("set-cookie"))


@pytest.mark.parametrize("token", ["x", "../x", "a" * 500, "%00"])
def test_invented_link_is_refused(site: Site, token: str) -> None:
    assert site.client.get(f"/welcome/{token}").status_code in (403, 404)


@pytest.mark.parametrize(
    "page", ["/data/", "/row/", "/evaluate/", "/artefact/", "/tune/run/", "/tune/events/", "/new?file="]
)
@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "%2e%2e/outside",
        "..%2foutside",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "link",
        ".studio/accounts.sqlite",
        "faq/link",
        "x%00",
    ],
)
def test_no_path_leads_out_of_the_folder(site: Site, page: str, name: str) -> None:
    dataset_with(site.folder.parent / "outside", [])
    (site.folder.parent / "outside" / "secret.csv").write_text("prompt,completion\nsecret,secret\n")
    (site.folder / "link").symlink_to(site.folder.parent / "outside")
    (site.folder / "faq" / "link").symlink_to(site.folder.parent / "outside")
    site.log_in()
    answer = site.client.get(f"{page}{name}{'&at=0' if '?' in page else '?at=0'}")
    assert answer.status_code in (307, 400, 404), answer.text[:500]
    assert "secret" not in answer.text and "root:" not in answer.text


def test_upload_above_its_limit_is_refused(site: Site) -> None:
    site.log_in()
    csrf = site.csrf("/new")
    files = {"file": ("x.csv", b"x" * 30_000)}
    answer = site.client.post("/new/upload", data={"csrf": csrf}, files=files)
    assert answer.status_code == 413 and "limit" in answer.text
    assert not (site.folder / "uploads").exists()


def test_upload_without_a_length_is_bounded_too(site: Site) -> None:
    site.log_in()
    boundary = "b"

    def body() -> Iterator[bytes]:
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="x.csv"\r\n\r\n'
        yield head.encode()
        for _ in range(100):
            yield b"x" * 1000
        yield f"\r\n--{boundary}--\r\n".encode()

    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = site.client.post("/new/upload", content=body(), headers=headers)
    assert answer.status_code == 413 and not (site.folder / "uploads").exists()


def test_form_above_its_limit_is_refused(site: Site) -> None:
    site.log_in()
    answer = site.client.post("/new", data={"csrf": site.csrf("/"), "system": "x" * (MAX_FORM_BYTES + 1)})
    assert answer.status_code == 413


@pytest.mark.parametrize("name", ["../../x.csv", "/etc/x.csv", "..\\x.csv", ".x.csv"])
def test_upload_stays_below_its_folder(site: Site, name: str) -> None:
    site.log_in()
    answer = site.client.post("/new/upload", data={"csrf": site.csrf("/new")}, files={"file": (name, b"a,b\n1,2\n")})
    assert answer.status_code == 303
    assert [file.name for file in (site.folder / "uploads").iterdir()] == ["x.csv"]


def test_upload_does_not_follow_a_link(site: Site) -> None:
    outside = site.folder.parent / "outside"
    outside.mkdir()
    (site.folder / "uploads").symlink_to(outside)
    site.log_in()
    answer = site.client.post(
        "/new/upload", data={"csrf": site.csrf("/new")}, files={"file": ("x.csv", b"a,b\n1,2\n")}
    )
    assert answer.status_code == 400 and list(outside.iterdir()) == []


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_rows_stay_text(site: Site, text: str) -> None:
    site.log_in()
    messages = (Message.of("user", text), Message.of("assistant", text))
    row = Example(messages, (Origin(text, text),), split="train", group=text)
    drop = Drop("too_long", text, text, detail=text, kept=row.id, text=text, method=text)
    data = dataset_with(site.folder / "hostile" / "data", [row], [drop])
    report_of(
        site.folder / "hostile" / "report",
        adapter_of(site.folder / "hostile" / "adapter", data),
        [report_row(text, 0.0, 1.0)],
    )
    for path in (
        "/data/hostile/data",
        "/data/hostile/data?split=dropped",
        "/row/hostile/data?at=0",
        "/evaluate/hostile/report",
    ):
        page = site.page(path)
        tags = Tags(page)
        assert not tags.acting({"style", "srcdoc", "formaction"}), path
        assert {tag for tag, _ in tags.tags} & {"iframe", "img", "object", "embed", "base"} == set()
        assert len([1 for tag, _ in tags.tags if tag == "script"]) == 2
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)


def test_full_disk_shuts_nobody_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page writes when its user was seen last; who can free the disk must still come in."""
    site.log_in()
    accounts = site.app.studio.accounts

    def full() -> None:
        raise MissingError("the disk is full", "df -h shows the full disk")

    monkeypatch.setattr(accounts._database, "change", full)
    monkeypatch.setattr(accounts, "_now", lambda: time.time() + 2 * SEEN_S)
    for path in READING:
        site.page(path)
    answer = site.post("/logout", from_page="/")
    assert answer.status_code == 503 and "the disk is full" in answer.text


def test_hostile_names_and_queries_stay_text(site: Site) -> None:
    site.log_in()
    name = "<script>alert(1)<\u29f8script>\u202e"
    data = dataset_with(site.folder / name, [Example((Message.of("user", "x"),), (Origin("a", "a"),))])
    assert data.path.is_dir()
    query = '"><script>alert(1)</script>'
    for path in (
        "/",
        "/data",
        f"/data/{name}",
        f"/data/faq/data?q={query}",
        f"/nothing/{query}",
        f"/evaluate/faq/report?rows={query}",
    ):
        page = site.client.get(path).text
        assert "<script>alert" not in page and "\u202e" not in page, path


def test_hostile_log_stays_text(site: Site) -> None:
    site.log_in()
    program = (
        sys.executable,
        "-c",
        "import sys; sys.stderr.write('<script>alert(1)</script>\\x1b]0;x\\x07\\u202e\\ndata: x\\n')",
    )
    control = JobControl(site.folder / ".studio" / "jobs", program)
    job = control.start(["tune", "<b>"], title="<b>title</b>", by="ada", cwd=site.folder)
    for _ in range(300):
        if control.files.status(job.id).state.is_over:
            break
        time.sleep(0.02)
    for path in (f"/jobs/{job.id}", f"/jobs/{job.id}/events", "/jobs", "/"):
        text = site.page(path)
        assert "<script>alert" not in text and "<b>title" not in text and "\u202e" not in text and "\x1b" not in text


def test_every_answer_forbids_scripts_and_frames_of_others(site: Site) -> None:
    client = site.new_client()
    site.log_in()
    answers = [
        client.get("/login"),
        client.get("/nothing"),
        client.get("/", headers={"host": "evil.example"}),
        site.client.get("/"),
    ]
    answers += [site.client.get("/static/studio.css"), site.client.get("/data/x"), site.client.post("/new", data={})]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "*" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
    assert site.client.get("/").headers["cache-control"] == "no-store"


def test_pages_load_nothing_from_another_host(site: Site) -> None:
    site.log_in()
    for path in (*READING, "/static/studio.css", "/static/studio.js", "/static/icon.svg"):
        text = site.page(path)
        assert not re.search(r"""(?:src|href|url\(|@import)\s*[=(]?\s*["']?(?:https?:)?//""", text), path


def test_studio_s_own_files_are_for_its_owner_alone(site: Site) -> None:
    site.log_in()
    hidden = site.folder / ".studio"
    files = [path for path in (hidden, *hidden.rglob("*")) if path.suffix != ".lock"]  # a lock holds nothing
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def test_error_pages_tell_nothing_of_other_files(site: Site) -> None:
    site.log_in()
    for path in ("/data/faq", "/data/nothing", "/artefact/faq/x"):
        assert str(site.folder.parent) not in site.client.get(path).text.replace(str(site.folder), "")
