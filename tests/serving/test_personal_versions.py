"""Personal versions between a registry and a crew: who is answered by their own, and what happens where that cannot be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch_fakes import (
    FakeCrew,
    FakeReceipts,
    admitted,
    asked,
    dispatching,
    no_fsync,
    registry,
    team,
    until,
    version,
)
from postgres_server import postgres
from sartor.core.errors import ModelError
from sartor.core.lineage.receipt_index import ReceiptIndex
from sartor.inference.engine import TextDelta
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.http.services import ANYBODY
from sartor.serving.receipts import erase_receipts
from sartor.serving.registry import server_presence
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.user_versions import FORGOTTEN, UserVersion, UserVersionStore
from sartor.serving.team_config import PersonalTerms, Team

__all__ = ["no_fsync"]

ADA, BEN, CLEO = ("a" * 64, "b" * 64, "c" * 64)


def own(person: str, number: str = "1", agent: str = "faq", name: str = "own") -> UserVersion:
    """A person's version of an agent, tuned on `number`, at a path that `admitted` takes."""
    adapter = f"{name}-{person[:4]}"
    return UserVersion(
        person, agent, number, f"id-{agent}-{number}", adapter, f"art-{adapter}", f"/people/{adapter}", {"rows": 9}
    )


async def told(dispatch: Any, person: str = "", model: str = "faq", **options: Any) -> tuple[str, str, str]:
    """(agent, text, reason) of a reply."""
    answer = await dispatch.open(asked(model, person=person, **options))
    text = "".join([event.text async for event in answer.events if isinstance(event, TextDelta)])
    return answer.agent, text, answer.reason


def opened(tmp_path: Path, *people: UserVersion) -> tuple[Registry, UserVersionStore]:
    of = registry(tmp_path, version("faq", "1"), version("faq", "2"))
    book = UserVersionStore(of.database)
    for one in people:
        book.put(one, ChangeCause("test"))
    return of, book


async def test_a_person_is_answered_by_their_own_and_nobody_else_is(tmp_path: Path) -> None:
    of, _ = opened(tmp_path, own(ADA))
    crew, receipts = FakeCrew(), FakeReceipts()

    async with dispatching(team(tmp_path), crew, of, admit=admitted, receipts=receipts) as dispatch:
        assert "own-aaaa" not in crew.attached, "loaded on demand"
        agent, text, reason = await told(dispatch, ADA)
        assert (agent, text) == ("faq@1+personal", "by own-aaaa") and reason.endswith("the user's own version")
        assert await told(dispatch, BEN) == ("faq@1", "by faq-1", "asked by name")
        assert (await told(dispatch))[:2] == ("faq@1", "by faq-1")
        assert (await told(dispatch, ADA, "faq@1"))[0] == "faq@1", "an exact version is that one"
        assert (await told(dispatch, ADA, "faq@1+personal"))[0] == "faq@1+personal"
        assert (await told(dispatch, ADA, "base"))[0].startswith("base@")
    first = receipts.kept[0]
    assert (first.person, first.release_id, first.call.adapter) == (ADA, "id-faq-1", "own-aaaa")
    assert receipts.kept[1].person == ""
    assert crew.lost == []


async def test_personal_version_of_superseded_version_is_unused(tmp_path: Path) -> None:
    """After a promotion the live version answers with the reason, until one tuned on it is added."""
    of, book = opened(tmp_path, own(ADA))

    async with dispatching(team(tmp_path), FakeCrew(), of, admit=admitted) as dispatch:
        assert (await told(dispatch, ADA))[0] == "faq@1+personal"
        of.promote("faq", "2")
        await until(lambda: dispatch.served.agents["faq"].live == "2")
        agent, text, reason = await told(dispatch, ADA)
        assert (agent, text) == ("faq@2", "by faq-2") and "tuned on 1" in reason
        assert (await told(dispatch, BEN))[2] == "asked by name", "others hear nothing of it"
        book.put(own(ADA, "2", name="new"))
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await told(dispatch, ADA))[:2] == ("faq@2+personal", "by new-aaaa")


