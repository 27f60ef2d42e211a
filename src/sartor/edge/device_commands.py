"""Verbs of a device: sync, status, confirm, rollback."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import signing
from sartor.core.errors import ConfigError, HealthError, MissingError, SartorError, StoreError
from sartor.core.resource_limits import ResourceLimits
from sartor.edge.health_reason import HealthReason
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Installed, StoreState, states
from sartor.edge.update import device_reports
from sartor.edge.update import health_check as checks
from sartor.edge.update.health_check import Health, Result
from sartor.edge.update.sync import SyncClient
from sartor.edge.update.sync import sync as bring

Notice = Callable[[str], object]
# Subfolder of the store: verified metadata, and the reports that were sent
_TRUST = "trust"


@dataclass(frozen=True)
class DeviceOptions:
    """Options of a device.

    id: decides the device's ring.
    root: the repository's 1.root.json that the device was set up with.
    health: JSONL file of the device's own canary prompts; by default the release's own.
    base: another location of the base than releases name, or a GGUF file.
    starts: number of starts within which a new version has to confirm; 0 means no trial.
    check_s, memory_bytes: limits of the health check; 0 means no limit.
    limit_bytes: maximum size of the store; 0 means no limit.
    key: key that signs reports.
    evaluation: a private measure (`Health`).
    public_key: the only key whose Releases are taken; by default those in SARTOR_HOME/trusted.
    """

    store: Path
    id: str
    root: Path
    health: Path | None = None
    base: str = ""
    starts: int = 3
    check_s: float = checks.LIMITS.wall_s
    memory_bytes: int = 0
    limit_bytes: int = 0
    key: Path | None = None
    evaluation: Callable[[Path], str | None] | None = None
    public_key: Path | None = None

    def checked(self) -> Health:
        """Return the health check of this device."""
        prompts = checks.read_prompts(self.health) if self.health else ()
        limits = ResourceLimits(memory_bytes=self.memory_bytes, wall_s=self.check_s)
        return Health(prompts, limits, self.base, self.evaluation)


def sync(
    url: str,
    name: str,
    options: DeviceOptions,
    *,
    again: bool = False,
    report: str = "",
    private: bool = False,
    notice: Notice = lambda line: None,
) -> dict[str, Any]:
    """Update `name` to the newest version for this device if it passes its health check here.

    report: folder or http(s) address for signed reports, which hold no data. One is sent before a version is tried
    (`announced`), and one with the outcome (`reported`).
    private: refuse every address but file:, and send nothing over a network.

    Raises what `update.sync` raises; a version that failed its check is reported all the same.
    """
    _check_private(url, report, private)
    if report and not options.key:
        raise ConfigError(
            "a report is signed with the device's key", "sartor keygen KEYS --purpose fleet, then --key KEYS"
        )
    if report:
        device_reports.check_id(options.id)
    health = options.checked()
    announced = ""

    def announce_and_check(path: Path) -> None:
        """Report the start of the trial, then run the health check."""
        nonlocal announced
        announced = _announce(store, name, options, report=report, notice=notice)
        health(path)

    device = SyncClient(
        options.id,
        options.store / _TRUST,
        options.root,
        options.starts,
        [signing.open_public(options.public_key)] if options.public_key else None,
    )
    with ReleaseStore(options.store, limit_bytes=options.limit_bytes) as store:
        for line in store.mended:
            notice(line)
        try:
            synced = bring(store, url, name, device=device, healthy=announce_and_check, again=again)
        except HealthError:
            _report_due(store, name, options, report=report, announced=announced, notice=notice)
            raise
        reports = _report_due(store, name, options, report=report, announced=announced, notice=notice)
        current = store.current(name)
    check_fields = _check_fields(health)
    if check_fields["not_checked"]:
        notice(f"the release's own check prompts: {check_fields['not_checked']}")
    return {
        "release": str(current.path) if current else "",
        **asdict(synced),
        "notes": list(synced.notes),
        **_trial_fields(current),
        **check_fields,
        "announced": bool(announced),
        "reported": reports,
    }


def _check_private(url: str, report: str, private: bool) -> None:
    """Raise ConfigError if `private` is set and an address is on a network."""
    if not private:
        return
    if not url.startswith("file:"):
        raise ConfigError(
            f"--private lets no packet leave, and {url} is on a network", "give a file: address, as of a USB stick"
        )
    if report.startswith(("http://", "https://")):
        raise ConfigError(f"--private lets no packet leave, and {report} is on a network", "--report DIR, or none")


def _announce(store: ReleaseStore, name: str, options: DeviceOptions, report: str, notice: Notice) -> str:
    """Send a report of the coming trial of the staged version, and return the version.

    A version that takes the device off the network could not be reported later. Returns an empty text if nothing was
    sent. Raises nothing: it is called within the health check, and a failure to send is no fault of the version.
    """
    staged = store.staged(name)
    if not report or not options.key or staged is None:
        return ""
    try:
        key = signing.open_private(options.key, "fleet")
        outbox = device_reports.Outbox(options.id, key, report, options.store / _TRUST)
        outbox.send_started(name, staged.version)
    except SartorError as error:
        notice(f"not reported: {error.problem}")
        return ""
    except OSError as error:
        notice(f"not reported: {error}")
        return ""
    return staged.version


def _report_due(
    store: ReleaseStore, name: str, options: DeviceOptions, report: str, announced: str, notice: Notice
) -> list[dict[str, str]]:
    """Send the reports that are due, and return them.

    A report that cannot be sent is a notice, and the next sync sends it again.

    announced: version whose start this sync has reported already.
    """
    if not report or not options.key:
        return []
    try:
        trust = options.store / _TRUST
        sent_reports = device_reports.send_due(
            store,
            name,
            device=options.id,
            key=options.key,
            destination=report,
            folder=trust,
            announced=announced,
        )
    except MissingError as error:
        notice(f"not reported: {error.problem}")
        return []
    return [{"version": item.version, "outcome": item.outcome, "reason": item.reason} for item in sent_reports]


def _check_fields(health: Health) -> dict[str, Any]:
    """Return the resources of the health check and what it could not compare.

    They are 0 and empty if no check ran, since nothing changed.
    """
    result = health.results[-1] if health.results else Result(0)
    return {
        "prompts": result.n_prompts,
        "not_checked": result.not_checked,
        "peak_memory_bytes": result.peak_memory_bytes,
        "limit_bytes": health.limits.memory_bytes,
    }


def _trial_fields(current: Installed | None) -> dict[str, Any]:
    return {"trial": asdict(current.trial) if current and current.trial else None}


def status(store: Path | str, name: str = "") -> dict[str, Any]:
    """Return the versions on the device as any program sees them, without a lock and without a change.

    Raises StoreError if the store holds no such release.
    """
    matches = [item for item in states(Path(store)) if not name or item.name == name]
    if not matches:
        raise StoreError(f"{store} holds no {name or 'release'}", _sync_command(store, name or "NAME"))
    releases = [_state_fields(state) for state in matches]
    single_release = {key: releases[0][key] for key in ("release", "version")} if len(releases) == 1 else {}
    return {**single_release, "releases": releases}


def _state_fields(state: StoreState) -> dict[str, Any]:
    current = state.current
    return {
        "name": state.name,
        "version": current.version if current else "",
        "release": str(current.path) if current else "",
        "since": current.since if current else "",
        **_trial_fields(current),
        "previous": state.previous.version if state.previous else "",
        "staged": state.staged.version if state.staged else "",
        "refused": dict(state.refused),
    }


def start(store: Path | str, name: str) -> dict[str, Any]:
    """Count a start of the device's program if the version is on trial; return the version to run.

    Raises StoreError if the store holds no such release.
    """
    with _existing_store(store) as release_store:
        before, current = release_store.current(name), release_store.start(name)
        if current is None or before is None:
            raise StoreError(f"{store} holds no {name}", _sync_command(store, name))
    rollback_fields = (
        {"was": before.version, "reason": "it did not confirm"} if current.version != before.version else {}
    )
    return {
        "name": name,
        "version": current.version,
        "release": str(current.path),
        **_trial_fields(current),
        **rollback_fields,
    }


def confirm(store: Path | str, name: str) -> dict[str, Any]:
    """End the trial of the current version: the device's program works with it.

    Raises StoreError if the store holds no such release.
    """
    with _existing_store(store) as release_store:
        current = release_store.current(name)
        if current is None:
            raise StoreError(f"{store} holds no {name}", _sync_command(store, name))
        release_store.confirm(name)
    return {
        "name": name,
        "version": current.version,
        "release": str(current.path),
        **_trial_fields(replace(current, trial=None)),
    }


def rollback(store: Path | str, name: str, *, reason: str = "") -> dict[str, Any]:
    """Go back to the previous version at a person's request.

    The device does not take the abandoned version again except with `sync --again`.
    """
    with _existing_store(store) as release_store:
        before = release_store.current(name)
        current = release_store.rollback(name, HealthReason.PERSON.text(reason or "no reason was given"))
    return {
        "name": name,
        "version": current.version,
        "was": before.version if before else "",
        "release": str(current.path),
    }


def verify(store: Path | str) -> dict[str, Any]:
    """Read every byte of the store and repair what is stored twice.

    Raises StoreError if a current version is damaged and no whole version replaced it.
    """
    with _existing_store(store) as release_store:
        damaged = release_store.verify()
        mended = list(release_store.mended)
        # `verify` has just quarantined the damaged blobs that it could not repair
        releases = [(item.name, item.current.files.values()) for item in states(release_store.folder) if item.current]
        broken = [name for name, digests in releases if not all(map(release_store.has, digests))]
    if broken:
        raise StoreError(
            f"{', '.join(broken)}: the current version is damaged, and nothing here can mend it",
            _sync_command(store, broken[0]),
        )
    return {"damaged": damaged, "mended": mended}


def _sync_command(store: Path | str, name: str) -> str:
    return f"sartor edge sync URL {name} --device ID --root 1.root.json --store {shlex.quote(str(store))}"


@contextmanager
def _existing_store(store: Path | str) -> Iterator[ReleaseStore]:
    """Open an existing store. A command that only reads does not create one."""
    if not states(Path(store)):
        raise StoreError(f"there is no store at {store}", f"{_sync_command(store, 'NAME')} makes it")
    with ReleaseStore(Path(store)) as release_store:
        yield release_store
