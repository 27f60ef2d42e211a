"""Why did it say that: the rows behind a reply, the proof by retraining, the repair of a Release.

Each step is a command as a job: `sartor trace`, `sartor ablate`, `sartor fix`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData
from starlette.responses import Response

from sartor.core.artifacts import Artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError, KeyRefusedError
from sartor.core.home import home
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_files import JobState, JobStatus
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.evaluate_pages import DEFAULT_KEY
from sartor.studio.pages.talk_pages import chosen_reply, fetch_receipt, request_messages
from sartor.studio.questions import CORRECTIONS, MESSAGES, RECEIPT, REPLY, Question, Questions
from sartor.studio.served_talk import Side
from sartor.studio.talk_servers import server_status
from sartor.studio.team_files import SUFFIXES
from sartor.studio.visitor import Owner, PostedForm, Reviewer, Studio, Visitor, studio_of, text_field

router = APIRouter()
TRACE, ABLATE, FIX, KEYGEN = "trace", "ablate", "fix", "keygen"
METHODS = ("retrieval", "gradient", "unrolled")
# of an ablation: sets of other rows, and the most that the form takes
LEAST_CONTROLS, MAX_CONTROLS, MAX_SEEDS = 5, 50, 10
MAX_SUSPECTS = 50
# bytes of one argument of a command
MAX_ARGUMENT_BYTES = 100_000
# of a trace's JSON, in which rows are whole
RESULT_BYTES = 64 << 20
SHOWN_CHARS = 1500
PROOF_KEY = Path("keys/proof")


@dataclass(frozen=True)
class EffectsChart:
    """Effects of the suspects and of each control set as positions on an axis, 0 to 100 %. zero: where 0 nats is."""

    suspects: float
    controls: Sequence[float]
    low: float
    high: float
    zero: float


def _questions(studio: Studio) -> Questions:
    return Questions(studio.folder.hidden / "questions")


def _open(request: Request, visitor: Visitor, question_id: str) -> tuple[Studio, Question]:
    """Return a question of the visitor, or anybody's for an owner. Raises NotFoundError, KeyRefusedError."""
    studio = studio_of(request)
    question = _questions(studio).open(question_id)
    if not visitor.may(Role.OWNER) and (visitor.user is None or question.by != visitor.user.name):
        raise KeyRefusedError("this question is somebody else's", "ask them, or an owner")
    return studio, question


