"""What stands between Flower and a client, without Flower: the hatch, the trainer's answers, letters to nodes that come and go."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from federating import write_keys
from round_parties import START, House, mean_of_numbers
from sartor.core.errors import BusyError, ConfigError, MissingError, RequestError, RoundError
from sartor.federate import updates as arrays
from sartor.federate.flower import driver_options as leading
from sartor.federate.flower.driver_options import RoundDriverOptions, drive_rounds
from sartor.federate.flower.flower_run import write_app
from sartor.federate.flower.flower_transport import AGAIN, ANSWERED, FlowerTransport, Node, NodeReply
from sartor.federate.flower.local_rpc import LocalRpcServer, RpcResponse, TransferLimits, ask, respond
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.transport import InProcess, run_round

NOBODY = 65_534
SHORT = TransferLimits(most_bytes=1000, transfer_s=0.3, most_waiting=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Short enough for a socket's path, and its owner's alone."""
    place = Path(os.path.relpath(tmp_path))
    place = place if len(str(place)) < 80 else tmp_path
    place.chmod(0o700)
    return place


@pytest.fixture
def served(folder: Path) -> Iterator[Path]:
    with opened(folder / "s") as path:
        yield path


class opened:
    """A hatch that answers with what it was asked, in a thread; "slow" takes a while, "bad" is refused."""

    def __init__(self, path: Path, **options: object) -> None:
        self.hatch = LocalRpcServer(path, **{"limits": SHORT, **options})
        self.thread = threading.Thread(target=self.hatch.serve, args=("ward-1", self.answer))

    def answer(self, request: bytes) -> RpcResponse:
        if request == b"slow":
            time.sleep(3)
        return RpcResponse("no", b"RoundError cohort") if request == b"bad" else RpcResponse("answer", request)

    def __enter__(self) -> Path:
        self.thread.start()
        return self.hatch.path

    def __exit__(self, *_: object) -> None:
        self.hatch.close()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_a_request_goes_in_and_an_answer_comes_out(served: Path) -> None:
    assert ask(served, b"", 5) == RpcResponse("answer", b"ward-1")
    assert ask(served, b"x" * 1000, 5) == RpcResponse("answer", b"x" * 1000)
    assert ask(served, b"bad", 5) == RpcResponse("no", b"RoundError cohort")


@pytest.mark.parametrize(
    "said", [b"", b"\0\0", struct.pack(">Q", 5) + b"half", struct.pack(">Q", 1 << 60), b"GET / HTTP/1.1\r\n\r\n"]
)
def test_nothing_that_a_connection_does_ends_the_trainer(served: Path, said: bytes) -> None:
    for hangs_up in (True, False):
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(served))
            end.sendall(said)
            if not hangs_up:
                end.settimeout(5)
                assert end.recv(100)[:1] == b"x"
    assert ask(served, b"still here", 5).content == b"still here"


def test_many_at_once_are_told_to_wait(folder: Path) -> None:
    with opened(folder / "s", limits=TransferLimits(most_bytes=1000, transfer_s=3.0, most_waiting=2)) as path:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for end in silent:
            end.connect(str(path))
        assert ask(path, b"one more", 30).kind == "busy"  # who connects is let in in order
        give_up = time.monotonic() + 60
        while (said := ask(path, b"again", 30)).kind == "busy" and time.monotonic() < give_up:
            time.sleep(0.1)
        assert said.content == b"again", "who says nothing is in the way no longer"
        for end in silent:
            end.close()


def test_an_answer_that_does_not_come_in_time(served: Path) -> None:
    with pytest.raises(RequestError):
        ask(served, b"slow", 0.1)
    assert ask(served, b"quick", 5).content == b"quick"


def test_only_users_on_the_list_are_heard(folder: Path) -> None:
    with opened(folder / "s", allowed=frozenset({os.geteuid() + 1})) as path:
        assert ask(path, b"", 5).kind == "stranger"
        assert ask(path, b"x" * 900, 5) == RpcResponse("stranger")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Another user and group, until the end: what the system then says of who connects is theirs."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
def test_a_carrier_of_another_user_is_heard_if_it_is_on_the_list() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        with opened(Path(name) / "own") as path, as_nobody(), pytest.raises(MissingError):
            ask(path, b"", 5)
        with opened(Path(name) / "unlisted", group=NOBODY) as path, as_nobody():
            assert ask(path, b"", 5).kind == "stranger"
        with opened(Path(name) / "listed", group=NOBODY, allowed=frozenset({NOBODY})) as path:
            with as_nobody():
                assert ask(path, b"anything", 5) == RpcResponse("answer", b"anything")
            assert ask(path, b"", 5).kind == "stranger", "nor is root, where it is not on the list"


def test_the_rights_of_the_socket_and_of_its_folder(folder: Path) -> None:
    with opened(folder / "s") as path:
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    with opened(folder / "s", group=os.getegid()) as path:
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(BusyError):
            LocalRpcServer(path)
    folder.chmod(0o770)
    with pytest.raises(ConfigError, match="others may write"):
        LocalRpcServer(folder / "s")
    folder.chmod(0o700)
    with pytest.raises(ConfigError):
        LocalRpcServer(folder / ("s" * 120))
    (folder / "file").write_text("mine")
    with pytest.raises(ConfigError, match="no socket"):
        LocalRpcServer(folder / "file")


