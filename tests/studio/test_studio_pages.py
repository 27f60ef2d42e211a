"""Every page of the studio, asked as a browser asks it: what it shows, in both languages, empty and full."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

import sartor
from page_markup import Tags
from sartor.core.records import Drop, Example, Message, Origin
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.page_renderer import STATIC
from studio_artefacts import dataset_with, report_of, report_row, write_specialist
from studio_site import Site, TestClient

# of the package htmx.org 2.0.11 of npm: dist/htmx.min.js and LICENSE
HTMX_SHA256 = "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717"
LICENCE_SHA256 = "d3d2456f76414f2456104660ebd65aff1c04cd7966b942bdabd63f3cdb316a38"
PAGES = (
    "/",
    "/data",
    "/data/faq/data",
    "/data/faq/data?split=eval&q=question",
    "/data/faq/data?split=dropped",
    "/row/faq/data?at=3",
    "/review",
    "/review/faq/data",
    "/evaluate",
    "/evaluate/faq/report",
    "/artefact/faq/adapter",
    "/artefact/faq/faq-1.0",
    "/jobs",
    "/new",
    "/talk",
)
ECHO = "import json, sys; print('notice', file=sys.stderr); print(json.dumps({'ran': sys.argv[1:]}))"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(tmp_path / "work" / ".studio" / "jobs", (sys.executable, "-c", ECHO))
    yield made
    made.close()


@pytest.fixture
def full(site: Site) -> Site:
    write_specialist(site.folder)
    return site


def ended(site: Site, location: str) -> Any:
    """Status of the job to whose page an answer leads, once it has ended."""
    job_id = location.rpartition("/")[2]
    for _ in range(1000):
        status = site.app.studio.jobs.files.status(job_id)
        if status.state.is_over:
            return status
        time.sleep(0.02)
    raise AssertionError(status)


def test_vendored_htmx_has_its_digest() -> None:
    for name, digest in (("htmx.min.js", HTMX_SHA256), ("htmx.LICENSE", LICENCE_SHA256)):
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_shown_in_both_languages(full: Site, path: str, language: str) -> None:
    text = full.page(path, **{"accept-language": language})
    assert f'<html lang="{language}">' in text
    word = {"en": "Log out", "de": "Abmelden"}[language]
    assert word in text and len(text) < 150_000
    tags = Tags(text)
    assert not tags.acting({"style", "srcdoc"}), path
    scripts = [attributes for tag, attributes in tags.tags if tag == "script"]
    assert all(attributes.get("src") for attributes in scripts) and not [tag for tag, _ in tags.tags if tag == "style"]
    links = [
        value for _, attributes in tags.tags for name, value in attributes.items() if name in ("src", "href", "action")
    ]
    assert not [link for link in links if re.match(r"[a-z]+:|//", link or "")]


@pytest.mark.parametrize("path", ["/", "/data", "/review", "/evaluate", "/jobs", "/new", "/talk"])
def test_empty_folder_has_pages_that_say_how_to_begin(site: Site, path: str) -> None:
    text = site.page(path)
    assert "class=empty" in text or path == "/new"


def test_every_control_has_a_name(full: Site) -> None:
    for path in (*PAGES, "/login"):
        text = full.page(path) if path != "/login" else full.new_client().get(path).text
        for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", text):
            if "type=hidden" in match[0]:
                continue
            before = text[: match.start()]
            assert before.rfind("<label") > before.rfind("</label>"), f"{path}: {match[0]}"


def test_static_files_are_kept_by_browsers(full: Site) -> None:
    for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', full.page("/")):
        answer = full.client.get(path)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    assert full.client.get("/static/other.js").status_code == 404


def test_home_shows_artefacts_with_their_lineage(full: Site) -> None:
    text = full.page("/")
    for name in ("/data/faq/data", "/artefact/faq/adapter", "/evaluate/faq/report", "/artefact/faq/faq-1.0"):
        assert text.count(f'href="{name}"') == 2  # graph and list
    assert text.count("class=edge") == 4


def test_home_names_what_needs_a_person(full: Site) -> None:
    manifest = full.folder / "faq" / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("MIT", "GPL"))
    failing = JobControl(full.folder / ".studio" / "jobs", (sys.executable, "-c", "import sys; sys.exit(3)"))
    job = failing.start(["tune", "x"], title="the tuning", by="ada", cwd=full.folder)
    ended(full, job.id)
    text = full.page("/")
    assert "is damaged" in text and f"/jobs/{job.id}" in text and "failed: look at its log" in text


def test_rows_are_filtered(full: Site) -> None:
    text = full.page("/data/faq/data?q=question%20123")
    assert text.count("<article class=row>") == 1 and "question 123" in text and "learnt" in text
    assert "No row fits" in full.page("/data/faq/data?q=nowhere")
    assert full.page("/data/faq/data?split=eval").count("<article class=row>") == 25


def test_drops_stand_beside_what_was_kept(full: Site) -> None:
    text = full.page("/data/faq/data?split=dropped")
    assert text.count("<article class=row>") == 2
    assert "<mark>33</mark>" in text and "Kept instead: row 4" in text and "0.90" in text
    assert full.page("/data/faq/data?split=dropped&reason=too_long").count("<article class=row>") == 1


def test_long_row_is_cut_with_a_link_to_the_whole(site: Site) -> None:
    text = "x" * 1_000_000
    row = Example((Message.of("user", text), Message.of("assistant", "y")), (Origin("a", "a:1"),), split="train")
    dataset_with(site.folder / "data", [row], [Drop("too_long", "a", "a:2", text=text)])
    page = site.page("/data/data")
    assert len(page) < 20_000 and "998,800 more characters" in page and 'href="/row/data?at=0"' in page
    assert text in site.page("/row/data?at=0")
    assert len(site.page("/data/data?split=dropped")) < 20_000


def test_report_shows_both_sides_with_intervals(full: Site) -> None:
    text = full.page("/evaluate/faq/report?rows=won")
    assert "cannot tell whether" in text and "-0.100 … +0.600" in text
    assert "2 : 1" in text and "base won 0" in text and "tuned won 1" in text and "tuned lost" not in text
    assert "tuned lost 2" in full.page("/evaluate/faq/report")
    assert "waived" in text and "four rows are few" in text


def test_report_opens_with_rows_that_there_are(site: Site) -> None:
    write_specialist(site.folder)
    adapter = sartor.open(site.folder / "faq" / "adapter")
    report_of(site.folder / "faq" / "all-right", adapter, [report_row("a", 1.0, 1.0), report_row("b", None, None)])
    assert "tuned a" in site.page("/evaluate/faq/all-right")


def test_report_says_where_the_tuned_model_is_worse(site: Site) -> None:
    """Beside the verdict on the primary metric: a gain is no news where the gate will hold the Release back."""
    write_specialist(site.folder)
    adapter = sartor.open(site.folder / "faq" / "adapter")
    language = {"base": 2.0, "tuned": 2.5, "difference": 0.5, "low": 0.4, "high": 0.6}
    report_of(site.folder / "faq" / "forgets", adapter, probes={"language": language})
    text = site.page("/evaluate/faq/forgets")
    assert "It is worse at: language loss (forgetting)." in text
    assert "It is worse at" not in site.page("/evaluate/faq/report")


def test_adapter_shows_its_losses(full: Site) -> None:
    text = full.page("/artefact/faq/adapter")
    points = re.search(r'<polyline class=line points="([^"]+)"', text)
    assert points and len(points[1].split()) == 40 and text.count("class=dot") == 1
    assert "held out: 1.2" in text


def test_evaluation_and_release_are_commands(full: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = full.post("/evaluate", from_page="/artefact/faq/adapter", adapter="faq/adapter")
    assert answer.status_code == 303
    adapter = str(full.folder / "faq" / "adapter")
    assert ended(full, answer.headers["location"]).result["ran"][:2] == ["evaluate", adapter]
    fields = {"report": "faq/report", "adapter": "faq/adapter", "name": "faq", "version": "2.0"}
    assert "no key to sign with" in full.post("/release", from_page="/jobs", **fields).text
    sartor.keygen(Path(tmp_path / "sartor-home" / "keys" / "default"))
    answer = full.post("/release", from_page="/jobs", **fields)
    assert ended(full, answer.headers["location"]).result["ran"][2:6] == ["--name", "faq", "--version", "2.0"]
    assert full.post("/release", from_page="/jobs", **{**fields, "version": "1.0"}).status_code == 400


def test_job_page_shows_command_log_and_result(full: Site) -> None:
    answer = full.post("/evaluate", from_page="/jobs", adapter="faq/adapter")
    status = ended(full, answer.headers["location"])
    text = full.page(answer.headers["location"])
    assert "sartor evaluate" in text and "notice" in text and "done" in text and "Start again" in text
    assert status.job.title in full.page("/jobs")


def test_stream_sends_the_job_and_its_end(full: Site) -> None:
    answer = full.post("/evaluate", from_page="/jobs", adapter="faq/adapter")
    ended(full, answer.headers["location"])
    stream = full.client.get(f"{answer.headers['location']}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "notice" in stream.text and stream.text.endswith("event: end\ndata: over\n\n")
    lines = [line for line in stream.text.split("\n") if line]
    assert all(line.startswith(("data: ", "event: ")) for line in lines)


def test_new_shows_rows_and_starts_tailor(site: Site) -> None:
    rows = "Frage;Antwort\n" + "".join(f"Was kostet {number}?;Nichts {number}.\n" for number in range(9))
    files = {"file": ("Häufige Fragen.csv", rows.encode(), "text/csv")}
    sent = site.client.post("/new/upload", data={"csrf": site.csrf("/new")}, files=files)
    assert sent.status_code == 303, sent.text
    page = site.page(sent.headers["location"])
    assert "Frage" in page and "Antwort" in page
    chosen = f"{sent.headers['location']}&prompt=Frage&completion=Antwort"
    page = site.page(chosen)
    assert "Was kostet 0?" in page and 'said learnt" dir=auto>Nichts 0.' in page
    fields = {"file": "uploads/Häufige-Fragen.csv", "prompt": "Frage", "completion": "Antwort", "base": "starter"}
    sent_fields = {"licence": "own", "system": "-s", "personal_data": "mask", "minutes": "3"}
    answer = site.post("/new", from_page="/new", name="faq", **sent_fields, **fields)
    assert answer.status_code == 303, answer.text
    ran = ended(site, answer.headers["location"]).result["ran"]
    out = site.folder.resolve() / "faq"
    expected = [
        "tailor",
        str(out.parent / "uploads/Häufige-Fragen.csv"),
        "--name",
        "faq",
        "--base=starter",
        "--out",
        str(out),
    ]
    assert ran == [
        *expected,
        "--fields=prompt=Frage,completion=Antwort",
        "--system=-s",
        "--licence=own",
        "--personal-data=mask",
        "--minutes=3",
        "--json",
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../x"},
        {"name": "X Y"},
        {"name": ""},
        {"minutes": "-1"},
        {"minutes": "nan"},
        {"file": "../x"},
        {"name": "taken"},
    ],
)
def test_new_refuses_a_wrong_form(site: Site, fields: dict[str, str]) -> None:
    (site.folder / "rows.csv").write_text("prompt,completion\na,b\n")
    (site.folder / "taken").mkdir()
    answer = site.post("/new", from_page="/new", **{"file": "rows.csv", "name": "faq", **fields})
    assert answer.status_code in (400, 404) and site.app.studio.jobs.files.ids() == []


def test_file_that_cannot_be_read_is_explained(site: Site) -> None:
    (site.folder / "rows.parquet").write_bytes(b"no parquet")
    (site.folder / "rows.json").write_bytes(b'{"a": [')
    for name in ("rows.parquet", "rows.json"):
        assert "Sartor Studio" in site.page(f"/new?file={name}")


def test_viewer_sees_no_forms_that_act(full: Site) -> None:
    full.client = full.new_client()
    full.log_in(Role.VIEWER, "eve")
    for path in ("/", "/data/faq/data", "/evaluate/faq/report", "/artefact/faq/adapter", "/jobs"):
        actions = re.findall(r'<form[^>]*method=post action="([^"]+)"', full.page(path))
        assert set(actions) <= {"/logout", "/language"}, path


def test_language_is_kept(full: Site) -> None:
    answer = full.post("/language", from_page="/data", language="de", next="/data")
    assert answer.headers["location"] == "/data"
    assert '<html lang="de">' in full.page("/data", **{"accept-language": "en"})


def test_unknown_pages_and_artefacts_are_explained(full: Site) -> None:
    for path in (
        "/nothing",
        "/data/nothing",
        "/evaluate/faq/data",
        "/artefact/x",
        "/jobs/x",
        "/row/faq/data?at=999",
        "/row/faq/data?at=x",
    ):
        answer = full.client.get(path)
        assert answer.status_code in (400, 404, 422) and "Try:" in answer.text, path


def test_pages_below_a_path_link_below_it(tmp_path: Path) -> None:
    """As `sartor serve --studio` mounts it."""
    site = Site(tmp_path)
    outer = Starlette()
    outer.mount("/studio", site.app)
    site.client = TestClient(outer, base_url="http://127.0.0.1:8765/studio", follow_redirects=False)
    token = site.app.studio.accounts.add_user("ada", Role.OWNER)
    site.app.studio.accounts.accept(token, "ada", "four words are enough")
    page = site.client.get("/login").text
    links = [
        value for _, fields in Tags(page).tags for name, value in fields.items() if name in ("href", "src", "action")
    ]
    assert all(link.startswith(("/studio/", "#")) for link in links), links
    answer = site.post("/login", from_page="/login", name="ada", password="four words are enough", next="/")
    assert answer.headers["location"] == "/studio/" and "Path=/studio" in answer.headers["set-cookie"]
    site.close()


def findings(dataset: Path, count: int = 3) -> list[str]:
    """Findings about the first rows of a Dataset, as a step writes them."""
    rows = [example.id for example in sartor.read_examples(sartor.open(dataset))][:count]
    lines = []
    for number, row in enumerate(rows):
        item = {"kind": "label", "examples": [row], "reason": "suspicious_label", "detail": f"finding {number}"}
        lines.append(json.dumps({**item, "suggestion": {"reply": f"better answer {number}"}}))
    (dataset / "review.jsonl").write_text("\n".join(lines) + "\n")
    return rows


def test_findings_are_decided_one_after_the_other(full: Site) -> None:
    data = full.folder / "faq" / "data"
    findings(data)
    assert "<b>3</b>" in full.page("/review")
    page = full.page("/review/faq/data")
    assert "finding" in page and "better" in page and "3 wait for you" in page
    verdicts = (("accept", {}), ("edit", {"reply": "An answer of mine"}), ("reject", {"reason": "wrong"}))
    for verdict, fields in verdicts:
        page = full.page("/review/faq/data")
        item = re.search(r'name=item value="([0-9a-f]+)"', page)
        assert item
        answer = full.post("/review/faq/data", from_page="/review/faq/data", item=item[1], verdict=verdict, **fields)
        assert answer.status_code == 303, answer.text
    assert "You have decided everything" in full.page("/review/faq/data")
    counts = sartor.review_counts(data)
    assert (counts["open"], counts["accepted"], counts["edited"], counts["rejected"]) == (0, 1, 1, 1)
    shown = sartor.review_show(data, item[1])
    assert [(decision["by"], decision["reason"]) for decision in shown["decisions"]] == [("ada", "wrong")]


def test_skipped_finding_waits_and_a_decision_can_be_changed(full: Site) -> None:
    data = full.folder / "faq" / "data"
    findings(data, 2)
    first = re.search(r'name=item value="([0-9a-f]+)"', full.page("/review/faq/data"))[1]
    second = re.search(r'name=item value="([0-9a-f]+)"', full.page(f"/review/faq/data?after={first}"))[1]
    assert first != second
    answer = full.post("/review/faq/data", from_page="/review/faq/data", item=first, verdict="reject")
    page = full.page(answer.headers["location"])
    assert f'value="{second}"' in page and f"item={first}" in page
    assert "Your decision so far: Reject" in full.page(f"/review/faq/data?item={first}")
    full.post("/review/faq/data", from_page="/review/faq/data", item=first, verdict="accept")
    assert sartor.review_counts(data)["accepted"] == 1


def test_two_reviewers_lose_no_decision_and_see_not_each_other_s(full: Site) -> None:
    data = full.folder / "faq" / "data"
    findings(data, 1)
    item = re.search(r'name=item value="([0-9a-f]+)"', full.page("/review/faq/data"))[1]
    full.post("/review/faq/data", from_page="/review/faq/data", item=item, verdict="accept")
    full.client = full.new_client()
    full.log_in(Role.REVIEWER, "ben")
    page = full.page("/review/faq/data")
    assert f'value="{item}"' in page and not re.search(r"\bada\b", page)
    full.post("/review/faq/data", from_page="/review/faq/data", item=item, verdict="reject")
    assert {decision["by"] for decision in sartor.review_show(data, item)["decisions"]} == {"ada", "ben"}
    assert sartor.review_counts(data)["conflicts"] == 1
    assert full.post("/review/faq/data", from_page="/review", item=item, verdict="burn").status_code == 400
