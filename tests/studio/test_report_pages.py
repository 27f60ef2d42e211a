"""Reports: slices, forgetting and bias with intervals, waivers signed by name, rows with their media, long states."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from page_markup import HOSTILE, Tags
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from studio_artefacts import adapter_of, report_of, report_row, write_specialist
from studio_media import media_dataset, media_row
from studio_site import Site

REFUSED = """
import json
print(json.dumps({"error": {"kind": "GateError", "problem": "the gate refuses it", "remedy": "tune again"},
                  "gate": {"gain": "cannot tell", "licence": "pass", "slice:polite": "fail"}}))
raise SystemExit(5)
"""
FINDING = {
    "kind": "pronouns",
    "group": "women",
    "outcome": "approved",
    "blocks": 24,
    "rate": 0.4,
    "others": 0.6,
    "gap": [-0.2, -0.31, -0.09],
    "ratio": 0.66,
    "p": 0.01,
    "base_gap": 0.0,
    "added": [-0.2, -0.3, -0.1],
    "rows": [],
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(tmp_path / "work" / ".studio" / "jobs", (sys.executable, "-c", REFUSED))
    write_specialist(made.folder)
    yield made
    made.close()


def rows_of(count: int = 24) -> list[dict[str, Any]]:
    kinds = ("hard", "easy")
    return [
        {
            **report_row(f"{index:02}", index % 2 * 1.0, 1.0 - index % 2),
            "reference": json.dumps({"kind": kinds[index % 2]}),
        }
        for index in range(count)
    ]


def test_slices_have_gains_with_intervals(site: Site) -> None:
    adapter = sartor.open(site.folder / "faq" / "adapter")
    report = report_of(site.folder / "faq" / "sliced", adapter, rows_of())
    found = {item.value: item for item in sartor.report_findings(report.path).slices}
    page = Tags(site.page("/slices/faq/sliced")).text
    for value, verdict in (("hard", "better"), ("easy", "worse")):
        item = found[value]
        assert (
            f"{value} 12 12 {item.base:.3f} {item.tuned:.3f} {item.difference:+.3f} {item.low:+.3f} … {item.high:+.3f} {verdict}"
            in page
        )
    assert page.index("easy 12") < page.index("hard 12")  # what was lost comes first
    assert 'href="/slices/faq/sliced"' in site.page("/evaluate/faq/sliced")
    assert "has not measured it" in page and "has no audit" in page


def test_forgetting_has_its_intervals(site: Site) -> None:
    adapter = sartor.open(site.folder / "faq" / "adapter")
    probe = {"base": 2.0, "tuned": 2.5, "difference": 0.5, "low": 0.4, "high": 0.6}
    probes = {"language": probe, "small_talk": {"skipped": "no rows of it"}}
    report_of(site.folder / "faq" / "forgets", adapter, probes=probes)
    page = Tags(site.page("/slices/faq/forgets")).text
    assert "language loss (forgetting) 2.000 2.500 +0.500 +0.400 … +0.600 worse" in page
    assert "small talk : no rows of it" in page.replace("small talk:", "small talk :")


def audited(site: Site, text: str = "women") -> None:
    """A Report with an audit, written as `sartor evaluate --audit` does."""
    adapter = sartor.open(site.folder / "faq" / "adapter")
    section = {"kinds": {"pronouns": {"blocks": 24, "clusters": 24, "groups": 2, "spread": 0.1}}, "tests": 1}
    finding = {**FINDING, "group": text[:60]}
    bias = {"own": {**section, "findings": [finding]}, "templates": {"hiring": {**section, "findings": [finding]}}}
    audit = {"bias": bias, "memorisation": {"skipped": text}}
    report_of(site.folder / "faq" / "audited", adapter, rows_of(), audit=audit)


def test_groups_of_people_have_gaps_with_intervals(site: Site) -> None:
    audited(site)
    page = Tags(site.page("/slices/faq/audited")).text
    line = "pronouns: women approved 24 0.400 0.600 -0.200 -0.310 … -0.090 -0.200 -0.300 … -0.100"
    assert page.count(line) == 2 and "Your own prompts" in page and "Templates: hiring" in page
    assert "bias fail own prompts, pronouns: women" in page and "memorisation fail not measured: women" in page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_reports_stay_text(site: Site, text: str) -> None:
    plain = text.encode("utf-8", "replace").decode()
    audited(site, plain)
    adapter = sartor.open(site.folder / "faq" / "adapter")
    rows = [
        {**report_row(str(index), 1.0, 0.0), "reference": json.dumps({plain[:50]: plain[: 40 + index % 2]})}
        for index in range(8)
    ]
    rows = [{**row, "prompt": plain, "tuned_reply": plain} for row in rows]
    report_of(site.folder / "faq" / "hostile", adapter, rows)
    for path in ("/slices/faq/audited", "/slices/faq/hostile", "/evaluate/faq/hostile"):
        page = Tags(site.page(path))
        assert len([tag for tag, _ in page.tags if tag == "script"]) == 2, path
        assert page.acting({"style", "srcdoc"}) == set() and not [tag for tag, _ in page.tags if tag == "img"], path


def released(site: Site, **fields: Any) -> Any:
    csrf = site.csrf("/evaluate/faq/other")
    data = {"csrf": csrf, "report": "faq/other", "adapter": "faq/adapter", "name": "faq", "version": "2.0", **fields}
    return site.client.post("/release", data=data)


@pytest.fixture
def unreleased(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A Report of an Adapter that has no Release yet."""
    (site.folder / "faq" / "faq-1.0" / "release.json").unlink()
    report_of(site.folder / "faq" / "other", sartor.open(site.folder / "faq" / "adapter"), rows_of())
    sartor.keygen(tmp_path / "sartor-home" / "keys" / "default")
    return site


