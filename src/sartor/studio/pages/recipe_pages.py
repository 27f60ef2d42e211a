"""Recipe: a curation recipe as a form and as YAML, its errors, its first rows, and its start."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData
from starlette.responses import Response

import sartor
from sartor.core.config import is_valid_name, parse_yaml
from sartor.core.errors import ConfigError, SartorError, about_option
from sartor.core.filesystem import write_file_atomic
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.new_pages import SHOWN_CHARS, turns_of_example
from sartor.studio.recipe_form import FilledForm, RecipeForm, check_recipe, recipe_yaml
from sartor.studio.studio_folder import StudioFolder
from sartor.studio.visitor import Owner, PostedForm, Studio, Visitor, studio_of, text_field

router = APIRouter()
PREVIEW_ROWS = 5
MAX_YAML_CHARS = 1_000_000
RECIPE_FILE, DATASET_FOLDER = "curate.yaml", "data"
STARTING_RECIPE: Mapping[str, Any] = {"sources": [{"path": ""}], "steps": [{"kind": "exact_duplicates"}]}
# options whose texts are never paths
_TEXTS = {"prompt", "system", "licence", "match", "with", "name", "terms", "fields"}
# options that name files
_FILE_OPTIONS = {"path", "against", "examples", "encoder", "known"}
_WILDCARD = re.compile(r"[*?\[]")


@router.get("/recipe")
def recipe(request: Request, visitor: Owner, dataset: str = "", file: str = "") -> Response:
    """Show a recipe to begin with: that of a Dataset, one for a file, or an empty one."""
    folder = studio_of(request).folder
    if dataset:
        found = folder.artifact(dataset, ("dataset",)).manifest.get("recipe")
        if not isinstance(found, Mapping):
            raise ConfigError(f"{dataset} was not made by a recipe", "choose another Dataset")
        return _show(request, visitor, _curate_form().without_defaults(found))
    start: dict[str, Any] = {**STARTING_RECIPE}
    if file:
        folder.resolve(file)
        start["sources"] = [{"path": file}]
    return _show(request, visitor, start, is_checked=bool(file))


@router.post("/recipe")
def change(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Take a changed recipe: add, remove or move a part, check it, or start it as a job."""
    studio = studio_of(request)
    action, _, target = text_field(form, "do").partition(":")
    text_field(form, "yaml", max_chars=MAX_YAML_CHARS)
    text = str(form.get("yaml", ""))  # with the indentation of its first line
    try:
        stated = parse_yaml(text, "the recipe") if action == "yaml" else _curate_form().read(_fields(form))
    except ConfigError as error:
        kept = {} if action == "yaml" else _readable(form)
        return _show(request, visitor, kept, text=text if action == "yaml" else "", problem=error)
    if action in ("add", "remove", "up", "down"):
        _rearrange(stated, action, target, text_field(form, "new_step"))
        return _show(request, visitor, stated, name=text_field(form, "name"), is_checked=False)
    errors = _errors(studio.folder, stated)
    name = text_field(form, "name")
    if action == "start" and not errors:
        try:
            return _start(request, studio, visitor, stated, name)
        except ConfigError as error:
            errors = [error]
    return _show(request, visitor, stated, name=name, errors=errors)


@functools.cache
def _curate_form() -> RecipeForm:
    return RecipeForm(sartor.schema("curate").schema)


def _fields(form: FormData) -> dict[str, str]:
    """Return the texts of a form by field; of a field with several boxes, a line for each that is ticked."""
    texts: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            texts.setdefault(name, []).append(value)
    return {name: "\n".join(values) for name, values in texts.items()}


def _readable(form: FormData) -> dict[str, Any]:
    """Return the recipe of a form without the fields of YAML that cannot be read."""
    fields = _fields(form)
    while True:
        try:
            return _curate_form().read(fields)
        except ConfigError as error:
            if fields.pop(error.option, None) is None:
                return {}


def _show(
    request: Request,
    visitor: Visitor,
    stated: Mapping[str, Any],
    *,
    text: str = "",
    name: str = "",
    problem: ConfigError | None = None,
    errors: list[SartorError] | None = None,
    is_checked: bool = True,
) -> Response:
    """Show a recipe. text: YAML that cannot be read, as it was typed. is_checked: whether to show its errors."""
    folder = studio_of(request).folder
    if errors is None:
        errors = _errors(folder, stated) if is_checked and not text else []
    shown_errors = [problem] if problem else errors
    filled: FilledForm = _curate_form().fill(stated, shown_errors)
    preview, failure = None, None
    if is_checked and not shown_errors and not text and not _asks_a_hub(stated):
        try:
            preview = sartor.preview_recipe(_anchored(folder, stated), rows=PREVIEW_ROWS)
        except SartorError as error:
            failure = error
    return render(
        request,
        visitor,
        "data_recipe",
        form=filled,
        kinds=_curate_form().step_kinds(),
        yaml=text or recipe_yaml(stated),
        is_unreadable=bool(text),
        files=folder.data_files(),
        name=name,
        error_count=len(shown_errors),
        preview=preview,
        failure=failure,
        turns=[turns_of_example(example) for example in preview.rows] if preview else [],
        shown_chars=SHOWN_CHARS,
    )


