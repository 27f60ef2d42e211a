"""A fleet over one repository: what devices report, what is counted, and what becomes of a version that fails or works."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from loopback import listening
from sartor.core import signing
from sartor.core.errors import ArtifactError, ConfigError, HealthError, MissingError
from sartor.edge import device_commands as verbs
from sartor.edge.health_reason import HealthReason
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update import device_reports, fleet_monitor, health_check, repository, version_metadata
from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import Counted, FleetPolicy, RolloutTally
from sartor.edge.update.sync import SyncClient, sync
from sartor.edge.update.version_metadata import ring_of
from updating import World, adapter, release, serving


def version_in(path: Path) -> str:
    return str(json.loads((path / "report" / "report.json").read_text())["version"])


def ill_is_1_1(path: Path) -> None:
    if version_in(path) == "1.1":
        raise HealthError("canary: 1 of 1 of the device's prompts: line 1 (exact)", "publish another")


@dataclass
class Box:
    """One device of a fleet. is_blind: its health check sees nothing; its program then fails on 1.1, and never confirms."""

    id: str
    folder: Path
    is_blind: bool

    def sync(self, world: World, reports_to: Path) -> None:
        device = SyncClient(self.id, self.folder / "trust", world.root, starts=2)
        with ReleaseStore(self.folder / "store") as store, suppress(HealthError):
            sync(store, world.repository.as_uri(), "home", device, (lambda path: None) if self.is_blind else ill_is_1_1)
        self.run()
        with ReleaseStore(self.folder / "store") as store:
            device_reports.send_due(store, "home", self.id, self.folder / "key", str(reports_to), self.folder / "trust")

    def run(self) -> None:
        """The device's program, started until it works."""
        with ReleaseStore(self.folder / "store") as store:
            for _ in range(4):
                found = store.start("home")
                if found and version_in(found.path) != "1.1":
                    store.confirm("home")
                    return

    @property
    def version(self) -> str:
        return str(verbs.status(self.folder / "store")["releases"][0]["version"])

    @property
    def refused(self) -> dict[str, str]:
        return dict(verbs.status(self.folder / "store")["releases"][0]["refused"])


def fleet_of(world: World, count: int) -> tuple[list[Box], Path]:
    boxes, devices = [], world.folder / "devices"
    devices.mkdir()
    for number in range(count):
        box = Box(f"box-{number}", world.folder / f"box-{number}", is_blind=number % 3 == 0)
        signing.keygen(box.folder / "key")
        (devices / f"{box.id}.pub").write_bytes((box.folder / "key" / "sartor.pub").read_bytes())
        boxes.append(box)
    return boxes, devices


def add(world: World, version: str, percent: int) -> None:
    made = release(world.folder / version, version, adapter(0, 0.05 if version == "1.1" else 0.1), world.key)
    repository.publish(made, world.repository, world.keys, key=world.key, percent=percent)


def of(counted: Counted, version: str) -> RolloutTally:
    return next(one for one in counted.tallies if one.version == version)


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.services)])
def test_a_regressed_release_is_left_and_halted_and_a_good_one_reaches_everybody(world: World, count: int) -> None:
    boxes, devices = fleet_of(world, count)
    gathered = world.folder / "gathered"
    policy = FleetPolicy(least_reports=3, widen_below=0.5, rings=(50, 100))
    for box in boxes:
        box.sync(world, gathered)
    assert {box.version for box in boxes} == {"1.0"}

    add(world, "1.1", 50)
    inside = [box for box in boxes if ring_of(box.id) < 50]
    assert 3 <= len(inside) < count
    for box in boxes:
        box.sync(world, gathered)
    assert {box.version for box in boxes} == {"1.0"}
    assert {box.id for box in boxes if "1.1" in box.refused} == {box.id for box in inside}
    counted = fleet_monitor.tally(gathered, world.repository, devices, policy)
    found = of(counted, "1.1")
    assert (found.passed, found.failed, found.action) == (0, len(inside), "halt")
    blind = sum(box.is_blind for box in inside)
    assert found.reasons == {word: n for word, n in (("canary", len(inside) - blind), ("starts", blind)) if n}
    assert [one.version for one in fleet_monitor.watch(world.repository, world.keys, counted, widen=True)] == ["1.1"]
    assert of(fleet_monitor.tally(gathered, world.repository, devices, policy), "1.1").action == "halted"
    for box in boxes:
        if box not in inside:
            box.sync(world, gathered)
            assert (box.version, box.refused) == ("1.0", {})

    add(world, "1.2", 50)
    for _ in range(2):
        for box in boxes:
            box.sync(world, gathered)
        fleet_monitor.watch(
            world.repository, world.keys, fleet_monitor.tally(gathered, world.repository, devices, policy), widen=True
        )
    for box in boxes:
        box.sync(world, gathered)
    found = of(fleet_monitor.tally(gathered, world.repository, devices, policy), "1.2")
    assert {box.version for box in boxes} == {"1.2"} and (found.passed, found.percent, found.action) == (count, 100, "done")