@pytest.mark.parametrize("fault", ["unloadable", "another", "breaks"])
async def test_the_live_version_answers_where_ones_own_cannot(tmp_path: Path, fault: str) -> None:
    of, _ = opened(tmp_path, own(ADA) if fault != "another" else replace(own(ADA), artifact="art-another"))
    crew = FakeCrew()
    if fault == "unloadable":
        crew.unloadable.add("own-aaaa")
    if fault == "breaks":
        crew.faults["own-aaaa"] = ModelError("the logits are not finite", "tune it again")

    async with dispatching(team(tmp_path), crew, of, admit=admitted) as dispatch:
        agent, text, reason = await told(dispatch, ADA)
        assert (agent, text) == ("faq@1", "by faq-1")
        assert "the user's own version" in reason and ("not finite" in reason) == (fault == "breaks")
        troubles = json.dumps(dispatch.health())
        assert ADA[:8] not in troubles and "personal" not in troubles


async def test_the_one_that_was_asked_for_longest_ago_goes_first(tmp_path: Path) -> None:
    of, _ = opened(tmp_path, own(ADA), own(BEN), own(CLEO))
    crew = FakeCrew()

    async with dispatching(team(tmp_path, personal=PersonalTerms(held=2)), crew, of, admit=admitted) as dispatch:
        for person in (ADA, BEN, ADA, CLEO):
            assert (await told(dispatch, person))[0] == "faq@1+personal"
        await until(lambda: "own-bbbb" not in crew.attached)
        assert {"own-aaaa", "own-cccc", "faq-1"} <= set(crew.attached) and dispatch.user_versions.loaded_count == 2
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert {"own-aaaa", "own-cccc"} <= set(crew.attached), "a reading of the registry takes none of them"
        assert (await told(dispatch, BEN))[0] == "faq@1+personal", "and is there again when it is asked for"
    assert crew.lost == []


async def test_nobody_tries_a_candidate_instead_of_their_own(tmp_path: Path) -> None:
    of, _ = opened(tmp_path, own(ADA))

    async with dispatching(team(tmp_path), FakeCrew(), of, admit=admitted) as dispatch:
        of.start_canary("faq", "2", 1.0)
        await until(lambda: dispatch.served.agents["faq"].candidate == "2")
        await dispatch.served.settle()
        assert (await told(dispatch, BEN))[0] == "faq@2"
        agent, _, reason = await told(dispatch, ADA)
        assert agent == "faq@1+personal" and "canary" not in reason


async def test_server_detaches_forgotten_user_and_confirms(tmp_path: Path) -> None:
    """A running reply keeps the adapter to its end; only then does the server confirm the generation."""
    of, book = opened(tmp_path, own(ADA), own(BEN))
    crew, forgotten = FakeCrew(), []

    async with dispatching(team(tmp_path), crew, of, admit=admitted) as dispatch:
        dispatch.user_versions.listeners.append(forgotten.append)
        await told(dispatch, ADA)
        await told(dispatch, BEN)
        crew.slow = 20
        answer = await dispatch.open(asked("faq", person=ADA))
        generation, removed = book.forget(ADA, ChangeCause("dpo", "asked for"))
        assert removed == {"people": 1, "speakers": 0}
        state = Path(team(tmp_path).state)
        assert await asyncio.to_thread(server_presence.wait_for, state, generation, 0.0) == (
            [],
            [server_presence.os.getpid()],
        )
        await until(lambda: forgotten == [ADA])
        assert "own-aaaa" in crew.attached, "the reply that lives has it to its end"
        await answer.events.aclose()
        late: Sequence[int] = [1]
        while late:
            heard, late = await asyncio.to_thread(server_presence.wait_for, state, generation, 0.2)
        assert heard == [server_presence.os.getpid()] and crew.renewals == 1
        assert "own-aaaa" not in crew.attached and "own-bbbb" in crew.attached
        assert (await told(dispatch, ADA))[:2] == ("faq@1", "by faq-1")
    assert server_presence.running(state) == {}
    assert crew.lost == []


