"""Tune: the tunings of a folder, live and compared, and a form that forecasts and starts them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData
from starlette.responses import Response

from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError, SartorError
from sartor.core.filesystem import write_file_atomic
from sartor.studio.jobs.job_control import GRACE_S, JobProgress
from sartor.studio.jobs.job_files import JobState, JobStatus
from sartor.studio.jobs.training_logs import Losses
from sartor.studio.option_schema import Control
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.job_pages import draw_losses, stream_part
from sartor.studio.run_plots import draw_compared, draw_rates
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.tuning_drafts import TuningDraft, TuningDrafts
from sartor.studio.tuning_form import COMMON, CheckedForm, check_form, default_values, recipe_fields
from sartor.studio.tuning_runs import FORECAST, TuningRun, find_run, renewed, tuning_runs
from sartor.studio.visitor import Owner, PostedForm, Studio, Viewer, Visitor, studio_of, text_field

router = APIRouter()
MAX_RUNS, MAX_COMPARED = 100, 6
ADAPTER = "adapter"
# Datasets of which one form starts a tuning each
MAX_DATASETS = 20


@dataclass(frozen=True)
class PlanView:
    """Forecast of a tuning. label: Dataset. plan: of `sartor plan --json`; empty before it is there."""

    label: str
    status: JobStatus
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class _ReadForm:
    """A form as it was sent. errors: by field; `datasets` and `name` are fields too."""

    values: Mapping[str, str]
    datasets: Sequence[str]
    name: str
    checked: CheckedForm
    errors: Mapping[str, SartorError]


@router.get("/tune")
def tunings(request: Request, visitor: Viewer) -> Response:
    """List the tunings, those in work first."""
    runs = tuning_runs(studio_of(request))
    shown = []
    for run in runs[:MAX_RUNS]:
        losses = None if run.facts() else run.losses()
        progress = _progress(studio_of(request), run, losses)
        shown.append((run, run.facts().get("loss") or _last_losses(losses), progress))
    return render(request, visitor, "tune", runs=shown, most=MAX_COMPARED)


def _last_losses(losses: Losses | None) -> dict[str, float | None]:
    """Return the first, last and held-out loss, as a manifest has them."""
    if losses is None:
        return {}
    held_out = losses.held_out[-1][1] if losses.held_out else None
    return {"first": losses.updates[0][1], "last": losses.updates[-1][1], "eval": held_out}


def _progress(studio: Studio, run: TuningRun, losses: Losses | None) -> JobProgress | None:
    """Return the progress of a tuning that runs, by its journal, or by its log for one of a terminal."""
    if run.status and run.state is JobState.RUNNING and not run.is_foreign:
        return studio.jobs.progress(run.status)
    if not run.is_foreign or losses is None or losses.fraction is None:
        return None
    left_s = losses.left_s
    if left_s is not None:
        left_s = max(0.0, left_s - (time.time() - losses.changed_at))
    return JobProgress("tune", losses.fraction, f"{losses.updates[-1][0]:,}", left_s)


@router.get("/tune/run/{name:path}")
def tuning(request: Request, visitor: Viewer, name: str) -> Response:
    """Show a tuning."""
    studio = studio_of(request)
    run = find_run(studio, name)
    return render(request, visitor, "tune_run", title=name, recipe=run.recipe(), **_context(studio, run))


def _context(studio: Studio, run: TuningRun) -> dict[str, Any]:
    losses, facts, plan = run.losses(), run.facts(), run.plan()
    own: Mapping[str, Any] = facts.get("forecast") or (losses.forecast if losses else {})
    actual = {
        "time_s": facts.get("wall_s") or (losses.wall_s if losses else None),
        "peak_memory_bytes": facts.get("peak_memory_bytes") or (losses.memory_bytes if losses else None),
    }
    return {
        "run": run,
        "status": run.status,
        "losses": losses,
        "curve": draw_losses(losses),
        "rates": draw_rates(losses),
        "progress": _progress(studio, run, losses),
        "forecasts": [(key, plan.get(key), own.get(key), actual[key]) for key in actual] if plan or own else [],
        "grace_s": GRACE_S,
    }


@router.get("/tune/events/{name:path}")
async def events(request: Request, visitor: Viewer, name: str) -> Response:
    """Stream the changing part of a tuning's page."""
    studio = studio_of(request)
    run = await asyncio.to_thread(find_run, studio, name)

    def look() -> tuple[str, bool]:
        now = renewed(studio, run)
        page = render(request, visitor, "tune_live", **_context(studio, now))
        return bytes(page.body).decode(), now.state.is_over

    return stream_part(request, look)