@dataclass
class Ballot:
    """Devices that vote by hand on version 1.0, which everybody is offered."""

    world: World
    devices: Path

    def key(self, device: str, enrolled: bool = True) -> Path:
        folder = self.world.folder / "keys-of-devices" / device
        if not folder.is_dir():
            signing.keygen(folder)
        if enrolled:
            (self.devices / f"{device}.pub").write_bytes((folder / "sartor.pub").read_bytes())
        return folder

    def vote(self, device: str, enrolled: bool = True, by: str = "", **changes: Any) -> bytes:
        report = Report(device, "home", "1.0", ring_of(device), "pass", "", int(time.time()))
        self.key(device, enrolled)
        return replace(report, **changes).signed(signing.open_private(self.key(by or device, enrolled)))

    def count(self, *found: bytes) -> Counted:
        return fleet_monitor.tally(found, self.world.repository, self.devices)


@pytest.fixture
def ballot(world: World) -> Ballot:
    (world.folder / "devices").mkdir()
    return Ballot(world, world.folder / "devices")


def test_each_device_has_one_vote_and_a_replay_is_counted(ballot: Ballot) -> None:
    passed, now = ballot.vote("a"), int(time.time())
    failed = ballot.vote("a", outcome="fail", reason="canary", time=now + 5)
    counted = ballot.count(passed, failed, passed, ballot.vote("b"))
    assert (of(counted, "1.0").passed, of(counted, "1.0").failed) == (1, 1)
    assert counted.refused == {"replayed": 2}
    assert of(ballot.count(failed, passed), "1.0").failed == 1  # whatever comes first


def test_what_is_forged_or_of_another_does_not_count(ballot: Ballot) -> None:
    now = int(time.time())
    changed = ballot.vote("d").replace(b'"pass"', b'"fail"')
    repository.publish(
        release(ballot.world.folder / "1.1", "1.1", adapter(0, 0.1), ballot.world.key),
        ballot.world.repository,
        ballot.world.keys,
        key=ballot.world.key,
        percent=0,
    )
    bad = {
        "forged": [changed, ballot.vote("e", by="another")],
        "unknown device": [ballot.vote("f", enrolled=False)],
        "unknown version": [ballot.vote("g", version="7.7"), ballot.vote("g", name="garden")],
        "of another time": [ballot.vote("h", time=now - 9 * 86_400), ballot.vote("h", time=now + 9 * 86_400)],
        "not offered to it": [ballot.vote("i", version="1.1"), ballot.vote("i", ring=(ring_of("i") + 1) % 100)],
        "malformed": [b"", b"[]", b"{}", b"\xff", b"x" * 9999, ballot.vote("j", reason="my name is Ann"), b"[" * 4000],
    }
    counted = ballot.count(*(one for some in bad.values() for one in some))
    assert counted.refused == {why: len(some) for why, some in sorted(bad.items())}
    assert (of(counted, "1.0").passed, of(counted, "1.0").failed) == (0, 0)


def test_few_reports_decide_nothing_and_a_doubtful_rate_waits(ballot: Ballot) -> None:
    failed = [ballot.vote(f"f{n}", outcome="fail", reason="crash") for n in range(4)]
    passed = [ballot.vote(f"p{n}") for n in range(20)]
    assert of(ballot.count(*failed), "1.0").action == "done"  # 4 of 4, and 5 are needed
    assert of(ballot.count(*failed, *passed[:1]), "1.0").action == "halt"
    found = of(ballot.count(failed[0], *passed), "1.0")
    assert found.action == "done" and found.low < 0.05 < found.high


@pytest.mark.parametrize(
    ("failed", "count", "action"),
    [(2, 5, "halt"), (1, 5, "wait"), (10, 100, "halt"), (9, 100, "widen"), (0, 12, "widen"), (0, 11, "wait"), (4, 4, "wait")],
)
def test_the_figures_of_the_page(failed: int, count: int, action: str) -> None:
    low, high = fleet_monitor._interval(failed, count, 0.95)
    assert (
        fleet_monitor._decide_action(version_metadata.Offer("1.0", 1, 10, False, 0), count, low, high, FleetPolicy())[0]
        == action
    )


def test_rules_out_of_range_are_refused() -> None:
    for wrong in ({"least_reports": 0}, {"halt_above": 1.0}, {"widen_below": 0.0}, {"rings": (0,)}, {"confidence": 1.0}):
        with pytest.raises(ConfigError):
            FleetPolicy(**wrong)  # type: ignore[arg-type]


