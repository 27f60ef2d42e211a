"""Golden: the text of `x-sartor-reason`, which receipts hold too, for each way in which a version comes to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dispatch_fakes import (
    FakeCrew,
    FakeReceipts,
    FakeRouter,
    admitted,
    asked,
    dispatching,
    no_fsync,
    registry,
    team,
    until,
    version,
)
from sartor.core.errors import ModelError, UnavailableError
from sartor.serving.http.app_state import as_header
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.user_versions import UserVersion, UserVersionStore
from sartor.serving.types import AgentRequest

__all__ = ["no_fsync"]

ADA = "a" * 64
BROKEN = ModelError("a logit is not finite; canary rows are", "tune again")
PERSONAL = UserVersion(ADA, "faq", "1", "id-faq-1", "own-aaaa", "art-own-aaaa", "/people/own-aaaa", {"rows": 9})
Change = Callable[[Registry, FakeCrew, FakeRouter], object]


def nothing(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    """What most cases change."""


def on_trial(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    of.bring_in("faq", "2", canary=1.0, shadow=0.0)


def promoted(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    of.promote("faq", "2")


def breaking(*adapters: str) -> Change:
    def change(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
        of.promote("faq", "2")
        crew.faults.update(dict.fromkeys(adapters, BROKEN))

    return change


def breaking_on_trial(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    on_trial(of, crew, router)
    crew.faults["faq-2"] = BROKEN


def breaking_own(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    crew.faults["own-aaaa"] = BROKEN


def unloadable(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    crew.unloadable.add("own-aaaa")


def failing_router(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    router.error = ModelError("the encoder is gone", "install it")


def choosing_the_base(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
    router.chosen = "base"


STALE = "asked by name; the user's own version was tuned on 1, and is not used until it is tuned again"
FELL_BACK = "asked by name; a logit is not finite; canary rows are; the previous version steps in"
CASES: list[tuple[AgentRequest, Change, str, str]] = [
    (asked("faq"), nothing, "faq@1", "asked by name"),
    (asked("base"), nothing, "base@", "asked by name"),
    (asked("faq@1"), nothing, "faq@1", "asked by name and version"),
    (asked("faq"), on_trial, "faq@2", "asked by name; canary, 1 of the requests"),
    (
        asked("faq"),
        breaking_on_trial,
        "faq@1",
        "asked by name; canary, 1 of the requests; a logit is not finite; canary rows are; asked by name",
    ),
    (asked("faq"), breaking("faq-2"), "faq@1", FELL_BACK),
    (
        asked("faq"),
        breaking("faq-2", "faq-1"),
        "base@",
        "asked by name; a logit is not finite; canary rows are; the base steps in",
    ),
    (asked("auto"), nothing, "faq@1", "auto: nearest to faq"),
    (asked("auto"), on_trial, "faq@2", "auto: nearest to faq; canary, 1 of the requests"),
    (asked("auto"), choosing_the_base, "base@", "auto: nearest to base"),
    (asked("auto"), failing_router, "base@", "auto: the router failed: the encoder is gone"),
    (asked("auto", openable=frozenset()), nothing, "base@", "auto: there is nobody to choose from"),
    (asked("faq", person=ADA), nothing, "faq@1+personal", "asked by name; the user's own version"),
    (asked("faq", person=ADA), on_trial, "faq@1+personal", "asked by name; the user's own version"),
    (asked("faq@1", person=ADA), nothing, "faq@1", "asked by name and version"),
    (asked("auto", person=ADA), on_trial, "faq@1+personal", "auto: nearest to faq; the user's own version"),
    (asked("faq", person=ADA), promoted, "faq@2", STALE),
    (
        asked("faq", person=ADA),
        unloadable,
        "faq@1",
        "asked by name; the user's own version could not be loaded (ModelError)",
    ),
    (
        asked("faq", person=ADA),
        breaking_own,
        "faq@1",
        "asked by name; the user's own version; a logit is not finite; canary rows are; asked by name",
    ),
]


async def reason_of(tmp_path: Path, request: AgentRequest, change: Change) -> tuple[str, str, str]:
    """(version that answers, its reason, the reason in the receipt)."""
    of = registry(tmp_path, version("faq", "1"), version("faq", "2"))
    UserVersionStore(of.database).put(PERSONAL, ChangeCause("test"))
    crew, router, receipts = FakeCrew(), FakeRouter(), FakeReceipts()
    change(of, crew, router)
    async with dispatching(team(tmp_path), crew, of, admit=admitted, router=router, receipts=receipts) as dispatch:
        answer = await dispatch.open(request)
        async for _ in answer.events:
            pass
        await until(lambda: bool(receipts.kept))
    return answer.agent, answer.reason, receipts.kept[0].reason


@pytest.mark.parametrize(("request_", "change", "agent", "reason"), CASES)
async def test_reason_text_is_golden(
    tmp_path: Path, request_: AgentRequest, change: Change, agent: str, reason: str
) -> None:
    answered_by, said, in_receipt = await reason_of(tmp_path, request_, change)
    assert answered_by.startswith(agent)
    assert (said, in_receipt, as_header(said)) == (reason, reason, reason)


async def test_routers_words_on_a_canary_stay(tmp_path: Path) -> None:
    """The reason for a candidate is left out by its kind: words of the router that read like it are not cut."""

    def change(of: Registry, crew: FakeCrew, router: FakeRouter) -> None:
        on_trial(of, crew, router)
        router.chosen = "faq"
        router.reason = "faq 0.9; canary birds are its subject"

    _, reason, _ = await reason_of(tmp_path, asked("auto", person=ADA), change)
    assert reason == "auto: faq 0.9; canary birds are its subject; the user's own version"


async def test_reason_of_an_agent_without_a_version_is_golden(tmp_path: Path) -> None:
    of = registry(tmp_path, version("faq", "1"))
    async with dispatching(team(tmp_path), FakeCrew(), of) as dispatch:
        agent = replace(
            dispatch.served.agents["faq"], live="", earlier=(), candidate="", note="not admitted: é; try: x"
        )
        dispatch.served.agents = {**dispatch.served.agents, "faq": agent}
        reason = (await dispatch.open(asked("faq"))).reason
    assert reason == "asked by name; faq has no version: not admitted: é; try: x; the base steps in"
    assert as_header(reason) == "asked by name; faq has no version: not admitted: \\xe9; try: x; the base steps in"


async def test_error_text_where_nobody_answers_is_golden(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        await reason_of(tmp_path, asked("faq"), breaking("faq-2", "faq-1", ""))
    wanted = "faq cannot answer now, nor who may step in: a logit is not finite; canary rows are"
    assert caught.value.problem == wanted
