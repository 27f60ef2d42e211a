from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch_fakes import (
    FakeCrew,
    FakeReceipts,
    FakeRouter,
    admit,
    asked,
    dispatching,
    no_fsync,
    registry,
    said,
    team,
    until,
    version,
)
from sartor.core.errors import (
    ArtifactError,
    BusyError,
    ConflictError,
    KeyRefusedError,
    ModelError,
    RequestError,
    UnavailableError,
    UnknownAgentError,
)
from sartor.inference.engine import ReplyDone, ReplyFailed
from sartor.serving.commands.agent_commands import list_agents
from sartor.serving.dispatch.agent_admin import AgentAdmin
from sartor.serving.team_config import AgentOptions, Rollout
from sartor.serving.types import RoutingDecision

__all__ = ["no_fsync"]


async def test_a_name_is_a_version_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    crew = FakeCrew()
    async with dispatching(
        team(tmp_path), crew, registry(tmp_path, version("faq", "1"), version("home", "3"))
    ) as dispatch:
        assert (await said(dispatch, asked("faq")))[:2] == ("faq@1", "by faq-1")
        assert (await said(dispatch, asked("home@3")))[:2] == ("home@3", "by home-3")
        assert (await said(dispatch, asked("base")))[:2] == ("base@" + "b" * 12, "by base")
        for unknown in ("faz", "faq@2", "", "faq@", "base@1", "auto@1", "FAQ"):
            with pytest.raises(UnknownAgentError):
                await dispatch.open(asked(unknown))
        with pytest.raises(KeyRefusedError, match="home"):
            await dispatch.open(asked("home", openable=frozenset({"faq"})))
        with pytest.raises(UnknownAgentError) as caught:
            await dispatch.open(asked("faz", openable=frozenset({"faq"})))
        assert "home" not in str(caught.value)
        assert not crew.live["faq-1"] and dispatch.in_flight == 0


async def test_call_has_release_defaults_unless_client_overrides(tmp_path: Path) -> None:
    """System prompt, sampling and tools are the Release's; too large or unknown sampling is refused."""
    tool = {"type": "function", "function": {"name": "look"}}
    facts = {"system_prompt": "Be brief.", "sampling": {"max_tokens": 5000, "temperature": 0.5}, "tools": [tool]}

    crew = FakeCrew()
    async with dispatching(team(tmp_path), crew, registry(tmp_path, version("faq", "1", **facts))) as dispatch:
        await said(dispatch, asked("faq", sampling={"top_p": 0.5}))
        call = crew.calls[-1]
        assert call.messages[0] == {"role": "system", "content": "Be brief."} and len(call.messages) == 2
        assert (call.sampling.max_tokens, call.sampling.temperature, call.sampling.top_p) == (1024, 0.5, 0.5)
        assert call.tools == (tool,)
        own = {"role": "system", "content": "Be long."}
        request = asked("faq")
        await said(dispatch, type(request)("faq", (own, *request.messages), tools=({"own": 1},)))
        assert crew.calls[-1].messages[0] == own and crew.calls[-1].tools == ({"own": 1},)
        with pytest.raises(RequestError, match="max_tokens"):
            await dispatch.open(asked("faq", sampling={"max_tokens": 5000}))
        with pytest.raises(RequestError, match="beams"):
            await dispatch.open(asked("faq", sampling={"beams": 2}))


