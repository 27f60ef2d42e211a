"""Verb tailor: from own data to a tested specialist by one command.

    DATA -> OUT/data (Dataset) -> OUT/adapter (Adapter) -> OUT/report (Report) -> OUT/NAME-1.0 (Release, if the gate
    passes)

Each stage is a verb that can also be called alone, and its recipe is beside its result: OUT/curate.yaml,
OUT/tune.yaml. A command that was stopped or killed continues where it was, to the same digests; finished stages are
reused. OUT/forecast.json is the plan of the tuning, by which a command that continues knows the time left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sartor.core import assets, signing
from sartor.core.artifacts import MANIFESTS, Adapter, Artifact, Dataset, Release, Report, kind_of, open_artifact
from sartor.core.config import is_valid_name, load, read_yaml
from sartor.core.errors import ConfigError, GateError, MissingError, SignatureError, SourceError
from sartor.core.filesystem import DISK_FULL, file_digest, make_parent, write_file_atomic
from sartor.core.home import folder
from sartor.core.licences.spdx import UNKNOWN, checked
from sartor.core.model_refs import STARTER, locate_base
from sartor.core.progress import WholeProgress
from sartor.core.records import Example
from sartor.core.result_display import ShownResult
from sartor.core.splits import LEAST_GROUPS
from sartor.curate.pipeline import Curated, curate
from sartor.curate.recipe import CurateRecipe
from sartor.curate.sources import python_rows
from sartor.curate.sources.column_options import fields_flag
from sartor.curate.sources.planner import first_rows, plan_reading, read_all, tables_of
from sartor.curate.sources.row_formats import column_names, suggest_columns, unread_label
from sartor.curate.sources.source_files import sheet_of
from sartor.curate.sources.types import Columns, SourceOptions
from sartor.evaluate.bootstrap import Comparison, groups_needed
from sartor.evaluate.evaluation import evaluate
from sartor.evaluate.limits import Check
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.models import hardware
from sartor.release.export.parity import has_llama_cpp
from sartor.release.release import gate, release
from sartor.tune import preflight
from sartor.tune.checkpoint import folder_of
from sartor.tune.cost_model import FORWARD_FRACTION
from sartor.tune.plan import TuningPlan, plan
from sartor.tune.recipe import Checkpoints
from sartor.tune.trainer import tune
from sartor.tune.training_log import OnStep

Notice = Callable[[str], None]
Ask = Callable[[str], str]
PersonalDataChoice = Literal["keep", "mask", "drop"]
VERSION = "1.0"
_FACTS, _FORECAST, _SCHEMA = "tailor.json", "forecast.json", 1
# Results of a call, beside OUT/tailor.json. A call that starts over removes everything under these names
_WRITTEN = ("tune.yaml", "curate.yaml", _FORECAST)
_MADE = ("data", "data.curating", "adapter", "adapter.checkpoints", "report")
# Held-out fraction of few rows, so that an interval is informative, and held-out number of many rows, where more would
# only be taken from training
_FRACTION, _HELD_OUT_ROWS = 0.2, 300
# Seconds of a time-limited command that are reserved for work without a forecast: opening the base a second time,
# signing, writing
_RESERVE_S, _LEAST_TUNING_S = 20.0, 20.0
# Duration of an evaluation without a forecast
_EVALUATION_S = 60.0
# About the tokens of the probes of forgetting, which base and tuned model read
_PROBE_TOKENS = 2 * 10_000
# Assets that tuning and evaluation read beside the rows and the base
_ASSETS = ("small-talk", "chitchat")
_PLAN_NOTICE = "plan     measuring a few micro-batches and replies on this machine, for a minute or two"
_PLAN_LINES = ("time", "evaluation", "peak memory", "reads", "trains", "left out", "warning")


class GainEvidence(Enum):
    """Verdict of the held-out rows on the tuned model."""

    BETTER = "better"
    NOT_ENOUGH = "not enough evidence"
    NO_DIFFERENCE = "no difference"
    WORSE = "worse"


@dataclass(frozen=True, repr=False)
class Tailored(ShownResult):
    """Result of `tailor`.

    released: the Release; None if the gate held it back.
    checks: results of the gate's checks.
    more_rows: number of further held-out rows, of other groups, that would decide if the gain stays as it is; 0 if it
    is decided, or if no number of rows would.
    """

    dataset: Dataset
    adapter: Adapter
    report: Report
    released: Release | None
    checks: Mapping[str, Check]
    evidence: GainEvidence
    more_rows: int
    recipes: Mapping[str, str]
    next_steps: Sequence[str]
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        return {
            "dataset": str(self.dataset.path),
            "adapter": str(self.adapter.path),
            "report": str(self.report.path),
            "release": str(self.released.path) if self.released else None,
            "gate": {name: check.outcome for name, check in self.checks.items()},
            "recipes": dict(self.recipes),
            "metrics": self.report.manifest["metrics"],
            "forgetting": self.report.manifest["forgetting"],
            "evidence": {"verdict": self.evidence.value, "more_rows": self.more_rows},
            "next": list(self.next_steps),
            "wall_s": round(self.wall_s, 1),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the result as a table for the terminal."""
        manifest = self.report.manifest
        primary = manifest["metrics"][manifest["primary"]]
        name = manifest["primary"].replace("_", " ")
        counts = self.dataset.manifest["counts"]["splits"]
        return [
            ("rows", f"{counts.get('train', 0):,} to learn from, {manifest['rows']:,} held out and measured"),
            (
                name,
                f"{primary['base']:.3f} -> {primary['tuned']:.3f}, gain in [{primary['low']:+.3f}, "
                f"{primary['high']:+.3f}]",
            ),
            ("evidence", self._evidence_text()),
            *((f"gate: {check}", f"{result.outcome}: {result.detail}") for check, result in self.checks.items()),
            ("adapter", str(self.adapter.path)),
            ("report", str(self.report.path / "report.html")),
            ("release", str(self.released.path) if self.released else "none: the gate holds it back"),
            *(("next" if index == 0 else "", step) for index, step in enumerate(self.next_steps)),
        ]

    def _evidence_text(self) -> str:
        """Return the verdict as text."""
        if self.evidence is GainEvidence.NOT_ENOUGH and self.more_rows:
            return f"{self.evidence.value}, which is not worse: about {self.more_rows} more held-out rows would decide"
        is_verdict = self.evidence in (GainEvidence.BETTER, GainEvidence.WORSE)
        return f"{self.evidence.value} than the base" if is_verdict else self.evidence.value


