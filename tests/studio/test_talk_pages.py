"""Talk: two models side by side, replies in pieces, media, receipts, speech and feedback, with a server on loopback."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from page_markup import HOSTILE, Tags
from sartor.core.errors import BusyError
from sartor.inference.engine import TextDelta
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.team_config import SpeechOptions
from sartor.studio.accounts import Role
from sartor.studio.request_guard import MAX_FORM_BYTES, MAX_MEDIA_BYTES
from sartor.studio.served_talk import ReplyEnd, Side, Talk
from serving import KEYS, Doors, failed
from speaking import needs_espeak
from studio_artefacts import write_specialist
from studio_site import ADDRESS, Site
from talking import HeldReplies, SeeingRoster, ask, choices, close_servers, opened, talk_jobs, talking

UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


@pytest.fixture
def replies() -> HeldReplies:
    return HeldReplies()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    write_specialist(tmp_path / "work")
    made = Site(tmp_path / "work")
    made.log_in()
    talk_jobs(made, tmp_path)
    yield made
    close_servers(made)
    made.close()


@pytest.fixture
def served(site: Site, tmp_path: Path, replies: HeldReplies) -> Iterator[Site]:
    """The studio with a server that answers."""
    with talking(tmp_path, replies):
        yield site


def team_of(site: Site, tmp_path: Path) -> str:
    """The name of a team's file whose records are those of the server."""
    (site.folder / "team.yaml").write_text(
        f"base: tiny\nagents: [{{name: faq, release: faq/faq-1.0}}]\nstate: {tmp_path / 'state'}\n"
    )
    return "team.yaml"


def test_targets_are_bases_artefacts_and_teams(site: Site, tmp_path: Path) -> None:
    team_of(site, tmp_path)
    (site.folder / "tune.yaml").write_text("base: starter\ndata: {path: faq/data}\n")
    page = site.page("/talk")
    first = re.search(r'<select name="artefact">(.*?)</select>', page)
    assert first
    values = re.findall(r'value="([^"]+)"', first[1])
    assert values == ["faq/faq-1.0", "faq/adapter", "team.yaml", "base:starter"]


def test_only_targets_of_the_folder_are_opened(site: Site) -> None:
    (site.folder / "tune.yaml").write_text("base: starter\ndata: {path: faq/data}\n")
    for artefact in ("../x", "base:/etc", "base:other", "tune.yaml", "faq/data", ""):
        answer = site.post("/talk", from_page="/talk", artefact=artefact)
        assert answer.status_code in (400, 404, 422), (artefact, answer.text)
    site.client = site.new_client()
    site.log_in(Role.REVIEWER, "ben")
    assert site.post("/talk", from_page="/talk", base="other").status_code == 403
    assert site.app.studio.jobs.files.ids() == []


def test_servers_of_artefacts_keep_their_records(served: Site, tmp_path: Path) -> None:
    for artefact in ("faq/adapter", "faq/faq-1.0", "base:starter"):
        opened(served, artefact)
    jobs = {status.job.title: status.job for status in served.app.studio.jobs.files.statuses()}
    hidden = served.folder / ".studio" / "served"
    assert jobs["faq/adapter"].arguments[:4] == ("serve", str(served.folder / "faq" / "adapter"), "--port", "0")
    assert all(Path(jobs[name].arguments[5]).parent.parent == hidden for name in ("faq/adapter", "faq/faq-1.0"))
    assert Path(jobs["base:starter"].out).read_text() == "base: starter\n"
    release = next(hidden.glob("release-*")) / "team.yaml"
    assert "release: " in release.read_text() and "state: state" in release.read_text()