async def test_who_steps_in_and_that_it_is_said(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    made.promote("faq", "2")
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        crew.faults["faq-2"] = ModelError("a logit is not finite", "tune again")
        answer = await dispatch.open(asked("faq"))
        assert answer.agent == "faq@1"
        assert "not finite" in answer.reason and "previous version" in answer.reason
        crew.breakers["faq@1"] = "open"
        assert (await said(dispatch, asked("faq")))[0].startswith("base@")
        crew.faults[""] = ModelError("the base broke", "restart")
        with pytest.raises(UnavailableError, match="faq cannot answer now") as caught:
            await dispatch.open(asked("faq"))
        assert caught.value.remedy
        with pytest.raises(ModelError):  # an exact version is that version or nobody
            await dispatch.open(asked("faq@2"))
        crew.faults["faq-2"] = BusyError("the queue is full", "later")  # a bulkhead does not overflow into another
        with pytest.raises(BusyError):
            await dispatch.open(asked("faq"))


async def test_failure_after_first_event_is_an_event(tmp_path: Path) -> None:
    """The reply ends with ReplyFailed, and no other version answers instead."""
    crew, receipts = FakeCrew(), FakeReceipts()
    async with dispatching(
        team(tmp_path), crew, registry(tmp_path, version("faq", "1")), receipts=receipts
    ) as dispatch:
        crew.faults["faq-1"] = "ModelError"
        agent, text, end = await said(dispatch, asked("faq"))
        assert (agent, text) == ("faq@1", "by faq-1") and isinstance(end, ReplyFailed)
        assert receipts.kept[-1].done is None and len(crew.calls) == 1


async def test_auto_asks_the_router_for_what_the_key_opens(tmp_path: Path) -> None:
    router, crew = FakeRouter(), FakeCrew()
    made = registry(tmp_path, version("faq", "1"), version("home", "3"))
    async with dispatching(team(tmp_path), crew, made, router=router) as dispatch:
        assert router.learnt == [{"faq": Path("/releases/faq-1"), "home": Path("/releases/home-3")}]
        answer = await dispatch.open(asked("auto"))
        assert answer.agent == "faq@1" and answer.reason == "auto: nearest to faq"
        answer = await dispatch.open(asked("auto", openable=frozenset({"home"})))
        assert answer.agent.startswith("base@")
        router.error = ModelError("the encoder is gone", "install it")
        answer = await dispatch.open(asked("auto"))
        assert answer.agent.startswith("base@") and "the encoder is gone" in answer.reason


async def test_receipt_is_written_before_reply_done(tmp_path: Path) -> None:
    """On a full disk the receipt is counted as lost and the reply stays whole."""
    receipts = FakeReceipts()
    async with dispatching(
        team(tmp_path), FakeCrew(), registry(tmp_path, version("faq", "1")), receipts=receipts
    ) as dispatch:
        answer = await dispatch.open(asked("faq"))
        assert not receipts.kept
        async for event in answer.events:
            assert bool(receipts.kept) == isinstance(event, ReplyDone)
        given = receipts.kept[0]
        assert (given.receipt, given.agent, given.text) == (answer.receipt, "faq@1", "by faq-1")
        assert given.release_id == "id-faq-1" and given.call.messages[-1]["content"] == "hello"
        receipts.error = OSError(28, "no space")
        assert (await said(dispatch, asked("faq")))[1] == "by faq-1"
        assert dispatch.health()["receipts_lost"] == 1


async def test_closing_an_answer_cancels_its_call(tmp_path: Path) -> None:
    """The version is free and no receipt is written, for an unread, a half-read and a twice closed answer."""
    crew, receipts = FakeCrew(), FakeReceipts()
    async with dispatching(
        team(tmp_path), crew, registry(tmp_path, version("faq", "1")), receipts=receipts
    ) as dispatch:
        unread, half = await dispatch.open(asked("faq")), await dispatch.open(asked("faq"))
        await anext(half.events)
        assert dispatch.in_flight == 2
        for answer in (unread, half, half):
            await answer.events.aclose()
        assert (dispatch.in_flight, len(crew.cancelled), receipts.kept) == (0, 2, [])


async def test_a_reply_ends_on_the_version_that_it_began_with(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"), version("faq", "3"))
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        answer = await dispatch.open(asked("faq"))
        for number in ("2", "3"):
            made.promote("faq", number)
            await dispatch.served.reload()
            await dispatch.served.settle()
        await dispatch.leases.settle()
        assert set(crew.attached) == {
            "faq-1",
            "faq-2",
            "faq-3",
        }  # 1 is neither live nor previous, but its reply lives
        assert (await said(dispatch, asked("faq")))[0] == "faq@3"
        assert [event async for event in answer.events][-1] == ReplyDone(crew.calls[0].id, "stop", 5, 3)
        await dispatch.leases.settle()
        assert set(crew.attached) == {"faq-2", "faq-3"}


async def test_a_member_that_is_not_admitted_is_a_trouble_of_its_own(tmp_path: Path) -> None:
    members = (
        AgentOptions("bad", "/releases/bad-1"),
        AgentOptions("faq", "/releases/faq-1"),
        AgentOptions("shy", "/releases/bad-2", fallback=()),
    )

    async def lenient(path: Path, name: str) -> Any:
        if path.name == "mended":
            return replace(version("bad", "3"), release=str(path))
        return await admit(path, name)

    async with dispatching(team(tmp_path, agents=members), FakeCrew(), registry(tmp_path)) as dispatch:
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        for name, release in (("bad", "bad-1"), ("shy", "bad-2")):
            with pytest.raises(UnavailableError, match=f"{release} holds NaN; try: tune again"):
                await dispatch.open(asked(name))
        assert set(dispatch.health()["troubles"]) == {"bad", "shy"}
        events = dispatch.served.registry.events()
        assert {(event.what, event.agent) for event in events} == {
            ("added", "faq"),
            ("refused", "bad"),
            ("refused", "shy"),
        }
    router, alone = FakeRouter(), tmp_path / "alone"
    async with dispatching(team(alone, agents=members[:1]), FakeCrew(), registry(alone), router=router):
        assert router.learnt == [{}], "a router that is never taught would say for ever that it is being made"
    rows = {row["name"]: row for row in list_agents(team(tmp_path)).rows}
    assert rows["bad"]["note"] == "not admitted: bad-1 holds NaN; try: tune again" and not rows["bad"]["versions"]
    good = (replace(members[0], release="/releases/mended"), *members[1:])
    async with dispatching(team(tmp_path, agents=good), FakeCrew(), registry(tmp_path), admit=lenient) as dispatch:
        assert (await said(dispatch, asked("bad")))[0] == "bad@3"  # a later start tries again
        assert not dispatch.served.agents["bad"].earlier
        assert len(dispatch.served.registry.events("shy")) == 1  # what is known is not written again
        with pytest.raises(ConflictError, match="added meanwhile"):
            dispatch.served.registry.refuse("bad", "too late")


async def test_base_fallback_needs_an_earlier_admission(tmp_path: Path) -> None:
    """`sartor agents add` registers without an engine: the server may still refuse what is live by then."""

    refuse = ["home-1"]

    async def admit_most(path: Path, name: str) -> Any:
        if path.name in refuse:
            raise ModelError(f"{path.name} does not fit", "another one")
        return await admit(path, name)

    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("home", "1"))
    async with dispatching(team(tmp_path), crew, made, admit=admit_most) as dispatch:
        listed = await AgentAdmin(dispatch, crew, admit, Rollout()).listed()
        assert {agent.name: agent.is_ready for agent in listed} == {"faq": True, "home": False}
        with pytest.raises(UnavailableError, match="home@1 cannot answer: home-1 does not fit"):
            await dispatch.open(asked("home"))
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        note = dispatch.served.registry.read().agents["home"].note
        assert note == "not admitted: home-1 does not fit; try: another one"
    refuse.clear()
    async with dispatching(team(tmp_path), crew, registry(tmp_path), admit=admit_most) as dispatch:
        listed = await AgentAdmin(dispatch, crew, admit, Rollout()).listed()
        assert {agent.name: agent.is_ready for agent in listed}["home"]
        assert (await said(dispatch, asked("home")))[0] == "home@1"
        home = dispatch.served.registry.read().agents["home"]
        assert (home.note, home.fallback) == ("", ("previous", "base"))
        dispatch.leases.directories.clear()
        refuse.append("home-1")
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("home")))[0].startswith("base@")  # it was admitted once: the chain holds