def test_a_report_says_a_word_and_never_what_was_answered(ballot: Ballot) -> None:
    assert HealthReason.parse("canary: 1 of 3 of the device's prompts: line 2 (exact)") == "canary"
    assert HealthReason.parse("ValueError: my diagnosis is") == "other"
    said = json.loads(ballot.vote("a"))
    assert set(said) == {
        "schema", "kind", "device", "name", "version", "ring", "outcome", "reason", "time", "signature"
    }  # fmt: skip
    with pytest.raises(ArtifactError):
        device_reports.read_report(json.dumps({**said, "prompt": "what do I take"}).encode())
    with pytest.raises(ConfigError, match="no id that can report"):
        device_reports.check_id("../box")


# what leaves a device


@dataclass
class Seen:
    requests: list[tuple[str, str, bytes]]
    url: str


@contextmanager
def gathering(status: int = 204) -> Iterator[Seen]:
    """A plain endpoint that takes reports, and counts every request with its body."""
    seen = Seen([], "")

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.requests.append(("POST", self.path, body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with listening(Endpoint) as address:
        seen.url = f"{address}/reports"
        yield seen


def options(world: World, **more: Any) -> verbs.DeviceOptions:
    world.store.close()
    root = world.folder / "root.json"
    root.write_bytes(world.root)
    (world.folder / "device-key").is_dir() or signing.keygen(world.folder / "device-key")
    return verbs.DeviceOptions(world.folder / "store", "box-1", root, key=world.folder / "device-key", **more)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-made releases have no base, so what a runtime would say of them is left out."""
    monkeypatch.setattr(health_check.Health, "__call__", lambda self, path: None)


def test_a_sync_without_a_report_sends_requests_for_files_and_nothing_else(world: World, trusting: None) -> None:
    with serving(world.repository) as mirror:
        done = verbs.sync(mirror.url, "home", options(world))
    assert (done["version"], done["reported"]) == ("1.0", [])
    wanted = {path.relative_to(world.repository).as_posix() for path in world.repository.rglob("*") if path.is_file()}
    asked = {path.lstrip("/") for path, _ in mirror.asked}
    assert asked - wanted <= {"metadata/2.root.json"}  # how TUF learns that there is no newer root


def test_a_report_is_one_post_and_said_once(world: World, trusting: None) -> None:
    with gathering() as seen:
        given = options(world)
        done = verbs.sync(world.repository.as_uri(), "home", given, report=seen.url)
        again = verbs.sync(world.repository.as_uri(), "home", given, report=seen.url)
    assert done["reported"] == [{"version": "1.0", "outcome": "pass", "reason": ""}] and again["reported"] == []
    [(method, _, body)] = seen.requests
    assert method == "POST" and device_reports.read_report(body)[0].device == "box-1" and len(body) < 600


@pytest.mark.parametrize("status", [500, 404, 302])
def test_a_report_that_is_not_taken_is_said_again(world: World, trusting: None, status: int) -> None:
    said: list[str] = []
    with gathering(status) as seen:
        done = verbs.sync(world.repository.as_uri(), "home", options(world), report=seen.url, notice=said.append)
    assert (done["version"], done["reported"]) == ("1.0", []) and "not reported" in said[0]
    with gathering() as seen:
        verbs.sync(world.repository.as_uri(), "home", options(world), report=seen.url)
    assert len(seen.requests) == 1


def test_an_endpoint_that_is_not_there_is_named(world: World) -> None:
    from sartor.edge.update.downloader import Fetcher

    with pytest.raises(MissingError, match="cannot connect"):
        Fetcher().post("http://127.0.0.1:9/reports", b"{}")
    with pytest.raises(ConfigError, match="no http or https address"):
        Fetcher().post("ftp://127.0.0.1/reports", b"{}")


def test_in_private_mode_no_packet_leaves(world: World, trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    opened: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: opened.append(address))
    given, url = options(world), world.repository.as_uri()
    for address, report in (("http://127.0.0.1:9", ""), (url, "http://127.0.0.1:9/reports")):
        with pytest.raises(ConfigError, match="no packet leave"):
            verbs.sync(address, "home", given, report=report, private=True)
    assert verbs.sync(url, "home", given, report=str(world.folder / "stick"), private=True)["reported"]
    add(world, "1.1", 100)
    verbs.sync(url, "home", given, private=True)
    for verb in (verbs.start, verbs.confirm, verbs.rollback):
        verb(given.store, "home")
    verbs.status(given.store)
    verbs.verify(given.store)
    assert opened == []