def _errors(folder: StudioFolder, stated: Mapping[str, Any]) -> list[SartorError]:
    """Return the recipe's own errors, and one for each path that leads out of the studio's folder."""
    errors = check_recipe(stated)
    for option, value in _texts(stated, ""):
        if option.rpartition(".")[2] not in _TEXTS and not _is_inside(folder, value):
            outside = ConfigError(f"{option} is {value[:200]!a}, not below this folder", "give a file of this folder")
            errors.append(about_option(outside, option))
    return errors


def _texts(value: Any, option: str) -> Iterator[tuple[str, str]]:
    """Yield (path of the option, text) of each text of a recipe."""
    if isinstance(value, str):
        yield option, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _TEXTS:
                yield from _texts(inner, f"{option}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, option if isinstance(inner, str) else f"{option}[{index}]")


def _is_inside(folder: StudioFolder, text: str) -> bool:
    """Return whether a text names no file or folder outside the studio's folder, nor its own hidden one.

    A database may be a file anywhere, so sources of SQL are for the terminal.
    """
    if text.startswith("sql:") or ".." in text.replace("\\", "/").split("/"):
        return False
    plain = _WILDCARD.split(text.removeprefix("inbox:").partition("#")[0])[0]
    if not plain or "\0" in plain:
        return True
    try:
        path = (folder.root / Path(plain).expanduser()).resolve()
        is_below = path.is_relative_to(folder.root) and not path.is_relative_to(folder.hidden)
        return is_below or not (path.exists() or plain.startswith(("/", "~")))
    except (OSError, RuntimeError, ValueError):
        return False


def _asks_a_hub(stated: Mapping[str, Any]) -> bool:
    """Return whether a source is of a hub: the studio itself asks no other host."""
    return any(option.endswith(".path") and text.startswith("hub:") for option, text in _texts(stated, ""))


def _anchored(folder: StudioFolder, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose files are found from any current directory, for a preview within the studio."""

    def with_root(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: with_root(name, inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [with_root(key, inner) for inner in value]
        is_file = key in _FILE_OPTIONS and isinstance(value, str) and _names_a_file(folder.root, value)
        return str(folder.root / value) if is_file else value

    return {key: with_root(key, value) for key, value in stated.items()}


def _names_a_file(root: Path, text: str) -> bool:
    plain = _WILDCARD.split(text.partition("#")[0])[0]
    try:
        return "\0" not in plain and ":" not in plain and (root / plain).exists()
    except (OSError, ValueError):
        return False


def _rearrange(stated: dict[str, Any], action: str, target: str, kind: str) -> None:
    """Add, remove or move a source or a step.

    target: `sources` or `steps` to add one; `steps[1]` to remove or move it. kind: of a step to add.
    Raises ConfigError for another target.
    """
    match = re.fullmatch(r"(sources|steps)(?:\[(\d{1,3})\])?", target)
    if not match or (action != "add") != (match[2] is not None):
        raise ConfigError(f"there is no {target[:40]!a} in a recipe", "use the page's own buttons")
    items = stated.setdefault(match[1], [])
    if action == "add":
        items.append({"path": ""} if match[1] == "sources" else {"kind": kind or "exact_duplicates"})
        return
    index = int(match[2])
    if index >= len(items):
        raise ConfigError(f"there is no {target[:40]!a} in the recipe", "reload the page")
    item = items.pop(index)
    if action != "remove":
        items.insert(max(0, index + (1 if action == "down" else -1)), item)


def _start(request: Request, studio: Studio, visitor: Visitor, stated: Mapping[str, Any], name: str) -> Response:
    assert visitor.user is not None
    if not is_valid_name(name):
        raise ConfigError(f"{name[:40]!a} is no name", "lower-case letters, digits, - and ., such as faq")
    target = studio.folder.root / name
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{name} exists in this folder", "choose another name")
    target.mkdir()
    write_file_atomic(target / RECIPE_FILE, recipe_yaml(stated).encode())
    out = target / DATASET_FOLDER
    job = studio.jobs.start(
        ["curate", str(target / RECIPE_FILE), "--out", str(out)],
        title=name,
        by=visitor.user.name,
        cwd=studio.folder.root,
        out=str(out),
    )
    return redirect(request, f"/jobs/{job.id}")