def test_a_server_that_died_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "4242.json").write_text('{"pid": 4242, "generation": 3}')
    assert server_presence.wait_for(tmp_path, 9, 0.0) == ([], [])
    assert list((tmp_path / "servers").iterdir()) == []


def test_a_key_speaks_for_whom_it_was_let(tmp_path: Path) -> None:
    with closing(Registry.open(team(tmp_path).registry_url)) as of:
        keys, book = ApiKeyStore(of.database, clock=lambda: 1e9 * len(made)), UserVersionStore(of.database)
        made: list[Any] = []
        secret, key = keys.make(["faq"])
        assert not keys.admit(secret).may_speak_for(ADA)
        book.allow(key.id, ADA)
        made.append(key)
        assert keys.admit(secret).may_speak_for(ADA) and not keys.admit(secret).may_speak_for(BEN)
        book.allow(key.id, "*")
        made.append(key)
        assert keys.admit(secret).may_speak_for(BEN)
        _, removed = book.forget(ADA)
        made.append(key)
        assert removed["speakers"] == 1 and keys.admit(secret).may_speak_for(BEN)
    assert ANYBODY.may_speak_for(ADA)


def rows_of_people(url: str) -> None:
    with closing(Registry.open(url)) as of:
        of.add(version("faq", "1"))
        book = UserVersionStore(of.database)
        book.put(own(ADA), ChangeCause("ada"))
        book.refuse(replace(own(ADA), adapter=""), "it is worse", ChangeCause("ada"))
        book.refuse(replace(own(BEN), adapter=""), "too few rows", ChangeCause("ben"))
        people = book.read()
        kept = people.versions[ADA, "faq"]
        assert (kept.adapter, kept.note, kept.facts) == ("own-aaaa", "it is worse", {"rows": 9})
        assert people.versions[BEN, "faq"].adapter == "" and people.damaged_count == 0
        assert set(book.read(BEN).versions) == {(BEN, "faq")}
        before = people.generation
        generation, removed = book.forget(ADA, ChangeCause("dpo"))
        assert generation == before + 1 and removed["people"] == 1
        assert book.forgotten_since(before) == [ADA] and book.forgotten_since(generation) == []
        assert book.mentions(ADA) == {"people": 0, "speakers": 0} and of.generation() == generation
        assert [event.what for event in of.events()][-1] == FORGOTTEN and of.read().agents["faq"].live == "1"
        assert "vacuum" in of.database.scrub("people", "speakers")


def test_the_rows_of_people(tmp_path: Path) -> None:
    url = Team(base="tiny", state=str(tmp_path / "state")).registry_url
    rows_of_people(url)
    with closing(Registry.open(url)) as of, of.database.change() as connection:
        connection.exec_driver_sql("update people set adapter = 'another'")
    with closing(Registry.open(url)) as of:
        assert UserVersionStore(of.database).read().damaged_count == 1


@pytest.mark.services
def test_the_rows_of_people_on_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "s3cret")
    with postgres() as url:
        rows_of_people(url)


def test_erase_receipts_keeps_offsets_of_other_receipts(tmp_path: Path) -> None:
    """Erased lines turn blank, so that the index finds the others, also when it is built again."""
    lines = [
        {
            "id": f"{place:032x}",
            "release": "r",
            "agent": "faq@1",
            "created": "2026-11-20",
            **({"person": ADA} if place % 2 else {}),
        }
        for place in range(6)
    ]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (tmp_path / "receipts-00000001.jsonl").write_text(text)
    index = ReceiptIndex(tmp_path)
    assert index.catch_up() == 0
    assert erase_receipts(tmp_path, ADA) == (3, ["receipts-00000001.jsonl"])
    assert [index.find(line["id"]) is not None for line in lines] == [True, False] * 3
    assert ADA not in (tmp_path / "receipts-00000001.jsonl").read_text() and erase_receipts(tmp_path, ADA) == (0, [])
    (tmp_path / "index.sqlite").unlink()
    assert index.catch_up() == 0, "a blank line is no torn one"
    assert index.find(lines[2]["id"]) == lines[2] and index.find(lines[3]["id"]) is None
