"""Tunings below a studio's folder: jobs of the studio, runs of a terminal, finished Adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.config import read_yaml
from sartor.core.errors import ConfigError
from sartor.core.html import flat
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.jobs.job_files import JobState, JobStatus, read_json
from sartor.studio.jobs.training_logs import TRAINING_LOG, Losses, log_of, read_losses
from sartor.studio.jobs.unfinished_runs import UnfinishedRun, unfinished_runs
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.visitor import Studio

# of the plan that was made before the start, beside the recipe (quickstart/tailor.py)
FORECAST = "forecast.json"
# options of a recipe that differ in every run without a meaning of their own
_LEFT_OUT = ("track.", "checkpoints.")


@dataclass(frozen=True)
class TuningRun:
    """A tuning: what makes an Adapter, or has made it.

    name: of the Adapter, relative to the studio's folder.
    status: of the studio's newest job that makes it; None for one of a terminal.
    found: the Adapter; None before it exists.
    unfinished: folder in work, or left behind.
    """

    name: str
    adapter: Path
    status: JobStatus | None = None
    found: FoundArtifact | None = None
    unfinished: UnfinishedRun | None = None

    @property
    def state(self) -> JobState:
        """State as a job would have it."""
        if self.status and not self.status.state.is_over:
            return self.status.state
        if self.is_foreign:
            return JobState.RUNNING
        if self.found:
            return JobState.DONE
        return self.status.state if self.status else JobState.LOST

    @property
    def is_foreign(self) -> bool:
        """Whether it runs, and not as a job of the studio: at a terminal."""
        is_own = self.status is not None and not self.status.state.is_over
        return self.unfinished is not None and self.unfinished.is_running and not is_own

    @property
    def began_at(self) -> float:
        """Unix time of its start, s; 0 if only its result is known."""
        if self.status and not self.is_foreign:
            return self.status.job.created_at
        return self.unfinished.started_at if self.unfinished else 0.0

    def losses(self) -> Losses | None:
        """Return its log, also of one in work; None if there is none yet."""
        if self.unfinished and self.unfinished.is_running:
            return read_losses(self.unfinished.folder / TRAINING_LOG)
        file = log_of(self.adapter)
        return read_losses(file) if file else None

    def recipe(self) -> dict[str, Any]:
        """Return its options by dotted names: resolved once it has saved its state, before that as written."""
        recipe: Any = self.found.artifact.manifest.get("recipe", {}) if self.found and self.found.artifact else {}
        if not recipe:
            saved = sorted(self.adapter.with_name(f"{self.adapter.name}.checkpoints").glob("update-*/checkpoint.json"))
            recipe = read_json(saved[-1]).get("fingerprint", {}).get("recipe", {}) if saved else {}
        if not recipe:
            try:
                recipe = read_yaml(self.adapter.parent / "tune.yaml")
            except ConfigError:
                recipe = {}
        options = flat(recipe) if isinstance(recipe, Mapping) else {}
        return {name: value for name, value in options.items() if not name.startswith(_LEFT_OUT)}

    def facts(self) -> Mapping[str, Any]:
        """Return `run` of the Adapter's manifest; empty before it exists."""
        run = self.found.artifact.manifest.get("run", {}) if self.found and self.found.artifact else {}
        return run if isinstance(run, Mapping) else {}

    def plan(self) -> Mapping[str, Any]:
        """Return the forecast that was made before the start; empty without one."""
        try:
            plan = json.loads((self.adapter.parent / FORECAST).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return plan if isinstance(plan, Mapping) else {}


def tuning_runs(studio: Studio) -> list[TuningRun]:
    """Return the tunings below the folder: those in work first, then the newest."""
    artifacts, _ = studio.folder.scan()
    adapters = {item.artifact.path: item for item in artifacts if item.kind == "adapter" and item.artifact}
    jobs: dict[Path, JobStatus] = {}
    for status in studio.jobs.files.statuses():
        if status.job.adapter:
            jobs.setdefault(Path(status.job.adapter), status)
    unfinished = unfinished_runs(studio.folder.walk())
    runs = []
    for path in adapters.keys() | jobs.keys() | unfinished.keys():
        if name := studio.folder.name_of(path):
            runs.append(TuningRun(name, path, jobs.get(path), adapters.get(path), unfinished.get(path)))
    return sorted(runs, key=lambda run: (run.state.is_over, -_moment(run), run.name))


def _moment(run: TuningRun) -> float:
    if run.began_at:
        return run.began_at
    try:
        return (run.adapter / "sartor.json").stat().st_mtime
    except OSError:
        return 0.0


def find_run(studio: Studio, name: str) -> TuningRun:
    """Return the tuning of an Adapter. Raises NotFoundError."""
    for run in tuning_runs(studio):
        if run.name == name:
            return run
    raise NotFoundError(f"there is no tuning at {name[:200]!a}", "the page Tune lists all of them")


def renewed(studio: Studio, run: TuningRun) -> TuningRun:
    """Return a tuning as it stands now, without looking through the whole folder."""
    status = studio.jobs.files.status(run.status.job.id) if run.status else None
    unfinished = unfinished_runs([run.adapter.parent]).get(run.adapter)
    return TuningRun(run.name, run.adapter, status, run.found, unfinished)


def foreign_runs(studio: Studio) -> list[TuningRun]:
    """Return the tunings that run at a terminal."""
    return [run for run in tuning_runs(studio) if run.is_foreign]