@dataclass(frozen=True, repr=False)
class TailorForecast(ShownResult):
    """Result of `plan_tailor`: what `tailor` would take.

    kept: rows of the Dataset. dropped: number of rows by reason.
    tuning: plan of the tuning and the evaluation.
    budget: limits that `minutes` sets to the tuning; empty without.
    """

    kept: int
    dropped: Mapping[str, int]
    tuning: TuningPlan
    budget: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        plan_fields = self.tuning.as_json()
        return {"kept": self.kept, "dropped": dict(self.dropped), "budget": dict(self.budget), "plan": plan_fields}

    def table(self) -> list[tuple[str, Any]]:
        """Return the forecast as a table for the terminal."""
        return [("rows", f"{self.kept:,} kept, dropped: {_dropped_text(self.dropped)}"), *self.tuning.table()]


@dataclass(frozen=True)
class _Job:
    """Options of a call, as OUT/tailor.json stores them.

    data, test: absolute paths, or sources with a scheme.
    """

    data: tuple[str, ...]
    name: str
    base: str
    fields: Mapping[str, str]
    system: str
    licence: str
    test: str
    encoding: str = ""
    personal_data: PersonalDataChoice = "keep"

    def sources(self) -> list[dict[str, Any]]:
        """Return the sources of the curation recipe."""
        shared: dict[str, Any] = {"licence": self.licence or UNKNOWN}
        if self.fields:
            shared["fields"] = dict(self.fields)
        if self.system:
            shared["system"] = self.system
        if self.encoding:
            shared["encoding"] = self.encoding
        sources = [{"path": path, **shared} for path in self.data]
        return [*sources, *([{"path": self.test, **shared, "split": "eval"}] if self.test else [])]


