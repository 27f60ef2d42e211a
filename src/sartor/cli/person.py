"""Commands of a device's person: what a release learns from its owner, which stays on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sartor
from sartor.cli.app import REPLACE
from sartor.cli.edge import STORE, edge_app

PERSON = Path("person")


@edge_app.command
def add(name: str, rows: Path, *, store: Path = STORE, person: Path = PERSON, key: str = "", base: str = "") -> Any:
    """Put rows into the person's encrypted store; the file itself stays as it is, in plain: remove it.

    Args:
        name: of the release that is to learn from them
        rows: JSONL in any form that curate reads, with rating (-1 bad .. 1 good) and correction if there are
        store: directory of the device's releases
        person: directory of the person's rows, made if absent
        key: of the rows: a file (by default in the person's directory), keyring, or passphrase (SARTOR_PERSON_PASSPHRASE)
        base: the base in another place than the release names, in transformers' layout
    """
    return sartor.edge_add(sartor.PersonOptions(name, store, person, key, base), rows)


@edge_app.command
def tune(
    name: str,
    *,
    store: Path = STORE,
    person: Path = PERSON,
    key: str = "",
    base: str = "",
    probe: Path | None = None,
    most_probe_loss: float = 0.05,
    epochs: float = 3.0,
    learning_rate: float = 1e-4,
    memory_bytes: int = 0,
    wall_s: float = 0.0,
    cpu_s: float = 0.0,
    disk_bytes: int = 0,
    min_battery: float = 0.3,
    ac_only: REPLACE = False,
    max_temperature_c: float = 80.0,
    again: REPLACE = False,
) -> Any:
    """Learn from the person's rows within a budget; what came of it is used if it is better on rows that it never saw.

    Exits 4 where the policy says no, now or meanwhile, or no way fits: the same command goes on where it was.

    Args:
        name: of the release
        store: directory of the device's releases
        person: directory of the person's rows
        key: of the rows, as in add
        base: the base in another place than the release names, in transformers' layout
        probe: JSONL of rows whose loss may not rise; by default the canaries that the release ships
        most_probe_loss: by which it may, in nats a token
        epochs: over the rows
        learning_rate: of the factors
        memory_bytes: limit of anonymous and shared memory, held by the system; 0 is none
        wall_s: time limit in seconds; 0 is none
        cpu_s: limit of processor time in seconds; 0 is none
        disk_bytes: what the work may take of the disk; 0 is no bound
        min_battery: 0 to 1; below, it waits
        ac_only: only while plugged in
        max_temperature_c: of every thermal zone; above, it waits
        again: also on rows that were tuned to no avail, or undone
    """
    recipe = {"budget": {"epochs": epochs}, "optimizer": {"learning_rate": learning_rate, "batch_tokens": 1024}}
    budget = sartor.DeviceBudget(memory_bytes, wall_s, cpu_s, disk_bytes)
    policy = sartor.EnergyPolicy(min_battery, ac_only, max_temperature_c)
    options = sartor.PersonOptions(name, store, person, key, base, probe, most_probe_loss, recipe, budget, policy)
    return sartor.edge_tune(options, again=again)


@edge_app.command
def undo(name: str, *, reason: str = "", store: Path = STORE, person: Path = PERSON, key: str = "", base: str = "") -> Any:
    """Go back to what the person's rows had taught before, or to the shipped release.

    Args:
        name: of the release
        reason: remembered on the device
        store: directory of the device's releases
        person: directory of the person's rows
        key: of the rows, as in add
        base: the base in another place than the release names
    """
    return sartor.edge_undo(sartor.PersonOptions(name, store, person, key, base), reason=reason)


@edge_app.command
def forget(
    name: str,
    *ids: str,
    since: str = "",
    before: str = "",
    containing: str = "",
    retune: bool = True,
    store: Path = STORE,
    person: Path = PERSON,
    key: str = "",
    base: str = "",
    probe: Path | None = None,
    memory_bytes: int = 0,
) -> Any:
    """Remove rows of the person for good, and what was learnt from them; a signed receipt says which, and what came instead.

    Args:
        name: of the release
        ids: of rows, as add printed them
        since: of this ISO date and later
        before: of an earlier ISO date
        containing: a text in the row, whatever its case
        retune: learn anew from the rows that stay
        store: directory of the device's releases
        person: directory of the person's rows
        key: of the rows, as in add
        base: the base in another place than the release names
        probe: as in tune
        memory_bytes: limit of the tuning's memory; 0 is none
    """
    budget = sartor.DeviceBudget(memory_bytes)
    options = sartor.PersonOptions(name, store, person, key, base, probe, budget=budget)
    return sartor.edge_forget(options, ids, since=since, before=before, containing=containing, retune=retune)