async def test_unloadable_version_leaves_previous_one_in_service(tmp_path: Path) -> None:
    """Health has the refusal, and loading is tried again only after a change of the registry."""
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    crew.unloadable = {"faq-2"}
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        made.promote("faq", "2")  # by another process, say: nothing was loaded before
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        assert "does not fit" in dispatch.health()["troubles"]["faq@2"]
        crew.unloadable = set()
        await dispatch.served.reload()  # nothing has changed: a refusal is not asked for again and again
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        made.note("faq", "mended")
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[0] == "faq@2"
        assert not dispatch.health()["troubles"]


async def test_a_rollback_does_not_wait_for_another_agents_admission(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"), version("home", "1"))
    made.promote("faq", "2")
    gate = asyncio.Event()

    async def slow(path: Path, name: str) -> Any:
        if path.name == "home-2":
            await gate.wait()
        return await admit(path, name)

    async with dispatching(team(tmp_path), crew, made, admit=slow) as dispatch:
        made.add(version("home", "2"))
        made.promote("home", "2")
        await dispatch.served.reload()
        made.rollback("faq")
        await dispatch.served.reload()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        assert (await said(dispatch, asked("home")))[0] == "home@1"
        gate.set()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("home")))[0] == "home@2"
        gate.clear()
        crew.attached.clear()
        dispatch.leases.directories.clear()
        await dispatch.served.reload()  # and one that never ends does not keep the server from ending