def test_waiver_has_the_name_of_who_signs_it(unreleased: Site) -> None:
    answer = released(
        unreleased, waive=["gain", "slice:polite"], reason="-- the old one was worse", by="somebody else"
    )
    assert answer.status_code == 303, answer.text
    (job,) = unreleased.app.studio.jobs.files.statuses()
    arguments = job.job.arguments
    waived = [argument for argument in arguments if argument.startswith(("--waive", "--by", "--reason"))]
    assert waived == ["--waive=gain", "--waive=slice:polite", "--by=ada", "--reason=-- the old one was worse"]


def test_waiver_without_a_reason_or_of_no_check_is_refused(unreleased: Site) -> None:
    assert "has no reason" in released(unreleased, waive=["gain"]).text
    assert released(unreleased, waive=["--out"], reason="x").status_code == 400
    assert released(unreleased, waive=["gain"] + [f"c{index}" for index in range(50)], reason="x").status_code == 400
    assert unreleased.app.studio.jobs.files.ids() == []


def test_checks_that_hold_it_back_can_be_waived(unreleased: Site) -> None:
    page = unreleased.page("/evaluate/faq/other")
    assert re.findall(r'name=waive value="([^"]+)"', page) == ["gain", "forgetting", "licence"]
    assert "your name, ada," in page
    released(unreleased)
    for _ in range(1000):
        (job,) = unreleased.app.studio.jobs.files.statuses()
        if job.state.is_over:
            break
        time.sleep(0.02)
    page = unreleased.page("/evaluate/faq/other")
    assert re.findall(r'name=waive value="([^"]+)"', page) == ["gain", "slice:polite"]
    assert "slice:polite fail" in Tags(page).text


def test_viewer_waives_nothing(unreleased: Site) -> None:
    unreleased.client = unreleased.new_client()
    unreleased.log_in(Role.VIEWER, "eve")
    assert "name=waive" not in unreleased.page("/evaluate/faq/other")
    assert released(unreleased, waive=["gain"], reason="x").status_code == 403


def test_rows_won_and_lost_show_their_media(site: Site) -> None:
    rows = [media_row("image", "media/picture.png", f"what {index}") for index in range(3)]
    dataset = media_dataset(site.folder / "seen" / "data", rows)
    adapter = adapter_of(site.folder / "seen" / "adapter", dataset)
    scored = [{**report_row(row.id, 1.0, 0.0), "media": "image"} for row in rows[1:]]
    report_of(site.folder / "seen" / "report", adapter, [*scored, {**report_row("gone", 1.0, 0.0), "media": "image"}])
    page = site.page("/evaluate/seen/report?rows=lost")
    assert re.findall(r'<img[^>]* src="([^"]+)"', page) == [
        "/media/seen/data?at=1&amp;number=0",
        "/media/seen/data?at=2&amp;number=0",
    ]
    assert page.count("<code class=soft>image</code>") == 1


def test_very_long_report_stays_a_page(site: Site) -> None:
    adapter = sartor.open(site.folder / "faq" / "adapter")
    long = "word " * 200_000
    rows = [{**row, "prompt": long, "base_reply": long, "tuned_reply": long, "media": long} for row in rows_of(40)]
    report_of(site.folder / "faq" / "long", adapter, rows, warnings=[{"problem": long, "remedy": long}])
    assert len(site.page("/evaluate/faq/long")) < 200_000
    assert len(site.page("/slices/faq/long")) < 50_000