@router.post("/tune/stop")
def stop(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Ask a tuning of the studio to save its state and end."""
    run = find_run(studio_of(request), text_field(form, "run"))
    if run.status is None or run.is_foreign:
        raise ConfigError("this tuning was not started here", "stop it where it was started: Ctrl-C at its terminal")
    studio_of(request).jobs.stop(run.status.job.id, by=_user(visitor))
    return redirect(request, f"/tune/run/{run.name}")


@router.post("/tune/resume")
def resume(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Go on with a tuning that was stopped, killed or lost, where it saved its state."""
    run = find_run(studio_of(request), text_field(form, "run"))
    if run.status is None or run.is_foreign:
        raise ConfigError("this tuning was not started here", "type its command again with --resume")
    studio_of(request).jobs.again(run.status.job.id, by=_user(visitor))
    return redirect(request, f"/tune/run/{run.name}")


@router.get("/tune/compare")
def compare(request: Request, visitor: Viewer) -> Response:
    """Show the losses of several tunings in one plot, and the options in which they differ."""
    known = {item.name: item for item in tuning_runs(studio_of(request))}
    names = dict.fromkeys(request.query_params.getlist("run"))
    chosen = [known[name] for name in names if name in known][:MAX_COMPARED]
    pairs = [(item, losses) for item in chosen if (losses := item.losses())]
    recipes = [item.recipe() for item, _ in pairs]
    options = sorted({name for recipe in recipes for name in recipe})
    rows = [(name, [recipe.get(name) for recipe in recipes]) for name in options]
    return render(
        request,
        visitor,
        "tune_compare",
        pairs=pairs,
        facts=[{**_last_losses(losses), **item.facts().get("loss", {})} for item, losses in pairs],
        curves=draw_compared([losses for _, losses in pairs]) if pairs else None,
        differences=[(name, values) for name, values in rows if values.count(values[0]) < len(values)],
        same=sum(values.count(values[0]) == len(values) for _, values in rows),
    )


@router.get("/tune/new")
def new(request: Request, visitor: Owner) -> Response:
    """Show the form with the defaults."""
    names = [item.name for item in _datasets(studio_of(request))]
    chosen = [name for name in names if name in request.query_params.getlist("data")]
    if len(names) == 1:
        chosen = names
    return _form_page(request, visitor, default_values(), datasets=chosen, name="")


def _datasets(studio: Studio) -> list[FoundArtifact]:
    artifacts, _ = studio.folder.scan()
    return [item for item in artifacts if item.kind == "dataset" and item.artifact]


def _form_page(
    request: Request,
    visitor: Visitor,
    values: Mapping[str, str],
    *,
    datasets: Sequence[str],
    name: str,
    errors: Mapping[str, SartorError] | None = None,
    draft: TuningDraft | None = None,
    status_code: int = 200,
) -> Response:
    studio, fields = studio_of(request), recipe_fields()
    # of several kinds, the default one
    common = [next(field for field in fields if field.name == name) for name in COMMON]
    groups: dict[str, list[Any]] = {}
    for field in fields:
        if field not in common:
            groups.setdefault(field.group, []).append(field)
    errors = errors or {}
    return render(
        request,
        visitor,
        "tune_new",
        status_code=status_code,
        found=_datasets(studio),
        datasets=datasets,
        name=name or _proposed_name(studio, datasets),
        values=values,
        errors=errors,
        common=common,
        groups=groups,
        open_groups={field.group for field in fields if field.key in errors and field not in common},
        draft=draft,
        texts=[(label, _drafts(studio).recipe_text(draft, label)) for label in draft.datasets] if draft else [],
        commands=[_command(studio, out) for out in _out_names(draft.name, draft.datasets)] if draft else [],
        forecasts=_plan_views(studio, draft.plans) if draft else [],
        forecast_path=f"/tune/draft/{draft.id}/forecast" if draft else "",
    )


def _drafts(studio: Studio) -> TuningDrafts:
    return TuningDrafts(studio.folder.hidden / "drafts", studio.folder.root)


def _proposed_name(studio: Studio, datasets: Sequence[str]) -> str:
    """Return a free name of what a form makes, after its Dataset."""
    parts = PurePosixPath(datasets[0] if datasets else "rows").parts
    stem = f"{parts[-2] if len(parts) > 1 and parts[-1] == 'data' else parts[-1]}-tuned".lower()
    stem = stem if is_valid_name(stem) else "tuning"
    candidates = (f"{stem}{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(candidate for candidate in candidates if not (studio.folder.root / candidate).exists())


def _out_names(name: str, datasets: Sequence[str]) -> list[str]:
    """Return the folder of each Dataset's tuning: the name, with a number for each of several."""
    return [name] if len(datasets) == 1 else [f"{name}-{number + 1}" for number in range(len(datasets))]


def _command(studio: Studio, out: str) -> list[str]:
    folder = studio.folder.root / out
    return ["tune", str(folder / "tune.yaml"), "--out", str(folder / ADAPTER)]


def _plan_views(studio: Studio, plans: Mapping[str, str]) -> list[PlanView]:
    """Return the forecasts of jobs. plans: job by label."""
    views = []
    for label, job_id in plans.items():
        try:
            status = studio.jobs.files.status(job_id)
        except ConfigError:  # its journal was removed
            continue
        views.append(PlanView(label, status, _plan_of(status)))
    return views


def _plan_of(status: JobStatus) -> Mapping[str, Any]:
    """Return the plan that a job of `plan` or `tailor --plan` has printed; empty without one."""
    plan = status.result.get("plan", status.result)
    return plan if isinstance(plan, Mapping) and "refusals" in plan else {}


def plan_view(studio: Studio, label: str, job_id: str) -> list[PlanView]:
    """Return the forecast of one job for the template `tune_forecast`; none for an unknown job."""
    return _plan_views(studio, {label: job_id})


@router.get("/tune/draft/{draft_id}")
def draft_page(request: Request, visitor: Owner, draft_id: str) -> Response:
    """Show a form as it was sent, with its recipe and its forecast."""
    draft = _drafts(studio_of(request)).load(draft_id)
    return _form_page(request, visitor, draft.values, datasets=draft.datasets, name=draft.name, draft=draft)


@router.get("/tune/draft/{draft_id}/forecast")
def draft_forecast(request: Request, visitor: Owner, draft_id: str) -> Response:
    """Show the forecast alone, for a page that renews it."""
    studio = studio_of(request)
    draft = _drafts(studio).load(draft_id)
    path = f"/tune/draft/{draft.id}/forecast"
    return render(request, visitor, "tune_forecast", forecasts=_plan_views(studio, draft.plans), forecast_path=path)


@router.post("/tune/forecast")
def forecast(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start `sartor plan` for each Dataset of a form, and show the form as a draft."""
    studio, read = studio_of(request), _read_form(studio_of(request), form)
    if read.errors:
        return _refused(request, visitor, read)
    drafts = _drafts(studio)
    draft = drafts.save(read.values, read.datasets, name=read.name, recipe=read.checked.recipe)
    plans = dict(draft.plans)
    for dataset in draft.datasets:
        known = _plan_views(studio, {dataset: plans[dataset]}) if dataset in plans else []
        if known and (known[0].plan or not known[0].status.state.is_over):
            continue
        file = drafts.recipe_file(draft, dataset)
        job = studio.jobs.start(["plan", str(file)], title=dataset, by=_user(visitor), cwd=studio.folder.root)
        plans[dataset] = job.id
    drafts.with_plans(draft, plans)
    return redirect(request, f"/tune/draft/{draft.id}")


@router.post("/tune/start")
def start(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start `sartor tune` for each Dataset of a form."""
    studio, read = studio_of(request), _read_form(studio_of(request), form)
    if read.errors:
        return _refused(request, visitor, read)
    drafts = _drafts(studio)
    draft = drafts.save(read.values, read.datasets, name=read.name, recipe=read.checked.recipe)
    plans = {view.label: view.plan for view in _plan_views(studio, draft.plans)}
    outs = _out_names(read.name, read.datasets)
    for dataset, out_name in zip(read.datasets, outs, strict=True):
        out = studio.folder.root / out_name
        out.mkdir()
        write_file_atomic(out / "tune.yaml", drafts.recipe_text(draft, dataset).encode())
        if plan := plans.get(dataset):
            write_file_atomic(out / FORECAST, json.dumps({"schema": 1, **plan}, indent=1).encode())
        studio.jobs.start(
            _command(studio, out_name),
            title=out_name,
            by=_user(visitor),
            cwd=studio.folder.root,
            out=str(out / ADAPTER),
            adapter=str(out / ADAPTER),
        )
    return redirect(request, f"/tune/run/{outs[0]}/{ADAPTER}" if len(outs) == 1 else "/tune")


def _refused(request: Request, visitor: Visitor, read: _ReadForm) -> Response:
    return _form_page(
        request,
        visitor,
        read.values,
        datasets=read.datasets,
        name=read.name,
        errors=read.errors,
        status_code=400,
    )


def _read_form(studio: Studio, form: FormData) -> _ReadForm:
    values = {}
    for field in recipe_fields():
        if field.control is Control.CHOICES:
            values[field.key] = "\n".join(str(value) for value in form.getlist(field.key))
        else:
            values[field.key] = text_field(form, field.key) if field.key in form else field.default
    known = {item.name for item in _datasets(studio)}
    datasets = [name for name in dict.fromkeys(map(str, form.getlist("datasets"))) if name in known]
    name = text_field(form, "name", max_chars=200)
    checked = check_form(values, str(studio.folder.root / datasets[0]) if datasets else "data")
    errors = dict(checked.errors)
    if not 0 < len(datasets) <= MAX_DATASETS:
        errors["datasets"] = ConfigError(f"{len(datasets)} Datasets are chosen", f"choose 1 to {MAX_DATASETS}")
    taken = [out for out in _out_names(name, datasets) if (studio.folder.root / out).exists()]
    if not is_valid_name(name):
        errors["name"] = ConfigError(f"{name[:40]!a} is no name", "lower-case letters, digits, - and ., such as faq")
    elif taken:
        errors["name"] = ConfigError(f"{taken[0]} exists in this folder", "choose another name")
    return _ReadForm(values, datasets, name, checked, errors)


def _user(visitor: Visitor) -> str:
    assert visitor.user is not None
    return visitor.user.name
