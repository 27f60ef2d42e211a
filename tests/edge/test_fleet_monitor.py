"""A fleet over one repository: what devices report, what is counted, and what becomes of a version that fails or works."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from loopback import listening
from sartor.cli import main
from sartor.core import signing
from sartor.core.errors import ArtifactError, ConfigError, HealthError, MissingError, SartorError, StoreError
from sartor.edge import device_commands as verbs
from sartor.edge.health_reason import HealthReason
from sartor.edge.runtime.ask_device import ask
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update import device_reports, fleet_monitor, health_check, repository, version_metadata
from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import Counted, FleetPolicy, RolloutTally
from sartor.edge.update.sync import SyncClient, sync
from sartor.edge.update.tuf_roles import Documents
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
            sync(
                store, world.repository.as_uri(), "home", device, (lambda path: None) if self.is_blind else ill_is_1_1
            )
        self.run()
        with ReleaseStore(self.folder / "store") as store:
            device_reports.send_due(
                store, "home", self.id, self.folder / "key", str(reports_to), self.folder / "trust"
            )

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
        signing.keygen(box.folder / "key", purposes=("fleet",))
        (devices / f"{box.id}.pub").write_bytes((box.folder / "key" / "sartor.pub").read_bytes())
        boxes.append(box)
    return boxes, devices


def add(world: World, version: str, percent: int) -> None:
    made = release(world.folder / version, version, adapter(0, 0.05 if version == "1.1" else 0.1), world.key)
    repository.publish(made, world.repository, world.keys, key=world.key, percent=percent)


def of(counted: Counted, version: str) -> RolloutTally:
    return next(one for one in counted.tallies if one.version == version)


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.services)])
def test_regressed_version_is_halted_and_a_good_one_reaches_all(world: World, count: int) -> None:
    """Devices that got the bad version refuse it and go back; the others never install it."""
    boxes, devices = fleet_of(world, count)
    gathered = world.folder / "gathered"
    # four clean reports, which is what the ring of so small a fleet has
    policy = FleetPolicy(least_reports=3, widen_below=0.5, confidence=0.6, rings=(50, 100))
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
    assert {box.version for box in boxes} == {"1.2"} and (found.passed, found.percent, found.action) == (
        count,
        100,
        "done",
    )


@dataclass
class Ballot:
    """Devices that vote by hand on version 1.0, which everybody is offered."""

    world: World
    devices: Path

    def key(self, device: str, enrolled: bool = True) -> Path:
        folder = self.world.folder / "keys-of-devices" / device
        if not folder.is_dir():
            signing.keygen(folder, purposes=("fleet",))
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
    found = of(ballot.count(*failed[:2], *passed), "1.0")
    assert found.action == "done" and found.low < 0.05 < found.high


def test_device_that_falls_silent_fails_after_the_deadline(ballot: Ballot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed reports of a start; who took it back stays pending, and who never started anything counts as nothing."""
    started = [ballot.vote(f"s{n}", outcome="started") for n in range(6)]
    back = [ballot.vote("b", outcome="started"), ballot.vote("b", outcome="deferred")]
    for n in range(20):
        ballot.key(f"never-{n}")
    found = of(ballot.count(*started, *back), "1.0")
    assert (found.failed, found.votes.pending, found.high, found.action) == (0, 7, 1.0, "done")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 6.9 * 86_400)
    assert of(ballot.count(*started, *back), "1.0").failed == 0
    monkeypatch.setattr(time, "time", lambda: now + 7.1 * 86_400)
    found = of(ballot.count(*started, *back), "1.0")
    assert (found.failed, found.votes.silent, found.votes.pending, found.action) == (6, 6, 1, "halt")
    fields = found.as_json()
    assert (fields["silent"], fields["reasons"], fields["ring"]["failed"]) == (6, {"silent": 6}, 6)
    late = ballot.vote("s0", time=int(now + 7 * 86_400))
    heard = of(ballot.count(*started, late), "1.0")
    assert (heard.passed, heard.votes.silent) == (1, 5)  # heard of after all
    again = ballot.vote("s1", outcome="started", time=int(now + 3 * 86_400))
    assert of(ballot.count(*started, again), "1.0").votes.silent == 5  # its deadline begins with the newest start


