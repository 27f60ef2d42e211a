"""Faults are done to a served team under load: who else notices, and how long until those who were hurt are well
again.

`sartor serve TEAM.yaml` runs as a user starts it: the starter base, three agents with adapters of their own, one
worker and one spare. Requests to each agent, and to the base, come at times that are fixed beforehand (Poisson, at 0.4
of the rate that the server answers in peace), whether or not earlier ones were answered; latency counts from the
scheduled arrival. Each greedy reply must be, byte for byte, the one that the same version gave to the same prompt in
peace. A reply that is late is right; one that is refused, cut off or another is wrong. `others_success` is the
fraction of right ones among the agents that a fault may not hurt; each fault has their `p99_s` and `slowest_s`. A
fault may hurt everybody, as the loss of all API keys does: then these are of the requests that were answered.
`mutants` counts Releases with a changed bit or byte that were admitted, by kind.

    python benchmarks/chaos.py --json            # tuned adapters, every fault, 200 promotions and rollbacks
    python benchmarks/chaos.py --quick --json    # adapters of random factors, 20 changes
    python benchmarks/chaos.py --only slow       # faults whose name has this in it
    python benchmarks/chaos.py --small --json    # a tiny base, no spare, a few faults and bad adapters, 4 changes

Below the table: a JSON object; `absent` names the faults that were left out. Exits 1 if
anybody else was hurt, a bad adapter was admitted, or a reply was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chaos_faults
import chaos_house
import httpx
import psutil
import smallest
from chaos_faults import ALL, FAULTS, PATIENCE_S, Fault, Outcome, Scene
from chaos_load import Load
from chaos_tools import Clock
from results import print_result

TOKENS = 6


@dataclass(frozen=True)
class Plan:
    """What is done. faults: their names, empty for all. bad: of the corpus that is promoted, every so many."""

    changes: int
    trained: bool = False
    faults: tuple[str, ...] = ()
    bad: int = 1
    mutants: int = 40
    is_small: bool = False


FULL, QUICK = Plan(200, trained=True), Plan(20, mutants=10)
# those of workers, of the registry, of the disk and of the clock take seconds each, or need root
SMALL_FAULTS = (
    "bad adapters promoted",
    "mutated adapters promoted",
    "10 MB prompts",
    "all API keys lost",
    "registry's file removed",
    "registry's file replaced",
    "decompression bombs",
    "forged turns",
    "promotions and rollbacks",
)
SMALL = Plan(4, faults=SMALL_FAULTS, bad=8, mutants=1, is_small=True)
# What an encoder takes that is opened in a worker is more than this, and what replies come to is less
MARGIN_BYTES = 48 << 20
CALM_S = 1.0
OPEN_FILES = 4096


def main() -> None:
    """Run, print the table, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    smallest.add_argument(parser)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="part of a fault's name")
    parser.add_argument("--changes", type=int, default=0, help="so many promotions and rollbacks")
    parser.add_argument("--keep", type=Path, help="directory to work in; it is emptied first, and stays")
    asked = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, most), most))
    began = time.monotonic()
    plan = SMALL if asked.small else QUICK if asked.quick else FULL
    with smallest.home(asked.small), workplace(asked.keep) as path:
        said = asyncio.run(run(path, replace(plan, changes=asked.changes or plan.changes), asked.only))
    said["wall_s"] = round(time.monotonic() - began, 1)
    table(said)
    if asked.json:
        print_result(said)
    is_hurt = (
        said["others_success"] < 1
        or not said["base_bit_equal"]
        or said.get("admitted_bad")
        or said.get("lost_in_flight")
    )
    raise SystemExit(1 if is_hurt or any(fault["failed"] for fault in said["faults"].values()) else 0)


@contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """An empty directory."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="sartor-chaos-") as path:
            yield Path(path)
    else:
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        yield keep.absolute()


async def run(path: Path, plan: Plan, only: str) -> dict[str, Any]:
    """Everything that is measured."""
    home = chaos_house.build(path, trained=plan.trained)
    home.is_small = plan.is_small
    home.mount()
    clock = None if plan.is_small else Clock.made(path)
    server = None
    try:
        server, start_s = await opened(home, clock)
        load = Load(server.url, server.key, TOKENS)
        await peace(home, server, load)
        again = {} if plan.is_small else await limited(home, server, load)
        await load.fit_rate(ALL)
        if plan.is_small:  # the tests' machine may be many times slower a minute later
            load.rate_per_s = min(load.rate_per_s, 0.5)
        scene = Scene(home, server, load, clock, plan.changes, plan.bad, plan.mutants)
        chosen = [fault for fault in FAULTS if only in fault.name and (not plan.faults or fault.name in plan.faults)]
        faults, replies = await suffer(scene, chosen)
        before, asked = dict(load.known), len(replies)
        await load.learn(["base"])
        status = server.stop()
    finally:
        if server:
            server.kill()
        home.unmount()
    others = [reply for reply in replies if reply["other"]]
    wrong = [reply for reply in others if reply["wrong"]]
    bases = [reply for reply in replies if reply["agent"] == "base"]
    return {
        "faults": faults,
        "others_success": round(1 - len(wrong) / len(others), 6) if others else 0.0,
        "others_requests": len(others),
        "base_bit_equal": before == load.known and not any(reply["wrong"] and reply["other"] for reply in bases),
        **({} if home.admitted is None else {"admitted_bad": len(home.admitted)}),
        "bad_adapters": len(chaos_faults.corpus()[:: plan.bad]),
        **({} if home.lost is None else {"lost_in_flight": home.lost}),
        "mutants": scene.admitted_mutants,
        "offered_per_s": round(load.rate_per_s * len(ALL), 2),
        "promotions": scene.changed,
        "in_flight_at_a_change": scene.spanning,
        **hostile_of(faults),
        "p99_s": {name: fault["p99_s"] for name, fault in faults.items() if "p99_s" in fault},
        "slowest_s": {name: fault["slowest_s"] for name, fault in faults.items() if "slowest_s" in fault},
        "recovery_s": {name: fault["recovery_s"] for name, fault in faults.items() if "recovery_s" in fault},
        "requests": asked,
        "wrong": [{"agent": one["agent"], "fault": one["fault"], "wrong": one["wrong"]} for one in wrong][:20],
        "start_s": round(start_s, 1),
        "exit_status": status,
        "processors": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[1], 1),
        **again,
        "absent": {
            fault.name: smallest.LEFT_OUT if plan.is_small else "not asked for"
            for fault in FAULTS
            if fault not in chosen
        },
    }


async def opened(home: chaos_house.Home, clock: Clock | None) -> tuple[chaos_house.Server, float]:
    """The server, started for the first time: every Release is admitted."""
    server = chaos_house.Server(chaos_house.write_team(home), home.path / "server.log", clock)
    return server, await asyncio.to_thread(server.start)


async def peace(home: chaos_house.Home, server: chaos_house.Server, load: Load) -> None:
    """The second version of one agent is registered, and everybody's replies are learnt."""
    second, version = chaos_house.SECOND, chaos_house.VERSIONS[1]
    await server.staffed(PATIENCE_S)
    await load.learn(ALL)
    await changed(server, "promote", release=str(home.releases[f"{second}@{version}"]))
    await load.learn([second])
    await changed(server, "rollback")


async def changed(server: chaos_house.Server, verb: str, **asked: Any) -> None:
    """A change that must succeed."""
    said = await server.change(chaos_house.SECOND, verb, **asked)
    if said.status_code != 200:
        raise SystemExit(f"{verb}: HTTP {said.status_code} {said.text}")


async def limited(home: chaos_house.Home, server: chaos_house.Server, load: Load) -> dict[str, float]:
    """Start it again with a limit of memory a little above what its workers take; all replies must be as they were."""
    most = max(worker["memory_bytes"] for worker in (await server.health())["workers"])
    memory_bytes = most + MARGIN_BYTES
    server.stop()
    chaos_house.write_team(home, memory_bytes)
    again_s = await asyncio.to_thread(server.start)
    load.url = server.url
    await server.staffed(PATIENCE_S)
    known = dict(load.known)
    await load.learn(["base", chaos_house.AGENTS[0]])
    if known != load.known:
        raise SystemExit("after a restart the replies are others")
    return {"memory_limit_bytes": memory_bytes, "start_again_s": round(again_s, 1)}


