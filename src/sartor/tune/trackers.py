"""Copies of a run's log in MLflow and TensorBoard, on this machine, during a run or afterwards.

A tracker gets the numbers of each line of log.jsonl, the recipe, ids of base and Dataset, and the Adapter's card. It
gets no row, prompt or reply. Both are written without a server and without a network:

    FOLDER/tensorboard/NAME-RUN/   an event file by torch.utils.tensorboard; written anew when a run resumes
    FOLDER/mlflow.db, mlartifacts/ MLflow's SQLite store; its file store is in maintenance mode and refuses to open

RUN is a digest of what decides the run's result. So a resumed run, and `track` after it, go on in the same place, and
each step is there once: a new event file replaces the old one, and of MLflow's steps those that it has are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from sartor.core import records
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError, StoppedError, missing_package
from sartor.core.html import flat
from sartor.tune.adapter_card import adapter_card
from sartor.tune.recipe import Tracking

Notice = Callable[[str], object]
TrackerName = Literal["mlflow", "tensorboard"]
Status = Literal["FINISHED", "FAILED", "KILLED"]
EXPERIMENT = "sartor"
FOLDER = Tracking().folder
LOG, CARD, PLOT = "log.jsonl", "README.md", "loss.png"
FLUSH_S = 2.0
_MOST_WAITING = 500
_EVENT_FILES = ".sartor"  # ending of our event files: no other file of a folder is ever removed
_MOST_METRICS, _MOST_PARAMS, _MOST_PARAM_LENGTH = 1000, 100, 6000  # of one call of MLflow


class LoggedValue(NamedTuple):
    """One number of a log line. time_s: Unix time."""

    name: str
    value: float
    step: int
    time_s: float


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first line.

    identity: first 12 digits of the digest of what decides its result.
    params: the recipe, by dotted option.
    """

    name: str
    identity: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]

    @property
    def folder_name(self) -> str:
        """Name of the run among others of its folder."""
        return f"{self.name}-{self.identity}"


class Tracker(Protocol):
    """Writer to one tracker. Writing a step again changes nothing."""

    location: str

    def write(self, values: Sequence[LoggedValue]) -> None:
        """Write numbers."""
        ...

    def finish(self, tags: Mapping[str, str], card: str, files: Sequence[Path]) -> None:
        """Write what is known at the end: tags, the Adapter's card, further files."""
        ...

    def close(self, status: Status) -> None:
        """Write what still waits, and say how the run ended."""
        ...


