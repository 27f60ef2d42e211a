"""Workers are killed, stopped, filled and poisoned while clients stream: each client gets the reply that it must get.

Real processes, with the scripted engine: what a reply must be follows from its call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import scripted
from sartor.core.errors import BusyError, DeadlineError, InputError, ModelError, SartorError, UnavailableError
from sartor.inference.engine import Event, GenerateCall, ReplyFailed, Sampling, TextDelta
from sartor.serving.team_config import CircuitBreakerOptions, RequestLimits
from sartor.serving.types import EmbeddingResult
from sartor.serving.workers.supervisor import Supervisor

pytestmark = [pytest.mark.services, pytest.mark.alone]
AGENTS = ("a", "b", "c", "d")


def call(prompt: str, adapter: str = "", tokens: int = 8) -> GenerateCall:
    return GenerateCall("c", adapter, text=prompt, sampling=Sampling(max_tokens=tokens))


async def asked(crew: Supervisor, one: GenerateCall, deadline_s: float = 300.0) -> str:
    """The whole reply of an agent that is named as its adapter. Raises the error that it ends with."""
    text = ""
    async for event in await crew.reply(one, f"{one.adapter}@1" if one.adapter else "base", deadline_s):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, ReplyFailed):
            raise ModelError(event.problem, event.remedy)
    return text


@contextlib.asynccontextmanager
async def running(folder: Path, agents: tuple[str, ...] = AGENTS, **changes: Any) -> AsyncIterator[Supervisor]:
    """A crew with agents whose adapters do as the part of their name behind `-` says. No process of it is left."""
    crew = Supervisor(scripted.team(**changes), scripted.COMMAND)
    await crew.start()
    try:
        for agent in agents:
            await crew.attach(agent, scripted.adapter(folder / agent, agent.partition("-")[2] or "ok"))
        yield crew
    finally:
        started = pids(crew)
        await crew.close()
        assert [pid for pid in started if alive(pid)] == []


def pids(crew: Supervisor, *states: str) -> list[int]:
    return [
        row["pid"]
        for row in crew.health()["workers"]
        if row["pid"] and (not states or {row["role"] or row["state"]} & {*states})
    ]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def until(condition: Callable[[], Any], within_s: float = 120.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def load(crew: Supervisor, agents: tuple[str, ...] = AGENTS, clients: int = 8, calls: int = 12) -> None:
    """Clients ask one after the other; each reply must be what it must be."""

    async def client(number: int) -> None:
        for turn in range(calls):
            one = call(f"{number} {turn}", agents[(number + turn) % len(agents)], 5 + (number * turn) % 30)
            assert await asked(crew, one) == scripted.reply_of(one)

    await asyncio.gather(*(client(number) for number in range(clients)))


@contextlib.asynccontextmanager
async def disturbed(disturbance: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(disturbance)
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def signals(crew: Supervisor, number: signal.Signals, every_s: float) -> None:
    """To any worker, at random moments. They are as far apart as a worker takes to start, or no call would ever be answered."""
    rng = random.Random(7)
    while True:
        began = time.monotonic()
        await until(lambda: pids(crew, "answers"))
        await asyncio.sleep(rng.uniform(0.3, 1.7) * max(every_s, time.monotonic() - began))
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(pids(crew, "answers", "spare")), number)


async def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        async with disturbed(signals(crew, signal.SIGKILL, 0.25)):
            while crew.health()["ends"].get("crashed", 0) < 8:
                await load(crew)
        health = crew.health()
        assert health["counts"]["made_again"] >= 3
        assert "condemned" not in health["counts"] and health["agents"] == {}


async def test_sigstop_under_load_and_in_a_spare(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        async with disturbed(signals(crew, signal.SIGSTOP, 1.0)):
            while crew.health()["ends"].get("hangs", 0) < 2:
                await load(crew, calls=4)
        await until(lambda: pids(crew, "spare"))
        os.kill(pids(crew, "spare")[0], signal.SIGSTOP)
        before = crew.health()["ends"]["hangs"]
        await until(lambda: crew.health()["ends"]["hangs"] > before)
        assert "condemned" not in crew.health()["counts"]


async def test_new_calls_go_to_the_spare_while_a_worker_says_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, workers={"hang_s": 60.0}) as crew:
        await until(lambda: pids(crew, "spare"))
        (stopped,) = pids(crew, "answers")
        os.kill(stopped, signal.SIGSTOP)
        (silent,) = [slot.worker for slot in crew._slots._slots if slot.worker and slot.worker.pid == stopped]
        await until(lambda: silent.is_quiet(1.5))
        began, one = time.monotonic(), call("hello", "a")
        assert await asked(crew, one) == scripted.reply_of(one)
        assert time.monotonic() - began < 30.0
        os.kill(stopped, signal.SIGCONT)
        await until(lambda: len(pids(crew, "answers")) == len(pids(crew, "spare")) == 1)
        await load(crew, calls=2)
        assert not crew.health()["ends"]


async def test_a_worker_that_stops_while_it_starts_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose engine takes longer to open says that it lives, and is not."""
    monkeypatch.setattr("sartor.serving.workers.worker_pool.SILENT_START_S", 15.0)

    async with running(tmp_path, workers={"start_s": 120.0}, open_s=17.0) as crew:
        await until(lambda: pids(crew, "spare"))
        assert not crew.health()["ends"]
    async with running(tmp_path / "quick", workers={"start_s": 120.0}) as crew:
        await until(lambda: pids(crew, "spare"))
        os.kill(pids(crew, "spare")[0], signal.SIGKILL)
        await until(lambda: pids(crew, "starting"))
        os.kill(pids(crew, "starting")[0], signal.SIGSTOP)
        await until(lambda: crew.health()["ends"].get("hangs") == 1)
        await until(lambda: pids(crew, "spare"))