@router.post("/talk/{job_id}/why")
def begin(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Look for the rows behind a reply of a conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    talk, turn, _, reply = chosen_reply(studio, visitor, job_id, form)
    if reply.is_base or not reply.is_history:
        raise ConfigError("no rows of yours have taught this reply", "choose a whole reply of a tuned model")
    messages = request_messages(talk, turn, reply)
    job, receipt = server_status(studio, Side.of(reply.side).job_id).job, None
    is_team = Path(job.out).suffix in SUFFIXES
    if is_team:
        _, receipt = fetch_receipt(studio, reply)
    question = Question(
        id="",
        by=visitor.user.name,
        at=0.0,
        agent=reply.model,
        prompt=talk.turns()[turn].prompt,
        reply=reply.text,
        target="" if is_team else job.out,
        team=job.out if is_team else "",
        is_first=len(messages) == 1 and isinstance(messages[0]["content"], str),
    )
    question = _questions(studio).create(question, messages, receipt)
    return _start_trace(request, studio, question, visitor, ["--method", METHODS[0]])


@router.post("/why/{question_id}/trace")
def trace_again(request: Request, visitor: Reviewer, question_id: str, form: PostedForm) -> Response:
    """Look for the rows by another method, or among those of another Dataset."""
    studio, question = _open(request, visitor, question_id)
    method = text_field(form, "method") or METHODS[0]
    if method not in METHODS:
        raise ConfigError(f"{method[:40]!a} is no method", f"one of {', '.join(METHODS)}")
    options = ["--method", method]
    if data := text_field(form, "data"):
        options += ["--data", str(studio.folder.artifact(data, ("dataset",)).path)]
    return _start_trace(request, studio, question, visitor, options)


def _start_trace(
    request: Request, studio: Studio, question: Question, visitor: Visitor, options: Sequence[str]
) -> Response:
    folder = _questions(studio).path(question.id)
    arguments = [TRACE, *([question.target] if question.target else [])]
    if question.team:
        arguments += ["--receipt", str(folder / RECEIPT), "--team", question.team]
    arguments += ["--messages", str(folder / MESSAGES), "--reply-file", str(folder / REPLY), *options]
    # a look-up does not wait for a tuning
    is_heavy = METHODS[0] not in options
    return _start(request, studio, question, visitor, arguments, is_heavy=is_heavy)


def _start(
    request: Request,
    studio: Studio,
    question: Question,
    visitor: Visitor,
    arguments: Sequence[str],
    *,
    page: str = "",
    out: str = "",
    adapter: str = "",
    is_heavy: bool = True,
) -> Response:
    """Start a command about a question as a job, note it and go to a page of the question."""
    job = studio.jobs.start(
        arguments,
        title=question.agent,  # users who may not read the question see the list of jobs
        by=visitor.user.name if visitor.user else "",
        cwd=studio.folder.root,
        out=out,
        adapter=adapter,
        is_heavy=is_heavy,
    )
    _questions(studio).save(replace(question, jobs={**question.jobs, arguments[0]: job.id}))
    return redirect(request, f"/why/{question.id}{page}")


def _status(studio: Studio, question: Question, verb: str) -> JobStatus | None:
    """Return the last job of a verb; None if there is none, or its journal is gone."""
    if verb not in question.jobs:
        return None
    try:
        return studio.jobs.files.status(question.jobs[verb])
    except ConfigError:
        return None


def _trace_result(studio: Studio, question: Question) -> dict[str, Any]:
    """Return the JSON of the last trace; empty if it has none."""
    status = _status(studio, question, TRACE)
    if status is None or status.state is not JobState.DONE:
        return {}
    result = studio.jobs.files.result(status.job.id, RESULT_BYTES)
    return result if isinstance(result.get("examples"), list) else {}


@router.get("/why/{question_id}")
def rows(request: Request, visitor: Reviewer, question_id: str) -> Response:
    """Show the rows behind a reply, best first."""
    studio, question = _open(request, visitor, question_id)
    result = _trace_result(studio, question)
    target = _target(question, result)
    artifacts, _ = studio.folder.scan()
    return render(
        request,
        visitor,
        "why",
        title=question.prompt,
        question=question,
        step="rows",
        status=_status(studio, question, TRACE),
        result=result,
        datasets=[item.name for item in artifacts if item.kind == "dataset"],
        methods=METHODS,
        suspects=set(question.suspects),
        shown_chars=SHOWN_CHARS,
        dataset=studio.folder.name_of(Path(result["dataset"])) if result else "",
        tuning_s=_tuning_seconds(studio, target),
        argument_problem=_argument_problem(question),
        least_controls=LEAST_CONTROLS,
        max_controls=MAX_CONTROLS,
        max_seeds=MAX_SEEDS,
        has_key=(home() / PROOF_KEY).is_dir(),
        key_status=_status(studio, question, KEYGEN),
    )


def _target(question: Question, result: dict[str, Any]) -> Path | None:
    """Return the Adapter or Release of a question; None until the trace of a team's reply has named it."""
    path = question.target or result.get("target")
    return Path(path) if isinstance(path, str) and path else None


def _tuning_seconds(studio: Studio, target: Path | None) -> float | None:
    """Return the seconds that the tuning of an artefact took, which an ablation repeats; None if unknown."""
    try:
        manifest = read_manifest(target) if target else {}
        if manifest.get("kind") == "release" or "run" not in manifest:
            parents = {parent["id"] for parent in manifest.get("parents", [])}
            artifacts, _ = studio.folder.scan()
            runs = [item.artifact for item in artifacts if item.artifact and item.id in parents]
            manifest = next((item.manifest for item in runs if item.kind == "adapter"), {})
        return float(manifest["run"]["wall_s"])
    except (ArtifactError, KeyError, TypeError, ValueError):
        return None


def _argument_problem(question: Question) -> str:
    """Return the key of why no proof or regression case of this reply can be asked for; empty if it can."""
    if not question.is_first:
        return "why.not_first"
    too_long = max(len(text.encode("utf-8", "replace")) for text in (question.prompt, question.reply))
    return "why.too_long" if too_long > MAX_ARGUMENT_BYTES else ""


@router.post("/why/{question_id}/suspects")
def suspects(request: Request, visitor: Reviewer, question_id: str, form: PostedForm) -> Response:
    """Mark the rows that are suspected, for the proof and the repair."""
    studio, question = _open(request, visitor, question_id)
    _questions(studio).save(replace(question, suspects=_marked(studio, question, form)))
    return redirect(request, f"/why/{question_id}/fix" if text_field(form, "to") == FIX else f"/why/{question_id}")


def _marked(studio: Studio, question: Question, form: FormData) -> list[str]:
    """Return the ids of rows that a form marks. Raises ConfigError unless they are rows of the trace."""
    known = {str(row.get("id")) for row in _trace_result(studio, question).get("examples", [])}
    marked = [str(value) for value in form.getlist("examples")]
    if not marked or not set(marked) <= known:
        raise ConfigError("no row of the list is marked", "mark the rows that you suspect, then go on")
    return marked


@router.post("/why/{question_id}/key")
def make_key(request: Request, visitor: Owner, question_id: str, form: PostedForm) -> Response:
    """Make the key that signs proofs."""
    studio, question = _open(request, visitor, question_id)
    arguments = [KEYGEN, str(home() / PROOF_KEY), "--purpose", "proof", "--trust"]
    return _start(request, studio, question, visitor, arguments, is_heavy=False)


@router.post("/why/{question_id}/ablate")
def ablate(request: Request, visitor: Owner, question_id: str, form: PostedForm) -> Response:
    """Start the proof by retraining without the marked rows."""
    studio, question = _open(request, visitor, question_id)
    target = _target(question, _trace_result(studio, question))
    marked = _marked(studio, question, form)
    if problem := _argument_problem(question):
        raise ConfigError("this reply cannot be proved", f"ask the question alone in a new conversation ({problem})")
    assert target is not None  # rows were marked, so there is a trace
    controls = _count(form, "controls", LEAST_CONTROLS, MAX_CONTROLS)
    seeds = _count(form, "seeds", 1, MAX_SEEDS)
    proof = _free_path(studio.folder.root / "proofs", f"{target.name}-{question.id[:8]}")
    question = replace(question, suspects=marked, proof=str(proof))
    arguments = [ABLATE, str(target), "--examples", *marked, *_words(question), "--out", str(proof)]
    arguments += ["--controls", str(controls), "--seeds", str(seeds)]
    return _start(request, studio, question, visitor, arguments, page="/proof", out=str(proof))


def _words(question: Question) -> list[str]:
    return [f"--prompt={question.prompt}", f"--reply={question.reply}"]


def _count(form: FormData, name: str, least: int, most: int) -> int:
    text = text_field(form, name, max_chars=6) or str(least)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name} is {text!a}", f"a number from {least} to {most}")
    return int(text)