async def suffer(scene: Scene, chosen: list[Fault]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each fault in turn, and what became of the requests meanwhile."""
    faults: dict[str, Any] = {}
    judged: list[dict[str, Any]] = []
    async with scene.load.running(ALL):
        for fault in chosen:
            began = time.monotonic()
            outcome = await suffered(scene, fault)
            if outcome.skipped:
                faults[fault.name] = {"skipped": outcome.skipped, "failed": ""}
                continue
            took_s = time.monotonic() - began
            await asyncio.sleep(CALM_S)
            ended = time.monotonic()
            # what was due while it lasted is its own, however late the answer comes
            await scene.load.answered_until(ended)
            replies = [reply for reply in scene.load.replies if began <= reply.due < ended]
            others = [reply for reply in replies if reply.agent not in fault.hurt]
            wrong = [reply for reply in others if reply.wrong]
            judged += [
                {
                    "agent": reply.agent,
                    "fault": fault.name,
                    "wrong": reply.wrong,
                    "other": reply.agent not in fault.hurt,
                }
                for reply in replies
            ]
            # where a fault hurts everybody, the p99 is of those who were answered
            rated = others or [reply for reply in replies if not reply.wrong]
            latencies = sorted(reply.latency_s for reply in rated) or [0.0]
            faults[fault.name] = {
                **({"others_success": 1 - len(wrong) / len(others)} if others else {}),
                "others": len(others),
                "requests": len(replies),
                "hurt": list(fault.hurt),
                "recovery_s": round(outcome.recovery_s, 2),
                "note": outcome.note,
                "failed": outcome.failed,
                "p99_s": round(nearest_rank(latencies, 0.99), 2),
                "slowest_s": round(latencies[-1], 2),
                "wall_s": round(took_s, 1),
                "rows": dict(outcome.rows),
            }
            line = f"{fault.name}: {outcome.note}; {outcome.failed or 'as it must be'} ({took_s:.0f} s)"
            print(line, file=sys.stderr, flush=True)  # record.py keeps stdout until the end
    return faults, judged


def hostile_of(faults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the others' success and p99 of the faults that are an attack, by name; nothing unless each was made.

    Lost keys hurt everybody, by design: that fault has no others, and its p99 is of who was answered.
    """
    made = {name: faults.get(name, {}) for name in chaos_faults.HOSTILE}
    if any("p99_s" not in fault for fault in made.values()):
        return {}
    shown = ("others_success", "p99_s")
    return {"hostile": {name: {key: fault[key] for key in shown if key in fault} for name, fault in made.items()}}


def nearest_rank(ordered: Sequence[float], fraction: float) -> float:
    """Return the least of sorted values that at least `fraction` of them do not exceed."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


async def suffered(scene: Scene, fault: Fault) -> Outcome:
    """A fault; one from which nobody recovers is an outcome, too."""
    try:
        return await fault.do(scene)
    except (TimeoutError, OSError, httpx.HTTPError, psutil.Error) as error:
        return Outcome(PATIENCE_S, "", f"not over after {PATIENCE_S:g} s: {type(error).__name__} {error}")


def table(said: dict[str, Any]) -> None:
    """The faults, a line each."""
    print(f"\n{'fault':32} {'others':>8} {'of':>6} {'p99':>8} {'slowest':>8} {'recovery':>9}  note")
    for name, fault in said["faults"].items():
        if "skipped" in fault:
            print(f"{name:32} {'skipped':>8}  {fault['skipped']}")
            continue
        note = f"{fault['note']}{'; FAILED: ' + fault['failed'] if fault['failed'] else ''}"
        success = f"{fault['others_success']:8.2%}" if fault["others"] else f"{'none':>8}"
        figures = f"{success} {fault['requests']:6} {fault['p99_s']:7.1f}s"
        figures += f" {fault['slowest_s']:7.1f}s {fault['recovery_s']:8.1f}s"
        print(f"{name:32} {figures}  {note}")
        for row, said_of_it in fault["rows"].items():
            if row in chaos_faults.SHOWN:
                print(f"  {row:30} {said_of_it}")
    print(
        f"\nothers' success {said['others_success']:.4%} of {said['others_requests']}; "
        f"base bit-equal {said['base_bit_equal']}; "
        f"{said.get('admitted_bad', '?')} of {said['bad_adapters']} bad adapters admitted; "
        f"{said.get('lost_in_flight', '?')} replies lost in "
        f"{said['promotions']} promotions and rollbacks, {said['in_flight_at_a_change']} were in flight at one; "
        f"{said['wall_s']} s in all"
    )


if __name__ == "__main__":
    main()
