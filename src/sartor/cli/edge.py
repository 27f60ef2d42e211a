"""Commands for update publishers, devices and their owners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

import sartor
from sartor.cli.app import FILE_OR_STDIN, REPLACE, app, notice, prompt_of
from sartor.core.errors import ConfigError

edge_app = App(
    name="edge", help="Devices: signed updates that cannot break them, rings, health checks, what the fleet says."
)
app.command(edge_app)

STORE = Path("store")
KEYS = Path("update-keys")
Role = Literal["root", "targets", "snapshot", "timestamp"]

# commands of a publisher


@edge_app.command
def keygen(keys: Path = KEYS) -> Any:
    """Make the keys of an update repository, once: root (2 of 3 sign), targets (2 of 2), snapshot, timestamp.

    Args:
        keys: directory; keep the folders of root and targets on removable media, plugged in only for a publication
    """
    return sartor.edge_keygen(keys)


@edge_app.command
def publish(
    release: Path,
    repository: Path,
    *,
    keys: Path = KEYS,
    public_key: Path | None = None,
    percent: int = 100,
    days: float = 7.0,
) -> Any:
    """Add a signed Release, or a signed export of one, to a directory that any file server can serve.

    Args:
        release: it is verified first, and published byte for byte as signed
        repository: made if absent; devices are set up with its metadata/1.root.json
        keys: directory of the repository's keys
        public_key: trust this one for the release instead of those in SARTOR_HOME/trusted
        percent: of the devices that may take it, by their rings
        days: until the timestamp expires, which `refresh` renews; longer than the longest time that a device is
            offline
    """
    return sartor.edge_publish(
        release, repository, keys, key=public_key, percent=percent, expiry=sartor.Expiry(timestamp=days)
    )


@edge_app.command
def widen(repository: Path, name: str, version: str, percent: int, *, keys: Path = KEYS) -> Any:
    """Offer a version to more devices.

    Args:
        repository: the directory
        name: of the release
        version: of the release
        percent: of the devices; never fewer than before
        keys: directory of the repository's keys
    """
    return sartor.edge_widen(repository, keys, name, version, percent=percent)


@edge_app.command
def halt(repository: Path, name: str, version: str, *, keys: Path = KEYS) -> Any:
    """Stop offering a version; devices that have it go back at their next sync.

    Args:
        repository: the directory
        name: of the release
        version: of the release
        keys: directory of the repository's keys
    """
    return sartor.edge_halt(repository, keys, name, version)


@edge_app.command
def refresh(repository: Path, *, keys: Path = KEYS, days: float = 7.0) -> Any:
    """Renew the signatures of timestamp and snapshot before they expire: daily, from cron.

    It needs only the keys of these two roles.

    Args:
        repository: the directory
        keys: directory of the repository's keys
        days: until the timestamp expires
    """
    return sartor.edge_refresh(repository, keys, expiry=sartor.Expiry(timestamp=days))


@edge_app.command
def rotate(
    repository: Path, role: Role, *, keys: Path = KEYS, old: Annotated[tuple[str, ...], Parameter(negative="")] = ()
) -> Any:
    """Replace keys of a role by new ones, which devices accept at their next sync.

    Args:
        repository: the directory
        role: root, targets, snapshot or timestamp
        keys: directory of the repository's keys
        old: folder names of the keys to replace, such as targets-1; by default all of the role
    """
    return sartor.edge_rotate(repository, keys, role, old=old)


@edge_app.command
def withdraw(repository: Path, name: str, version: str, *, keys: Path = KEYS) -> Any:
    """Remove a version from a repository, with every blob that no other version needs.

    Args:
        repository: the directory
        name: of the release
        version: of the release
        keys: directory of the repository's keys
    """
    return sartor.edge_withdraw(repository, keys, name, version)


@edge_app.command
def watch(
    repository: Path,
    *,
    reports: Path,
    devices: Path,
    keys: Path | None = None,
    widen: REPLACE = False,
    least_reports: int = 5,
    halt_above: float = 0.05,
    widen_below: float = 0.25,
    rings: str = "10,25,50,100",
    confidence: float = 0.95,
    silent_after_days: float = 7.0,
) -> Any:
    """Count the devices' reports, one vote each, and halt a version that fails.

    Without --keys it only says what it would do.

    Args:
        repository: the directory
        reports: folder of the reports that devices wrote or sent
        devices: folder of the devices' public keys, ID.pub
        keys: directory of the repository's keys: act
        widen: also offer a working version to the next ring
        least_reports: number of reports below which nothing is decided
        halt_above: fraction of failures that the lower end of its confidence sequence must exceed
        widen_below: fraction of failures that the upper end of the newest ring's must stay under
        rings: percentages of devices to which a version is widened, in turn
        confidence: 1 minus the probability of ever halting, or ever widening, wrongly, over any number of runs
        silent_after_days: a device that started a version and has not reported on it for this long counts as failed; 0
            for never
    """
    steps = tuple(int(step) if step.strip().isdigit() else 0 for step in rings.split(","))
    policy = sartor.FleetPolicy(
        least_reports=least_reports,
        halt_above=halt_above,
        widen_below=widen_below,
        confidence=confidence,
        rings=steps,
        silent_after_days=silent_after_days,
    )
    return sartor.edge_watch(repository, reports, devices, keys=keys, widen=widen, policy=policy)


# commands of a device


@edge_app.command
def sync(
    url: str,
    name: str,
    *,
    device: str,
    root: Path,
    store: Path = STORE,
    health: Path | None = None,
    base: str = "",
    starts: int = 3,
    check_s: float = 900.0,
    memory_bytes: int = 0,
    limit_bytes: int = 0,
    again: REPLACE = False,
    report: str = "",
    key: Path | None = None,
    private: REPLACE = False,
    public_key: Path | None = None,
) -> Any:
    """Update a release to the newest version for this device; it becomes current if its health check passes.

    Args:
        url: of the repository: http(s):// or file:// (a USB stick); no mirror is trusted
        name: of the release
        device: id of this device, which decides its ring
        root: the repository's metadata/1.root.json with which the device was set up
        store: directory of the device's releases, made if absent
        health: JSONL of canary prompts: prompt or messages, and expected: {exact | contains: text} or {json: {field:
            value}}
        base: the base, if it is not where the release says; for an export's adapter, the base's GGUF file
        starts: starts within which a new version must be confirmed, or the device goes back; 0 needs no confirmation
        check_s: the health check's time limit in seconds
        memory_bytes: the health check's memory limit; 0 is none
        limit_bytes: largest size of the store on the disk; 0 is no limit
        again: also take a version that was refused here
        report: folder or http(s) address for signed reports (started, then pass, fail or deferred); without it nothing
            is sent
        key: directory of the device's key, which signs reports (sartor keygen DIR --purpose fleet)
        private: refuse every network address
        public_key: take only Releases that this key signed, instead of those in SARTOR_HOME/trusted
    """
    options = sartor.DeviceOptions(
        store,
        id=device,
        root=root,
        health=health,
        base=base,
        starts=starts,
        check_s=check_s,
        memory_bytes=memory_bytes,
        limit_bytes=limit_bytes,
        key=key,
        public_key=public_key,
    )
    return sartor.edge_sync(url, name, options, again=again, report=report, private=private, notice=notice)


@edge_app.command
def status(name: str = "", *, store: Path = STORE) -> Any:
    """Show the versions on the device: current, previous, on trial, refused and why.

    Args:
        name: of one release; by default all
        store: directory of the device's releases
    """
    return sartor.edge_status(store, name)


@edge_app.command
def start(name: str, *, store: Path = STORE) -> Any:
    """Count a start of the device's program if the version is on trial, and print the version to run.

    Call it before each start of the program. When the starts of a trial are used up, the device goes back.

    Args:
        name: of the release
        store: directory of the device's releases
    """
    return sartor.edge_start(store, name)


@edge_app.command
def confirm(name: str, *, store: Path = STORE) -> Any:
    """End the trial of the current version: the device's program works with it.

    Args:
        name: of the release
        store: directory of the device's releases
    """
    return sartor.edge_confirm(store, name)


@edge_app.command
def rollback(name: str, *, reason: str = "", store: Path = STORE) -> Any:
    """Go back to the previous version; the version left is not taken again, except by `sync --again`.

    Args:
        name: of the release
        reason: recorded on the device
        store: directory of the device's releases
    """
    return sartor.edge_rollback(store, name, reason=reason)


@edge_app.command
def verify(*, store: Path = STORE) -> Any:
    """Read every byte of the device's releases, and repair files of which a second copy exists.

    Args:
        store: directory of the device's releases
    """
    return sartor.edge_verify(store)


@edge_app.command
def ask(
    name: str,
    prompt: str = "",
    *,
    prompt_file: FILE_OR_STDIN = None,
    store: Path = STORE,
    base: str = "",
    max_tokens: int | None = None,
    person: Path | None = None,
) -> Any:
    """Ask the current version for one reply, by llama.cpp for a GGUF export.

    For a version on trial, a reply confirms that it works.

    Args:
        name: of the release
        prompt: the question
        prompt_file: file with the question, which keeps it out of the list of processes; - is standard input
        store: directory of the device's releases
        base: the base, if it is not where the release says; for an export's adapter, the base's GGUF file
        max_tokens: longest reply
        person: directory of a person's rows: the adapter learnt from them answers, if it fits the version
    """
    chosen = {"max_tokens": max_tokens} if max_tokens is not None else {}
    question = prompt_of(prompt, prompt_file)
    if not question.strip():
        raise ConfigError("there is no question", f'sartor edge ask {name} "..."')
    return sartor.edge_ask(store, name, question, base=base, sampling=chosen, person=person or "")


PERSON = Path("person")


@edge_app.command
def add(
    name: str, rows: Path, *, store: Path = STORE, person: Path = PERSON, row_key: str = "", base: str = ""
) -> Any:
    """Add rows to the person's encrypted store; the file itself stays unencrypted: remove it.

    Args:
        name: of the release that is to learn from them
        rows: JSONL in any form that curate reads, optionally with rating (-1 bad .. 1 good) and correction
        store: directory of the device's releases
        person: directory of the person's rows, made if absent
        row_key: source of the encryption key: a file (by default in the person's directory), keyring, or passphrase
            (SARTOR_PERSON_PASSPHRASE)
        base: the base, if it is not where the release says, in transformers' layout
    """
    return sartor.edge_add(sartor.PersonOptions(name, store, person, key=row_key, base=base), rows)


@edge_app.command
def tune(
    name: str,
    *,
    store: Path = STORE,
    person: Path = PERSON,
    row_key: str = "",
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
    """Tune on the person's rows within a budget; the result is used if it is better on held-out rows.

    Exits 4 if the policy refuses, at the start or later, or if no method fits the budget: the same command then
    resumes.

    Args:
        name: of the release
        store: directory of the device's releases
        person: directory of the person's rows
        row_key: as in add
        base: the base, if it is not where the release says, in transformers' layout
        probe: JSONL of rows whose loss may not rise; by default the canaries that the release ships
        most_probe_loss: largest allowed rise of that loss, in nats per token
        epochs: passes over the rows
        learning_rate: of the factors
        memory_bytes: limit of anonymous and shared memory, enforced by the system; 0 is none
        wall_s: time limit in seconds; 0 is none
        cpu_s: limit of processor time in seconds; 0 is none
        disk_bytes: largest use of the disk; 0 is no limit
        min_battery: 0 to 1; below, it waits
        ac_only: only while plugged in
        max_temperature_c: of every thermal zone; above, it waits
        again: also on rows whose last tuning brought nothing, or was undone
    """
    recipe = {"budget": {"epochs": epochs}, "optimizer": {"learning_rate": learning_rate, "batch_tokens": 1024}}
    options = sartor.PersonOptions(
        name,
        store,
        person,
        key=row_key,
        base=base,
        probe=probe,
        most_probe_loss=most_probe_loss,
        recipe=recipe,
        budget=sartor.DeviceBudget(memory_bytes, wall_s=wall_s, cpu_s=cpu_s, disk_bytes=disk_bytes),
        policy=sartor.EnergyPolicy(min_battery, ac_only=ac_only, max_temperature_c=max_temperature_c),
    )
    return sartor.edge_tune(options, again=again)


@edge_app.command
def undo(
    name: str, *, reason: str = "", store: Path = STORE, person: Path = PERSON, row_key: str = "", base: str = ""
) -> Any:
    """Go back to the adapter before the last tuning on the person's rows, or to the shipped release.

    Args:
        name: of the release
        reason: recorded on the device
        store: directory of the device's releases
        person: directory of the person's rows
        row_key: as in add
        base: the base, if it is not where the release says
    """
    return sartor.edge_undo(sartor.PersonOptions(name, store, person, key=row_key, base=base), reason=reason)


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
    row_key: str = "",
    base: str = "",
    probe: Path | None = None,
    memory_bytes: int = 0,
) -> Any:
    """Erase rows of the person and all that was learnt from them; a signed receipt records it.

    The receipt lists the erased rows and what replaced the adapter.

    Args:
        name: of the release
        ids: of rows, as add printed them
        since: of this ISO date and later
        before: of an earlier ISO date
        containing: a text in the row, ignoring case
        retune: tune again on the rows that stay
        store: directory of the device's releases
        person: directory of the person's rows
        row_key: as in add
        base: the base, if it is not where the release says
        probe: as in tune
        memory_bytes: limit of the tuning's memory; 0 is none
    """
    budget = sartor.DeviceBudget(memory_bytes)
    options = sartor.PersonOptions(name, store, person, key=row_key, base=base, probe=probe, budget=budget)
    return sartor.edge_forget(options, ids, since=since, before=before, containing=containing, retune=retune)