def tailor(
    data: Path | str | Sequence[Path | str] = (),
    *,
    name: str,
    rows: Any = None,
    base: str = "starter",
    out: Path | str | None = None,
    fields: Mapping[str, str] | None = None,
    system: str = "",
    licence: str = "",
    test: Path | str | None = None,
    encoding: str = "",
    personal_data: PersonalDataChoice = "keep",
    minutes: float = 0.0,
    key: Path | str | None = None,
    require_release: bool = False,
    replace: bool = False,
    ask: Ask | None = None,
    show: bool = True,
    on_step: OnStep | None = None,
    notice: Notice = lambda line: None,
) -> Tailored:
    """Make a tested specialist of own data: curate, plan, tune, evaluate, and release if the gate passes.

    data: files, folders, or sources as a curation recipe names them. rows: instead of them, rows as `curate` takes
    them; they are kept in `OUT/rows`, from where OUT/curate.yaml reads them. Of rows by name, those called eval, test
    or validation are `test`. out: directory of all results, `./NAME` by
    default. fields: Sartor's field -> the column. system: the system prompt of every row. licence: `own`, or an SPDX
    expression; without one the gate holds the Release back. test: rows to measure on, in place of some that are held
    out. encoding: code page of the files, if it is not detected. personal_data: mask it in the rows, drop rows that
    hold any, or keep it, which a warning says. minutes: for the whole command; 0 takes what the settings need. key:
    signs; by default a key of this machine. ask: asks the user a question (columns, licence); None if there is no
    user. on_step: as in `tune`. require_release: a held-back Release is an error.

    Raises ConfigError (options, unknown columns, `out` of another call, too few minutes), GateError with
    `require_release`, and the errors of the verbs. Called again with the same options, it continues where it was
    stopped.
    """
    start_time = time.monotonic()
    _check_minutes(minutes)
    out = (Path(out) if out else Path(name)).absolute()
    if key:
        signing.open_private(Path(key), "release")  # an invalid key raises here, before the long stages
    if rows is not None:
        data, test = _written_rows(out, rows, data=data, test=test, name=name, replace=replace, notice=notice)
    job = _job(data, name=name, base=base, fields=fields or {}, system=system, licence=licence, test=test)
    job = changed(job, encoding=encoding, personal_data=personal_data)
    _check_place(out, job)
    is_first_call = not (out / _FACTS).exists()
    job = _recall(out, job, ask=ask, notice=notice, replace=replace)

    # before other work, as there may be no network
    for asset in (STARTER, *_ASSETS) if job.base == STARTER else _ASSETS:
        assets.install(asset, notice=notice)
    try:
        dataset = _curated(out, job, notice)
    except (ConfigError, SourceError):
        if is_first_call:
            # nothing was made: a next call may correct the options
            _clear(out, job)
            (out / _FACTS).unlink()
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    _check_held_out(dataset, job)
    with _planned(out, job, minutes=minutes, start_time=start_time, notice=notice):
        tuned = out / "adapter"
        # a first call has nothing to resume, and need not say so
        is_begun = tuned.exists() or folder_of(tuned).exists()
        adapter = tune(out / "tune.yaml", tuned, resume=is_begun, show=show, on_step=on_step, notice=notice).adapter
        notice(f"adapter  {adapter.path}")
        report = _made_of(out / "report", Report, adapter)
        if report is None:
            report = evaluate(adapter.path, out=out / "report", replace=True, notice=notice).report
        notice(f"report   {report.path / 'report.html'}")
    checks = gate(adapter, report, (), name=name)
    is_held_back = any(check.holds_back for check in checks.values())
    released = None
    if not is_held_back:
        path = out / f"{name}-{VERSION}"
        released = _released(path, name, adapter=adapter, report=report, key=key, notice=notice)
    evidence, more_rows = _evidence(report)
    result = Tailored(
        dataset=dataset,
        adapter=adapter,
        report=report,
        released=released,
        checks=checks,
        evidence=evidence,
        more_rows=more_rows,
        recipes={"curate": str(out / "curate.yaml"), "tune": str(out / "tune.yaml")},
        next_steps=_next_steps(job, out, adapter=adapter, released=released, checks=checks),
        wall_s=time.monotonic() - start_time,
    )
    if require_release and released is None:
        lines = "; ".join(f"{check}: {found.detail}" for check, found in checks.items() if found.holds_back)
        raise GateError(f"the gate holds {adapter.path} back: {lines}", "; ".join(_gate_steps(job, checks)))
    return result


def plan_tailor(
    data: Path | str | Sequence[Path | str],
    *,
    name: str,
    base: str = "starter",
    fields: Mapping[str, str] | None = None,
    system: str = "",
    licence: str = "",
    test: Path | str | None = None,
    encoding: str = "",
    personal_data: PersonalDataChoice = "keep",
    minutes: float = 0.0,
    notice: Notice = lambda line: None,
) -> TailorForecast:
    """Forecast `tailor` with the same options: curate into a folder that is then removed, and plan the tuning.

    A problem that would stop the tuning is listed in the plan's `refusals`. Raises ConfigError for wrong options and
    too few minutes, and the errors of `curate` and `plan`.
    """
    start_time = time.monotonic()
    _check_minutes(minutes)
    job = _job(data, name=name, base=base, fields=fields or {}, system=system, licence=licence, test=test)
    job = _answered(changed(job, encoding=encoding, personal_data=personal_data), None, notice)
    for asset in (STARTER, *_ASSETS) if job.base == STARTER else _ASSETS:
        assets.install(asset, notice=notice)
    with tempfile.TemporaryDirectory() as scratch:
        curated = curate(_curation(job), Path(scratch) / "data", notice=notice)
        _show_warnings(curated, notice)
        _check_held_out(curated.dataset, job)
        notice(_PLAN_NOTICE)
        tuning = plan({"base": job.base, "data": str(curated.dataset.path)}, notice=notice)
    can_fit = minutes > 0 and not tuning.refusals
    budget = _within(tuning, minutes, time.monotonic() - start_time).get("budget", {}) if can_fit else {}
    return TailorForecast(curated.kept, curated.dropped, tuning, budget)


