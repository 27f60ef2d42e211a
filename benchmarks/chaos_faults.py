"""The faults. Each is done to a running server under load, says whom it may hurt, and how long they were hurt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from bad_adapters import CORPUS, WEIGHTS
from chaos_house import AGENTS, HANG_S, SECOND, VERSIONS, Home, Server
from chaos_load import Load, ask, body, client

ALL = ("base", *AGENTS)
HURT = "ada"  # the agent that faults of one agent are done to
PATIENCE_S = 240.0
BIG_BYTES = 10_000_000
CONNECTIONS = 1_000
SLOW_CLIENTS = 4
DAY_S = 86_400


@dataclass
class Scene:
    """What a fault has to do with. clock: libfaketime's file, None where it is not installed."""

    home: Home
    server: Server
    load: Load
    clock: Path | None
    changes: int

    async def well(self, moment: float, agents: tuple[str, ...] = ALL) -> float:
        """Seconds from a moment until each agent has answered rightly to a request that came after it."""
        return await self.load.all_well_after(moment, agents, PATIENCE_S)


@dataclass(frozen=True)
class Outcome:
    """recovery_s: until those who were hurt, or else all, were well again. failed: what was not as it must be."""

    recovery_s: float
    note: str
    failed: str = ""


@dataclass(frozen=True)
class Fault:
    """hurt: the agents that it may hurt. needs: an option of the server without which it cannot be done."""

    name: str
    do: Callable[[Scene], Awaitable[Outcome]]
    hurt: tuple[str, ...] = ()
    is_long: bool = False


async def kill_worker(scene: Scene) -> Outcome:
    """SIGKILL to the worker that answers: nobody may notice, and a new spare comes."""
    pid = await scene.server.answering()
    moment = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    recovery_s = await scene.well(moment)
    await scene.server.staffed(PATIENCE_S)
    return Outcome(recovery_s, f"a new spare after {time.monotonic() - moment:.1f} s")


async def hang_worker(scene: Scene) -> Outcome:
    """SIGSTOP to the worker that answers: it says nothing more, and is given up after hang_s."""
    pid = await scene.server.answering()
    moment = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    recovery_s = await scene.well(moment)
    await scene.server.staffed(PATIENCE_S)
    return Outcome(recovery_s, f"hang_s is {HANG_S:g}", "" if not psutil.pid_exists(pid) else "it was not ended")


async def out_of_memory(scene: Scene) -> Outcome:
    """The worker that answers is driven over workers.memory_bytes by another model that it is asked for: it is recycled."""
    before = set(scene.server.workers())
    moment = time.monotonic()
    async with client(scene.server.url, scene.server.key) as http:
        said = await http.post("/v1/embeddings", json={"model": "minilm", "input": ["over the limit"] * 64})
    async with asyncio.timeout(PATIENCE_S):
        while before <= set(scene.server.workers()):
            await asyncio.sleep(0.1)
    recovery_s = await scene.well(moment)
    ended_s = time.monotonic() - moment
    await scene.server.staffed(PATIENCE_S)
    failed = "" if said.status_code == 200 else f"embeddings: {said.text[:200]}"
    return Outcome(recovery_s, f"recycled after {ended_s:.1f} s", failed)


async def allocations_fail(scene: Scene) -> Outcome:
    """The worker that answers gets no more memory from the system (RLIMIT_DATA): it may fail, the replies may not."""
    worker = psutil.Process(await scene.server.answering())
    moment = time.monotonic()
    worker.rlimit(psutil.RLIMIT_DATA, (worker.memory_info().data, -1))
    async with client(scene.server.url, scene.server.key) as http:
        said = await http.post("/v1/embeddings", json={"model": "minilm", "input": ["no room"] * 64})
    recovery_s = await scene.well(moment)
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.kill()
    await scene.well(time.monotonic())
    await scene.server.staffed(PATIENCE_S)
    return Outcome(recovery_s, f"what needed memory got HTTP {said.status_code}")


