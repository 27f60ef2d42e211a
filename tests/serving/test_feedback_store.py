"""What is written of people's feedback: with whose consent, by whom, without personal data, how often; and taken out again."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

import serving
from sartor.core.errors import BusyError, ConfigError, MissingError, SourceError
from sartor.core.filesystem import temporary_path
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.serving.commands.agent_commands import list_feedback, remove_feedback
from sartor.serving.feedback_intake import FeedbackIntake, Mask
from sartor.serving.feedback_store import Exchange, FeedbackStore, Memory
from sartor.serving.rate_limits import FeedbackRates
from sartor.serving.receipts import team_digest
from sartor.serving.team_config import FeedbackTerms
from serving import chat

COMPLETIONS, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
FAQ, ALL, ADMIN = ({"authorization": f"Bearer key-{name}"} for name in ("faq", "all", "admin"))
CANARY = "zebra.quince@example.org"


async def ask(tmp_path: Path, *calls: tuple[str, Any, dict[str, str]], keys: bool = True, **made: Any) -> list[Any]:
    """The answers to a few POSTs, and to GET /metrics behind them; `roster` is the house's."""
    parts = {"keys": serving.KEYS} if keys else {}
    if "agent_admin" in made:
        parts["agent_admin"] = made.pop("agent_admin")

    async with serving.client(serving.house(**parts), serving.team(tmp_path, **made)) as client:
        answers = [await client.post(path, json=body, headers=headers) for path, body, headers in calls]
        return [*answers, await client.get("/metrics", headers=ALL if keys else {})]


def lines(tmp_path: Path) -> list[Feedback]:
    return [kept.feedback for kept in FeedbackStore(tmp_path / "inbox").lines() if kept.feedback]


async def test_nothing_personal_reaches_the_disk(tmp_path: Path) -> None:
    body = {
        "receipt": "r1",
        "correction": f"ask {CANARY}",
        "comment": "or +49 30 1234567, or jane@example.org",
        "user": "ann",
    }
    *_, said, page = await ask(tmp_path, (COMPLETIONS, chat(f"who is {CANARY}?"), FAQ), (FEEDBACK, body, FAQ))
    assert said.json() == {"receipt": "r1", "agent": "faq@1.0", "learnable": True}
    (line,) = lines(tmp_path)
    assert line.messages[0]["content"] == "who is <EMAIL_1>?" and line.correction == "ask <EMAIL_1>"
    assert line.comment == "or <PHONE_1>, or <EMAIL_2>"
    assert line.masked == {"email": 3, "phone": 1}
    assert line.by == FeedbackAuthor("k1", team_digest(tmp_path)("user", "ann"), "assumed")
    assert 'sartor_feedback_masked_total{kind="email"} 3.0' in page.text
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert not any(word in written for word in (CANARY.encode(), b"1234567", b"jane", b"ann"))


def test_what_is_not_personal_stays_and_media_are_let_be() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,bob@example.com"}}
    calls = [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "mail", "arguments": '{"to": "bob@example.com", "n": 1}'},
        }
    ]
    messages = (
        {
            "role": "user",
            "content": [{"type": "text", "text": "call 030 123"}, {"type": "text", "text": "4567"}, picture],
        },
        {"role": "assistant", "content": None, "tool_calls": calls},
    )
    said = Feedback(
        "r1", "faq@1.0", "2026-01-31", messages=messages, reply="ask +49 30 7654321", correction="bob@example.com"
    )
    kept = Mask(("+49 30 7654321",))(said)
    assert kept.reply == said.reply and kept.correction == "<EMAIL_1>"
    assert kept.messages[0]["content"][2] == picture
    assert json.loads(kept.messages[1]["tool_calls"][0]["function"]["arguments"]) == {"to": "<EMAIL_1>", "n": 1}
    assert kept.messages[1]["content"] is None and kept.messages[1]["role"] == "assistant"
    assert Mask()(kept).correction == "<EMAIL_1>"  # once is enough
    plain = Feedback(
        "r1", "faq@1.0", "2026-01-31", rating=1, messages=({"role": "user", "content": "hi"},), reply="ho"
    )
    assert Mask()(plain) is plain