async def test_a_release_that_was_exchanged_on_disk_is_not_loaded(tmp_path: Path) -> None:
    async def other(path: Path, name: str) -> Any:
        found = await admit(path, name)
        return type(found)(**{**vars(found), "release_id": "another"})

    passed = version("faq", "1", checks={"canary": "4 replies"})  # another server admitted it
    async with dispatching(team(tmp_path), FakeCrew(), registry(tmp_path, passed), admit=other) as dispatch:
        assert (await said(dispatch, asked("faq")))[0].startswith("base@")
        assert "not id-faq-1 any more" in dispatch.health()["troubles"]["faq@1"]


async def test_this_machines_copy_is_loaded_where_it_is_whole(tmp_path: Path) -> None:
    copy = tmp_path / "state" / "adapters" / "id-faq-1"

    async def copied(path: Path, name: str) -> Any:
        if path == copy and not (copy / "whole").exists():
            raise ArtifactError("the copy was changed", "remove it")
        return replace(version("faq", "1"), release=str(path)) if path == copy else await admit(path, name)

    copy.mkdir(parents=True)
    crew = FakeCrew()
    async with dispatching(team(tmp_path), crew, registry(tmp_path, version("faq", "1")), admit=copied):
        assert crew.attached["faq-1"] == Path("/releases/faq-1")
    (copy / "whole").touch()
    crew = FakeCrew()
    async with dispatching(team(tmp_path), crew, registry(tmp_path), admit=copied):
        assert crew.attached["faq-1"] == copy


async def test_shared_adapter_is_checked_per_release(tmp_path: Path) -> None:
    """The adapter is detached with the last of its Releases; a refused one stays out of service."""
    checked: list[str] = []

    async def one_adapter(path: Path, name: str) -> Any:
        checked.append(path.name)
        return replace(await admit(path, name), adapter="same")

    versions = [replace(version("faq", number), adapter="same") for number in ("1", "2", "bad")]
    crew, made = FakeCrew(), registry(tmp_path, *versions)
    async with dispatching(team(tmp_path), crew, made, admit=one_adapter) as dispatch:
        made.promote("faq", "2")
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert checked[-1] == "faq-2" and list(crew.attached) == ["same"]
        made.promote("faq", "bad")
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[0] == "faq@2" and "NaN" in dispatch.health()["troubles"]["faq@bad"]
        made.remove("faq")
        await dispatch.served.reload()
        await dispatch.leases.settle()
        assert not crew.attached