def _free_path(folder: Path, name: str) -> Path:
    candidates = (folder / f"{name}{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


@router.get("/why/{question_id}/proof")
def proof(request: Request, visitor: Reviewer, question_id: str) -> Response:
    """Show the verdict of the proof."""
    studio, question = _open(request, visitor, question_id)
    status = _status(studio, question, ABLATE)
    result = dict(status.result) if status and status.state is JobState.DONE and "verdict" in status.result else {}
    return render(
        request,
        visitor,
        "why_proof",
        title=question.prompt,
        question=question,
        step="proof",
        status=status,
        result=result,
        chart=draw_effects(result) if result else None,
        check=["ablate", "check", str(result["proof"])] if result else [],
    )


def draw_effects(result: dict[str, Any]) -> EffectsChart | None:
    """Return the chart of an ablation's effects; None for a result without them."""
    try:
        own = float(result["suspects"]["effect"])
        controls = [float(control["effect"]) for control in result["controls"]]
        excess = [float(result["effect"][name]) for name in ("low", "high")]
    except (KeyError, TypeError, ValueError):
        return None
    mean = sum(controls) / len(controls)
    # the interval is of the excess over the controls; it is drawn beside them, from their mean on
    bounds = [mean + value for value in excess]
    values = [own, *controls, *bounds, 0.0]
    low, span = min(values), max(max(values) - min(values), 1e-9)

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    return EffectsChart(place(own), [place(value) for value in controls], place(bounds[0]), place(bounds[1]), place(0))


@router.get("/why/{question_id}/fix")
def fix_form(request: Request, visitor: Reviewer, question_id: str) -> Response:
    """Show the form of the repair, or how it went."""
    studio, question = _open(request, visitor, question_id)
    result = _trace_result(studio, question)
    target = _target(question, result)
    release = _release(target)
    status = _status(studio, question, FIX)
    marked = [row for row in result.get("examples", []) if row.get("id") in question.suspects]
    out = Path(question.fix) if question.fix else None
    fixed = dict(status.result) if status and status.state is JobState.DONE else {}
    return render(
        request,
        visitor,
        "why_fix",
        title=question.prompt,
        question=question,
        step=FIX,
        status=status,
        marked=marked,
        release=release,
        released=studio.folder.name_of(out / "release") if fixed and out else "",
        fixed=fixed,
        argument_problem=_argument_problem(question),
        has_key=(home() / DEFAULT_KEY).is_dir(),
        key=home() / DEFAULT_KEY,
        shown_chars=SHOWN_CHARS,
    )


def _release(target: Path | None) -> Artifact | None:
    """Return the Release at a path; None for an Adapter, and for what cannot be read."""
    try:
        return Artifact(target, read_manifest(target, ("release",))) if target else None
    except ArtifactError:
        return None


@router.post("/why/{question_id}/fix")
def fix(request: Request, visitor: Owner, question_id: str, form: PostedForm) -> Response:
    """Start the repair: drop or correct the marked rows, tune again, release the next version."""
    assert visitor.user is not None
    studio, question = _open(request, visitor, question_id)
    release = _release(_target(question, _trace_result(studio, question)))
    if release is None:
        raise ConfigError("only a Release can be repaired", "release the Adapter on the page Evaluate, and ask it")
    if not question.suspects:
        raise ConfigError("no row is marked", "mark rows on the page of the rows first")
    reason = text_field(form, "reason", max_chars=2000)
    if not reason:
        raise ConfigError("a repair has a reason", "say why the rows are wrong")
    out = Path(question.fix) if question.fix else _free_path(studio.folder.root, f"{release.path.name}-fixed")
    arguments = [FIX, str(release.path), "--examples", *question.suspects]
    arguments += [f"--by={visitor.user.name}", f"--reason={reason}", "--out", str(out)]
    if text_field(form, "how") == "correct":
        changes = [text_field(form, f"row-{id}", max_chars=100_000) for id in question.suspects]
        if not all(changes):
            raise ConfigError("a row has no corrected reply", "write one for each, or drop the rows")
        lines = "".join(json.dumps({"reply": text}, ensure_ascii=False) + "\n" for text in changes)
        arguments += ["--correct", str(_questions(studio).write(question.id, CORRECTIONS, lines))]
    else:
        arguments.append("--drop")
    if (corrected := text_field(form, "corrected", max_chars=100_000)) and not _argument_problem(question):
        arguments += [*_words(question), f"--corrected={corrected}"]
    for check in text_field(form, "waive", max_chars=400).replace(",", " ").split():
        arguments += ["--waive", check]
    question = replace(question, fix=str(out))
    return _start(
        request, studio, question, visitor, arguments, page="/fix", out=str(out), adapter=str(out / "adapter")
    )
