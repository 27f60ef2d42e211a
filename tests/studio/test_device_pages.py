"""The page Devices: fleets with their evidence, stores, tunings and federated rounds; commands that widen and halt."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from page_markup import HOSTILE, Tags
from sartor.core import signing
from sartor.core.artifacts import write_artifact
from sartor.edge.fleet_overview import MOST_EVIDENCE, fleet_overview
from sartor.edge.update import repository
from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import FleetPolicy
from sartor.edge.update.sync import SyncClient, sync
from sartor.edge.update.version_metadata import ring_of
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import JobControl
from studio_operations import ECHO, ended
from studio_site import Site
from updating import World, adapter, nothing, release

FLEET = "/devices/fleet/farm/repository"
ROUNDS = "/devices/rounds/wards"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    made = Site(tmp_path / "work")
    made.log_in()
    made.app.studio.jobs = JobControl(made.folder / ".studio" / "jobs", (sys.executable, "-c", ECHO))
    yield made
    made.close()


@dataclass
class Farm:
    """A fleet as docs/edge-publish.md lays it out, whose devices report by hand."""

    folder: Path

    def enrol(self, device: str) -> Path:
        key = self.folder.parent.parent / "device-keys" / device
        if not key.is_dir():
            signing.keygen(key, purposes=("fleet",))
            shutil.copyfile(key / "sartor.pub", self.folder / "devices" / f"{device}.pub")
        return key

    def report(self, device: str, **changes: Any) -> None:
        report = Report(device, "home", "1.0", ring_of(device), "pass", "", int(time.time()))
        content = replace(report, **changes).signed(signing.open_private(self.enrol(device)))
        (self.folder / "reports" / f"{device}.json").write_bytes(content)


@pytest.fixture
def farm(world: World, site: Site) -> Farm:
    folder = site.folder / "farm"
    shutil.copytree(world.repository, folder / "repository")
    shutil.copytree(world.keys, folder / "update-keys")
    for name in ("reports", "devices"):
        (folder / name).mkdir()
    return Farm(folder)


def test_empty_folder_says_how_to_begin(site: Site) -> None:
    page = site.page("/devices")
    assert "class=empty" in page and "sartor edge publish" in page


@pytest.mark.parametrize("language", ["en", "de"])
def test_fleet_shows_devices_and_the_evidence_for_a_halt(site: Site, farm: Farm, language: str) -> None:
    for number in range(6):
        farm.report(f"box-{number}", outcome="fail", reason="canary")
    farm.enrol("quiet")
    (farm.folder / "reports" / "noise.json").write_text("{}")
    overview = fleet_overview(farm.folder / "repository", farm.folder / "reports", farm.folder / "devices")
    [version] = overview.versions
    assert version.tally.action == "halt" and version.halt_evidence > overview.threshold == pytest.approx(20)
    assert 'href="/devices/fleet/farm/repository"' in site.page("/devices")
    page = site.page(FLEET, **{"accept-language": language})
    words = {"en": ("is to be halted", "never heard", "failed"), "de": ("soll angehalten werden", "nie gehört")}
    assert all(word in page for word in words[language])
    assert "canary" in page and "malformed 1" in page and page.count("box-") == 6
    assert not Tags(page).acting({"style", "srcdoc"})
    for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", page):
        before = page[: match.start()]
        assert "type=hidden" in match[0] or before.rfind("<label") > before.rfind("</label>"), match[0]


def test_evidence_is_that_of_the_decision(farm: Farm) -> None:
    """No report is no evidence; a fleet that only fails has as much as is shown at most."""
    policy = FleetPolicy(halt_above=0.0)
    [version] = fleet_overview(farm.folder / "repository").versions
    assert (version.halt_evidence, version.widen_evidence, version.tally.action) == (1.0, 1.0, "done")
    farm.report("box", outcome="fail", reason="canary")
    folders = [farm.folder / name for name in ("repository", "reports", "devices")]
    [version] = fleet_overview(*folders, policy=policy).versions
    assert version.halt_evidence == MOST_EVIDENCE and version.tally.action == "done"  # one report decides nothing


def test_device_is_shown_by_its_newest_version(farm: Farm, world: World) -> None:
    made = release(world.folder / "1.1", "1.1", adapter(0, 0.1), world.key)
    repository.publish(made, farm.folder / "repository", farm.folder / "update-keys", key=world.key)
    farm.report("box", outcome="pass")
    shutil.move(farm.folder / "reports" / "box.json", farm.folder / "reports" / "box-old.json")
    farm.report("box", outcome="started", version="1.1", time=int(time.time()) - 60)
    overview = fleet_overview(*(farm.folder / name for name in ("repository", "reports", "devices")))
    [device] = overview.devices
    assert (device.version, device.outcome, device.ring) == ("1.1", "started", ring_of("box"))
    assert time.time() - device.seen_at < 30
    assert [item.tally.version for item in overview.versions] == ["1.1", "1.0"]


def test_large_fleet_is_filtered_and_paged(site: Site, farm: Farm) -> None:
    for number in range(250):
        (farm.folder / "devices" / f"box-{number:03d}.pub").touch()
    farm.report("cow", outcome="pass")
    page = site.page(FLEET)
    assert "Rows 1 to 100 of 251" in page and "start=100" in page
    assert "Rows 201 to 251 of 251" in site.page(f"{FLEET}?start=200")
    assert "Rows 1 to 1 of 1" in site.page(f"{FLEET}?q=COW")
    assert "Rows 1 to 1 of 1" in site.page(f"{FLEET}?outcome=pass")
    assert "No row fits" in site.page(f"{FLEET}?q=nobody") and len(site.page(FLEET)) < 150_000


def test_changes_of_a_fleet_are_commands(site: Site, farm: Farm) -> None:
    fields = {"keys": "farm/update-keys", "version": "home@1.0"}
    path = str(farm.folder / "repository")
    keys = f"--keys={farm.folder / 'update-keys'}"
    for action, extra, expected in (
        ("halt", {}, ["halt", path, "home", "1.0", keys]),
        ("widen", {"percent": "50"}, ["widen", path, "home", "1.0", "50", keys]),
        (
            "watch",
            {"widen": "1"},
            ["watch", path, f"--reports={farm.folder / 'reports'}", f"--devices={farm.folder / 'devices'}"]
            + ["--widen", keys],
        ),
    ):
        answer = site.post(FLEET, from_page=FLEET, action=action, **fields, **extra)
        assert answer.status_code == 303, answer.text
        assert ended(site).result["ran"] == ["edge", *expected, "--json"]
    assert "Commands lately" in site.page(FLEET)


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "publish"},
        {"action": "halt", "version": "home@9.9"},
        {"action": "halt", "version": "--help@1"},
        {"action": "halt", "keys": "../keys"},
        {"action": "widen", "percent": "0"},
        {"action": "widen", "percent": "50.5"},
        {"action": "widen", "percent": ""},
    ],
)
def test_wrong_form_starts_nothing(site: Site, farm: Farm, fields: dict[str, str]) -> None:
    right = {"keys": "farm/update-keys", "version": "home@1.0", "percent": "50"}
    answer = site.post(FLEET, from_page=FLEET, **{**right, **fields})
    assert answer.status_code == 400 and site.app.studio.jobs.files.ids() == []


@pytest.mark.services
def test_halt_by_the_real_command_is_shown(site: Site, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    site.app.studio.jobs = JobControl(site.folder / ".studio" / "jobs")
    fields = {"keys": "farm/update-keys", "version": "home@1.0"}
    site.post(FLEET, from_page=FLEET, action="halt", **fields)
    status = ended(site)
    assert status.result.get("halted") is True, site.app.studio.jobs.log_lines(status.job.id)
    assert "halted" in site.page(FLEET)
    site.post(FLEET, from_page=FLEET, action="widen", percent="100", **fields)
    assert "is halted" in ended(site).result["error"]["problem"]
    assert "home 1.0 is halted" in site.page(FLEET)


def test_without_keys_nothing_can_be_changed(site: Site, farm: Farm) -> None:
    shutil.rmtree(farm.folder / "update-keys")
    assert "sartor edge keygen" in site.page(FLEET)
    assert site.post(FLEET, from_page=FLEET, action="halt", version="home@1.0").status_code == 400


def test_viewer_sees_no_forms_that_act(site: Site, farm: Farm) -> None:
    site.client = site.new_client()
    site.log_in(Role.VIEWER, "eve")
    for path in ("/devices", FLEET):
        assert set(re.findall(r'method=post action="([^"]+)"', site.page(path))) <= {"/logout", "/language"}
    assert site.post(FLEET, from_page="/", action="halt").status_code == 403


def test_damaged_repository_and_hostile_device_are_shown_as_text(site: Site, farm: Farm) -> None:
    for text in (HOSTILE[0].replace("/", "."), "<img src=x onerror=alert(1)>", "\u202egnp"):
        (farm.folder / "devices" / f"{text}.pub").touch()
    page = site.page(FLEET)
    assert "&lt;img" in page and "\u202e" not in page
    assert not Tags(page).acting({"style"}) and "img" not in {tag for tag, _ in Tags(page).tags}
    (farm.folder / "repository" / "metadata" / "timestamp.json").write_text("<script>")
    assert "cannot be read" in site.page("/devices") and "cannot be read" in site.page(FLEET)


@pytest.mark.parametrize("name", ["../work/farm/repository", "farm", "linked", "farm/reports"])
def test_only_repositories_below_the_folder_are_shown(site: Site, farm: Farm, name: str) -> None:
    (site.folder / "linked").symlink_to(farm.folder / "repository")
    assert site.client.get(f"/devices/fleet/{name}").status_code == 404


def test_store_and_tuning_of_a_device_are_listed(site: Site, world: World) -> None:
    client = SyncClient("box", world.device, world.root, starts=2)
    sync(world.store, world.repository.as_uri(), "home", client, nothing)
    made = release(world.folder / "1.1", "1.1", adapter(0, 0.1), world.key)
    repository.publish(made, world.repository, world.keys, key=world.key)
    sync(world.store, world.repository.as_uri(), "home", client, nothing)
    shutil.copytree(world.store.folder, site.folder / "box" / "store")
    usage = {"held_by": "cgroup", "limit_bytes": 2, "peak_bytes": 900_000_000, "wall_s": 12.0, "cpu_s": 20.0}
    said = {
        "outcome": "paused",
        "reason": "battery at 12 % <b>",
        "attempts": [{"usage": {**usage, "exit_code": 0, "killed": ""}}],
        "limits": {"memory_bytes": 1_000_000_000, "wall_s": 0},
    }
    (site.folder / "box" / "tuned").mkdir()
    (site.folder / "box" / "tuned" / "receipt.json").write_text(json.dumps({"said": said, "signature": {}}))
    (site.folder / "box" / "other").mkdir()
    (site.folder / "box" / "other" / "receipt.json").write_text('{"said": [1]}')
    page = site.page("/devices")
    assert "box/store" in page and "on trial" in page
    assert page.index(">1.1<") < page.index(">1.0<"), "the current version before the previous one"
    assert "900 MB / 1000 MB" in page and "12 s" in page and "battery at 12 % &lt;b&gt;" in page
    assert "box/other" not in page


def write_rounds(path: Path, *, privacy: bool = True, hostile: str = "") -> None:
    """An Adapter of three rounds by its manifest and log, as `sartor federate simulate` writes them."""
    lines = [
        {
            "round": number,
            "clients": 3,
            "clipped": 1,
            "exactness_error": 1e-7,
            "uploaded_bytes": 2_000_000,
            "loss_first": 3.0 - number / 2,
            "loss_last": 2.5 - number / 2,
            "epsilon": 1.5 * number if privacy else None,
            "verdicts": [f"ward-9 declined {hostile}"],
        }
        for number in (1, 2, 3)
    ]

    def fill(part: Path) -> dict[str, object]:
        (part / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "{damaged\n[1]\n")
        recipe = {"privacy": {"level": "client", "epsilon": 8.0, "delta": 1e-5} if privacy else None}
        run = {"federated": {"examples": {f"ward-{n}{hostile}": 10 * n for n in (1, 2, 3)}}, "rounds": 3}
        return {"licence": "MIT", "parents": [], "sources": [], "recipe": recipe, "run": run}

    write_artifact(path, "adapter", fill)


@pytest.mark.parametrize("language", ["en", "de"])
def test_rounds_show_clients_bytes_and_privacy_spent(site: Site, language: str) -> None:
    write_rounds(site.folder / "wards")
    (site.folder / "wards.personal").mkdir()
    own = {"clients": {"ward-1": {"loss": {"base": 3.25, "shared": 2.125, "personal": 1.0625}}}}
    (site.folder / "wards.personal" / "personal.json").write_text(json.dumps(own))
    assert 'href="/devices/rounds/wards"' in site.page("/devices")
    page = site.page(ROUNDS, **{"accept-language": language})
    assert {"en": "epsilon spent, of 8", "de": "Epsilon verbraucht, von 8"}[language] in page
    assert "6.0 MB" in page and page.count("<polyline") == 2 and page.count("class=limit") == 1
    assert "1.062" in page and "2,000,000" in page and "ward-3" in page
    rows = [page.index(f"<td class=n>{number}</td><td class=n>3</td>") for number in (3, 2, 1)]
    assert rows == sorted(rows)


def test_rounds_without_privacy_say_so(site: Site) -> None:
    write_rounds(site.folder / "wards", privacy=False, hostile=HOSTILE[0])
    page = site.page(ROUNDS)
    assert "add no noise" in page and page.count("<polyline") == 1
    assert "&lt;script&gt;" in page and not [tag for tag, fields in Tags(page).tags if tag == "script" and not fields]


def test_interrupted_rounds_go_on_by_their_command(site: Site) -> None:
    folder = site.folder / "wards.rounds"
    folder.mkdir()
    (folder / "fingerprint.json").write_text(json.dumps({"recipe": {"privacy": None}}))
    path = f"{ROUNDS}.rounds"
    assert "were interrupted" in site.page(path) and "unfinished" in site.page("/devices")
    answer = site.post("/devices/resume/wards.rounds", from_page=path)
    assert answer.status_code == 400 and "--resume" in answer.text
    out = site.folder / "wards"
    arguments = ["federate", "simulate", "federate.yaml", "--out", str(out), "--replace"]
    site.app.studio.jobs.start(arguments, title="wards", by="ada", cwd=site.folder, out=str(out))
    ended(site)
    answer = site.post("/devices/resume/wards.rounds", from_page=path)
    assert answer.status_code == 303 and answer.headers["location"].startswith("/jobs/")
    assert ended(site).result["ran"] == [*arguments[:-1], "--resume", "--json"]


def test_adapter_of_one_machine_has_no_rounds(site: Site) -> None:
    write_artifact(site.folder / "plain", "adapter", lambda part: {"licence": "MIT", "parents": [], "run": {}})
    assert site.client.get("/devices/rounds/plain").status_code == 404
    assert "plain" not in site.page("/devices")


@pytest.mark.services
def test_real_rounds_of_the_tiny_base_are_shown(site: Site, tiny_base: Path, dataset: Path, fp32: None) -> None:
    """The files are those of `federate simulate` itself, with the account of its noise."""
    from sartor.federate.tuning.simulation import simulate
    from tuning_rounds import recipe

    asked = recipe(tiny_base, dataset, privacy={"epsilon": 8.0, "delta": 1e-2}, rules={"clip": 0.01})
    result = simulate(asked, site.folder / "wards", shards={"count": 3, "by": "."}).as_json()
    page = site.page(ROUNDS)
    assert f"{result['epsilon']:.3g}" in page and "epsilon spent, of 8" in page and "client-2" in page
