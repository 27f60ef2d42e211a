"""Verbs of an update publisher."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sartor.edge.update import fleet_monitor, tuf_roles
from sartor.edge.update import repository as repositories
from sartor.edge.update.fleet_monitor import FleetPolicy
from sartor.edge.update.tuf_roles import Expiry, RoleName
from sartor.edge.update.version_metadata import Offer

__all__ = ["Expiry", "FleetPolicy"]


def keygen(keys: Path) -> dict[str, Any]:
    """Create the keys of the four roles of an update repository, once."""
    return {"keys": str(keys), "roles": tuf_roles.keygen(keys)}


def publish(
    release: Path,
    repository: Path,
    keys: Path,
    *,
    key: Path | None = None,
    percent: int = 100,
    expiry: Expiry | None = None,
) -> dict[str, Any]:
    """Add a signed Release, or a signed export of one, to a repository."""
    published = repositories.publish(release, repository, keys, key=key, percent=percent, expiry=expiry)
    return {"repository": str(repository), "release": str(release), **asdict(published)}


def widen(repository: Path, keys: Path, name: str, version: str, percent: int) -> dict[str, Any]:
    """Offer a version to more devices."""
    return _offer_fields(name, repositories.widen(repository, keys, name, version, percent=percent))


def halt(repository: Path, keys: Path, name: str, version: str) -> dict[str, Any]:
    """Stop offering a version; devices that have it go back."""
    return _offer_fields(name, repositories.halt(repository, keys, name, version))


def refresh(repository: Path, keys: Path, *, expiry: Expiry | None = None) -> dict[str, Any]:
    """Sign the metadata that expire first again, before they do."""
    repositories.refresh(repository, keys, expiry=expiry)
    return {"repository": str(repository), "expires": tuf_roles.expiries(repository / "metadata")}


def rotate(repository: Path, keys: Path, role: RoleName, *, old: tuple[str, ...] = ()) -> dict[str, Any]:
    """Replace keys of a role."""
    return {"role": role, "keys": repositories.rotate(repository, keys, role, old=old)}


def withdraw(repository: Path, keys: Path, name: str, version: str) -> dict[str, Any]:
    """Remove a version, with the content that no other version needs."""
    return {"name": name, "version": version, "freed_bytes": repositories.withdraw(repository, keys, name, version)}


def watch(
    repository: Path,
    found: Path,
    devices: Path,
    *,
    keys: Path | None = None,
    widen: bool = False,
    policy: FleetPolicy | None = None,
) -> dict[str, Any]:
    """Count the reports of devices; with `keys`, halt versions that fail, with `widen` widen ones that work."""
    counted = fleet_monitor.tally(found, repository, devices, policy)
    executed = fleet_monitor.watch(repository, keys, counted, widen=widen)
    actions = []
    for item in executed:
        fields: dict[str, Any] = {"name": item.name, "version": item.version, "did": item.action}
        if item.to:
            fields["percent"] = item.to
        actions.append(fields)
    return {"versions": [tally.as_json() for tally in counted.tallies], "refused": counted.refused, "done": actions}


def _offer_fields(name: str, offer: Offer) -> dict[str, Any]:
    return {"name": name, "version": offer.version, "percent": offer.percent, "halted": offer.halted}