def test_any_two_models_answer_side_by_side(served: Site, replies: HeldReplies) -> None:
    answer = served.post("/talk", from_page="/talk", artefact="faq/adapter", second="faq/faq-1.0")
    first, _, query = answer.headers["location"].partition("?")
    second = query.removeprefix("beside=")
    for _ in range(500):
        page = served.page(answer.headers["location"])
        if "data-send" in page:
            break
        time.sleep(0.02)
    chosen = re.findall(r'<option value="([^"]+)" selected', page)
    assert [value.partition(":")[0] for value in chosen] == [first.rpartition("/")[2], second]
    for prompt in ("one", "two"):
        page = ask(served, first, prompt, *chosen, temperature="0.5")
    assert page.count("dir=auto>the sky is blue") == 4 and "Why this model:" in page and "faq/faq-1.0" in page
    roles = [[message["role"] for message in request.messages] for request in replies.asked[-2:]]
    assert roles == [["user", "assistant", "user"]] * 2 and replies.asked[-1].sampling["temperature"] == 0.5
    assert (
        "no number" not in page
        and served.post(first, from_page=first, prompt="x", first=chosen[0], temperature="9").status_code == 400
    )
    served.post(f"{first}/clear", from_page=first)
    assert "the sky is blue" not in served.page(first)


def test_proposed_sides_are_the_agent_and_its_base(served: Site) -> None:
    page = served.page(opened(served, "faq/adapter"))
    chosen = re.findall(r'<option value="[^"]+:([^"]+)" selected', page)
    assert chosen == ["auto", "base"]
    assert {"faq@1.0", "home@2.0", "faq@0.9", "base"} <= set(choices(page))


def test_reply_comes_in_pieces(served: Site, replies: HeldReplies) -> None:
    path = opened(served, "faq/adapter")
    key = choices(served.page(path))["faq@1.0"]
    replies.is_held = True
    data = {"csrf": served.csrf(path), "prompt": "why", "first": key}
    sent = served.client.post(path, data=data, headers={"origin": ADDRESS, "hx-request": "true"})
    assert sent.status_code == 303
    for _ in range(500):
        page = served.page(path)
        if ">the <" in page:
            break
        time.sleep(0.01)
    assert 'data-reply="' in page and "aria-busy=true" in page and "sky" not in page and "Stop" in page
    assert served.post(path, from_page="/talk", prompt="x", first=key).status_code == 409  # one after the other
    # once the stream is open: a reply that is over by then has no more pieces
    threading.Timer(0.5, setattr, (replies, "is_held", False)).start()
    events = served.client.get(f"{path}/replies/0/0/events?after=4")
    pieces = [json.loads(line[6:]) for line in events.text.split("\n") if line.startswith('data: "')]
    assert "".join(pieces) == "sky is blue " and events.text.endswith("event: end\ndata: over\n\n")
    assert "the sky is blue" in served.page(path) and "data-reply" not in served.page(path)
    again = served.client.get(f"{path}/replies/0/0/events", headers={"last-event-id": "9"})
    assert again.text == "event: end\ndata: over\n\n"


def test_stopped_reply_keeps_what_has_come(served: Site, replies: HeldReplies) -> None:
    path = opened(served, "faq/adapter")
    replies.is_held = True
    data = {"csrf": served.csrf(path), "prompt": "why", "first": choices(served.page(path))["faq@1.0"]}
    served.client.post(path, data=data, headers={"origin": ADDRESS, "hx-request": "true"})
    while ">the <" not in served.page(path):
        time.sleep(0.01)
    served.post(f"{path}/stop", from_page=path, turn="0", side="0")
    replies.is_held = False
    while "data-reply" in (page := served.page(path)):
        time.sleep(0.01)
    assert "You stopped this reply." in page and "blue" not in page


def test_reply_that_breaks_off_is_said_so(served: Site, replies: HeldReplies) -> None:
    path = opened(served, "faq/adapter")
    replies.ends_with = failed("DeadlineError")
    page = ask(served, path, "why", choices(served.page(path))["faq@1.0"])
    assert (
        "the sky is blue" in page and "This reply broke off" in page and "it was too slow; try: ask for less" in page
    )
    replies.ends_with = None
    ask(served, path, "again", choices(page)["faq@1.0"])
    assert [message["content"] for message in replies.asked[-1].messages] == ["again"]  # it is no history