async def test_registry_changes_are_seen_locally_and_by_polling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change by this process is seen at once, one by another process at the next poll."""
    made = registry(tmp_path, version("faq", "1"), version("faq", "2"))
    async with dispatching(team(tmp_path), FakeCrew(), made) as dispatch:
        await asyncio.sleep(0)  # it listens from its first turn on
        made.promote("faq", "2")
        await until(lambda: dispatch.served.agents["faq"].live == "2")
        monkeypatch.setattr("sartor.serving.dispatch.served_agents.POLL_S", 0.001)
        made.promote("faq", "2")  # wakes it, so that it polls in the new rhythm
        await until(lambda: dispatch.served.generation == 4)
        other = registry(tmp_path)
        other.rollback("faq")
        await until(lambda: dispatch.served.agents["faq"].live == "1")
        other.close()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"


async def test_damaged_row_keeps_its_last_good_version_in_service(tmp_path: Path) -> None:
    """Other agents take changes meanwhile; repair and adding the version again clear the troubles."""
    made = registry(tmp_path, version("faq", "1"), version("home", "3"))
    async with dispatching(team(tmp_path), FakeCrew(), made) as dispatch:
        with made.database.change() as connection:
            connection.exec_driver_sql("update agents set live = '7' where name = 'faq'")
            connection.exec_driver_sql("update versions set adapter = 'evil' where agent = 'faq'")
        made.add(version("home", "4"))
        made.promote("home", "4")
        await dispatch.served.reload()
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[:2] == ("faq@1", "by faq-1")
        assert (await said(dispatch, asked("home")))[0] == "home@4"
        assert set(dispatch.health()["troubles"]) == {"faq", "faq@1"}
        made.repair("faq")
        made.add(version("faq", "1"))
        await dispatch.served.reload()
        assert not dispatch.health()["troubles"]


async def test_a_registry_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    made = registry(tmp_path, version("faq", "1"))
    async with dispatching(team(tmp_path), FakeCrew(), made) as dispatch:
        file = tmp_path / "state" / "registry.sqlite"
        file.write_bytes(b"not a database" * 1000)
        await dispatch.served.reload()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        assert "damaged" in dispatch.health()["troubles"]["registry"]


@pytest.mark.parametrize("most", [20, pytest.param(200, marks=pytest.mark.services)])
async def test_promotions_and_rollbacks_under_load_lose_no_reply(tmp_path: Path, most: int) -> None:
    """Each reply is whole, by one version, which is held until its last event; the versions change meanwhile."""

    crew = FakeCrew()
    crew.slow = 3
    made = registry(tmp_path, *(version("faq", str(number)) for number in range(4)))
    changes = 0
    # the monitors watch nothing: a busy machine's slow replies would have them change the versions, too
    unwatched = team(tmp_path, rollout=Rollout(watch_s=0.0))
    async with dispatching(unwatched, crew, made) as dispatch:
        replies: list[tuple[str, str, Any]] = []

        async def ask() -> None:
            while changes < most:
                replies.append(await said(dispatch, asked("faq")))

        askers = [asyncio.ensure_future(ask()) for _ in range(8)]
        while changes < most:
            live = made.read().agents["faq"].live
            if changes % 2:
                made.rollback("faq", expected=live)
            else:
                made.promote("faq", str((int(live) + 1 + changes % 3) % 4), expected=live)
            changes += 1
            await dispatch.served.reload()
            if changes % 3:  # some changes come while what the one before needs is still fetched
                await dispatch.served.settle()
        await asyncio.gather(*askers)
        await dispatch.served.settle()
        await dispatch.leases.settle()
        assert not crew.lost
        assert {agent for agent, _, _ in replies} <= {f"faq@{number}" for number in range(4)}
        assert len({agent for agent, _, _ in replies}) > 1 and len(replies) >= most
        assert all(
            text == f"by {agent.replace('@', '-')}" and isinstance(end, ReplyDone) for agent, text, end in replies
        )
        assert dispatch.in_flight == 0 and not any(crew.live.values())
        assert set(crew.attached) == {f"faq-{one}" for one in dispatch.served.agents["faq"].versions}


async def test_the_admin_loads_before_anything_changes(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        roster = AgentAdmin(dispatch, crew, admit, Rollout())
        crew.unloadable = {"faq-3"}
        with pytest.raises(ModelError):
            await roster.promote("faq", "/releases/faq-3", "", "1")
        assert made.read().agents["faq"].live == "1"
        with pytest.raises(ConflictError, match="'1' live"):
            await roster.promote("faq", "", "2", "7")
        assert (await roster.promote("faq", "", "2", "1"))["live"] == "2"
        assert (await said(dispatch, asked("faq")))[0] == "faq@2"
        assert (await roster.rollback("faq", "2"))["live"] == "1"
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        await roster.drain("faq")
        with pytest.raises(UnavailableError, match="drained"):
            await dispatch.open(asked("faq"))
        await roster.release("faq")
        assert (await said(dispatch, asked("faq")))[0] == "faq@1"
        assert {"faq@1", "faq@2"} <= set(crew.released)
        (listed,) = await roster.listed()
        assert (listed.name, listed.live, listed.versions) == ("faq", "1", ("1",))
        with pytest.raises(UnknownAgentError):
            await roster.rollback("faz", None)
        assert (await roster.promote("new", "/releases/new-1", "", None))["live"] == "1"
        assert (await said(dispatch, asked("new")))[0] == "new@1"


async def test_reload_during_promotion_keeps_the_new_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter being promoted survives a reload that runs before the registry has it."""

    async def unhurried(path: Path, name: str) -> Any:
        await asyncio.sleep(0.05)
        return await admit(path, name)

    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    async with dispatching(team(tmp_path), crew, made, admit=unhurried) as dispatch:
        loop, bring_in = asyncio.get_running_loop(), made.bring_in

        def late(*asked: Any, **options: Any) -> Any:
            asyncio.run_coroutine_threadsafe(dispatch.served.reload(), loop).result(60)
            return bring_in(*asked, **options)

        monkeypatch.setattr(made, "bring_in", late)
        await AgentAdmin(dispatch, crew, admit, Rollout()).promote("faq", "", "2", "1")
        assert (await said(dispatch, asked("faq")))[0] == "faq@2"