async def nan_in_a_worker(scene: Scene) -> Outcome:
    """Weights turn to NaN on disk after admission, and every worker is made to load them: only the guard of rows is left."""
    file = next(path for path in (scene.home.state / "adapters").glob(f"*/{WEIGHTS}") if _is_of(path, HURT))
    good = file.read_bytes()
    await _replace(scene, file, _with_nan(good))
    failed = ""
    moment = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        while not (reply := await _one(scene, HURT)).wrong and reply.model.startswith(f"{HURT}@"):
            await asyncio.sleep(0.1)
    if reply.wrong and "503" not in reply.wrong:
        failed = f"the broken agent said {reply.wrong}"
    fell = f"answered by {reply.model}" if not reply.wrong else "refused by 503"
    await scene.well(moment, tuple(agent for agent in ALL if agent != HURT))
    repaired = time.monotonic()
    await _replace(scene, file, good)
    await scene.server.change(HURT, "release")
    async with asyncio.timeout(PATIENCE_S):
        while not (await _one(scene, HURT)).model.startswith(f"{HURT}@"):
            await asyncio.sleep(0.2)
    return Outcome(time.monotonic() - repaired, f"meanwhile {fell}", failed)


async def _replace(scene: Scene, file: Path, raw: bytes) -> None:
    """Other weights in a file that workers load, and new workers in every place."""
    mode = file.stat().st_mode
    file.chmod(0o600)
    file.write_bytes(raw)
    file.chmod(mode)
    for pid in scene.server.workers():
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.5)
        await scene.server.staffed(PATIENCE_S)


def _is_of(weights: Path, agent: str) -> bool:
    return f'"name": "{agent}"' in (weights.parent / "release.json").read_text().replace('":"', '": "')


def _with_nan(raw: bytes) -> bytes:
    start = 8 + int.from_bytes(raw[:8], "little")
    values = np.frombuffer(raw[start:], "<f4").copy()
    values[::7] = np.nan
    return raw[:start] + values.tobytes()


async def _one(scene: Scene, agent: str):  # noqa: ANN202
    async with client(scene.server.url, scene.server.key) as http:
        return await ask(http, agent, "What colour is the sky?", scene.load.tokens, stream=False)


async def bad_adapters(scene: Scene) -> Outcome:
    """Every Release of the corpus that files alone show to be bad is promoted: truncated, NaN, of another base, unsigned..."""
    folder = scene.home.path / "releases"
    admitted, slips = [], []
    moment = time.monotonic()
    for name in corpus():
        path = scene.home.maker.bad(name, folder / name.replace(" ", "-"))
        said = await scene.server.change("shop", "promote", release=str(path))
        if said.status_code == 200:
            admitted.append(name)
            await scene.server.change("shop", "rollback")
        elif not 400 <= said.status_code < 500:
            slips.append(f"{name}: HTTP {said.status_code}")
        shutil.rmtree(path, ignore_errors=True)
    recovery_s = await scene.well(moment, ("shop",))
    scene.home.admitted = admitted
    note = f"{len(corpus()) - len(admitted)} of {len(corpus())} refused"
    return Outcome(recovery_s, note, "; ".join([f"admitted {name}" for name in admitted] + slips))


def corpus() -> list[str]:
    """The bad Releases that files alone show to be bad: what they would say is not theirs to choose here."""
    return [name for name, bad in CORPUS.items() if not bad.says]