def test_reply_of_a_killed_studio_broke_off(served: Site) -> None:
    path = opened(served, "faq/adapter")
    talk = Talk(served.app.studio.talks, path.rpartition("/")[2], "ada")
    talk.begin([Side(path.rpartition("/")[2], "faq")], "why")
    assert "This reply broke off" in served.page(path)


def test_refusal_of_the_server_is_shown(served: Site, replies: HeldReplies) -> None:
    path = opened(served, "faq/adapter")
    replies.fail = BusyError("too many ask", "ask again later")
    page = ask(served, path, "why", choices(served.page(path))["faq@1.0"])
    assert "too many ask; try: ask again later" in page


def test_server_that_asks_for_keys_is_explained(site: Site, tmp_path: Path, replies: HeldReplies) -> None:
    with talking(tmp_path, replies, authenticator=Doors(KEYS)):
        answer = site.post("/talk", from_page="/talk", artefact="faq/adapter")
        for _ in range(200):
            if "role=alert" in (page := site.page(answer.headers["location"])):
                break
            time.sleep(0.02)
        assert "key" in page and "data-send" not in page


def test_key_of_the_studio_is_sent(
    site: Site, tmp_path: Path, replies: HeldReplies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARTOR_STUDIO_KEY", "key-all")
    with talking(tmp_path, replies, authenticator=Doors(KEYS)):
        path = opened(site, "faq/adapter")
        assert "the sky is blue" in ask(site, path, "why", choices(site.page(path))["faq@1.0"])


def test_ended_server_is_said_so(served: Site) -> None:
    path = opened(served, "faq/adapter")
    close_servers(served)
    while "has ended" not in served.page(path):
        time.sleep(0.02)
    assert served.post(path, from_page="/talk", prompt="x", first=f"{path.rpartition('/')[2]}:faq").status_code == 503


def test_conversation_is_its_user_s_alone(tmp_path: Path) -> None:
    mine, other = Talk(tmp_path, "job", "ada"), Talk(tmp_path, "job", "bob")
    mine.begin([Side("job", "faq")], "secret")
    assert [turn.prompt for turn in mine.turns()] == ["secret"] and other.turns() == []
    assert mine.turns()[0].replies[0].end is ReplyEnd.PENDING
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.iterdir())
    mine.clear()
    assert list(tmp_path.iterdir()) == []


def picture(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, form)
    return file.getvalue()


def attach(site: Site, path: str, content: bytes, kind: str, side: str) -> Any:
    fields = {"csrf": site.csrf(path), "prompt": "what is it?", "first": side}
    files = {"media": ("<b>x.png", content, kind)}
    return site.client.post(path, data=fields, files=files, headers={"origin": ADDRESS})


def test_picture_is_shown_and_sent(site: Site, tmp_path: Path, replies: HeldReplies) -> None:
    with talking(tmp_path, replies, agent_admin=SeeingRoster()):
        path = opened(site, "faq/adapter")
        page = site.page(path)
        assert 'accept="audio/*,image/*"' in page and "data-record hidden" in page
        side = choices(page)["faq@1.0"]
        assert attach(site, path, picture(), "image/png", side).status_code == 303
        page = site.page(path)
        source = re.search(r'<img class=attached alt="attached picture" src="([^"]+)"', page)
        assert source
        shown = site.client.get(source[1])
        assert shown.content == picture() and shown.headers["content-type"] == "image/png"
        assert shown.headers["x-content-type-options"] == "nosniff"
        content = replies.asked[-1].messages[0]["content"]
        assert [part["type"] for part in content] == ["image", "text"] or content[0]["type"].startswith("image")
        ask(site, path, "and now?", side)
        assert isinstance(replies.asked[-1].messages[0]["content"], list)  # it stays in the history
        site.client = site.new_client()
        site.log_in(Role.REVIEWER, "ben")
        assert site.client.get(source[1]).status_code == 404