def test_the_socket_of_one_that_was_killed_is_taken_over(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / "s"))
    left.close()
    with pytest.raises(MissingError):
        ask(folder / "s", b"", 1)
    with opened(folder / "s") as path:
        assert ask(path, b"", 5).content == b"ward-1"


def test_a_refusal_leaves_without_its_text() -> None:
    class Refuses:
        def answer(self, request: bytes) -> bytes:
            if request == b"bug":
                raise ZeroDivisionError("/home/ann/data")
            raise RoundError("the file /home/ann/data is not there", "look", "task")

    assert respond(Refuses(), b"") == RpcResponse("no", b"RoundError task")
    assert respond(Refuses(), b"bug") == RpcResponse("no", b"failed")


@dataclass
class Nodes:
    """A Post: nodes with a client behind each, some of them away; letters to those are lost, as those under way are."""

    clients: Mapping[str, object]
    away: set[int] = field(default_factory=set)
    came: dict[int, int] = field(default_factory=dict)
    called: dict[int, str] = field(default_factory=dict)
    dumb: set[int] = field(default_factory=set)
    sent: list[tuple[int, int]] = field(default_factory=list)
    under_way: dict[str, tuple[int, Sequence[bytes]]] = field(default_factory=dict)

    def nodes(self) -> Mapping[int, Node]:
        names = sorted(self.clients)
        return {
            node: Node(self.called.get(node, name), str(self.came.get(node, 0)))
            for node, name in enumerate(names)
            if node not in self.away
        }

    def send(self, node: int, requests: Sequence[bytes], keep_s: float) -> str:
        assert keep_s > 0
        self.sent.append((node, len(requests)))
        self.under_way[str(len(self.sent))] = (node, requests)
        return str(len(self.sent))

    def collect(self, ids: Sequence[str]) -> Iterator[tuple[str, NodeReply | None]]:
        for one in [one for one in ids if one in self.under_way]:
            node, requests = self.under_way[one]
            if node not in self.dumb:
                del self.under_way[one]
                yield one, None if node in self.away else self.replied(node, requests)

    def replied(self, node: int, requests: Sequence[bytes]) -> NodeReply:
        name = sorted(self.clients)[node]
        heard = [respond(self.clients[name], request) for request in requests]
        said = tuple(ANSWERED if one.kind == "answer" else f"no {one.content.decode()}" for one in heard)
        return NodeReply(said, tuple(one.content if one.kind == "answer" else b"" for one in heard))


@dataclass
class Clock:
    """Of the coordinator and of the transport: it moves while they wait."""

    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def housed(count: int = 5) -> House:
    return House(count=count, clock=Clock())


def carried(house: House, post: Nodes) -> FlowerTransport:
    return FlowerTransport(post, house.clock, house.clock.sleep)


def test_rounds_over_nodes_are_those_of_one_process() -> None:
    house = housed()
    post = Nodes(house.clients)
    transport = carried(house, post)
    for _ in range(2):
        ended = run_round(house.coordinator, transport, house.plan(stage_s=100))
        assert (ended.state, ended.active) == ("done", house.names)
    np.testing.assert_allclose(
        house.coordinator.shared["tail.weight"], 1 + 2 * mean_of_numbers(list(range(5))), atol=1e-6
    )
    # five exchanges, twice; how the first round ended rides with the second's invitation
    assert sorted(post.sent) == sorted([(node, count) for node in range(5) for count in (*[1] * 9, 2)])
    transport.deliver(10.0)
    assert [house.journals[name].rounds("triage")[0].state for name in house.names] == ["done"] * 5


def test_lost_request_is_sent_again_when_the_node_returns() -> None:
    """The round ends with all clients after five exchanges, one of them sent twice."""
    house = housed()
    post = Nodes(house.clients)
    transport = carried(house, post)
    assert run_round(house.coordinator, transport, house.plan(stage_s=100)).state == "done"
    post.dumb.add(0)  # it dies with the letter, and nobody is told
    first, sleep, began = len(post.sent), transport.sleep, transport.clock()

    def passes(seconds: float) -> None:
        sleep(seconds)
        if transport.clock() > began + 20 and post.dumb:
            post.dumb.clear()
            post.under_way = {one: letter for one, letter in post.under_way.items() if letter[0] != 0}
            post.came[0] = 1

    transport.sleep = passes
    ended = run_round(house.coordinator, transport, house.plan(stage_s=100))
    assert (ended.state, ended.active) == ("done", house.names)
    assert [node for node, _ in post.sent[first:]].count(0) == 6, "five exchanges, one of them twice"