async def test_worker_above_memory_limit_is_recycled_after_its_calls(tmp_path: Path) -> None:
    """A spare takes new calls meanwhile; the running reply ends whole and none is restarted."""
    async with running(tmp_path, workers={"memory_bytes": 100 << 20}, step_s=0.05) as crew:
        first = pids(crew, "answers")
        # 72 MiB: with the interpreter's own more than the limit, not 1.5 times it (_FAR_ABOVE)
        greedy = call("GROW9", "a", 60)
        grown = asyncio.ensure_future(asked(crew, greedy))
        await until(lambda: pids(crew, "retiring"))
        await load(crew, ("b", "c"), clients=2, calls=2)
        assert await grown == scripted.reply_of(greedy)
        await until(lambda: crew.health()["ends"].get("recycled"))
        assert not alive(first[0]) and "made_again" not in crew.health()["counts"]


@pytest.mark.parametrize("workers", [{"count": 2, "spare": 0}, {"count": 1, "spare": 1}])
async def test_every_worker_is_replaced_and_no_reply_suffers(tmp_path: Path, workers: dict[str, int]) -> None:
    async with running(tmp_path, workers=dict(workers), limits=RequestLimits(deadline_s=300.0)) as crew:
        first = pids(crew)
        await asyncio.gather(load(crew, clients=4, calls=6), crew.renew())
        assert len(first) == 2 and not any(alive(pid) for pid in first), "with all that was in their memory"
        await load(crew, clients=2, calls=2)
        assert crew.health()["ends"] == {"renewed": 2}


async def test_a_call_that_takes_far_too_much_memory_fails_alone(tmp_path: Path) -> None:
    async with running(tmp_path, workers={"memory_bytes": 100 << 20}, step_s=0.01) as crew:
        greedy = asyncio.ensure_future(asked(crew, call("GROW", "a", 1000)))
        await load(crew, ("b", "c", "d"), clients=3, calls=30)
        with pytest.raises(ModelError, match="died"):
            await greedy
        ends = crew.health()["ends"]
        assert ends.get("memory", 0) + ends.get("crashed", 0) >= 2


@pytest.mark.parametrize("prompt", ["DIE \ud800", "DIE0", "HANG"])
@pytest.mark.parametrize("spare", [1, 0])
async def test_a_poison_call_fails_and_nobody_else(tmp_path: Path, prompt: str, spare: int) -> None:
    async with running(tmp_path, workers={"spare": spare}) as crew:
        poison = asyncio.ensure_future(asked(crew, call(prompt, "a")))
        await load(crew, clients=8, calls=6)
        with pytest.raises(ModelError, match="died"):
            await poison
        ends = sum(crew.health()["ends"].values())
        assert ends <= 4  # two with others, and one or, where it may have been anybody's doing, two alone
        with pytest.raises(ModelError, match="killed the workers"):
            await asked(crew, call(prompt, "a"))
        assert sum(crew.health()["ends"].values()) == ends
        innocent = call("hello", "a")
        assert await asked(crew, innocent) == scripted.reply_of(innocent)  # alone, for it is watched
        assert crew.health()["counts"]["condemned"] == 1