def check_packages(names: Sequence[str]) -> None:
    """Raise ExtraError if the package of a tracker is not installed. Nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name, "track")


def run_of(name: str, fingerprint: Mapping[str, Any], tags: Mapping[str, str]) -> TrackedRun:
    """Return a run by its fingerprint: the digests and the recipe that decide its result."""
    version = {"sartor.version": importlib.metadata.version("sartor")}
    identity = records.digest(fingerprint)[:12]
    params = flat(fingerprint.get("recipe", {}))
    return TrackedRun(name, identity, params, {**tags, **version, "sartor.run": identity})


def base_tags(base: Mapping[str, Any], dataset_ids: Sequence[str]) -> dict[str, str]:
    """Return the tags that name the base and the Datasets of a run."""
    return {
        "sartor.base": str(base["name"]),
        "sartor.base_digest": str(base["digest"]),
        "sartor.datasets": ", ".join(dataset_ids),
    }


def values_of(line: Mapping[str, Any], began: float) -> list[LoggedValue]:
    """Return the finite numbers of a log line by their update; none of a line without one.

    began: Unix time at which the run's clock stood at 0.
    """
    step = line.get("update")
    if not isinstance(step, int):
        return []
    group = "eval" if "eval_loss" in line else "train"
    values = []
    for key, value in line.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in ("update", "wall_s") or not is_number or not math.isfinite(value):
            continue
        name = f"{group}/{key.removeprefix('eval_')}"
        values.append(LoggedValue(name, float(value), step, began + float(line.get("wall_s", 0.0))))
    return values


class LogCopies:
    """Copies of one run's log in its trackers. Use it as a context manager.

    A tracker that cannot be opened ends the run before it begins. One that fails later is given up with a notice, and
    the run goes on without it.
    """

    def __init__(self, tracking: Tracking, run: TrackedRun, notice: Notice) -> None:
        self._tracking, self._run, self._notice = tracking, run, notice
        self._trackers: dict[TrackerName, Tracker] = {}
        self._waiting: list[LoggedValue] = []
        self._began = self._flushed = 0.0
        self.count = 0

    def __enter__(self) -> LogCopies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "FINISHED"
        if error is not None:
            status = "KILLED" if isinstance(error, (StoppedError, KeyboardInterrupt, SystemExit)) else "FAILED"
        self._flush()
        self._each(lambda tracker: tracker.close(status))

    @property
    def locations(self) -> dict[str, str]:
        """Where each tracker has the run."""
        return {name: tracker.location for name, tracker in self._trackers.items()}

    def begin(self, lines: Sequence[Mapping[str, Any]], began: float | None = None) -> None:
        """Open the trackers and copy the lines that the log already has.

        began: Unix time at which the run's clock stood at 0; by default from now and the last line.
        Raises ConfigError if one of them cannot be opened.
        """
        folder = Path(self._tracking.folder).expanduser().absolute()
        self._began = time.time() - float(lines[-1]["wall_s"] if lines else 0.0) if began is None else began
        for name in self._tracking.to:
            try:
                self._trackers[name] = _TRACKERS[name](folder, self._run)
            except Exception as error:  # each library raises types of its own
                raise ConfigError(
                    f"the tracker {name} cannot be opened in {folder}: {_first_line(error)}",
                    "a directory that can be written to: --folder DIR of sartor track, --track.folder DIR of sartor "
                    "tune, which also runs without --track",
                ) from error
            self._notice(f"the log is copied to {self._trackers[name].location}")
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Copy a line of the log; numbers wait up to FLUSH_S seconds for the next ones."""
        if not self._trackers:
            return
        self._waiting += values_of(line, self._began)
        if len(self._waiting) > _MOST_WAITING or time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def finish(self, adapter: Artifact) -> None:
        """Copy the Adapter's id, card and plot."""
        if not self._trackers:
            return
        self._flush()
        card = adapter_card(adapter.manifest, adapter.path.name)
        plots = [adapter.path / PLOT] if PLOT in adapter.manifest["files"] else []
        self._each(lambda tracker: tracker.finish({"sartor.adapter": adapter.id}, card, plots))

    def _flush(self) -> None:
        values, self._waiting, self._flushed = self._waiting, [], time.monotonic()
        if values:
            self._each(lambda tracker: tracker.write(values))
            self.count += len(values)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # a full disk, a locked database: the run is worth more than its copy
                del self._trackers[name]
                self._notice(
                    f"{name} failed, and the run goes on without it: {_first_line(error)}; afterwards "
                    f"`sartor track ADAPTER --to {name}` copies the whole log"
                )


class TensorBoardTracker:
    """Event file of one run. It replaces an older one, as the log's lines are written from the first on."""

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        log_folder = folder / "tensorboard" / run.folder_name
        log_folder.mkdir(parents=True, exist_ok=True)
        for file in log_folder.glob(f"events.out.tfevents.*{_EVENT_FILES}"):
            file.unlink()
        self.location = str(log_folder)
        self._writer: Any = SummaryWriter(self.location, filename_suffix=_EVENT_FILES, flush_secs=int(FLUSH_S))
        values = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in run.params.items()
        }
        for summary in hparams(values, {"eval/loss": 0.0, "train/loss": 0.0}):
            self._writer.file_writer.add_summary(summary)
        self._write_tags(run.tags)

    def write(self, values: Sequence[LoggedValue]) -> None:
        """Write scalars."""
        for value in values:
            self._writer.add_scalar(value.name, value.value, value.step, walltime=value.time_s)

    def finish(self, tags: Mapping[str, str], card: str, files: Sequence[Path]) -> None:
        """Write tags and the card as texts; TensorBoard draws the losses itself."""
        self._write_tags(tags)
        self._writer.add_text("card", card)

    def close(self, status: Status) -> None:
        """Write what waits, and close the file."""
        self._writer.add_text("tags/status", status)
        self._writer.close()

    def _write_tags(self, tags: Mapping[str, str]) -> None:
        for name, text in tags.items():
            self._writer.add_text(f"tags/{name}", text)


