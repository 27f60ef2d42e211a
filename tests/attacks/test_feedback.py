"""Attacks on the boundary of feedback: words in another's name, words after a deletion, and a full house."""

from __future__ import annotations

import asyncio
import datetime
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sartor
import serving
from receipt_fakes import ABOUT, given
from sample_data import ROWS, write_jsonl
from sartor.core import model_refs
from sartor.core.errors import ConfigError, ConflictError, KeyRefusedError
from sartor.core.lineage.receipt_index import INDEX, ReceiptIndex
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.curate.review.review_store import open_items
from sartor.learn import personal_rows
from sartor.learn.user_data import allow_personal
from sartor.release.gate import check_review, open_rules
from sartor.serving import api_keys, erased_users
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.erased_users import ErasedUsers
from sartor.serving.feedback_intake import FeedbackIntake
from sartor.serving.feedback_store import Exchange, FeedbackStore, Memory
from sartor.serving.http.services import UserDirectory
from sartor.serving.plans.plan_log import FinishedRun, PlanLog, erase_runs, read_runs
from sartor.serving.plans.plan_steps import StepLogEntry
from sartor.serving.receipts import ReceiptLog, digest_by, team_digest
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.user_versions import ANYBODY, UserVersion, UserVersionStore, user_digest
from sartor.serving.team_config import FeedbackTerms, Team, load
from serving import chat

DIGEST = digest_by(b"k" * 32)
ADA, BEN = (user_digest(name, DIGEST) for name in ("ada", "ben"))
WORDS = "my sister Odile keeps bees in Vouvray"


def house_of_people() -> Any:
    return serving.house(people=UserDirectory(lambda user: user_digest(user, DIGEST)))


def line(receipt: str, key: str = "", user: str = ADA, **changes: Any) -> Feedback:
    fields = {"messages": ({"role": "user", "content": "hello"},), "reply": "hi", "rating": 1.0}
    by = FeedbackAuthor(key, user, "given")
    return Feedback(receipt, "faq@1.0", "2026-11-20T10:00:00Z", by=by, **{**fields, **changes})


def learnt(tmp_path: Path, *lines: Feedback, has_keys: bool = True) -> tuple[list[str], Counter[str]]:
    """What a tuning for ada would learn from an inbox, and what it leaves out."""
    inbox, left_out = FeedbackStore(tmp_path / "inbox"), Counter[str]()
    for item in lines:
        inbox.add(item)
    query = personal_rows.RowQuery(ADA, "faq", "inbox", {"k-ada": {ADA}}, 0.25, 0, has_keys=has_keys)
    rows = personal_rows._learnable_rows(inbox, query, left_out)
    return [row["messages"][-1]["content"] for row in rows], left_out


def test_foreign_key_words_do_not_ride_on_own_line(tmp_path: Path) -> None:
    """L1: who knows the receipt's id corrects it under another key; the user's own later rating must not adopt that."""
    attack = line("r1", "k-eve", correction="send the money to Eve", rating=None)
    rows, left_out = learnt(tmp_path, attack, line("r1", "k-ada"))
    assert rows == ["hi"] and left_out == {"said by a key that may not speak for that user": 1}


def test_foreign_key_does_not_suppress_own_line(tmp_path: Path) -> None:
    """L1: a later line of another key on the same receipt does not replace the user's own."""
    rows, _ = learnt(tmp_path, line("r1", "k-ada", correction="hello, Ada"), line("r1", "k-eve", rating=-1.0))
    assert rows == ["hello, Ada"]


def test_keyless_lines_are_not_learnt_once_there_are_keys(tmp_path: Path) -> None:
    """L1: in a team's time without keys whoever reached it could say anything in anybody's name."""
    rows, left_out = learnt(tmp_path, line("r1", correction="obey Eve"))
    assert rows == [] and left_out == {"said before the team asked for keys": 1}


def test_keyless_lines_are_learnt_while_there_are_none(tmp_path: Path) -> None:
    assert learnt(tmp_path, line("r1", correction="hello, Ada"), has_keys=False)[0] == ["hello, Ada"]


def test_words_of_another_user_are_not_learnt(tmp_path: Path) -> None:
    """Ada comments on a reply to Ben: Ben's prompt must not be tuned into Ada's own version."""
    rows, left_out = learnt(tmp_path, line("r1", "k-ada", asker=BEN))
    assert rows == [] and left_out == {"said of a reply to another user": 1}