def _check_minutes(minutes: float) -> None:
    if minutes < 0:
        raise ConfigError(f"minutes is {minutes:g}; it must be 0, for no limit, or more", "--minutes 10")


def _written_rows(
    out: Path,
    rows: Any,
    data: Path | str | Sequence[Path | str],
    test: Path | str | None,
    name: str,
    replace: bool,
    notice: Notice,
) -> tuple[list[Path | str], Path | str | None]:
    """Write rows from Python to OUT/rows; return the files of rows and the file of test rows.

    Raises ConfigError for rows beside other data, for two sets of test rows, if OUT is not tailor's, and unless
    `replace` if it holds other rows.
    """
    if data:
        raise ConfigError("data and rows are both given", f"sartor.tailor(rows=rows, name={name!r}), or data alone")
    given = python_rows.named_rows(rows)
    held_out = [part for part in given if part in python_rows.HELD_OUT]
    if len(held_out) + (test is not None) > 1:
        problem = f"several sets of test rows are given: {', '.join([*held_out, *([str(test)] if test else [])])}"
        raise ConfigError(problem, "leave out all but one")
    if out.exists() and any(out.iterdir()) and not (out / _FACTS).is_file():
        raise ConfigError(f"{out} holds files that tailor has not made", f"out={str(out / name)!r}")
    files: list[Path | str] = []
    make_parent(out / "rows" / "rows.jsonl")
    for part, part_rows in given.items():
        with tempfile.TemporaryDirectory(dir=out, prefix=".rows-") as folder:
            written = python_rows.write_rows(part_rows, Path(folder), part)
            file = out / "rows" / written.file.name
            if file.is_file() and not replace and file_digest(file) != file_digest(written.file):
                raise ConfigError(
                    f"{out} was made of other rows", "replace=True makes it anew; or out=DIR for another one"
                )
            for media in sorted((Path(folder) / "media").iterdir()):
                _copy(media, out / "rows" / "media" / media.name)
            _copy(written.file, file)
        for note in written.notes:
            notice(f"{part}: {note}")
        if part in held_out:
            test = file
        else:
            files.append(file)
    if not files:
        raise ConfigError(
            f"the rows are all test rows: {', '.join(held_out)}", 'rows={"train": rows, "test": test_rows}'
        )
    return files, test


def _copy(file: Path, target: Path) -> None:
    """Copy a file below `out`, whole or not at all."""
    with file.open("rb") as stream:
        write_file_atomic(target, lambda copied: shutil.copyfileobj(stream, copied))


def _job(
    data: Path | str | Sequence[Path | str],
    name: str,
    base: str,
    fields: Mapping[str, str],
    system: str,
    licence: str,
    test: Path | str | None,
) -> _Job:
    """Return the job of a call.

    Raises ConfigError for a bad name, no data, or an unknown field or licence, and the errors of `locate_base`.
    """
    if not is_valid_name(name):
        problem = f"the name {name!r:.80} may hold up to 128 lower-case letters, digits, '.', '_' and '-'"
        raise ConfigError(problem, "--name faq")
    paths: list[Any] = list(data) if isinstance(data, (list, tuple)) else [data]
    if any(not isinstance(path, (str, Path)) for path in paths):
        raise ConfigError("data names files, and rows are given", f"sartor.tailor(rows=rows, name={name!r})")
    if not paths:
        raise ConfigError("no data is named", f"sartor tailor rows.csv --name {name}")
    locate_base(base, option="the same command with --base")  # a mistyped name is said before the long stages
    return _Job(
        data=tuple(_absolute(path) for path in paths),
        name=name,
        base=base,
        fields=load(Columns, dict(fields)).by_name(),
        system=system,
        licence=checked(licence) if licence else "",
        test=_absolute(test) if test else "",
    )


def _check_place(out: Path, job: _Job) -> None:
    """Raise ConfigError if `_clear` would remove files that tailor did not write.

    The same holds if the rows are in a directory that tailor writes, or if `out` is in a directory of rows. The facts
    are written before anything else: without them, nothing in `out` is tailor's.
    """
    made, place = [*_MADE, f"{job.name}-{VERSION}"], out.resolve()
    for source in filter(None, (*job.data, job.test)):
        rows = Path(sheet_of(source)[0]).resolve()
        if any(rows.is_relative_to(place / name) for name in made):
            raise ConfigError(f"{source} stands where tailor puts what it makes, in {out}", f"--out {out / job.name}")
        if rows.is_dir() and place.is_relative_to(rows):
            problem = f"{out} lies in {source}: what is made there would be read as rows"
            raise ConfigError(problem, f"--out {rows.parent / f'{job.name}-tailored'}")
    taken = next((name for name in (*_WRITTEN, *made) if os.path.lexists(out / name)), "")
    if taken and not (out / _FACTS).is_file():
        raise ConfigError(f"{out / taken} is there, and tailor has not made it", f"--out {out / job.name}")