async def test_admin_gets_unavailable_for_a_damaged_registry(tmp_path: Path) -> None:
    """The remedy is a repair or a backup; intact agents can be changed, and each agent answers."""
    crew, made = FakeCrew(), registry(tmp_path, *(version("faq", one) for one in "12"), version("home", "3"))
    async with dispatching(team(tmp_path), crew, made) as dispatch:
        roster = AgentAdmin(dispatch, crew, admit, Rollout())
        with made.database.change() as connection:
            connection.exec_driver_sql("update agents set note = 'x' where name = 'faq'")
        for change in (
            roster.promote("faq", "", "2", "1"),
            roster.promote("faq", "/releases/faq-2", "", None),
            roster.rollback("faq", None),
            roster.drain("faq"),
        ):
            with pytest.raises(UnavailableError) as caught:
                await change
            assert caught.value.remedy == "sartor agents repair faq"
        assert (await roster.promote("home", "/releases/home-4", "", "3"))["live"] == "4"
        (tmp_path / "state" / "registry.sqlite").write_bytes(b"not a database" * 1000)
        with pytest.raises(UnavailableError, match="damaged") as caught:
            await roster.promote("home", "", "3", "4")
        assert "cp BACKUP " in caught.value.remedy
        assert [(await said(dispatch, asked(name)))[0] for name in ("faq", "home")] == ["faq@1", "home@4"]


async def test_a_promotion_is_a_trial_where_the_team_asks_for_one(tmp_path: Path) -> None:
    crew, made = FakeCrew(), registry(tmp_path, version("faq", "1"), version("faq", "2"))
    rules = Rollout(canary_fraction=0.5, shadow_fraction=0.25)
    async with dispatching(team(tmp_path, rollout=rules), crew, made) as dispatch:
        roster = AgentAdmin(dispatch, crew, admit, rules)
        changed = await roster.promote("faq", "", "2", "1")
        assert (changed["live"], changed["candidate"], changed["canary_fraction"]) == ("1", "2", 0.5)
        agents = [(await said(dispatch, asked("faq")))[0] for _ in range(60)]
        assert {"faq@1", "faq@2"} == set(agents)
        changed = await roster.promote("faq", "", "2", "1")
        assert (changed["live"], changed["candidate"]) == ("2", "")


PICTURE = {"type": "image", "image": "data:image/png;base64,AAAA"}
CLIP = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def shown(model: str, *parts: Any, **options: Any) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return replace(asked(model, **options), messages=({"role": "user", "content": content},))


def seeing(agent: str, number: str, *reads: str) -> Any:
    return version(agent, number, reads=list(reads))