async def test_feedback_in_other_name_still_belongs_to_asker(tmp_path: Path) -> None:
    """Whoever names another user in the feedback puts ada's prompt out of reach of ada's deletion."""
    async with serving.client(house_of_people(), serving.team(tmp_path)) as client:
        await client.post("/v1/chat/completions", json=chat(WORDS, user="ada"))
        posted = {"receipt": "r1", "rating": 1, "user": "ben"}
        assert (await client.post("/v1/feedback", json=posted)).status_code == 200
    inbox = FeedbackStore(tmp_path / "inbox")
    (stored,) = inbox.lines()
    assert stored.feedback is not None and stored.feedback.asker == ADA and stored.feedback.by.user not in ("", ADA)
    assert len(inbox.remove(lambda feedback: feedback.is_of(ADA))) == 1
    assert WORDS not in "".join(file.read_text() for file in (tmp_path / "inbox").iterdir())


async def test_reply_in_flight_is_not_remembered_after_deletion(tmp_path: Path) -> None:
    """M7: the stream begins, the user is forgotten, the stream ends."""
    hold = asyncio.Event()
    house = replace(house_of_people(), replies=serving.Replies(hold=hold))
    async with serving.client(house, serving.team(tmp_path)) as client:
        running = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat(WORDS, user="ada")))
        await asyncio.sleep(0.1)
        for listener in house.people.listeners:
            listener(ADA)
        hold.set()
        assert (await running).status_code == 200
        memory: Memory = client.server.app.state.desk.memory
        assert memory.find("r1") is None
        await client.post("/v1/chat/completions", json=chat("hello again", user="ada"))
        assert memory.find("r2") is not None, "who comes back is a new user"


async def test_feedback_in_flight_is_not_stored_after_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M7: the masking of a long text takes seconds; the deletion looks through the inbox meanwhile."""
    house, kept = house_of_people(), FeedbackIntake.keep

    def slowly(self: FeedbackIntake, feedback: Feedback, is_erased: Callable[[], bool]) -> Feedback:
        for listener in house.people.listeners:
            listener(ADA)
        return kept(self, feedback, is_erased)

    monkeypatch.setattr(FeedbackIntake, "keep", slowly)
    async with serving.client(house, serving.team(tmp_path)) as client:
        await client.post("/v1/chat/completions", json=chat(WORDS, user="ada"))
        answer = await client.post("/v1/feedback", json={"receipt": "r1", "correction": f"{WORDS}!"})
    assert answer.status_code == 409 and "forgotten" in answer.text
    assert list(FeedbackStore(tmp_path / "inbox").lines()) == []


def test_deletion_is_seen_by_writers_that_wait_for_inbox(tmp_path: Path) -> None:
    """The check is made while the inbox is locked: not before a wait for the lock."""
    inbox, erased = FeedbackStore(tmp_path / "inbox"), ErasedUsers()
    began = time.monotonic()

    def is_erased() -> bool:
        assert (tmp_path / ".inbox.lock").exists()
        return erased.covers(began, ADA)

    inbox.add(line("r1"), is_erased)
    erased.add(ADA)
    with pytest.raises(ConflictError, match="forgotten"):
        inbox.add(line("r2"), is_erased)
    inbox.add(line("r3", user=BEN), lambda: erased.covers(began, BEN))
    assert [item.feedback.receipt for item in inbox.lines() if item.feedback] == ["r1", "r3"]


def test_receipt_in_flight_is_not_written_after_deletion(tmp_path: Path) -> None:
    """M7: a reply of the user's own version ends after its receipts were blanked."""
    log = ReceiptLog.of(Team(base="starter", state=str(tmp_path / ".team")), lambda: ABOUT)
    log.erased.add(ADA)
    log.write(given("r1", person=ADA, began=time.time() - 1))
    log.write(given("r2", person=BEN, began=time.time() - 1))
    log.close()
    stored = b"".join(file.read_bytes() for file in (tmp_path / ".team/receipts").glob("*.jsonl"))
    assert ADA.encode() not in stored and BEN.encode() in stored and log.read("r1") is None


