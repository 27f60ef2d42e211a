"""Verbs of a device: sync, status, confirm, rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError, HealthError, MissingError, StoreError
from sartor.core.resource_limits import ResourceLimits
from sartor.edge.health_reason import HealthReason
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Installed, StoreState, states
from sartor.edge.update import device_reports
from sartor.edge.update import health_check as checks
from sartor.edge.update.health_check import Health, Result
from sartor.edge.update.sync import SyncClient, Synced
from sartor.edge.update.sync import sync as bring

Notice = Callable[[str], object]
# Of the store's folder: what was verified, and what was reported
_TRUST = "trust"


@dataclass(frozen=True)
class DeviceOptions:
    """How a device syncs.

    id: decides its ring. root: the repository's 1.root.json that it was set up with. health: JSONL of its own canary prompts;
    without, the release's own are asked. base: in another place than releases name, or a GGUF file. starts: that a new version
    has to confirm within; 0: none is on trial. check_s, memory_bytes: what the health check may take, 0: no bound.
    limit_bytes: what the store may. key: what reports are signed with. evaluation: a private measure (`Health`).
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

    def checked(self) -> Health:
        """The health check of this device."""
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
    """Bring `name` to the newest version for this device, if it passes its health check here, and say so where it is asked to.

    report: a folder or http(s) address for signed reports, which hold no data. private: refuse every address but file:, and
    send nothing. Raises what `update.sync` raises; a version that failed its check is reported all the same.
    """
    _check_private(url, report, private)
    if report and not options.key:
        raise ConfigError("a report is signed with the device's key", "sartor keygen KEYS, then --key KEYS")
    if report:
        device_reports.check_id(options.id)
    healthy = options.checked()
    device = SyncClient(options.id, options.store / _TRUST, options.root, options.starts)
    with ReleaseStore(options.store, limit_bytes=options.limit_bytes) as store:
        for line in store.mended:
            notice(line)
        try:
            done = bring(store, url, name, device, healthy, again=again)
        except HealthError:
            _say(store, name, options, report, notice)
            raise
        said = _say(store, name, options, report, notice)
        current = store.current(name)
    checked = _of_check(healthy)
    if checked["not_checked"]:
        notice(f"the release's own check prompts: {checked['not_checked']}")
    return {**_synced(done, current), **checked, "reported": said}


def _check_private(url: str, report: str, private: bool) -> None:
    if not private:
        return
    if not url.startswith("file:"):
        raise ConfigError(
            f"--private lets no packet leave, and {url} is on a network", "give a file: address, as of a USB stick"
        )
    if report.startswith(("http://", "https://")):
        raise ConfigError(f"--private lets no packet leave, and {report} is on a network", "--report DIR, or none")


def _say(store: ReleaseStore, name: str, options: DeviceOptions, report: str, notice: Notice) -> list[dict[str, str]]:
    """Reports that are due. One that cannot be sent is a notice: the sync itself is done, and the next says it again."""
    if not report or not options.key:
        return []
    try:
        sent = device_reports.send_due(store, name, options.id, options.key, report, options.store / _TRUST)
    except MissingError as error:
        notice(f"not reported: {error.problem}")
        return []
    return [{"version": one.version, "outcome": one.outcome, "reason": one.reason} for one in sent]


def _synced(done: Synced, current: Installed | None) -> dict[str, Any]:
    said = asdict(done)
    said["notes"] = list(done.notes)
    return {"release": str(current.path) if current else "", **said, **_trial(current)}


def _of_check(healthy: Health) -> dict[str, Any]:
    """What the health check took, and could not compare; nothing where none was made, since nothing changed."""
    found = healthy.results[-1] if healthy.results else Result(0)
    return {
        "prompts": found.asked,
        "not_checked": found.not_checked,
        "peak_memory_bytes": found.peak_memory_bytes,
        "limit_bytes": healthy.limits.memory_bytes,
    }


def _trial(current: Installed | None) -> dict[str, Any]:
    return {"trial": asdict(current.trial) if current and current.trial else None}


def status(store: Path | str, name: str = "") -> dict[str, Any]:
    """Which versions are on the device, as any program sees them: without the lock, without a change."""
    found = [one for one in states(Path(store)) if not name or one.name == name]
    if not found:
        raise StoreError(f"{store} holds no {name or 'release'}", "sartor edge sync URL NAME --store DIR")
    said = [_state(one) for one in found]
    alone = {key: said[0][key] for key in ("release", "version")} if len(said) == 1 else {}
    return {**alone, "releases": said}


def _state(one: StoreState) -> dict[str, Any]:
    now = one.current
    return {
        "name": one.name,
        "version": now.version if now else "",
        "release": str(now.path) if now else "",
        "since": now.since if now else "",
        **_trial(now),
        "previous": one.previous.version if one.previous else "",
        "staged": one.staged.version if one.staged else "",
        "refused": dict(one.refused),
    }


def start(store: Path | str, name: str) -> dict[str, Any]:
    """Count a start of the device's program, if the version is on trial, and say which version it is to run."""
    with _held(store) as opened:
        was, found = opened.current(name), opened.start(name)
        if found is None or was is None:
            raise StoreError(f"{store} holds no {name}", f"sartor edge sync URL {name} --store {store}")
    back = {"was": was.version, "reason": "it did not confirm"} if found.version != was.version else {}
    return {"name": name, "version": found.version, "release": str(found.path), **_trial(found), **back}


def confirm(store: Path | str, name: str) -> dict[str, Any]:
    """The device's program works with the current version: its trial is over."""
    with _held(store) as opened:
        found = opened.current(name)
        if found is None:
            raise StoreError(f"{store} holds no {name}", f"sartor edge sync URL {name} --store {store}")
        opened.confirm(name)
    return {"name": name, "version": found.version, "release": str(found.path), **_trial(replace(found, trial=None))}


def rollback(store: Path | str, name: str, *, reason: str = "") -> dict[str, Any]:
    """Go back to the previous version by a person's wish; the one that is left is not taken again but by `sync --again`."""
    with _held(store) as opened:
        was = opened.current(name)
        found = opened.rollback(name, HealthReason.PERSON.text(reason or "no reason was given"))
    return {"name": name, "version": found.version, "was": was.version if was else "", "release": str(found.path)}


def verify(store: Path | str) -> dict[str, Any]:
    """Read every byte of the store and mend what is there twice.

    Raises StoreError where a current version is damaged and nothing whole took its place.
    """
    with _held(store) as opened:
        damaged = opened.verify()
        mended = list(opened.mended)
        # `verify` has just put the damaged blobs away that nothing could mend
        found = [(one.name, one.current.files.values()) for one in states(opened.folder) if one.current]
        broken = [name for name, digests in found if not all(map(opened.has, digests))]
    if broken:
        raise StoreError(f"{', '.join(broken)}: the current version is damaged, and nothing here can mend it", "sync")
    return {"damaged": damaged, "mended": mended}


@contextmanager
def _held(store: Path | str) -> Iterator[ReleaseStore]:
    """The store that is there: a command that only looks makes none."""
    if not states(Path(store)):
        raise StoreError(f"there is no store at {store}", "sartor edge sync URL NAME --store DIR makes it")
    with ReleaseStore(Path(store)) as opened:
        yield opened
