"""Devices: fleets with their rollouts, stores and tunings of single devices, and federated rounds.

A fleet is an update repository below the folder, with the reports and public keys of its devices. Rounds are those of
an Adapter that was tuned over clients, or of a run that goes on.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sartor
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError, SartorError
from sartor.core.home import home
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.jobs.job_files import JobStatus, tail
from sartor.studio.jobs.training_logs import Losses
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.job_pages import LossCurve, draw_losses
from sartor.studio.pages.team_pages import FAST_S, recent_commands
from sartor.studio.studio_folder import OutsideError, StudioFolder
from sartor.studio.visitor import Owner, PostedForm, Studio, Viewer, studio_of, text_field

router = APIRouter()
EDGE, FEDERATE = "edge", "federate"
# names of the folders beside a repository, as docs/edge-publish.md has them
REPORTS, DEVICES, KEYS = "reports", "devices", "update-keys"
PAGE_DEVICES = 100
# a fleet of more devices is not counted again by itself
MAX_LIVE_DEVICES = 500
SLOW_S = 15
MAX_LISTED = 200
MAX_RECEIPT_BYTES = 1 << 20
ROUNDS_SUFFIX = ".rounds"
# folders of keys that are looked at
MAX_KEY_FOLDERS = 50


class FleetAction(StrEnum):
    """What an owner may do to a fleet: verbs of `sartor edge`."""

    WIDEN = "widen"
    HALT = "halt"
    WATCH = "watch"


@dataclass(frozen=True)
class FoundFleet:
    """An update repository below the folder. overview: None if it cannot be read, for the reason `problem`.

    reports, devices: folders of the devices' reports and public keys; None if there are none.
    """

    name: str
    path: Path
    reports: Path | None
    devices: Path | None
    overview: Any = None
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class DeviceStore:
    """A device's own store below the folder. releases: as `sartor edge status` has them."""

    name: str
    releases: Sequence[Mapping[str, Any]]
    problem: str = ""


@dataclass(frozen=True)
class DeviceTuning:
    """A tuning on a device within its budget, by the receipt that the device signed.

    peak_bytes, wall_s, cpu_s: used by all attempts. limits: of the budget, without those that were 0.
    """

    name: str
    outcome: str
    reason: str
    attempts: int
    peak_bytes: int
    wall_s: float
    cpu_s: float
    limits: Mapping[str, float]


@dataclass(frozen=True)
class FoundRounds:
    """Rounds of a federated tuning: of a finished Adapter, or of a run whose journals stand beside its output.

    lines: a mapping for each finished round, as in log.jsonl.
    facts: the manifest's `run`; empty while it runs. recipe: as it was declared.
    """

    name: str
    path: Path
    is_finished: bool
    lines: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]


@router.get("/devices")
def devices(request: Request, visitor: Viewer) -> Response:
    """List fleets, federated rounds, stores and tunings."""
    studio = studio_of(request)
    found = _Found.of(studio.folder)
    return render(
        request,
        visitor,
        "devices",
        fleets=[_fleet(studio.folder, path) for path in found.repositories],
        rounds=found.rounds,
        stores=found.stores[:MAX_LISTED],
        tunings=found.tunings[:MAX_LISTED],
        running=[status for status in studio.jobs.files.statuses() if _is_federation(status)],
    )


def _is_federation(status: JobStatus) -> bool:
    return status.job.verb == FEDERATE and not status.state.is_over


@dataclass(frozen=True)
class _Found:
    """What the folder holds of devices."""

    repositories: list[Path]
    rounds: list[FoundRounds]
    stores: list[DeviceStore]
    tunings: list[DeviceTuning]

    @classmethod
    def of(cls, folder: StudioFolder) -> _Found:
        """Look through the folder. Files that cannot be read are left out, stores say why."""
        found = cls([], [], [], [])
        for path in folder.walk():
            if _is_repository(path):
                found.repositories.append(path)
            if (path / "current").is_dir() and (path / "blobs").is_dir():
                found.stores.append(_store(folder, path))
            if (path / "receipt.json").is_file() and (tuning := _tuning(folder, path)):
                found.tunings.append(tuning)
            if path.name.endswith(ROUNDS_SUFFIX) and (path / "fingerprint.json").is_file():
                found.rounds.append(_open_rounds(folder, path))
        artifacts, _ = folder.scan()
        for item in artifacts:
            manifest = item.artifact.manifest if item.artifact else {}
            run = manifest.get("run")
            if item.kind == "adapter" and isinstance(run, dict) and isinstance(run.get("federated"), dict):
                found.rounds.append(_finished_rounds(folder, item.name, folder.root / item.name, manifest))
        found.rounds.sort(key=lambda item: item.name)
        found.stores.sort(key=lambda item: item.name)
        found.tunings.sort(key=lambda item: item.name)
        found.repositories.sort()
        return found