def _clear(out: Path, job: _Job) -> None:
    """Remove the recipes and results of an earlier call below `out`."""
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    for name in (*_MADE, f"{job.name}-{VERSION}"):
        shutil.rmtree(out / name, ignore_errors=True)


def _curated(out: Path, job: _Job, notice: Notice) -> Dataset:
    """Return the Dataset.

    If the recipe differs from the existing one (a licence is stated now), everything is made again. Raises ConfigError
    if the rows are not those that the Dataset was made of, or if the user has changed the recipe or made it invalid.
    """
    recipe, file = _curation(job), out / "curate.yaml"
    known = read_yaml(file) if file.is_file() else {}
    if known.get("split", recipe["split"]) != recipe["split"] and (out / "data").exists():
        raise ConfigError(
            f"{out} was made of another number of rows", "--replace makes it anew; or --out DIR for another one"
        )
    if known and _without_licences(known) != _without_licences(recipe):
        command = f"sartor curate {shlex.quote(str(file))} --out DIR"
        remedy = f"{command} curates as it says; --replace writes it and everything after it anew"
        raise ConfigError(f"{file} is not as tailor wrote it", remedy)
    if known != recipe:
        _clear(out, job)
        _write_yaml(file, recipe)
    curated = curate(file, out / "data", resume=True, notice=notice)
    dropped = _dropped_text(curated.dropped)
    notice(f"data     {curated.dataset.path}: {curated.kept:,} rows kept, dropped: {dropped}")
    if curated.dropped:
        count, dataset = sum(curated.dropped.values()), shlex.quote(str(curated.dataset.path))
        notice(f"         sartor show {dataset} --split dropped -n {count} lists them with reasons")
    _show_warnings(curated, notice)
    return curated.dataset


def _show_warnings(curated: Curated, notice: Notice) -> None:
    for warning in curated.warnings:
        notice(f"warning  {warning.problem}\n         try: {warning.remedy}")
    if curated.warnings:
        notice("         options named here belong into a recipe of `sartor curate`; they are no flags of tailor")


def _dropped_text(dropped: Mapping[str, int]) -> str:
    """Return the number of dropped rows by reason, such as "exact_duplicate 6, missing_field 3"."""
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none"


