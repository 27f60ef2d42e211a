"""New: give a file, see its rows as they would be learnt from, forecast and start `sartor tailor`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

import sartor
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError, SartorError
from sartor.core.records import Example
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.tune_pages import plan_view
from sartor.studio.studio_folder import StudioFolder
from sartor.studio.uploads import store_upload
from sartor.studio.visitor import Owner, PostedForm, studio_of, text_field

router = APIRouter()
PREVIEW_ROWS = 5
SHOWN_CHARS = 1200
ADAPTER = "adapter"
STARTER = "starter"


@router.get("/new")
def new(
    request: Request,
    visitor: Owner,
    file: str = "",
    prompt: str = "",
    completion: str = "",
    system: str = "",
    encoding: str = "",
    name: str = "",
    base: str = STARTER,
    licence: str = "",
    personal_data: str = "keep",
    minutes: str = "",
    forecast: str = "",
) -> Response:
    """Show the files to choose from, or the rows of the chosen one and the form that starts.

    forecast: job that forecasts what was sent.
    """
    studio = studio_of(request)
    if not file:
        limit = studio.max_upload_bytes
        return render(request, visitor, "new", files=studio.folder.data_files(), max_upload_bytes=limit)
    path = studio.folder.resolve(file)
    fields = _fields(prompt, completion)
    problem: SartorError | None = None
    shown: Any = None
    try:
        shown = sartor.preview(path, fields=fields, system=system, encoding=encoding, rows=PREVIEW_ROWS)
    except SartorError as error:
        problem = error
    return render(
        request,
        visitor,
        "new_rows",
        title=file,
        file=file,
        preview=shown,
        turns=[turns_of_example(example) for example in shown.rows] if shown else [],
        problem=problem,
        prompt=prompt,
        completion=completion,
        system=system,
        encoding=encoding,
        needs_columns=bool(shown and shown.columns and (fields or shown.form == "unknown")),
        is_unknown=bool(shown and shown.columns and shown.form == "unknown" and not fields),
        encodings=shown.encodings if shown else (),
        name=name or _proposed_name(studio.folder, path.stem),
        base=base,
        licence=licence,
        personal_data=personal_data,
        minutes=minutes,
        forecasts=plan_view(studio, "", forecast) if forecast else [],
        forecast_path=f"/new/forecast/{forecast}",
        shown_chars=SHOWN_CHARS,
    )


def _fields(prompt: str, completion: str) -> dict[str, str]:
    fields = {"prompt": prompt, "completion": completion}
    return {name: column for name, column in fields.items() if column}


def turns_of_example(example: Example) -> list[dict[str, Any]]:
    """Return the turns of a row; the assistant's are learnt, as every template treats them, unless of weight 0."""
    return [
        {
            "role": message.role,
            "reasoning": message.reasoning_content,
            "text": message.text,
            "media": [f"{part.kind}: {part.media}" for part in message.content if part.kind != "text"],
            "tool_calls": message.tool_calls,
            "weight": message.weight,
            "is_learnt": message.role == "assistant" and message.weight > 0,
        }
        for message in example.messages
    ]


def _proposed_name(folder: StudioFolder, stem: str) -> str:
    """Return a valid name of a specialist that is free, made of a file's name."""
    letters = "".join(char if char.isascii() and char.isalnum() else "-" for char in stem.lower()).strip("-")
    name = letters if is_valid_name(letters) else "specialist"
    candidates = (f"{name}{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(candidate for candidate in candidates if not (folder.root / candidate).exists())


@router.post("/new/upload")
def upload(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Store a file and show its rows."""
    file = form.get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        raise ConfigError("no file was chosen", "choose a file, then send it")
    name = store_upload(studio_of(request).folder, file.filename, file.file, file.size or 0)
    return redirect(request, "/new", file=name)


@router.post("/new")
def start(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start `sartor tailor` on a file as a job."""
    assert visitor.user is not None
    studio = studio_of(request)
    arguments, name = _tailor_arguments(studio.folder, form)
    out = studio.folder.root / name
    if out.exists() and not (out / "tailor.json").is_file():
        raise ConfigError(f"{name} exists in this folder", "choose another name")
    job = studio.jobs.start(
        arguments,
        title=name,
        by=visitor.user.name,
        cwd=studio.folder.root,
        out=str(out),
        adapter=str(out / ADAPTER),
    )
    return redirect(request, f"/jobs/{job.id}")


@router.post("/new/forecast")
def start_forecast(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start `sartor tailor --plan` on a file as a job, and show the page with it."""
    assert visitor.user is not None
    studio = studio_of(request)
    arguments, name = _tailor_arguments(studio.folder, form)
    job = studio.jobs.start([*arguments, "--plan"], title=name, by=visitor.user.name, cwd=studio.folder.root)
    columns = ("file", "prompt", "completion", "system", "encoding")
    sent = (*columns, "name", "base", "licence", "personal_data", "minutes")
    query = {field: value for field in sent if (value := text_field(form, field))}
    return redirect(request, "/new", **query, forecast=job.id)


@router.get("/new/forecast/{job_id}")
def forecast(request: Request, visitor: Owner, job_id: str) -> Response:
    """Show the forecast alone, for the page that renews it."""
    views = plan_view(studio_of(request), "", job_id)
    return render(request, visitor, "tune_forecast", forecasts=views, forecast_path=f"/new/forecast/{job_id}")


def _tailor_arguments(folder: StudioFolder, form: FormData) -> tuple[list[str], str]:
    """Return the arguments of `sartor tailor` for a form, and the name. Raises ConfigError, OutsideError."""
    path = folder.resolve(text_field(form, "file"))
    name = text_field(form, "name")
    if not is_valid_name(name):
        raise ConfigError(f"{name[:40]!a} is no name", "lower-case letters, digits, - and ., such as faq")
    arguments = ["tailor", str(path), "--name", name, f"--base={text_field(form, 'base') or STARTER}"]
    arguments += ["--out", str(folder.root / name)]
    fields = _fields(text_field(form, "prompt"), text_field(form, "completion"))
    if fields:
        pairs = [f"{key}={column.replace(',', ',,')}" for key, column in fields.items()]
        arguments.append(f"--fields={','.join(pairs)}")
    for flag in ("system", "licence", "encoding", "personal_data"):
        if value := text_field(form, flag):
            arguments.append(f"--{flag.replace('_', '-')}={value}")
    if minutes := text_field(form, "minutes", max_chars=10):
        arguments.append(f"--minutes={_minutes(minutes):g}")
    return arguments, name


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1
    if not 0 < minutes <= 100_000:
        raise ConfigError(f"{text!a} is no number of minutes", "a number such as 30, or nothing")
    return minutes