def test_watch_halts_for_silence_by_the_command(ballot: Ballot, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`sartor edge watch` itself, with the deadline as a flag."""
    gathered = ballot.world.folder / "gathered"
    gathered.mkdir()
    for n in range(6):
        (gathered / f"{n}.json").write_bytes(ballot.vote(f"s{n}", outcome="started", time=int(time.time()) - 3600))
    watch = [
        "edge",
        "watch",
        str(ballot.world.repository),
        "--reports",
        str(gathered),
        "--devices",
        str(ballot.devices),
    ]
    watch += ["--keys", str(ballot.world.keys), "--json"]
    for flags, done in (["--silent-after-days", "0.5"], 0), (["--silent-after-days", "0.02"], 1):
        with pytest.raises(SystemExit) as end:
            main([*watch, *flags])
        fields = json.loads(capsys.readouterr().out)
        assert (end.value.code, len(fields["done"])) == (0, done)
    assert (fields["versions"][0]["silent"], fields["done"][0]["did"]) == (6, "halt")
    assert of(ballot.count(), "1.0").action == "halted"


def test_outcome_stands_before_a_start(ballot: Ballot) -> None:
    """The second of a report is all that a device tells, and files come in any order."""
    start, passed, failed = ballot.vote("a", outcome="started"), ballot.vote("a"), ballot.vote("b", outcome="fail")
    for found in ([start, passed], [passed, start]):
        counted = ballot.count(*found, failed)
        assert (of(counted, "1.0").passed, of(counted, "1.0").votes.pending, counted.refused) == (1, 0, {})
    assert ballot.count(start, start).refused == {"replayed": 1}


def test_widen_keeps_the_percent_of_before(world: World) -> None:
    add(world, "1.1", 10)

    def offer() -> version_metadata.Offer:
        return repository.offers_of(Documents.open(world.repository / "metadata"), "home")[0]

    assert (offer().percent, offer().previous_percent) == (10, 0)
    for percent, before in ((25, 10), (25, 10), (50, 25)):
        repository.widen(world.repository, world.keys, "home", "1.1", percent)
        assert (offer().percent, offer().previous_percent) == (percent, before)


def test_offer_of_an_older_repository_is_read() -> None:
    custom = {"order": 2, "percent": 25, "halted": False, "published": 5}
    assert version_metadata.offer_of("home/1.1.json", custom) == (
        "home",
        version_metadata.Offer("1.1", 2, 25, False, 5),
    )
    for wrong in (-1, 26, "10", True, None):
        assert version_metadata.offer_of("home/1.1.json", {**custom, "previous_percent": wrong}) is None


def test_rules_out_of_range_are_refused() -> None:
    """The remedy names the flags of the wrong rules alone."""
    for wrong in (
        {"least_reports": 0},
        {"halt_above": 1.0},
        {"widen_below": 0.0},
        {"rings": (0,)},
        {"confidence": 1.0},
        {"silent_after_days": -1.0},
        {"silent_after_days": math.nan},
        {"silent_after_days": math.inf},
    ):
        with pytest.raises(ConfigError) as refused:
            FleetPolicy(**wrong)  # type: ignore[arg-type]
        (name,) = wrong
        assert re.findall(r"--[a-z-]+", refused.value.remedy) == [f"--{name.replace('_', '-')}"]


def test_a_report_says_a_word_and_never_what_was_answered(ballot: Ballot) -> None:
    assert HealthReason.parse("canary: 1 of 3 of the device's prompts: line 2 (exact)") == "canary"
    assert HealthReason.parse("ValueError: my diagnosis is") == "other"
    said = json.loads(ballot.vote("a"))
    assert set(said) == {
        "schema",
        "kind",
        "device",
        "name",
        "version",
        "ring",
        "outcome",
        "reason",
        "time",
        "signature",
    }
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
    (world.folder / "device-key").is_dir() or signing.keygen(world.folder / "device-key", purposes=("fleet",))
    return verbs.DeviceOptions(world.folder / "store", "box-1", root, key=world.folder / "device-key", **more)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-made releases have no base, so what a runtime would say of them is left out."""
    monkeypatch.setattr(health_check.Health, "__call__", lambda self, path: None)


def test_sync_without_a_report_requests_files_only(world: World, trusting: None) -> None:
    """Apart from the next TUF root, each request names a file of the repository."""
    with serving(world.repository) as mirror:
        done = verbs.sync(mirror.url, "home", options(world))
    assert (done["version"], done["reported"]) == ("1.0", [])
    wanted = {path.relative_to(world.repository).as_posix() for path in world.repository.rglob("*") if path.is_file()}
    asked = {path.lstrip("/") for path, _ in mirror.asked}
    assert asked - wanted <= {"metadata/2.root.json"}  # how TUF learns that there is no newer root


def test_start_and_outcome_are_one_post_each(world: World, trusting: None) -> None:
    with gathering() as seen:
        given = options(world)
        done = verbs.sync(world.repository.as_uri(), "home", given, report=seen.url)
        again = verbs.sync(world.repository.as_uri(), "home", given, report=seen.url)
    assert done["reported"] == [{"version": "1.0", "outcome": "pass", "reason": ""}] and again["reported"] == []
    assert (done["announced"], again["announced"]) == (True, False)
    reports = [device_reports.read_report(body)[0] for _, _, body in seen.requests]
    assert [(report.device, report.outcome) for report in reports] == [("box-1", "started"), ("box-1", "pass")]
    assert all(method == "POST" and len(body) < 600 for method, _, body in seen.requests)


def test_start_is_reported_before_the_check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check, or the first seconds of a version, takes off the network cannot say so afterwards."""
    given, gathered, at_check = options(world), world.folder / "gathered", []

    def check(self: Any, path: Path) -> None:
        at_check.extend(device_reports.read_report(file.read_bytes())[0].outcome for file in gathered.iterdir())

    monkeypatch.setattr(health_check.Health, "__call__", check)
    verbs.sync(world.repository.as_uri(), "home", given, report=str(gathered))
    assert at_check == ["started"]


@pytest.mark.parametrize(
    ("error", "outcome"), [(HealthError("canary: no", "x"), "fail"), (MissingError("no base", "x"), "deferred")]
)
def test_start_ends_in_an_outcome(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: str
) -> None:
    """A check that could not be made says nothing of the version, and the device is not silent either."""
    given, gathered = options(world), world.folder / "gathered"

    def check(self: Any, path: Path) -> None:
        raise error

    monkeypatch.setattr(health_check.Health, "__call__", check)
    with pytest.raises(HealthError):
        verbs.sync(world.repository.as_uri(), "home", given, report=str(gathered))
    [file] = gathered.iterdir()
    assert device_reports.read_report(file.read_bytes())[0].outcome == outcome
    monkeypatch.setattr(health_check.Health, "__call__", lambda self, path: None)
    verbs.sync(world.repository.as_uri(), "home", given, report=str(gathered), again=True)
    assert device_reports.read_report(file.read_bytes())[0].outcome == "pass"


def test_trial_that_a_newer_version_ends_is_deferred(world: World, trusting: None) -> None:
    """A device that went on to 1.2 before it confirmed 1.1 is not silent on 1.1."""
    given, gathered, url = options(world), world.folder / "gathered", world.repository.as_uri()
    outcomes = []
    for version in ("1.1", "1.2"):
        verbs.sync(url, "home", given, report=str(gathered))
        add(world, version, 100)
    verbs.sync(url, "home", given, report=str(gathered))
    for version in ("1.0", "1.1", "1.2"):
        outcomes.append(device_reports.read_report((gathered / f"box-1.home.{version}.json").read_bytes())[0].outcome)
    assert outcomes == ["pass", "deferred", "started"]


def test_device_on_a_long_trial_is_not_silent(world: World, trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It syncs every five days and does not confirm for 20: one pending device, of which no report is refused."""
    given, url, start = options(world, starts=9), world.repository.as_uri(), int(time.time())
    devices = world.folder / "devices"
    devices.mkdir()
    (devices / "box-1.pub").write_bytes((world.folder / "device-key" / "sartor.pub").read_bytes())
    verbs.sync(url, "home", given)
    add(world, "1.1", 100)
    with gathering() as seen:
        for day in (0, 5, 10, 15, 20):
            monkeypatch.setattr(time, "time", lambda day=day: start + day * 86_400)
            done = verbs.sync(url, "home", given, report=seen.url)
            assert done["trial"] and bool(done["reported"]) is bool(day)
            counted = fleet_monitor.tally([body for _, _, body in seen.requests], world.repository, devices)
            votes = of(counted, "1.1").votes
            assert (votes.pending, votes.decided, counted.refused) == (1, 0, {})
        assert len(seen.requests) == 5
        with ReleaseStore(given.store) as store:
            store.confirm("home")
        done = verbs.sync(url, "home", given, report=seen.url)
    assert done["reported"] == [{"version": "1.1", "outcome": "pass", "reason": ""}]
    counted = fleet_monitor.tally([body for _, _, body in seen.requests], world.repository, devices)
    assert (of(counted, "1.1").passed, of(counted, "1.1").votes.pending, counted.refused) == (1, 0, {})
    # a copy is still counted as one
    copies = [seen.requests[0][2], *(body for _, _, body in seen.requests)]
    assert fleet_monitor.tally(copies, world.repository, devices).refused == {"replayed": 1}


def test_start_that_cannot_be_reported_does_not_refuse_version(world: World, trusting: None) -> None:
    """The endpoint fails, or the device has no key; the version stays installed."""
    said: list[str] = []
    given = options(world)
    with gathering(500) as seen:
        done = verbs.sync(world.repository.as_uri(), "home", given, report=seen.url, notice=said.append)
    assert (done["version"], done["announced"], len(said)) == ("1.0", False, 2)
    add(world, "1.1", 100)
    no_key = replace(given, key=world.folder / "no-key")
    with pytest.raises(SartorError, match="no-key"):
        verbs.sync(
            world.repository.as_uri(), "home", no_key, report=str(world.folder / "gathered"), notice=said.append
        )
    [state] = verbs.status(given.store)["releases"]
    assert (state["version"], state["refused"]) == ("1.1", {})


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


def test_a_store_without_the_release_names_a_whole_sync(world: World, trusting: None) -> None:
    """The command has every option that `sartor edge sync` requires."""
    given = options(world)
    verbs.sync(world.repository.as_uri(), "home", given)
    empty = world.folder / "no store"
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (verbs.status, (given.store, "other")),
        (verbs.start, (given.store, "other")),
        (verbs.confirm, (given.store, "other")),
        (ask, (given.store, "other", "hello")),
        (verbs.verify, (empty,)),
    ]
    for verb, given_values in calls:
        with pytest.raises(StoreError) as refused:
            verb(*given_values)
        assert "--device ID --root 1.root.json --store" in refused.value.remedy
    assert f"--store '{empty}'" in refused.value.remedy