def _is_repository(path: Path) -> bool:
    return (path / "metadata" / "1.root.json").is_file() and (path / "metadata" / "timestamp.json").is_file()


def _fleet(folder: StudioFolder, path: Path) -> FoundFleet:
    """Return the fleet of a repository, with the reports and keys that stand beside it."""
    reports, keys = path.parent / REPORTS, path.parent / DEVICES
    fields: dict[str, Any] = {
        "name": folder.name_of(path),
        "path": path,
        "reports": reports if _is_plain_folder(reports) else None,
        "devices": keys if _is_plain_folder(keys) else None,
    }
    try:
        overview = sartor.edge_fleet(path, fields["reports"] or "", fields["devices"] or "")
    except SartorError as error:
        return FoundFleet(**fields, problem=error.problem, remedy=error.remedy)
    return FoundFleet(**fields, overview=overview)


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _store(folder: StudioFolder, path: Path) -> DeviceStore:
    try:
        return DeviceStore(folder.name_of(path), sartor.edge_status(path)["releases"])
    except SartorError as error:
        return DeviceStore(folder.name_of(path), [], error.problem)


def _tuning(folder: StudioFolder, path: Path) -> DeviceTuning | None:
    """Return the tuning that a receipt tells of; None for a file that is no such receipt."""
    try:
        file = path / "receipt.json"
        fields = json.loads(file.read_bytes()) if file.stat().st_size <= MAX_RECEIPT_BYTES else {}
        said = fields["said"]
        usages = [attempt["usage"] for attempt in said["attempts"]]
        return DeviceTuning(
            folder.name_of(path),
            str(said["outcome"]),
            str(said["reason"]),
            len(usages),
            max([int(usage["peak_bytes"]) for usage in usages], default=0),
            sum(float(usage["wall_s"]) for usage in usages),
            sum(float(usage["cpu_s"]) for usage in usages),
            {str(name): float(value) for name, value in said["limits"].items() if value},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _finished_rounds(folder: StudioFolder, name: str, path: Path, manifest: Mapping[str, Any]) -> FoundRounds:
    recipe = manifest.get("recipe")
    lines = list(_round_lines(path / "log.jsonl"))
    return FoundRounds(name, path, True, lines, manifest["run"], recipe if isinstance(recipe, dict) else {})


def _open_rounds(folder: StudioFolder, path: Path) -> FoundRounds:
    """Return the rounds of a run that goes on or was killed: those that its coordinator wrote down as lines."""
    try:
        fields = json.loads((path / "fingerprint.json").read_bytes())
        recipe = fields["recipe"] if isinstance(fields["recipe"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        recipe = {}
    lines = list(_round_lines(path / "coordinator.rounds.jsonl"))
    return FoundRounds(folder.name_of(path), path, False, lines, {}, recipe)


def _round_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rounds in a log; damaged lines are left out."""
    for line in tail(file).splitlines():
        try:
            fields = json.loads(line)
            if isinstance(fields, dict) and isinstance(fields.get("round"), int):
                yield fields
        except (ValueError, RecursionError):
            continue


@router.get("/devices/fleet/{name:path}")
def fleet(request: Request, visitor: Viewer, name: str, q: str = "", outcome: str = "", start: int = 0) -> Response:
    """Show a fleet: its versions with their evidence, and its devices, filtered by id and outcome."""
    studio = studio_of(request)
    path = _repository(studio, name)
    found = _fleet(studio.folder, path)
    everybody = found.overview.devices if found.overview else []
    words = q.strip().lower()[:100]
    chosen = [item for item in everybody if words in item.id.lower() and outcome in ("", item.outcome or "unheard")]
    start = max(0, start)
    commands = recent_commands(studio, EDGE, path)
    is_busy = any(not status.state.is_over for status in commands)
    return render(
        request,
        visitor,
        "fleet",
        title=name,
        name=name,
        found=found,
        total=len(everybody),
        chosen=len(chosen),
        devices=chosen[start : start + PAGE_DEVICES],
        start=start,
        next_start=start + PAGE_DEVICES if start + PAGE_DEVICES < len(chosen) else None,
        q=q,
        outcome=outcome,
        outcomes=sorted({item.outcome or "unheard" for item in everybody}),
        keys=key_folders(studio, path),
        commands=commands,
        refresh_s=FAST_S if is_busy else SLOW_S if len(everybody) <= MAX_LIVE_DEVICES else 0,
        arguments=["edge", "watch", name, "--reports", REPORTS, "--devices", DEVICES],
    )


def _repository(studio: Studio, name: str) -> Path:
    path = studio.folder.resolve(name)
    if not _is_repository(path):
        raise NotFoundError(f"{name[:80]!a} is no update repository", "the page Devices lists those of this folder")
    return path


def key_folders(studio: Studio, repository: Path) -> dict[str, Path]:
    """Return the folders with keys of an update repository, by the name that a form sends.

    They stand beside the repository, or in SARTOR_HOME/keys.
    """
    found = {}
    for folder in (repository.parent, home() / "keys"):
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir())[:MAX_KEY_FOLDERS]:
            if _is_plain_folder(path) and (path / "targets-1" / "sartor.key").is_file():
                found[studio.folder.name_of(path) or f"SARTOR_HOME/keys/{path.name}"] = path
    return found


@router.post("/devices/fleet/{name:path}")
def act(request: Request, visitor: Owner, name: str, form: PostedForm) -> Response:
    """Start a command that widens, halts or judges versions of a fleet, and show the fleet again."""
    assert visitor.user is not None
    studio = studio_of(request)
    path = _repository(studio, name)
    action = text_field(form, "action")
    if action not in list(FleetAction):
        raise ConfigError(f"there is no action {action[:40]!a}", f"one of {', '.join(FleetAction)}")
    keys = key_folders(studio, path).get(text_field(form, "keys"))
    if keys is None:
        raise ConfigError(
            "the keys that sign the repository are not on this machine",
            f"copy their folders (targets-1, snapshot-1 and the others) to {path.parent / KEYS}",
        )
    arguments, title = [EDGE, action, str(path)], action
    if action == FleetAction.WATCH:
        found = _fleet(studio.folder, path)
        if found.reports is None or found.devices is None:
            raise ConfigError(
                f"there is no folder {REPORTS} or {DEVICES} beside {name}",
                f"gather the devices' reports in {path.parent / REPORTS}, their keys in {path.parent / DEVICES}",
            )
        arguments += [f"--reports={found.reports}", f"--devices={found.devices}"]
        arguments += ["--widen"] if text_field(form, "widen") else []
    else:
        release, version = _offered(studio, path, text_field(form, "version"))
        arguments += [release, version]
        title = f"{action} {release} {version}"
        if action == FleetAction.WIDEN:
            arguments.append(str(_percent(text_field(form, "percent", max_chars=10))))
    studio.jobs.start(
        [*arguments, f"--keys={keys}"],
        title=title,
        by=visitor.user.name,
        cwd=studio.folder.root,
        out=str(path),
        is_heavy=False,
    )
    return redirect(request, f"/devices/fleet/{name}")


def _offered(studio: Studio, path: Path, text: str) -> tuple[str, str]:
    """Return the name and version that a form names as NAME@VERSION. Raises ConfigError."""
    release, _, version = text.partition("@")
    overview = sartor.edge_fleet(path)
    offered = {(item.tally.name, item.tally.version) for item in overview.versions}
    if not (is_valid_name(release) and is_valid_name(version) and (release, version) in offered):
        raise ConfigError(f"the repository has no version {text[:80]!a}", "reload the page of the fleet")
    return release, version


def _percent(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100:
        raise ConfigError(f"{text!a} is no share of the devices", "a whole number from 1 to 100, in percent")
    return int(text)


@router.get("/devices/rounds/{name:path}")
def rounds(request: Request, visitor: Viewer, name: str) -> Response:
    """Show federated rounds: clients, losses, bytes, and the privacy that was spent."""
    studio = studio_of(request)
    found = _rounds(studio, name)
    out = found.path if found.is_finished else found.path.with_name(found.path.name.removesuffix(ROUNDS_SUFFIX))
    # newest first: the command that made it, or makes it
    jobs = [item for item in studio.jobs.files.statuses() if item.job.verb == FEDERATE and item.job.out == str(out)]
    budget = found.recipe.get("privacy") if isinstance(found.recipe.get("privacy"), dict) else None
    examples = found.facts.get("federated", {}).get("examples") if found.facts else None
    return render(
        request,
        visitor,
        "rounds",
        title=name,
        name=name,
        found=found,
        loss=_series(found.lines, "loss_last"),
        epsilon=_series(found.lines, "epsilon", limit=_number(budget.get("epsilon")) if budget else None),
        bytes_sent=sum(int(_number(line.get("uploaded_bytes")) or 0) for line in found.lines),
        budget=budget,
        examples=examples if isinstance(examples, dict) else {},
        personal=_personal(studio.folder, studio.folder.name_of(out)),
        job=jobs[0] if jobs else None,
        progress=studio.jobs.progress(jobs[0]) if jobs else None,
        max_listed=MAX_LISTED,
    )


def _rounds(studio: Studio, name: str) -> FoundRounds:
    """Return the rounds that a request names. Raises OutsideError, ArtifactError, NotFoundError."""
    path = studio.folder.resolve(name)
    if path.name.endswith(ROUNDS_SUFFIX) and (path / "fingerprint.json").is_file():
        return _open_rounds(studio.folder, path)
    adapter = studio.folder.artifact(name, ("adapter",))
    run = adapter.manifest.get("run")
    if not (isinstance(run, dict) and isinstance(run.get("federated"), dict)):
        raise NotFoundError(f"{name[:80]!a} was not tuned over clients", "the page Devices lists federated rounds")
    return _finished_rounds(studio.folder, name, path, adapter.manifest)


@dataclass(frozen=True)
class RoundSeries:
    """A number of each round as a curve, with its first and last value. limit: None without one."""

    curve: LossCurve | None
    first: float
    last: float
    limit: float | None = None


def _series(lines: Sequence[Mapping[str, Any]], key: str, limit: float | None = None) -> RoundSeries | None:
    """Return a number of the rounds as a curve; None if no round states it.

    limit: drawn as a line from the first round to the last.
    """
    points = [(int(line["round"]), value) for line in lines if (value := _number(line.get(key))) is not None]
    if not points:
        return None
    ends = [] if limit is None else [(points[0][0], limit), (points[-1][0], limit)]
    return RoundSeries(draw_losses(Losses(points, ends)), points[0][1], points[-1][1], limit)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < float("inf") else None


def _personal(folder: StudioFolder, name: str) -> Mapping[str, Mapping[str, Any]]:
    """Return what each client's own Adapter is worth, by client; empty if there is no report on them.

    name: of the Adapter that the clients share.
    """
    try:
        clients = json.loads(folder.resolve(f"{name}.personal/personal.json").read_bytes())["clients"]
        return {str(name): fields for name, fields in clients.items() if isinstance(fields.get("loss"), dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OutsideError):
        return {}


@router.post("/devices/resume/{name:path}")
def resume(request: Request, visitor: Owner, name: str, form: PostedForm) -> Response:
    """Go on with interrupted rounds by the command that began them, if a job of this studio did."""
    assert visitor.user is not None
    studio = studio_of(request)
    found = _rounds(studio, name)
    out = found.path.with_name(found.path.name.removesuffix(ROUNDS_SUFFIX))
    for status in studio.jobs.files.statuses():
        job = status.job
        if job.verb != FEDERATE or job.out != str(out) or found.is_finished:
            continue
        if not status.state.is_over:
            raise ConfigError("the rounds go on already", f"the job {job.title}")
        arguments = [argument for argument in job.arguments if argument not in ("--json", "--replace", "--resume")]
        again = studio.jobs.start(
            [*arguments, "--resume"],
            title=job.title,
            by=visitor.user.name,
            cwd=Path(job.cwd),
            out=job.out,
            adapter=job.adapter,
        )
        return redirect(request, f"/jobs/{again.id}")
    is_coordinated = (found.path / "lead.yaml").is_file()
    command = "coordinator RECIPE" if is_coordinated else f"simulate RECIPE --out {shlex.quote(str(out))} --resume"
    raise ConfigError("no job of this studio began these rounds", f"sartor federate {command} goes on with them")
