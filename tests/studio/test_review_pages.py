"""Review by several people: nobody's decision is lost, agreement is measured, a disagreement is settled by name."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import sartor
from page_markup import HOSTILE, Tags
from sartor.studio.accounts import Role
from studio_artefacts import write_specialist
from studio_media import media_dataset, media_row
from studio_scenes import write_findings
from studio_site import ADDRESS, Site, TestClient

QUEUE = "/review/faq/data"
ITEM = re.compile(r'name=item value="([0-9a-f]+)"')


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    write_specialist(made.folder)
    yield made
    made.close()


def reviewer(site: Site, name: str) -> TestClient:
    """A client of its own with a reviewer's session."""
    site.client = site.new_client()
    return site.log_in(Role.REVIEWER, name)


def decide_next(client: TestClient, verdict: str, path: str = QUEUE) -> str:
    """Decide the finding that the queue shows; return the page that follows."""
    page = client.get(path).text
    item = ITEM.search(page)
    token = re.search(r'name=csrf value="([0-9a-f]{64})"', page)
    assert item and token, page[:2000]
    fields = {"csrf": token[1], "item": item[1], "verdict": verdict}
    answer = client.post(QUEUE, data=fields, headers={"origin": ADDRESS})
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def test_two_people_at_one_queue_at_once_lose_no_decision(site: Site) -> None:
    data = site.folder / "faq" / "data"
    write_findings(data, 12)
    clients = {name: reviewer(site, name) for name in ("ada", "ben")}
    # FastAPI prepares a route at its first request, and silences warnings meanwhile: of two threads, each with a loop of
    # its own, one could see them, and they are errors in tests. A server has one loop.
    clients["ada"].get(QUEUE)
    assert clients["ada"].post(QUEUE).status_code >= 400
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            location = QUEUE
            for number in range(12):
                verdict = "accept" if name == "ada" or number % 3 else "reject"
                location = decide_next(clients[name], verdict, location)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    items = sartor.review_list(data, state="all")["items"]
    assert len(items) == 12
    for item in items:
        assert set(item["by"]) == {"ada", "ben"}, item
    for client in clients.values():
        assert "You have decided everything" in client.get(QUEUE).text


def test_decisions_taken_in_turn_are_each_their_own(site: Site) -> None:
    data = site.folder / "faq" / "data"
    write_findings(data, 4)
    ada, ben = reviewer(site, "ada"), reviewer(site, "ben")
    for verdicts in (("accept", "accept"), ("accept", "reject"), ("reject", "reject"), ("reject", "accept")):
        for client, verdict in zip((ada, ben), verdicts, strict=True):
            decide_next(client, verdict)
    found = {tuple(sorted(item["by"].items())) for item in sartor.review_list(data, state="all")["items"]}
    expected = {("accept", "accept"), ("accept", "reject"), ("reject", "reject"), ("reject", "accept")}
    assert found == {(("ada", first), ("ben", second)) for first, second in expected}


def test_agreement_has_kappa_with_its_interval(site: Site) -> None:
    data = site.folder / "faq" / "data"
    write_findings(data, 4)
    ada = reviewer(site, "ada")
    assert "No two people have judged" in ada.get("/agreement/faq/data").text
    ben = reviewer(site, "ben")
    for verdicts in (("accept", "accept"), ("accept", "reject"), ("reject", "reject"), ("reject", "reject")):
        for client, verdict in zip((ada, ben), verdicts, strict=True):
            decide_next(client, verdict)
    (pair,) = sartor.review_agreement(data)["pairs"]
    assert pair["kappa"]["estimate"] == 0.5
    page = Tags(ada.get("/agreement/faq/data").text).text
    assert "0.75" in page and "+0.50" in page and f"{pair['kappa']['low']:+.2f} … {pair['kappa']['high']:+.2f}" in page
    assert "Accept · Reject 1" in page and "sartor review agreement" in page


def test_disagreement_is_settled_by_a_third_person(site: Site) -> None:
    data = site.folder / "faq" / "data"
    write_findings(data, 1)
    decide_next(reviewer(site, "ada"), "accept")
    decide_next(reviewer(site, "ben"), "reject")
    cy = reviewer(site, "cy")
    listed = cy.get("/agreement/faq/data").text
    link = re.search(r'href="(/review/faq/data\?item=[0-9a-f]+&amp;settle=1)"', listed)
    assert link and "Reject" not in listed[listed.index("Judged differently") :].partition("<h2")[0]
    assert "Reject" not in Tags(cy.get(QUEUE).text).text.partition("suspicious label")[2].partition("Accept a")[0]
    path = link[1].replace("&amp;", "&")
    page = cy.get(path).text
    assert "These people differ" in page and "<b dir=auto>ada</b>" in page and "name=settle value=1" in page
    token, item = re.search(r'name=csrf value="([0-9a-f]{64})"', page), ITEM.search(page)
    fields = {"csrf": token[1], "item": item[1], "verdict": "reject", "settle": "1", "reason": "it is wrong"}
    assert cy.post(QUEUE, data=fields, headers={"origin": ADDRESS}).status_code == 303
    shown = sartor.review_show(data, item[1])
    assert (shown["state"], sartor.review_counts(data)["conflicts"]) == ("decided", 0)
    assert [decision["by"] for decision in shown["decisions"] if decision.get("settles")] == ["cy"]
    # nothing is left to settle: the page says so
    assert cy.post(QUEUE, data=fields | {"verdict": "accept"}, headers={"origin": ADDRESS}).status_code in (303, 409)


def test_viewer_sees_no_agreement(site: Site) -> None:
    site.client = site.new_client()
    site.log_in(Role.VIEWER, "eve")
    assert site.client.get("/agreement/faq/data").status_code == 403


def test_finding_shows_the_pictures_of_its_row(site: Site) -> None:
    rows = [media_row("audio", "media/sound.wav"), media_row("image", "media/picture.png", "what is <b>this</b>")]
    dataset = media_dataset(site.folder / "pictures", rows)
    line = {"kind": "label", "examples": [rows[1].id], "reason": "suspicious_label"}
    (dataset.path / "review.jsonl").write_text(json.dumps(line) + "\n")
    page = reviewer(site, "ada").get("/review/pictures").text
    assert 'src="/media/pictures?at=1&amp;number=0"' in page and "&lt;b&gt;this" in page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_findings_stay_text(site: Site, text: str) -> None:
    write_findings(site.folder / "faq" / "data", 1, text.encode("utf-8", "replace").decode())
    ada = reviewer(site, "ada")
    for path in (QUEUE, "/agreement/faq/data"):
        page = Tags(ada.get(path).text)
        assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
        assert page.acting({"style", "srcdoc"}) == set() and not [tag for tag, _ in page.tags if tag == "img"]


def test_decision_has_the_name_of_its_session(site: Site) -> None:
    """Each decision has the name of the session, whatever the form says."""
    data = site.folder / "faq" / "data"
    write_findings(data, 1)
    ada = reviewer(site, "ada")
    page = ada.get(QUEUE).text
    token, item = re.search(r'name=csrf value="([0-9a-f]{64})"', page), ITEM.search(page)
    fields = {"csrf": token[1], "item": item[1], "verdict": "accept", "by": "ben", "user": "ben"}
    assert ada.post(QUEUE, data=fields, headers={"origin": ADDRESS}).status_code == 303
    assert [decision["by"] for decision in sartor.review_show(data, item[1])["decisions"]] == ["ada"]