async def test_a_picture_goes_to_who_reads_pictures_and_to_nobody_else(tmp_path: Path) -> None:
    crew, router = FakeCrew(), FakeRouter("faq")
    held = registry(tmp_path, version("faq", "1"), seeing("eye", "2", "image"), seeing("all", "3", "audio", "image"))
    async with dispatching(team(tmp_path), crew, held, router=router) as dispatch:
        assert (await said(dispatch, shown("eye", PICTURE, "what is it?")))[0] == "eye@2"
        assert (await said(dispatch, shown("all@3", PICTURE, CLIP)))[0] == "all@3"
        for model, parts, problem in (
            ("faq", [PICTURE], "faq@1 reads text, and the request holds image"),
            ("faq@1", [PICTURE], "faq@1 reads text"),
            ("eye", [PICTURE, CLIP], "eye@2 reads text, image, and the request holds audio and image"),
            ("base", [CLIP], "base reads text, and the request holds audio"),
        ):
            with pytest.raises(RequestError, match=problem) as caught:
                await dispatch.open(shown(model, *parts))
            assert '"model": "all"' in caught.value.remedy or '"model": "eye"' in caught.value.remedy
        with pytest.raises(RequestError, match="reads text") as caught:
            await dispatch.open(shown("faq", PICTURE, openable=frozenset({"faq"})))
        assert "eye" not in caught.value.remedy, "what the key does not open is not named"
        assert (await said(dispatch, asked("base")))[0].startswith("base@")


@pytest.mark.parametrize(
    ("chosen", "scores", "parts", "found"),
    [
        ("eye", {"eye": 0.9}, [PICTURE, "look"], "eye@2"),
        ("eye", {"eye": 0.9}, [CLIP, "listen"], "base reads no audio"),  # the router names who does not hear
        ("base", {"eye": 0.1}, [PICTURE, "a joke"], "base reads no image: no agent fits"),
        ("base fits eye", {"eye": 0.9}, [PICTURE, "look"], "eye@2"),  # no gain over a base that would see
        ("base", {}, [CLIP], "all@3"),  # no text to go by, and one alone hears
        ("base", {}, [PICTURE], "name one that does: eye, all"),
    ],
)
async def test_auto_chooses_among_those_that_read_all_of_a_request(
    tmp_path: Path, chosen: str, scores: dict[str, float], parts: list[Any], found: str
) -> None:
    class Router(FakeRouter):
        async def route(self, messages: Any, openable: Any) -> RoutingDecision:
            self.openable = set(openable)
            agent, _, fits = chosen.partition(" fits ")
            return RoutingDecision(agent, "no agent fits", scores, fits)

    crew, router = FakeCrew(), Router()
    held = registry(tmp_path, version("faq", "1"), seeing("eye", "2", "image"), seeing("all", "3", "audio", "image"))
    async with dispatching(team(tmp_path), crew, held, router=router) as dispatch:
        try:
            agent, _, _ = await said(dispatch, shown("auto", *parts))
            assert agent == found
        except RequestError as error:
            assert found in f"{error.problem}; {error.remedy}"
        assert router.openable == ({"all"} if CLIP in parts else {"eye", "all"})
        with pytest.raises(RequestError):
            await dispatch.open(shown("auto", *parts, openable=frozenset({"faq"})))


async def test_who_steps_in_or_is_on_trial_reads_the_request_too(tmp_path: Path) -> None:
    crew = FakeCrew()
    held = registry(tmp_path, version("eye", "1"), seeing("eye", "2", "image"), version("eye", "3"))
    held.promote("eye", "2")
    held.bring_in("eye", "3", canary=1.0, shadow=0.0)
    async with dispatching(team(tmp_path), crew, held) as dispatch:
        assert (await said(dispatch, asked("eye")))[0] == "eye@3"
        assert (await said(dispatch, shown("eye", PICTURE)))[0] == "eye@2"
        crew.faults["eye-2"] = ModelError("NaN", "tune it again")
        with pytest.raises(ModelError):  # neither eye@1 nor the base would see it
            await dispatch.open(shown("eye", PICTURE))