async def test_a_poison_call_of_the_base_takes_no_service_from_it(tmp_path: Path) -> None:
    async with running(tmp_path, breaker=CircuitBreakerOptions(failures=1)) as crew:
        for adapter, ends in (("", 3), ("b", 4)):
            with pytest.raises(ModelError):
                await asked(crew, call("DIE", adapter))
            assert sum(crew.health()["ends"].values()) == ends  # the prompt is known: it is made alone at once
        assert await asked(crew, call("hello")) == scripted.reply_of(call("hello"))


async def test_a_poison_agent_is_taken_out_of_service_and_nobody_else(tmp_path: Path) -> None:
    """All of its calls kill: two workers die with others beside them, the rest of its calls are made alone until its breaker opens."""

    breaker = CircuitBreakerOptions(window_s=600.0, open_s=600.0)
    async with running(tmp_path, (*AGENTS, "x-poison"), breaker=breaker) as crew:
        ends: list[str] = []

        async def attack() -> None:
            for turn in range(40):
                try:
                    await asked(crew, call(f"{turn}", "x-poison"))
                except SartorError as error:
                    ends.append(error.kind)

        await asyncio.gather(attack(), load(crew, calls=20))
        assert ends[:3] == ["ModelError"] * 3 and set(ends[3:]) == {"UnavailableError"}
        assert crew.health()["agents"]["x-poison@1"]["breaker"] == "open"
        assert sum(crew.health()["ends"].values()) <= 5
        crew.release("x-poison@1")
        assert crew.health()["agents"] == {}


async def test_a_nan_agent_opens_its_breaker_and_quarantine_follows(tmp_path: Path) -> None:
    rules = CircuitBreakerOptions(failures=2, open_s=0.05, quarantine=2)
    async with running(tmp_path, ("a", "x-nan"), breaker=rules) as crew:
        while crew.health()["agents"].get("x-nan@1", {}).get("breaker") != "quarantined":
            with pytest.raises(SartorError, match="not finite"):
                await asked(crew, call("hello", "x-nan"))
            assert await asked(crew, call("hello", "a")) == scripted.reply_of(call("hello", "a"))
            await asyncio.sleep(0.01)
        assert crew.health()["ends"] == {}


async def test_clients_faults_and_deadlines_blame_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, breaker=CircuitBreakerOptions(failures=1)) as crew:
        with pytest.raises(InputError):
            await asked(crew, call("REFUSED", "a"))
        with pytest.raises(DeadlineError):
            await asked(crew, call("hello", "a", 10_000), deadline_s=0)
        with pytest.raises(ModelError, match="no whole reply"):
            await asked(crew, call("hello", "a", 10_000), deadline_s=3.0)
        assert crew.health()["agents"] == {} and crew.health()["counts"] == {"late": 2}
        crew.blame("a@1", "not the form that it was trained for")
        with pytest.raises(UnavailableError, match="not the form"):
            await asked(crew, call("hello", "a"))


async def test_a_flood_of_one_agent_delays_no_other(tmp_path: Path) -> None:
    async with running(tmp_path, rows=4, limits=RequestLimits(per_agent=20)) as crew:
        flood = [asyncio.ensure_future(asked(crew, call(f"{turn}", "a", 100_000), 600)) for turn in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError) as caught:
            await asked(crew, call("one more", "a"))
        assert caught.value.retry_after_s > 0
        for turn in range(10):
            one = call(f"{turn}", "b", 10)
            assert await asked(crew, one) == scripted.reply_of(one)
        assert not any(task.done() for task in flood), "ten tokens waited for 100,000"
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert await asked(crew, call("hello", "a")) == scripted.reply_of(call("hello", "a"))


async def test_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    """The reply ends with DeadlineError, other calls go on, and the row is freed."""
    limits = RequestLimits(slow_client_s=0.3)
    async with running(tmp_path, limits=limits) as crew:
        slow = await crew.reply(call("hello", "a", 100_000), "a@1", 60)
        await load(crew)
        await until(lambda: crew.health()["counts"].get("slow_clients"))
        events = [event async for event in slow]
        assert [type(event) for event in events] == [TextDelta, ReplyFailed] and events[1].kind == "DeadlineError"
        await until(lambda: all(row["live"] == 0 for row in crew.health()["workers"]))