def _without_licences(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe without its sources' licences, which may be stated later."""
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return dict(recipe)
    return {**recipe, "sources": [{**source, "licence": ""} for source in sources]}


def _check_held_out(dataset: Artifact, job: _Job) -> None:
    """Raise SourceError if there would be no rows to learn from, or none to measure on after the tuning."""
    counts = dataset.manifest["counts"]
    if job.test and not counts["splits"].get("train"):
        raise SourceError(
            f"no row of {', '.join(job.data)} is left to learn from (dropped: {_dropped_text(counts['dropped'])}): "
            f"rows that are in {job.test} too, or in a group with one there, are not learnt",
            "--test FILE --replace, with rows that are not among those to learn from; without --test a part is held "
            "out",
        )
    if counts["splits"].get("eval"):
        return
    if job.test:
        problem = f"no row of {job.test} is left to measure on"
        raise SourceError(
            problem,
            f"--test FILE --replace, with rows that are not in {', '.join(job.data)}, in columns of the same names",
        )
    raise SourceError(
        f"none of the {counts['kept']:,} rows can be held out to measure on: they are too few, or one group (a PDF is "
        "one)",
        "add rows; or --test FILE --replace, with rows that are not among them",
    )


@contextlib.contextmanager
def _planned(out: Path, job: _Job, minutes: float, start_time: float, notice: Notice) -> Iterator[None]:
    """Write the tuning recipe after reporting its plan, and show tuning and evaluation as one progress.

    Raises the errors that would stop the tuning, and ConfigError for too few minutes. A resumed run is not planned
    again: its plan is on disk.
    """
    if not (out / "tune.yaml").is_file():
        _foresee(out, job, minutes=minutes, start_time=start_time, notice=notice)
        # the plan held a model, whose memory the tuning needs
        gc.collect()
        hardware.release_free_memory()
    seconds = _stage_seconds(out)
    with WholeProgress("tailor", seconds, notice) if seconds else contextlib.nullcontext():
        yield


def _foresee(out: Path, job: _Job, minutes: float, start_time: float, notice: Notice) -> None:
    """Report the plan, and write it and the tuning recipe."""
    recipe: dict[str, Any] = {"base": job.base, "data": str(out / "data")}
    notice(_PLAN_NOTICE)
    forecast = plan(recipe, notice=notice)
    for refusal in forecast.refusals:
        _write_yaml(out / "tune.yaml", recipe)
        command = f"sartor tune {shlex.quote(str(out / 'tune.yaml'))} --out {shlex.quote(str(out / 'adapter'))}"
        raise type(refusal.error)(refusal.problem, f"{refusal.remedy}; its flags are those of {command}")
    for line, value in forecast.table():
        if line in _PLAN_LINES:
            notice(f"plan     {line}: {value}")
    if any(line == "warning" for line, _ in forecast.table()):
        notice("         options named here are flags of `sartor tune`; they are none of tailor")
    preflight.check_disk(out, forecast.trainable, Checkpoints.keep)
    if minutes:
        recipe |= _within(forecast, minutes, time.monotonic() - start_time)
    _write(out / _FORECAST, json.dumps({"schema": _SCHEMA, **forecast.as_json()}, indent=1, ensure_ascii=False))
    _write_yaml(out / "tune.yaml", recipe)


def _stage_seconds(out: Path) -> dict[str, float]:
    """Return the forecast seconds of tuning, evaluation and forgetting; empty if no plan is on disk."""
    try:
        forecast = json.loads((out / _FORECAST).read_bytes())
        tuning_s = float(forecast["time_s"]["estimate"])
        evaluation_s = float((forecast["evaluation_s"] or {}).get("estimate", _EVALUATION_S))
        # a forward pass costs FORWARD_FRACTION of an update's tokens; replies and losses take a tenth of it at least
        probes_s = _PROBE_TOKENS * FORWARD_FRACTION * tuning_s / max(int(forecast["tokens"]), 1)
        probes_s = min(probes_s, 0.9 * evaluation_s)
        budget = read_yaml(out / "tune.yaml").get("budget", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return {}
    if isinstance(budget, dict) and "minutes" in budget:
        tuning_s = min(tuning_s, 60 * float(budget["minutes"]))
    return {"tune": tuning_s, "evaluate": evaluation_s - probes_s, "forgetting": probes_s}


def _absolute(path: Path | str) -> str:
    """Return an absolute path; a source with a scheme (hub:, sql:, asset:, inbox:) is returned unchanged."""
    text = str(path)
    if text.startswith(("hub:", "sql:", "asset:", "inbox:")):
        return text
    return str(Path(text).expanduser().absolute())


def _recall(out: Path, job: _Job, *, ask: Ask | None, notice: Notice, replace: bool) -> _Job:
    """Return the job with the user's answers from this call or an earlier one.

    Raises ConfigError if `out` belongs to another job. replace: results of an earlier call are removed, once it is
    known that there are rows to make them of again.
    """
    file = out / _FACTS
    if replace or not file.is_file():
        job = _answered(job, ask, notice)
        if replace:
            _clear(out, job)
        _write_facts(file, job)
        return job
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        kept = _Job(**{**known["job"], "data": tuple(known["job"]["data"])})
        if known["schema"] != _SCHEMA:
            raise ValueError("another schema")
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} is damaged", "--replace makes everything anew") from None
    # questions that the user answered then are not asked again; a licence may be stated later
    job = changed(job, fields=job.fields or kept.fields, licence=job.licence or kept.licence)
    differing = [name for name, value in _as_json(job).items() if value != _as_json(kept)[name] and name != "licence"]
    if differing:
        problem = f"{out} was made with other options: {', '.join(differing)}"
        raise ConfigError(problem, "--replace makes it anew; or --out DIR for another one")
    if kept.licence and job.licence != kept.licence:
        raise ConfigError(f"{out} was made of rows under {kept.licence}, not {job.licence}", "--replace makes it anew")
    _write_facts(file, job)
    return job


def _write_facts(file: Path, job: _Job) -> None:
    """Write OUT/tailor.json."""
    content = {"schema": _SCHEMA, "job": _as_json(job)}
    _write(file, json.dumps(content, indent=1, ensure_ascii=False))


def _as_json(job: _Job) -> dict[str, Any]:
    """Return the job as JSON values."""
    return {**asdict(job), "data": list(job.data)}


def _answered(job: _Job, ask: Ask | None, notice: Notice) -> _Job:
    """Ask the user for the columns to read, if the form of a file is unknown, and for the licence.

    Returns the job with the answers. Raises ConfigError if there is no user to ask.
    """
    fields, licence = dict(job.fields), job.licence
    for fields_of_source in job.sources():
        source = load(SourceOptions, {**fields_of_source, "fields": fields})
        forms = {file.form for file in tables_of(plan_reading([source], CurateRecipe.max_row_bytes).files)}
        if fields or not forms or forms - {"unknown", "text"}:
            continue
        rows = first_rows(source, CurateRecipe.max_row_bytes)
        label = next((label for row in rows if (label := unread_label(row))), "") if "text" in forms else ""
        if "text" in forms and not label:
            continue
        columns = column_names(rows)
        if not columns:
            continue  # curate reports the problem of each file
        name = Path(source.path).name
        if ask is None and label:
            raise ConfigError(
                f"{name} has a column {label!r} beside `text`, and it is not said whether that is the answer",
                f"{fields_flag(prompt='text', completion=label)}; or --fields text=text, to learn the texts alone",
            )
        if ask is None:
            prompt, completion = suggest_columns(rows)
            raise ConfigError(
                f"{name} has the columns {', '.join(map(repr, columns[:12]))}, and none is called prompt or "
                "completion",
                fields_flag(prompt=prompt, completion=completion),
            )
        notice(f"{name} has the columns {', '.join(columns)}")
        fields = {
            "prompt": _choose(ask, "Which column holds what is asked?", columns),
            "completion": _choose(ask, "Which column holds the answer?", columns),
        }
    if not licence and ask is not None:
        answer = ask(
            "Whose are these rows? `own`, an SPDX licence such as CC-BY-4.0, or nothing to decide later: "
        ).strip()
        licence = checked(answer) if answer else ""
    return changed(job, fields=fields, licence=licence)


def _choose(ask: Ask, question: str, columns: Sequence[str]) -> str:
    """Ask the user for one of `columns`, at most five times. Raises ConfigError."""
    for _ in range(5):
        answer = ask(f"{question} [{', '.join(columns)}]: ").strip()
        if answer in columns:
            return answer
    remedy = fields_flag(prompt=columns[0], completion="COLUMN")
    raise ConfigError(f"none of the answers is one of {', '.join(columns)}", remedy)


def _curation(job: _Job) -> dict[str, Any]:
    """Return the curation recipe of a job."""
    recipe: dict[str, Any] = {"sources": job.sources()}
    fraction = 0.0
    if not job.test:
        rows = 0
        with tempfile.TemporaryDirectory() as media:
            for source in job.sources():
                options = load(SourceOptions, source)
                read = read_all(options, CurateRecipe.max_row_bytes, Path(media))
                rows += sum(isinstance(row, Example) for row in read)
        fraction = _FRACTION if rows * _FRACTION <= _HELD_OUT_ROWS else round(_HELD_OUT_ROWS / rows, 4)
    recipe["split"] = {"eval_fraction": fraction}
    if job.personal_data != "keep":
        recipe["steps"] = [{"kind": "personal_data", "action": job.personal_data}]
    return recipe


def _within(forecast: TuningPlan, minutes: float, elapsed_s: float) -> dict[str, Any]:
    """Return the budget of a tuning that leaves time for the evaluation; empty if the whole tuning fits.

    Raises ConfigError for too few minutes.
    """
    assert forecast.time_s is not None
    evaluation_s = forecast.evaluation_s.high if forecast.evaluation_s else _EVALUATION_S
    left_s = minutes * 60 - elapsed_s - evaluation_s - _RESERVE_S
    if forecast.time_s.high <= left_s:
        return {}
    if left_s < _LEAST_TUNING_S:
        other_s = elapsed_s + evaluation_s + _RESERVE_S
        problem = f"{minutes:g} minutes are too few: reading and measuring alone take about {other_s:.0f} s"
        raise ConfigError(problem, f"--minutes {math.ceil((other_s + forecast.time_s.high) / 60)}")
    return {"budget": {"minutes": round(left_s / 60, 2)}}


Made = TypeVar("Made", Report, Release)


def _made_of(path: Path, cls: type[Made], adapter: Artifact) -> Made | None:
    """Return the artefact at `path` if an earlier call made it of this Adapter; else None."""
    if kind_of(path) != cls.__name__.lower():
        return None
    artifact = open_artifact(path)
    is_of_adapter = adapter.id in {parent["id"] for parent in artifact.manifest["parents"]}
    return artifact if isinstance(artifact, cls) and is_of_adapter else None


def _released(
    path: Path, name: str, adapter: Artifact, report: Artifact, key: Path | str | None, notice: Notice
) -> Release:
    """Return the Release of an Adapter that has passed the gate.

    A Release of an earlier call is reused if the requested key signed it, or if no key is requested. Then a key of
    this machine signs, generated once.
    """
    earlier = _made_of(path, Release, adapter)
    if earlier is not None and (not key or _is_signed_by(earlier, Path(key))):
        return earlier
    signer = Path(key) if key else folder("keys") / "default"
    if not key and not (signer / "sartor.key").is_file():
        signing.keygen(signer, trust=True)
        notice(f"key      {signer}: made now, and trusted on this machine alone; --key DIR signs with another one")
    options: dict[str, Any] = {"name": name, "version": VERSION, "key": signer, "report": report.path}
    return release(adapter.path, out=path, replace=True, **options).release


def _is_signed_by(released: Artifact, key: Path) -> bool:
    """Return whether a key signed a Release."""
    document = released.document or (released.path / MANIFESTS["release"]).read_bytes()
    try:
        signing.check(document, released.path / "signature", [signing.open_private(key).public_key()])
    except SignatureError:
        return False
    return True


def _evidence(report: Artifact) -> tuple[GainEvidence, int]:
    """Return the Report's verdict on the gain, and the number of further held-out rows that would decide."""
    manifest = report.manifest
    primary, name = manifest["metrics"][manifest["primary"]], manifest["primary"]
    higher_is_better = name not in LOWER_IS_BETTER
    verdict = Comparison(**primary).verdict(higher_is_better=higher_is_better)
    if verdict != "cannot tell":
        return GainEvidence(verdict), 0
    difference, groups = primary["difference"], manifest["groups"]
    if not difference:
        return GainEvidence.NO_DIFFERENCE, max(0, LEAST_GROUPS - groups)
    if (difference > 0) != higher_is_better:
        return GainEvidence.NOT_ENOUGH, 0
    needed = groups_needed(difference, primary["low"], primary["high"], groups)
    # rows = groups needed * rows per group: in groups of several rows a new row is not a new group
    return GainEvidence.NOT_ENOUGH, math.ceil((needed - groups) * manifest["rows"] / groups)


def _next_steps(
    job: _Job, out: Path, *, adapter: Artifact, released: Artifact | None, checks: Mapping[str, Check]
) -> list[str]:
    """Return the commands that the user may run next."""
    if released is not None:
        path = shlex.quote(str(released.path))
        form = "gguf" if has_llama_cpp() else "merged"  # by llama.cpp the export is compared with the Release
        export = f"sartor export {path} --to {form} --out {job.name}-{form}"
        return [f'sartor ask {path} "..."', f"sartor chat {path}", f"sartor serve {path}", export]
    path = shlex.quote(str(adapter.path))
    return [
        f'sartor ask {path} "..."',
        f"sartor chat {path}",
        *_longer_tuning(out, adapter),
        *_gate_steps(job, checks),
    ]


def _gate_steps(job: _Job, checks: Mapping[str, Check]) -> list[str]:
    """Return what would pass the checks that hold a Release back."""
    steps = []
    for name, check in checks.items():
        if not check.holds_back:
            continue
        if name == "licence" and not job.licence:
            steps.append(
                "the same command with --licence own, if the rows are yours; or with their licence, --licence "
                "CC-BY-4.0"
            )
        elif check.remedy:
            steps.append(f"{name}: {check.remedy}")
        elif name == "gain":
            steps.append("gain: look in the report where both are wrong; more rows, cleaner rows, or a larger --base")
    return steps


def _longer_tuning(out: Path, adapter: Artifact) -> list[str]:
    """Return the step that lets the tuning run to its end, if `minutes` ended it before."""
    try:
        forecast = json.loads((out / _FORECAST).read_bytes())
        planned_updates, updates = int(forecast["updates"]), int(adapter.manifest["run"]["updates"])
        needed_s = float(forecast["time_s"]["high"]) + float(
            (forecast["evaluation_s"] or {}).get("high", _EVALUATION_S)
        )
        is_limited = "minutes" in read_yaml(out / "tune.yaml").get("budget", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return []
    if not is_limited or updates >= planned_updates:
        return []
    minutes = math.ceil((needed_s + _RESERVE_S) / 60) + 1  # one for reading and planning
    return [
        f"the same command with --replace --minutes {minutes}: the limit ended the tuning after {updates:,} of "
        f"{planned_updates:,} updates"
    ]


def _write_yaml(file: Path, content: Mapping[str, Any]) -> None:
    """Write a YAML file below `out`."""
    _write(file, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _write(file: Path, text: str) -> None:
    """Write a file below `out`.

    Raises ConfigError if `out` is not writable, MissingError if the disk is full.
    """
    make_parent(file)
    try:
        write_file_atomic(file, text.encode())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        problem = f"the disk is full: {file} could not be written"
        raise MissingError(problem, f"df -h {file.parent}, and free some; then the same command goes on") from None