async def test_refused_consent_stores_only_the_rating(tmp_path: Path) -> None:
    """Words without consent are counted as withheld; without a rating the feedback is refused."""
    roster = serving.Roster()
    refused = {"receipt": "r1", "rating": -1, "correction": "b", "comment": "c", "consent": False}
    *_, kept, wordless, page = await ask(
        tmp_path,
        (COMPLETIONS, chat(), FAQ),
        (FEEDBACK, refused, FAQ),
        (FEEDBACK, {**refused, "rating": None}, FAQ),
        agent_admin=roster,
    )
    assert kept.json()["learnable"] is False
    assert (wordless.status_code, wordless.json()["error"]["param"]) == (400, "consent")
    (line,) = lines(tmp_path)
    assert line == Feedback("r1", "faq@1.0", line.date, rating=-1, by=FeedbackAuthor("k1", "", "refused"))
    assert roster.heard == [("faq@1.0", -1.0)]
    assert 'sartor_feedback_total{agent="faq@1.0",kind="withheld"} 1.0' in page.text


@pytest.mark.parametrize(
    ("terms", "consent", "agreed"),
    [
        ("assumed", None, "assumed"),
        ("assumed", True, "given"),
        ("assumed", False, "refused"),
        ("required", None, "refused"),
        ("required", True, "given"),
        ("required", False, "refused"),
    ],
)
def test_consent_is_what_the_client_says_or_the_team(
    tmp_path: Path, terms: Any, consent: bool | None, agreed: str
) -> None:
    assert FeedbackIntake(FeedbackTerms(consent=terms), tmp_path).voice("k1", "", consent) == FeedbackAuthor(
        "k1", "", agreed
    )  # type: ignore[arg-type]


async def test_only_the_key_that_got_a_reply_rates_it_or_an_admin(tmp_path: Path) -> None:
    rated = {"receipt": "r1", "rating": 1}
    _, own, other, admin, _ = await ask(
        tmp_path, (COMPLETIONS, chat(), FAQ), (FEEDBACK, rated, FAQ), (FEEDBACK, rated, ALL), (FEEDBACK, rated, ADMIN)
    )
    assert [answer.status_code for answer in (own, other, admin)] == [200, 403, 200]
    assert "another key" in other.json()["error"]["message"]
    assert [line.by.key for line in lines(tmp_path)] == ["k1", "k3"]


async def test_the_monitors_hear_a_key_once_of_each_reply(tmp_path: Path) -> None:
    roster = serving.Roster()
    again = [(FEEDBACK, {"receipt": "r1", "rating": -1}, {})] * 5
    await ask(tmp_path, (COMPLETIONS, chat(), {}), *again, keys=False, agent_admin=roster)
    assert roster.heard == [("faq@1.0", -1.0)]
    memory = Memory(100)
    memory.keep("r1", Exchange("faq@1.0", (), "a" * 90, "b", "k1"))
    memory.keep("r2", Exchange("faq@1.0", (), "a" * 90, "b", "k2"))
    assert memory.find("r1") is None and memory.asker("r1") == "k1" and memory.asker("r9") == ""


async def test_a_key_has_a_rate_per_minute_and_per_day(tmp_path: Path) -> None:
    rated = (FEEDBACK, {"receipt": "r1", "rating": 1}, FAQ)
    terms = FeedbackTerms(per_minute=2)
    answers = (
        await ask(
            tmp_path, (COMPLETIONS, chat(), FAQ), rated, rated, rated, (FEEDBACK, rated[1], ADMIN), feedback=terms
        )
    )[1:-1]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 200]
    assert (
        int(answers[2].headers["retry-after"]) <= 30 and "feedback.per_minute" in answers[2].json()["error"]["remedy"]
    )

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    rates = FeedbackRates(FeedbackTerms(per_minute=0, per_day=3), clock)
    for _ in range(3):
        rates.begin("one")
    with pytest.raises(BusyError, match="per day") as caught:
        rates.begin("one")
    assert caught.value.retry_after_s == pytest.approx(86_400 / 3)
    rates.begin("two")
    clock.now += 86_400 / 3
    rates.begin("one")