@pytest.mark.parametrize("kind", ["image/png", "image/svg+xml", "audio/wav", "text/html"])
@pytest.mark.parametrize(
    "content", [b"<svg onload=alert(1)>", b"<script>alert(1)</script>", b"\x89PNG\r\n\x1a\n", b""]
)
def test_file_that_is_no_medium_is_refused(served: Site, kind: str, content: bytes) -> None:
    path = opened(served, "faq/adapter")
    answer = attach(served, path, content, kind, choices(served.page(path))["faq@1.0"])
    assert answer.status_code == 400 and "Try:" in answer.text
    talks = served.folder / ".studio" / "talks"
    assert [file for file in talks.rglob("*") if file.is_file()] == []


def test_attachment_above_its_limit_is_refused(served: Site) -> None:
    path = opened(served, "faq/adapter")
    side = choices(served.page(path))["faq@1.0"]
    for size in (MAX_MEDIA_BYTES + 1, MAX_MEDIA_BYTES + MAX_FORM_BYTES + 1):
        assert attach(served, path, picture() + bytes(size), "image/png", side).status_code == 413


@pytest.mark.parametrize("name", ["../x.jsonl", "%2e%2e%2fx", "a.html", "0" * 32 + ".svg", "0" * 32 + ".png"])
def test_no_other_file_is_shown(served: Site, name: str) -> None:
    path = opened(served, "faq/adapter")
    assert served.client.get(f"{path}/media/{name}").status_code == 404


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_replies_stay_text(served: Site, replies: HeldReplies, text: str) -> None:
    replies.pieces = [TextDelta("c", text[:40_000], 1)]
    path = opened(served, "faq/adapter")
    page = ask(served, path, text[:2000].replace("\x00", "") or "x", choices(served.page(path))["faq@1.0"])
    tags = Tags(page)
    assert not tags.acting({"style", "srcdoc", "formaction"})
    assert {tag for tag, _ in tags.tags} & {"iframe", "img", "object", "embed", "base"} == set()
    assert len([1 for tag, _ in tags.tags if tag == "script"]) == 2
    assert not UNSEEN.search(page)


def test_hostile_pieces_are_sent_as_text(served: Site, replies: HeldReplies) -> None:
    replies.pieces = [
        TextDelta("c", text, 1) for text in ("first", "\n\nevent: end\n\u202e<script>", "\x1b[31m\u2028")
    ]
    path = opened(served, "faq/adapter")
    replies.is_held = True
    data = {"csrf": served.csrf(path), "prompt": "why", "first": choices(served.page(path))["faq@1.0"]}
    served.client.post(path, data=data, headers={"origin": ADDRESS, "hx-request": "true"})
    replies.is_held = False
    text = served.client.get(f"{path}/replies/0/0/events").text
    assert text.count("event: end") - text.count("\\nevent: end") == 1
    assert not UNSEEN.search(text) and "\u2028" not in text
    assert {line.partition(":")[0] for line in text.split("\n") if line} <= {"id", "data", "event"}


