"""Rounds of real processes, one of which kills itself: a coordinator and clients on Unix sockets, each with its journal on disk.

    killed_round.py ROOT WHO EACH COMES_BACK   ROOT/N/ is the house as it stood after the N-th kill and two rounds; WHO:
        "coordinator", or a client's number; prints a JSON line [N, what was being written, states, values] for each

A party kills itself (SIGKILL) before or after the N-th time that it writes to its journal; its parent starts it again, or, where
COMES_BACK is 0, only once the first round is over. EACH 1 leaves no write out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Client as Caller
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from federating import COORDINATOR, LENIENT, identity, names, roster_of
from round_parties import RULES, START, Pull
from sartor.core.errors import SartorError
from sartor.federate.rounds.round_client import Participant, RoundClient
from sartor.federate.rounds.round_coordinator import Coordinator, RoundPlan
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.transport import finish, run_round

COUNT = 5
PEOPLE = {name: identity(name) for name in (*names(COUNT), COORDINATOR)}
ROSTER = roster_of(*PEOPLE.values())
WRITES = ("begin", "add", "keep", "end")


class Killer(RoundJournal):
    """Kills its own process around the n-th write: an even one is not made, an odd one is made and nobody hears of it."""

    def __init__(self, path: Path, at: int = -1) -> None:
        self.at, self.count, self.said = at, 0, path.with_suffix(".killed")
        super().__init__(path)

    def point(self, what: str) -> None:
        if self.count == self.at:
            self.said.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def written(self, write: str, *arguments: Any) -> None:
        what = " ".join(
            [write, *(kind for argument in arguments if isinstance(argument, tuple) for kind in argument[:1])]
        )
        self.point(f"before {what}")
        getattr(super(), write)(*arguments)
        self.point(f"after {what}")

    def begin(self, *arguments: Any) -> None:
        self.written("begin", *arguments)

    def add(self, *arguments: Any) -> None:
        self.written("add", *arguments)

    def keep(self, *arguments: Any) -> None:
        self.written("keep", *arguments)

    def end(self, *arguments: Any) -> None:
        self.written("end", *arguments)


class Sockets:
    """A transport to clients who listen, each on its socket; who is not there does not answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        for name, request in requests.items():
            try:
                with Caller(str(self.folder / f"{name}.sock"), "AF_UNIX") as line:
                    line.send_bytes(request)
                    if answer := line.recv_bytes():
                        yield answer
            except (OSError, EOFError):
                continue


def serve(folder: Path, name: str, at: int) -> None:
    """A client, until it is killed."""
    socket = folder / f"{name}.sock"
    socket.unlink(missing_ok=True)
    member = Participant(PEOPLE[name], ROSTER, COORDINATOR, LENIENT)
    with Listener(str(socket), "AF_UNIX") as listener:
        client = RoundClient(member, Killer(folder / f"{name}.sqlite", at), {"pull": Pull(names(COUNT).index(name))})
        while True:
            with listener.accept() as line:
                try:
                    line.send_bytes(client.answer(line.recv_bytes()))
                except SartorError:
                    line.send_bytes(b"")


def lead(folder: Path, at: int, stage_s: int, until: int) -> None:
    """The coordinator, for so many rounds."""
    journal = Killer(folder / f"{COORDINATOR}.sqlite", at)
    coordinator = Coordinator(Participant(PEOPLE[COORDINATOR], ROSTER, COORDINATOR, LENIENT), journal, "triage")
    if not journal.load("shared triage"):
        coordinator.start(START)
    transport = Sockets(folder)
    finish(coordinator, transport)
    while len(journal.rounds("triage")) < until:
        run_round(coordinator, transport, RoundPlan("pull", names(COUNT), RULES, stage_s=stage_s))


class House:
    """The processes of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, dict[str, int]()
        folder.mkdir(parents=True)

    def start(self, name: str, at: int = -1, stage_s: int = 30, until: int = 2) -> None:
        child = os.fork()
        if child:
            self.processes[name] = child
            return
        try:
            if name == COORDINATOR:
                lead(self.folder, at, stage_s, until)
            else:
                serve(self.folder, name, at)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)

    def wait(self, name: str) -> int:
        _, status = os.waitpid(self.processes.pop(name), 0)
        return status

    def is_dead(self, name: str) -> bool:
        done, _ = os.waitpid(self.processes[name], os.WNOHANG)
        if done:
            del self.processes[name]
        return bool(done)

    def end(self) -> None:
        for name in list(self.processes):
            os.kill(self.processes[name], signal.SIGKILL)
            self.wait(name)


def one_kill(folder: Path, who: str, at: int, comes_back: bool) -> str:
    """Two rounds with one kill; what was being written, "" where the party lived to the end."""
    house = House(folder)
    for name in names(COUNT):
        house.start(name, at if name == who else -1)
    while not all((folder / f"{name}.sock").exists() for name in names(COUNT)):
        time.sleep(0.001)
    if who == COORDINATOR:
        house.start(COORDINATOR, at)
        if os.WIFSIGNALED(house.wait(COORDINATOR)):
            house.start(COORDINATOR)
            assert house.wait(COORDINATOR) == 0
    elif not comes_back:
        house.start(COORDINATOR, stage_s=1, until=1)
        assert house.wait(COORDINATOR) == 0
    if who != COORDINATOR:
        house.start(COORDINATOR)
        while not house.is_dead(COORDINATOR):
            if who in house.processes and house.is_dead(who):
                house.start(who)
            time.sleep(0.002)
    house.end()
    said = folder / f"{who}.killed"
    return said.read_text() if said.exists() else ""


def found(folder: Path) -> list[Any]:
    """[states of the rounds, the values of one tensor]."""
    with RoundJournal(folder / f"{COORDINATOR}.sqlite") as journal:
        coordinator = Coordinator(Participant(PEOPLE[COORDINATOR], ROSTER, COORDINATOR, LENIENT), journal, "triage")
        states = [kept.state for kept in reversed(journal.rounds("triage"))]
        return [states, coordinator.shared["head.weight"].ravel().tolist()]


def main(root: Path, who: str, each: int, comes_back: bool) -> None:
    """One kill after the other, until the party lives to the end."""
    at = 0
    who = COORDINATOR if who == COORDINATOR else names(COUNT)[int(who)]
    while True:
        folder = root / str(at)
        what = one_kill(folder, who, at, comes_back)
        print(json.dumps([at, what, *found(folder)]), flush=True)
        if not what:
            return
        at += each


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