def test_from_json_reads_older_schema_and_refuses_newer() -> None:
    """Schema 1 is read, the present one survives a round trip, and schema 3 is refused."""
    old = {"schema": 1, "receipt": "r1", "agent": "faq@1.0", "date": "2026-01-31", "rating": 1, "messages": []}
    assert Feedback.from_json(old) == Feedback("r1", "faq@1.0", "2026-01-31", rating=1)
    new = Feedback("r1", "faq@1.0", "2026-01-31", rating=1, by=FeedbackAuthor("k1", "u", "given"), masked={"email": 1})
    assert Feedback.from_json(json.loads(json.dumps(new.as_json()))) == new
    with pytest.raises(SourceError):
        Feedback.from_json({**old, "schema": 3})


def test_what_a_key_or_a_user_said_is_found_and_taken_out(tmp_path: Path) -> None:
    team = tmp_path / "team.yaml"
    team.write_text("base: tiny\nstate: state\n")
    hearing = FeedbackIntake(FeedbackTerms(), tmp_path / "state")
    for number in range(6):
        by = hearing.voice("k1" if number % 2 else "k2", "ann" if number < 2 else "bea", consent=True)
        rated = Feedback(
            f"r{number}", "faq@1.0", f"2026-01-{number // 4 + 1:02}T", rating=1, correction=f"word{number}", by=by
        )
        hearing.keep(rated)
    torn = tmp_path / "state" / "inbox" / "feedback-2026-01-01.jsonl"
    with torn.open("a") as stream:
        stream.write('{"schema": 2, "text": "word1')
    rows = list_feedback(team).rows
    assert sorted((row["key"], bool(row["user"]), row["rows"], row["corrections"]) for row in rows) == [
        ("k1", False, 3, 3),
        ("k1", True, 1, 1),
        ("k1", True, 2, 2),
        ("k2", False, 3, 3),
        ("k2", True, 1, 1),
        ("k2", True, 2, 2),
    ]
    before = {kept.location: kept.feedback for kept in hearing.inbox.lines()}
    gone = remove_feedback(team, user="ann")
    assert gone == {
        "removed": 2,
        "damaged": 1,
        "places": ["feedback-2026-01-01.jsonl:1", "feedback-2026-01-01.jsonl:2"],
    }
    after = {kept.location: kept.feedback for kept in hearing.inbox.lines()}
    assert after == {place: said for place, said in before.items() if place not in gone["places"] and said}
    assert b"word1" not in torn.read_bytes() and torn.stat().st_mode & 0o077 == 0
    assert remove_feedback(team, key="k1")["removed"] == 2
    assert {row["key"] for row in list_feedback(team).rows} == {"k2"}
    with pytest.raises(ConfigError, match="neither a key nor a user"):
        remove_feedback(team)


def test_lines_are_added_while_others_are_taken_out(tmp_path: Path) -> None:
    one, other = FeedbackStore(tmp_path / "inbox"), FeedbackStore(tmp_path / "inbox")
    goes, stays = (
        Feedback("r", "faq@1.0", "2026-01-31", rating=1, by=FeedbackAuthor(key)) for key in ("goes", "stays")
    )

    def add() -> None:
        for number in range(60):
            one.add(stays if number % 2 else goes)

    adding = threading.Thread(target=add)
    adding.start()
    gone = 0
    while adding.is_alive():
        gone += len(other.remove(lambda said: said.by.key == "goes"))
    adding.join()
    gone += len(other.remove(lambda said: said.by.key == "goes"))
    assert (gone, [kept.feedback for kept in one.lines()]) == (30, [stays] * 30)


def test_a_full_disk_leaves_the_inbox_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = FeedbackStore(tmp_path / "inbox")
    inbox.add(Feedback("r", "faq@1.0", "2026-01-31", rating=1))
    (file,) = inbox.path.iterdir()
    before = file.read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MissingError, match="No space left"):
        inbox.remove(lambda said: True)
    assert file.read_bytes() == before


def test_removing_sweeps_what_a_killed_removal_left(tmp_path: Path) -> None:
    inbox = FeedbackStore(tmp_path / "inbox")
    inbox.add(Feedback("r", "faq@1.0", "2026-01-31", rating=1))
    (file,) = inbox.path.iterdir()
    temporary_path(file).write_bytes(file.read_bytes())
    assert len(inbox.remove(lambda said: True)) == 1
    assert list(inbox.path.iterdir()) == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