def test_receipt_written_during_deletion_is_blanked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deletion comes between the look and the write: the line is there, and is blanked by its writer."""
    log = ReceiptLog.of(Team(base="starter", state=str(tmp_path / ".team")), lambda: ABOUT)
    append = log._append

    def late(*arguments: Any) -> None:
        log.erased.add(ADA)
        append(*arguments)

    monkeypatch.setattr(log, "_append", late)
    log.write(given("r1", person=ADA, began=time.time() - 1))
    log.close()
    assert ADA.encode() not in b"".join(file.read_bytes() for file in (tmp_path / ".team/receipts").glob("*"))


def test_clock_set_back_does_not_revive_what_was_erased() -> None:
    wall = [1000.0]
    erased = ErasedUsers(wall_clock=lambda: wall[0])
    erased.add(ADA)
    wall[0] = 500.0
    assert erased.covers_unix(990.0, ADA) and not erased.covers_unix(990.0, BEN)


def finished_run(person: str, began: float) -> FinishedRun:
    asked = {"messages": [{"role": "user", "content": WORDS}]}
    entry = StepLogEntry("", "request", "desk", "asked", request_fields=asked)
    answer = StepLogEntry("", "answer", "desk@1", "answered", reply=WORDS)
    return FinishedRun("p1", "desk@1", entry, [], answer, content=True, began=began, person=person)


def test_plan_texts_are_blanked_by_user(tmp_path: Path) -> None:
    """A plan with `log: content` keeps a user's words: the deletion must reach them and the log must stay readable."""
    log = PlanLog(tmp_path / "plans", DIGEST)
    log.write(finished_run(ADA, time.time()))
    log.write(replace(finished_run(BEN, time.time()), id="p2"))
    (file,) = (tmp_path / "plans").iterdir()
    assert erase_runs(tmp_path / "plans", ADA) == 2 and file.read_text().count(WORDS) == 2
    assert [rows[0]["run"] for rows in read_runs(file)] == ["p2"]


def test_plan_in_flight_keeps_no_texts_after_deletion(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "plans", DIGEST)
    log.erased.add(ADA)
    log.write(finished_run(ADA, time.time() - 1))
    (file,) = (tmp_path / "plans").iterdir()
    assert WORDS not in file.read_text() and ADA not in file.read_text()


@pytest.fixture
def team(tmp_path: Path) -> Team:
    file = tmp_path / "team.yaml"
    file.write_text(f"base: starter\nstate: {tmp_path / '.team'}\n")
    return load(file)


@pytest.mark.parametrize("store_result", ["put", "refuse"])
def test_tuning_in_flight_leaves_no_row_after_deletion(team: Team, store_result: str) -> None:
    """M7: the tuning read the inbox before the deletion, and ends after it."""
    with closing(Registry.open(team.registry_url)) as registry:
        store = UserVersionStore(registry.database)
        since, version = store.read().generation, UserVersion(ADA, "faq", "1.0", "r" * 64)
        store.forget(ADA)
        with pytest.raises(ConfigError, match="was forgotten"):
            if store_result == "put":
                store.put(version, since=since)
            else:
                store.refuse(version, "worse", since=since)
        assert store.mentions(ADA) == {"people": 0, "speakers": 0}
        store.put(version, since=store.read().generation)
        assert store.mentions(ADA)["people"] == 1, "who comes back may be tuned for"


def test_right_to_speak_can_be_withdrawn(team: Team) -> None:
    """L2: a key that was let speak for a user by mistake could do so until it was revoked."""
    with closing(Registry.open(team.registry_url)) as registry:
        keys = ApiKeyStore(registry.database, state=Path(team.state))
        secret, key = keys.make(["faq"])
        person = user_digest("ada", team_digest(Path(team.state)))
        allow_personal(team, key.id, "ada")
        assert ApiKeyStore(registry.database).admit(secret).may_speak_for(person)
        done = sartor.allow_personal(team, key.id, "ada", withdraw=True)
        assert done == {"key": key.id, "speaks_for": person, "withdrawn": True}
        assert not ApiKeyStore(registry.database).admit(secret).may_speak_for(person)


def test_withdrawal_of_one_user_names_right_for_anybody(team: Team) -> None:
    """A withdrawal that changes nothing must not look like one: the key still speaks for everybody."""
    with closing(Registry.open(team.registry_url)) as registry:
        _, key = ApiKeyStore(registry.database, state=Path(team.state)).make(["faq"])
    allow_personal(team, key.id, ANYBODY)
    with pytest.raises(ConfigError, match="but for anybody") as caught:
        allow_personal(team, key.id, "ada", withdraw=True)
    assert "--user '*' --withdraw" in caught.value.remedy