def test_a_node_that_is_away_costs_its_client_the_stage() -> None:
    house = housed(7)
    post = Nodes(house.clients, away={2})
    transport = carried(house, post)
    ended = run_round(house.coordinator, transport, house.plan(stage_s=0))
    assert ended.state == "abandoned"
    ended = run_round(house.coordinator, transport, house.plan(stage_s=1))
    assert ended.active == tuple(name for place, name in enumerate(house.names) if place != 2)
    post.away.clear()
    assert run_round(house.coordinator, transport, house.plan(stage_s=1)).active == house.names


def test_a_node_of_the_wrong_name_hinders_nobody_else() -> None:
    house = housed()
    post = Nodes(house.clients, called={4: house.names[0]})
    transport = carried(house, post)
    ended = run_round(house.coordinator, transport, house.plan(stage_s=1))
    assert (ended.state, ended.active) == ("done", house.names[:4])


def test_refusals_are_counted_and_not_asked_again() -> None:
    house = housed()
    house.clients[house.names[1]]._tasks = {}
    post = Nodes(house.clients)
    transport = carried(house, post)
    assert run_round(house.coordinator, transport, house.plan(stage_s=1)).active == (house.names[0], *house.names[2:])
    assert transport.said_no == {f"{house.names[1]} RoundError task": 1}


def test_a_trainer_that_is_not_there_is_asked_again_later() -> None:
    house, calls = housed(), []
    post = Nodes(house.clients)
    replied = post.replied

    def absent(node: int, requests: Sequence[bytes]) -> NodeReply:
        if node == 3 and len(calls) < 2:
            calls.append(len(requests))
            return NodeReply() if len(calls) < 2 else NodeReply(tuple(AGAIN for _ in requests))
        return replied(node, requests)

    post.replied = absent
    transport = carried(house, post)
    ended = run_round(house.coordinator, transport, house.plan(stage_s=60))
    assert (ended.active, transport.lost) == (house.names, 2)


def written(folder: Path, house: House, **options: object) -> Path:
    """A coordinator's folder on disk."""
    write_keys(folder, house.me, house.roster)
    (folder / "start").write_bytes(arrays.pack_tensors(START))
    said = {
        "run": "triage",
        "rounds": 2,
        "key": "coordinator.key",
        "roster": "roster",
        "journal": "coordinator.sqlite",
        "start": "start",
        "round": {
            "task": "pull",
            "cohort": list(house.names),
            "settings": {"rate": 0.01},
            "rules": {"most_examples": 10},
            "stage_s": 0,
            "work_s": 0,
        },
    }
    (folder / "lead.yaml").write_text(json.dumps({**said, **options}))
    return folder / "lead.yaml"


def test_rounds_are_led_by_a_file_and_gone_on_with(tmp_path: Path) -> None:
    house = House(clock=time.time)
    lead = RoundDriverOptions.open(written(tmp_path, house))
    lines = drive_rounds(lead, InProcess(house.clients))
    assert json.loads(next(lines))["active"] == list(house.names)
    lines.close()  # stopped between two rounds
    assert [json.loads(line)["number"] for line in drive_rounds(lead, InProcess(house.clients))] == [2]
    assert [json.loads(line)["state"] for line in lead.record.read_text().splitlines()] == ["done", "done"]
    assert list(drive_rounds(lead, InProcess(house.clients))) == []
    assert [house.journals[name].rounds("triage")[0].state for name in house.names] == ["done"] * 5


def test_who_leads_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ServerApp whose SuperLink was killed has the journal for some seconds more."""
    house = House(clock=time.time)
    lead = RoundDriverOptions.open(written(tmp_path, house, rounds=1))
    before = RoundJournal(Path(lead.journal))
    monkeypatch.setattr(leading, "_PATIENCE_S", -1.0)
    with pytest.raises(BusyError):
        next(drive_rounds(lead, InProcess(house.clients)))
    monkeypatch.setattr(leading, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: before.close())
    assert json.loads(next(drive_rounds(lead, InProcess(house.clients))))["state"] == "done"


def test_a_file_that_leads_nowhere_says_which_option(tmp_path: Path) -> None:
    path = written(tmp_path, House(), rouns=3)
    with pytest.raises(ConfigError, match="rouns"):
        RoundDriverOptions.open(path)
    path.write_text(path.read_text().replace(', "rouns": 3', "").replace('"task": "pull", ', ""))
    with pytest.raises(ConfigError, match="round.task"):
        RoundDriverOptions.open(path)


def test_the_app_is_a_folder_that_flower_bundles(tmp_path: Path) -> None:
    folder = write_app(tmp_path / "app")
    said = tomllib.loads((folder / "pyproject.toml").read_text())
    for place in said["tool"]["flwr"]["app"]["components"].values():
        module = place.split(":")[0].replace(".", "/")
        assert (folder / f"{module}.py").read_text().startswith("from sartor.federate.flower import ")
    assert (folder / said["project"]["license"]["file"]).is_file()
    with pytest.raises(ConfigError):
        write_app(folder)


def test_the_carriers_side_loads_neither_keys_nor_tensors() -> None:
    code = "import sartor.federate.flower.local_rpc, sartor.federate.flower.flower_transport, sys; print({'numpy', 'cryptography'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