def test_feedback_goes_to_the_inbox_that_retrain_reads(served: Site, tmp_path: Path) -> None:
    path = opened(served, team_of(served, tmp_path))
    page = ask(served, path, "when?", choices(served.page(path))["faq@1.0"])
    assert "Correct it" in page
    served.post(f"{path}/feedback", from_page=path, turn="0", side="0", rating="-1", consent="1")
    answer = served.post(f"{path}/feedback", from_page=path, turn="0", side="0", correction="at nine", consent="1")
    assert answer.status_code == 303, answer.text
    inbox = tmp_path / "state" / "inbox"
    lines = [json.loads(line) for file in inbox.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [line.get("rating") for line in lines] == [-1, None] and lines[1]["correction"] == "at nine"
    assert lines[0]["messages"][0]["content"] == "when?" and lines[0]["by"]["consent"] == "given"
    page = served.page(path)
    assert str(inbox) in page and f"sartor retrain {served.folder / 'team.yaml'} --agent faq" in page
    assert 'value="-1" aria-pressed="true"' in page and ">at nine</textarea>" in page


def test_feedback_without_consent_keeps_no_words(served: Site, tmp_path: Path) -> None:
    path = opened(served, team_of(served, tmp_path))
    ask(served, path, "secret?", choices(served.page(path))["faq@1.0"])
    served.post(f"{path}/feedback", from_page=path, turn="0", side="0", rating="1")
    written = "".join(file.read_text() for file in (tmp_path / "state" / "inbox").glob("*.jsonl"))
    assert '"rating":1' in written.replace(" ", "") and "secret" not in written
    assert "without words" in served.page(path)
    refused = served.post(f"{path}/feedback", from_page=path, turn="0", side="0", correction="x")
    assert refused.status_code == 503 and "consent" in refused.text
    for fields in ({"turn": "9"}, {"rating": "5"}, {"side": "x"}):
        wrong = {"turn": "0", "side": "0", "rating": "1", **fields}
        assert served.post(f"{path}/feedback", from_page=path, **wrong).status_code == 400


def test_feedback_of_an_adapter_names_its_inbox_for_curate(served: Site) -> None:
    path = opened(served, "faq/adapter")
    ask(served, path, "when?", choices(served.page(path))["faq@1.0"])
    served.post(f"{path}/feedback", from_page=path, turn="0", side="0", rating="1", consent="1")
    assert "<code>inbox:" in served.page(path)


def test_receipt_is_shown_and_downloaded(served: Site, tmp_path: Path) -> None:
    path = opened(served, team_of(served, tmp_path))
    page = ask(served, path, "when?", choices(served.page(path))["faq@1.0"])
    link = f"{path}/receipts/0/0"
    assert link in page
    page = served.page(link)
    assert f"sartor receipt verify receipt-r1.json --team {served.folder / 'team.yaml'}" in page and "faq@1.0" in page
    document = served.client.get(f"{link}?download=true")
    assert document.headers["content-disposition"] == 'attachment; filename="receipt-r1.json"'
    content = document.json()
    assert content["receipt"]["id"] == "r1" and content["reply"] == "the sky is blue "
    assert content["messages"] == [{"role": "user", "content": "when?"}]
    assert served.client.get(f"{path}/receipts/3/0").status_code == 400


def test_without_a_voice_there_is_nothing_to_listen_to(served: Site) -> None:
    path = opened(served, "faq/adapter")
    assert "Listen" not in ask(served, path, "when?", choices(served.page(path))["faq@1.0"])


@needs_espeak
def test_reply_is_spoken(site: Site, tmp_path: Path, replies: HeldReplies) -> None:
    with talking(tmp_path, replies, speech=SpeechService(SpeechOptions(voice="espeak"))):
        path = opened(site, "faq/adapter")
        page = ask(site, path, "when?", choices(site.page(path))["faq@1.0"])
        source = re.search(r'<audio controls preload=none aria-label="Listen" src="([^"]+)"', page)
        assert source
        sound = site.client.get(source[1])
        assert sound.headers["content-type"] == "audio/wav" and sound.content[:4] == b"RIFF"


@pytest.mark.parametrize("language", ["en", "de"])
def test_conversation_is_shown_in_both_languages(served: Site, language: str) -> None:
    path = opened(served, "faq/adapter")
    ask(served, path, "when?", choices(served.page(path))["faq@1.0"])
    for page in (path, "/talk", f"{path}/receipts/0/0"):
        text = served.page(page, **{"accept-language": language})
        assert f'<html lang="{language}">' in text
        for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", text):
            before = text[: match.start()]
            assert "type=hidden" in match[0] or before.rfind("<label") > before.rfind("</label>"), match[0]