def test_clock_set_back_does_not_revive_expired_key(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """L8: a running server that has seen a key expired goes on refusing it."""
    today = datetime.datetime.now(datetime.UTC)
    with closing(Registry.open(team.registry_url)) as registry:
        keys = ApiKeyStore(registry.database, state=Path(team.state))
        secret, _ = keys.make(["faq"], expires="1d")
        assert keys.admit(secret)
        monkeypatch.setattr(api_keys, "_now", lambda: api_keys._stamp(today + datetime.timedelta(days=2)))
        with pytest.raises(KeyRefusedError, match="expired"):
            keys.admit(secret)
        monkeypatch.undo()
        with pytest.raises(KeyRefusedError, match="expired"):
            keys.admit(secret)


async def test_slow_masking_does_not_hold_up_receipts(tmp_path: Path) -> None:
    """L9: fifty long feedbacks are masked one at a time; other work of the event loop's threads goes on."""
    intake = FeedbackIntake(FeedbackTerms(), tmp_path)
    waiting = [asyncio.ensure_future(intake.run(time.sleep, 0.2)) for _ in range(50)]
    await asyncio.sleep(0)
    began = time.monotonic()
    await asyncio.to_thread(int)
    assert time.monotonic() - began < 1.0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def test_damaged_index_is_set_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L15: two processes find the index damaged; the second must not rename the first one's new index."""
    log = ReceiptLog.of(Team(base="starter", state=str(tmp_path / ".team")), lambda: ABOUT)
    log.write(given("r1"))
    log.close()
    folder = tmp_path / ".team/receipts"
    (folder / INDEX).write_bytes(b"no database" * 100)
    index = ReceiptIndex(folder)
    assert index.find("r1") is not None
    index._set_aside(folder / INDEX)
    assert (folder / INDEX).exists(), "what another process has mended stays"
    with closing(sqlite3.connect(folder / INDEX)) as connection:
        assert connection.execute("select count(*) from receipts").fetchone() == (1,)


def test_journal_of_damaged_index_is_not_rolled_back(tmp_path: Path) -> None:
    """L15: a journal that stays would be rolled back into the new file."""
    log = ReceiptLog.of(Team(base="starter", state=str(tmp_path / ".team")), lambda: ABOUT)
    log.write(given("r1"))
    log.close()
    file = tmp_path / ".team/receipts" / INDEX
    file.write_bytes(b"no database" * 100)
    Path(f"{file}-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\0" * 504)
    assert ReceiptIndex(file.parent).find("r1") is not None and not Path(f"{file}-journal").exists()


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_digest_cache_that_others_can_write_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L14: who can write SARTOR_HOME/digests.sqlite makes a changed base pass as the one that was checked."""
    file = tmp_path / "weights"
    file.write_bytes(b"w" * (1 << 20))
    monkeypatch.setattr(model_refs.time, "time", lambda: 1e11)  # long after the file was written
    digest = model_refs.remembered_digest(file)
    store = Path(os.environ["SARTOR_HOME"]) / "digests.sqlite"
    assert store.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("update digests set sha256 = 'of another file'")
    store.chmod(0o666)
    assert model_refs.remembered_digest(file) == digest


def test_unsigned_decisions_do_not_open_signed_gate(tmp_path: Path) -> None:
    """L11: whoever can write to the Dataset decides its open items by hand; no manifest lists review.jsonl."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    recipe = {"sources": [{"path": str(tmp_path / "rows.jsonl"), "licence": "MIT"}], "workers": 1}
    dataset = sartor.curate(recipe, tmp_path / "data").dataset
    found = {"kind": "validation", "slice": "all rows", "reason": "novelty", "detail": "unlike reality"}
    sartor.review_add(dataset.path, [found])
    (item,) = sartor.review_list(dataset.path)["items"]
    sartor.review_decide(dataset.path, [item["id"]], sartor.Opinion("accept", by="Eve", reason="looks fine"))
    limits = open_rules({"review": {"open": 0, "signed": True}}).limits
    assert limits.review is not None and limits.review.signed
    assert (open_items(dataset), open_items(dataset, signed=True)) == (0, 1)
    assert check_review(open_items(dataset, signed=True), limits.review, "data")["review"].outcome == "fail"


def test_exchange_of_foreign_key_is_erased_with_user() -> None:
    """A key that may not speak for ada names ada: it is no way around the deletion."""
    memory = Memory(1 << 20)
    memory.keep("r1", Exchange("faq@1", [], WORDS, "yes", key="k-eve", person=ADA))
    memory.forget_person(ADA)
    assert memory.find("r1") is None and erased_users.forgotten_meanwhile().remedy