async def corrupt_row(scene: Scene) -> Outcome:
    """Rows of one agent are changed behind the registry's back: it goes on as it was, or is refused, and /health says so."""
    with contextlib.closing(sqlite3.connect(scene.home.registry, timeout=10)) as connection:
        rows = connection.execute("select rowid, live from agents where name = ?", (HURT,)).fetchall()
        adapters = connection.execute("select rowid, adapter from versions where agent = ?", (HURT,)).fetchall()
        with connection:
            connection.execute("update agents set live = '6.6.6' where name = ?", (HURT,))
            connection.execute("update versions set adapter = 'feed' where agent = ?", (HURT,))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while HURT not in str((await scene.server.health()).get("troubles")):
                    await asyncio.sleep(0.2)
            meanwhile = await _one(scene, HURT)
        finally:
            with connection:
                connection.executemany("update agents set live = ? where rowid = ?", [(live, row) for row, live in rows])
                connection.executemany("update versions set adapter = ? where rowid = ?", [(one, row) for row, one in adapters])
    moment = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        while HURT in str((await scene.server.health()).get("troubles")):
            await asyncio.sleep(0.2)
    await scene.well(moment)
    said = f"HTTP {meanwhile.wrong[:40]}" if meanwhile.wrong else f"{meanwhile.model} went on"
    return Outcome(time.monotonic() - moment, f"/health named it; {said}")


async def slow_clients(scene: Scene) -> Outcome:
    """Clients that ask for a stream and read nothing, and such as send half a request and no more, of one and the same agent.

    The first hold nobody up, whether their reply fits into the system's buffers or they are cut off; the others are cut off.
    """
    moment = time.monotonic()
    deaf = [await _stalling(scene, whole=True) for _ in range(SLOW_CLIENTS)]
    halves = [await _stalling(scene, whole=False) for _ in range(SLOW_CLIENTS)]
    recovery_s = await scene.well(moment)
    async with asyncio.timeout(PATIENCE_S):
        while not all(_is_cut(one) for one in halves):
            await asyncio.sleep(0.2)
    cut_s = time.monotonic() - moment
    for one in (*deaf, *halves):
        one.close()
    await scene.well(time.monotonic())
    return Outcome(recovery_s, f"{len(halves)} with half a request were cut off within {cut_s:.1f} s; {len(deaf)} read nothing")