class MlflowTracker:
    """Run of the experiment `sartor` in an SQLite store; found again by its tag `sartor.run`."""

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from sqlalchemy import URL

        folder.mkdir(parents=True, exist_ok=True)
        store = URL.create("sqlite", database=str(folder / "mlflow.db")).render_as_string()
        self._client: Any = MlflowClient(store)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        artifacts = (folder / "mlartifacts").as_uri()
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT, artifacts)
        )
        earlier = self._client.search_runs([experiment_id], f"tags.`sartor.run` = '{run.identity}'", max_results=1)
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            created = self._client.create_run(experiment_id, tags=dict(run.tags), run_name=run.folder_name)
            self._run_id = created.info.run_id
            params = [Param(name, str(value)[:_MOST_PARAM_LENGTH]) for name, value in run.params.items()]
            for start in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._run_id, params=params[start : start + _MOST_PARAMS])
        self._is_new = not earlier
        self._last_steps: dict[str, int] = {}
        self.location = f"{store}, run {self._run_id}"

    def write(self, values: Sequence[LoggedValue]) -> None:
        """Write the metrics of steps after the last one that the store has."""
        from mlflow.entities import Metric

        new = []
        for value in values:
            if value.step > self._last_step(value.name):
                new.append(Metric(value.name, value.value, int(value.time_s * 1000), value.step))
                self._last_steps[value.name] = value.step
        for start in range(0, len(new), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=new[start : start + _MOST_METRICS])

    def _last_step(self, name: str) -> int:
        if name not in self._last_steps:
            history = [] if self._is_new else self._client.get_metric_history(self._run_id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    def finish(self, tags: Mapping[str, str], card: str, files: Sequence[Path]) -> None:
        """Write tags, and card and files as artefacts."""
        for name, text in tags.items():
            self._client.set_tag(self._run_id, name, text)
        self._client.log_text(self._run_id, card, CARD)
        for file in files:
            self._client.log_artifact(self._run_id, str(file))

    def close(self, status: Status) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run_id, status)


_TRACKERS: Mapping[TrackerName, Callable[[Path, TrackedRun], Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
}


@dataclass(frozen=True)
class Tracked:
    """Result of `track`. values: count of the numbers copied. locations: of the run, by tracker."""

    adapter: Artifact
    run: str
    values: int
    locations: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {"adapter": str(self.adapter.path), "run": self.run, "values": self.values, **self.locations}


def track(
    adapter: Path | str,
    to: TrackerName | Sequence[TrackerName],
    *,
    folder: Path | str = FOLDER,
    notice: Notice = lambda line: None,
) -> Tracked:
    """Copy the log of a finished run to trackers, as `tune` with `track` does while it runs.

    to: mlflow, tensorboard or both.
    folder: of the trackers; a run that is there already is completed, not repeated.
    Raises ConfigError for an unknown or unusable tracker or an Adapter without a log, ExtraError for a missing
    package, ArtifactError.
    """
    names = [to] if isinstance(to, str) else list(to)
    if unknown := [name for name in names if name not in _TRACKERS]:
        raise ConfigError(f"there is no tracker {unknown[0]!r}; there are {', '.join(_TRACKERS)}", "--to tensorboard")
    check_packages(names)
    artifact = open_artifact(adapter, "adapter")
    manifest = artifact.manifest
    if LOG not in manifest["files"]:
        raise ConfigError(f"{artifact.path} has no {LOG}", "track an Adapter that `sartor tune` wrote")
    log = [json.loads(line) for line in (artifact.path / LOG).read_text(encoding="utf-8").splitlines()]
    dataset_ids = [parent["id"] for parent in manifest["parents"] if parent["kind"] == "dataset"]
    fingerprint = {**manifest.get("fingerprint", {}), "recipe": manifest["recipe"]}
    run = run_of(artifact.path.name, fingerprint, base_tags(manifest["base"], dataset_ids))
    began = (artifact.path / LOG).stat().st_mtime - float(manifest["run"].get("wall_s", 0.0))
    with LogCopies(Tracking(tuple(names), str(folder)), run, notice) as copies:
        copies.begin(log, began)
        copies.finish(artifact)
        locations = copies.locations
    return Tracked(artifact, run.folder_name, copies.count, locations)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