async def test_closing_the_iterator_frees_the_row(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        events: Any = await crew.reply(call("hello", "a", 100_000), "a@1", 60)
        await anext(events)
        await events.aclose()
        await until(lambda: all(row["live"] == 0 for row in crew.health()["workers"]))
        waiting = asyncio.ensure_future(crew.reply(call("hello", "a", 100_000), "a@1", 60))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert crew.health()["counts"]["cancelled"] == 2


async def test_a_reply_that_cannot_go_on_as_it_was_is_not_mixed(tmp_path: Path) -> None:
    async with running(tmp_path, ("x-moody",)) as crew:
        events = await crew.reply(call("hello", "x-moody", 100_000), "x-moody@1", 60)
        await anext(events)
        os.kill(pids(crew, "answers")[0], signal.SIGKILL)
        rest = [event async for event in events]
        assert isinstance(rest[-1], ReplyFailed) and rest[-1].kind == "UnavailableError"
        assert crew.health()["counts"]["differing"] == 1


async def test_adapters_that_do_not_load(tmp_path: Path) -> None:
    """One that is refused is; one whose loading kills or hangs takes workers with it, and no call."""

    # a call whose worker says nothing for so long, twice, is blamed: not where the machine alone is slow
    async with running(tmp_path, workers={"hang_s": 5.0}) as crew:
        for behaviour, problem in (
            ("error", "does not fit"),
            ("die", "workers died while"),
            ("hang", "workers died while"),
        ):
            folder = scripted.adapter(tmp_path / behaviour, behaviour)
            with pytest.raises(ModelError, match=problem):
                await asyncio.gather(crew.attach(behaviour, folder), load(crew, calls=10))
            await load(crew, calls=3)
            with pytest.raises(UnavailableError, match="not loaded"):
                await asked(crew, call("hello", behaviour))


async def test_an_adapter_that_went_bad_on_disk_hurts_its_agent_alone(tmp_path: Path) -> None:
    """New workers cannot load it, or die of it: they serve the others."""

    async with running(tmp_path) as crew:
        (tmp_path / "a" / "behaviour").write_text("error")
        (tmp_path / "b" / "behaviour").write_text("die")
        for _ in range(2):  # both workers that hold them
            old = pids(crew)
            os.kill(pids(crew, "answers")[0], signal.SIGKILL)
            await until(lambda old=old: len(set(pids(crew, "answers", "spare")) - set(old)) >= 1)
            await load(crew, ("c", "d"), calls=3)
        await until(lambda: len(pids(crew, "answers", "spare")) == 2)
        for agent, problem in (("a", "does not fit"), ("b", "died while they loaded")):
            with pytest.raises(ModelError, match=problem):
                await asked(crew, call("hello", agent))
        (tmp_path / "a" / "behaviour").write_text("ok")
        await crew.attach("a", tmp_path / "a")
        await load(crew, ("a", "c", "d"), calls=3)


async def test_probation_tells_what_an_adapter_does_and_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as crew:
        trial = crew._trial_worker
        monkeypatch.setattr(trial, "_start", lambda worker: worker.start(120.0))
        monkeypatch.setattr(trial, "_start_s", 5.0)  # of silence, once it has started
        workers = pids(crew)
        calls = [
            replace(call("hello", "new"), id="1"),
            replace(call("hello"), id="2"),
            replace(call("NAN", "new"), id="3"),
        ]

        async def probe(behaviour: str) -> list[tuple[Event, ...]]:
            return await crew.probe("new", scripted.adapter(tmp_path / f"new-{behaviour}", behaviour), calls)

        said, _ = await asyncio.gather(probe("ok"), load(crew))
        texts = ["".join(event.text for event in events if isinstance(event, TextDelta)) for events in said]
        assert texts[:2] == [scripted.reply_of(one) for one in calls[:2]]
        assert [type(events[-1]).__name__ for events in said] == ["ReplyDone", "ReplyDone", "ReplyFailed"]
        for behaviour, problem in (
            ("error", "not fit"),
            ("die", "ended"),
            ("hang", "nothing for 5 s"),
            ("poison", "ended"),
        ):
            with pytest.raises(ModelError, match=problem):
                await asyncio.gather(probe(behaviour), load(crew, calls=4))
        assert pids(crew) == workers and crew.health()["ends"] == {} and crew.health()["adapters"] == 4


async def test_detach_waits_for_live_calls_and_yields_to_a_new_attach(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        one = call("hello", "a", 1000)
        for again in (True, False):
            reply = asyncio.ensure_future(asked(crew, one))
            await until(lambda: crew.health()["workers"][0]["live"] + crew.health()["workers"][1]["live"])
            gone = asyncio.ensure_future(crew.detach("a"))
            await asyncio.sleep(0.02)
            assert not gone.done()
            if again:  # a rollback
                await crew.attach("a", tmp_path / "a")
            assert await reply == scripted.reply_of(one)
            await gone
            assert crew.health()["adapters"] == (4 if again else 3)


async def test_embeddings_survive_a_death(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        made = await crew.embed(["a", "bc"] * 20 + ["d" * 9000], "base")
        assert made == EmbeddingResult([[1.0, 1.0], [1.0, 2.0]] * 20 + [[1.0, 9000.0]], 9060)
        with pytest.raises(SartorError, match="no encoder 'x'"):
            await crew.embed(["a"], "x")
        deadly = asyncio.ensure_future(crew.embed(["DIE"], "base"))
        await load(crew)
        with pytest.raises(UnavailableError):
            await deadly
        restarts = sum(worker["restarts"] for worker in crew.health()["workers"])
        with pytest.raises(ModelError):
            await crew.embed(["DIE"], "base")  # no more workers are given to it
        assert sum(worker["restarts"] for worker in crew.health()["workers"]) <= restarts + 1


async def test_too_many_deaths_give_up_for_a_while(tmp_path: Path) -> None:
    async with running(tmp_path, workers={"spare": 0, "restarts": 2, "window_s": 15.0}) as crew:
        waiting = asyncio.ensure_future(asked(crew, call("hello", "a", 100_000)))
        while crew.health()["workers"][0]["state"] != "given up":
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(pids(crew, "answers", "starting")[0], signal.SIGKILL)
            await asyncio.sleep(0.05)
        with pytest.raises((UnavailableError, ModelError), match="more than 2 times"):
            await waiting
        with pytest.raises(UnavailableError, match="ask again in 15 s"):
            await asked(crew, call("hello", "a"))
        await until(lambda: pids(crew, "answers", "spare"))
        assert await asked(crew, call("hello", "a")) == scripted.reply_of(call("hello", "a"))


@pytest.mark.parametrize(
    ("changes", "command", "kind"),
    [
        ({"base": "nowhere"}, scripted.COMMAND, ModelError),
        ({}, (sys.executable, "-c", "raise SystemExit(3)"), UnavailableError),
        ({}, ("/no/such/program",), UnavailableError),
        ({"start_s": 0.2}, (sys.executable, "-c", "import time; time.sleep(60)"), UnavailableError),
        ({"memory_bytes": 1 << 20}, scripted.COMMAND, SartorError),
    ],
)
async def test_a_crew_that_cannot_start_says_why(
    changes: dict[str, Any], command: tuple[str, ...], kind: type[SartorError]
) -> None:
    base = changes.pop("base", "")
    team = scripted.team(workers={"restarts": 1, **changes})
    with pytest.raises(kind):
        await Supervisor(replace(team, base=base or team.base), command).start()


async def test_draining_lets_replies_end_and_takes_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as crew:
        one, endless = call("hello", "a", 500), await crew.reply(call("endless", "b", 100_000), "b@1", 60)
        reply = asyncio.ensure_future(asked(crew, one))
        await until(lambda: sum(row["live"] for row in crew.health()["workers"]) == 2)
        closing = asyncio.ensure_future(crew.close(drain_s=15.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="is stopping"):
            await asked(crew, call("late", "a"))
        assert await reply == scripted.reply_of(one)
        await closing
        events = [event async for event in endless]
        assert isinstance(events[-1], ReplyFailed) and "is stopping" in events[-1].problem


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    """Also one that hangs."""
    code = (
        "import asyncio, scripted\n"
        "from sartor.serving.workers.supervisor import Supervisor\n"
        "async def scene():\n"
        "    crew = Supervisor(scripted.team(), scripted.COMMAND)\n"
        "    await crew.start()\n"
        "    while [row['state'] for row in crew.health()['workers']] != ['ready', 'ready']:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(*[row['pid'] for row in crew.health()['workers']], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(scene())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(scripted.__file__).parent
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    parent.send_signal(number)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in workers if alive(pid)] == []