async def _stalling(scene: Scene, whole: bool) -> socket.socket:
    where = urlsplit(scene.server.url)
    stalling = socket.socket()
    stalling.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    stalling.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stalling, (where.hostname, where.port))
    asked = {**body("shop", "Tell me a long story.", 48, stream=True), "logprobs": True, "top_logprobs": 20}
    said = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {scene.server.key}\r\ncontent-length: {len(said)}\r\n\r\n"
    )
    await loop.sock_sendall(stalling, head.encode() + (said if whole else said[: len(said) // 2]))
    return stalling


def _is_cut(stalling: socket.socket) -> bool:
    """Whether the server has ended it: an answer may come before that."""
    try:
        while stalling.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def large_prompts(scene: Scene) -> Outcome:
    """A prompt of 10 MB is refused before it is read; one that fits the body and not the base is refused, too."""
    moment = time.monotonic()
    statuses = []
    async with client(scene.server.url, scene.server.key) as http:
        for size in (BIG_BYTES, BIG_BYTES, 1_500_000):
            said = await http.post("/v1/chat/completions", json=body("shop", "word " * (size // 5), 4, stream=False))
            statuses.append(said.status_code)
    recovery_s = await scene.well(moment)
    wrong = [status for status in statuses if not 400 <= status < 500]
    return Outcome(recovery_s, f"HTTP {', '.join(map(str, statuses))}", f"answered {wrong}" if wrong else "")


async def many_connections(scene: Scene) -> Outcome:
    """A thousand connections, half of them with half a request, while others ask."""
    where = urlsplit(scene.server.url)
    moment = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        writers = []
        for place in range(CONNECTIONS):
            _, writer = await asyncio.open_connection(where.hostname, where.port)
            stack.callback(writer.close)
            writers.append(writer)
            if place % 2:
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n")
        recovery_s = await scene.well(time.monotonic())
        opened_s = time.monotonic() - moment - recovery_s
    return Outcome(recovery_s, f"{len(writers)} opened in {opened_s:.1f} s")


async def disk_full(scene: Scene) -> Outcome:
    """No byte is left where the registry and the copies are, during a promote: it fails, all else goes on; then it succeeds."""
    release = scene.home.releases[f"{SECOND}@{VERSIONS[1]}"]
    third = scene.home.maker.good(release.with_name("third"), _third(scene))
    statuses = []
    with scene.home.no_room(scene.server.pid):
        for asked in ({"release": str(third)}, {"version": VERSIONS[1]}):
            said = await scene.server.change(SECOND, "promote", **asked)
            statuses.append(said.status_code)
        await scene.well(time.monotonic())
    moment = time.monotonic()
    said = await scene.server.change(SECOND, "promote", version=VERSIONS[1])
    recovery_s = await scene.well(moment)
    back = await scene.server.change(SECOND, "rollback")
    failed = "" if said.status_code == back.status_code == 200 else f"afterwards {said.text[:200]}"
    if any(status in (200, 500) for status in statuses):
        failed = f"promotes on a full disk: HTTP {statuses}"
    return Outcome(recovery_s, f"promotes meanwhile: HTTP {', '.join(map(str, statuses))}", failed)


def _third(scene: Scene):  # noqa: ANN202
    draft = scene.home.maker.draft(seed=123, size=0.1)
    draft.facts.update(name=SECOND, version="3.0")
    return draft


async def clock_jumps(scene: Scene) -> Outcome:
    """The wall clock of the server and its workers goes a day ahead, and two back."""
    assert scene.clock is not None
    moment = time.monotonic()
    for offset_s in (DAY_S, -DAY_S, 0):
        new = scene.clock.with_name("clock-new")  # libfaketime ends the process that reads half a file
        new.write_text(f"{offset_s:+d}\n")
        new.replace(scene.clock)
        jumped = time.monotonic()
        await scene.well(jumped)
        await asyncio.sleep(2 * HANG_S if offset_s else 0)
    health = await scene.server.health()
    restarts = sum(worker["restarts"] for worker in health["workers"])
    return Outcome(await scene.well(moment), f"a day ahead, two back; {restarts} restarts in all so far")


async def promotions(scene: Scene) -> Outcome:
    """Another version, and back, under load, as often as asked; in the middle a worker is killed."""
    moment = time.monotonic()
    slips = []
    async with scene.load.running([SECOND, SECOND]):
        for turn in range(scene.changes):
            verb, asked = ("rollback", {}) if turn % 2 else ("promote", {"version": VERSIONS[1]})
            said = await scene.server.change(SECOND, verb, expected_version=VERSIONS[turn % 2], **asked)
            if said.status_code != 200:
                slips.append(f"{verb}: HTTP {said.status_code} {said.text[:120]}")
            if turn == scene.changes // 2:
                os.kill(await scene.server.answering(), signal.SIGKILL)
    took_s = time.monotonic() - moment
    lost = [reply for reply in scene.load.since(moment) if reply.wrong]
    scene.home.lost = len(lost)
    versions = {reply.model for reply in scene.load.since(moment, (SECOND,))}
    note = f"{scene.changes} changes in {took_s:.1f} s, answered by {' and '.join(sorted(versions))}"
    recovery_s = await scene.well(time.monotonic())
    await scene.server.staffed(PATIENCE_S)
    return Outcome(recovery_s, note, "; ".join(slips[:3]))


FAULTS = (
    Fault("SIGKILL of the worker", kill_worker),
    Fault("hang of the worker (SIGSTOP)", hang_worker),
    Fault("worker above its memory limit", out_of_memory, is_long=True),
    Fault("worker gets no more memory", allocations_fail, is_long=True),
    Fault("bad adapters promoted", bad_adapters),
    Fault("NaN in every worker", nan_in_a_worker, (HURT,), is_long=True),
    Fault("corrupt registry rows", corrupt_row, (HURT,)),
    Fault("slow clients", slow_clients),
    Fault("10 MB prompts", large_prompts),
    Fault("1,000 connections", many_connections),
    Fault("disk full during promote", disk_full),
    Fault("clock jumps", clock_jumps),
    Fault("promotions and rollbacks", promotions),
)
