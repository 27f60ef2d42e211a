"""Talk: a conversation with any two of a base, an Adapter, a Release and a team's agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, Response, StreamingResponse

from sartor.core.errors import ConfigError, ConflictError, KeyRefusedError, UnavailableError
from sartor.core.html import escape_control
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio import talk_servers
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_files import Job, JobState
from sartor.studio.page_renderer import redirect, render
from sartor.studio.reply_streams import MAX_TOKENS, LiveReply, ReplyKey, ReplyRequest
from sartor.studio.request_guard import MAX_MEDIA_BYTES
from sartor.studio.served_talk import BASE, ReplyEnd, Side, SideReply, Talk, TalkTurn
from sartor.studio.server_traffic import key_headers
from sartor.studio.talk_media import kind_of, media_file, store_media, user_message
from sartor.studio.talk_servers import BASE_PREFIX, ServedModel, running_server, server_status
from sartor.studio.visitor import PostedForm, Reviewer, Studio, Visitor, studio_of, text_field

router = APIRouter()
MAX_TEMPERATURE = 2.0
# seconds between two looks at a reply that is written, and that a request to a server may take
LOOK_S, REQUEST_S = 0.04, 60.0


@router.get("/talk")
def targets(request: Request, visitor: Reviewer) -> Response:
    """List what can be talked to, and the servers that run."""
    studio = studio_of(request)
    found = talk_servers.targets(studio.folder)
    served = {status.job.title: status for status in talk_servers.servers(studio).values()}
    return render(request, visitor, "talk_targets", found=found, served=served, base_prefix=BASE_PREFIX)


@router.post("/talk")
def open_servers(request: Request, visitor: Reviewer, form: PostedForm) -> Response:
    """Serve one target or two, unless they are served, and go to the conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    names = list(dict.fromkeys(filter(None, (text_field(form, "artefact"), text_field(form, "second")))))
    if base := text_field(form, "base", max_chars=400):
        if not visitor.may(Role.OWNER):
            raise KeyRefusedError("a base of any name is opened by an owner", "ask them, or choose one of the list")
        names = [f"{BASE_PREFIX}{base}"]
    if not names:
        raise ConfigError("nothing was chosen", "choose what to talk to")
    known = {target.name for target in talk_servers.targets(studio.folder)}
    for name in names:
        if name.startswith(BASE_PREFIX) and name not in known and not base:
            raise ConfigError(f"{name[:80]!a} is not in this folder", "choose one of the list")
        talk_servers.target_of(studio, name)  # before any of them is started
    first, *others = [talk_servers.open_server(studio, name, visitor.user.name) for name in names]
    return redirect(request, f"/talk/{first}", **({"beside": others[0]} if others else {}))


@router.get("/talk/{job_id}")
def talk(request: Request, visitor: Reviewer, job_id: str, beside: str = "") -> Response:
    """Show a conversation. beside: job of another server whose model answers too."""
    assert visitor.user is not None
    studio = studio_of(request)
    status = server_status(studio, job_id)
    result = studio.jobs.files.result(job_id)
    is_ready = status.state is JobState.RUNNING and "address" in result
    views = talk_servers.views(studio) if is_ready else []
    own = [view for view in views if view.status.job.id == job_id]
    models = [model for view in (*own, *(view for view in views if view not in own)) for model in view.models]
    conversation = Talk(studio.talks, job_id, visitor.user.name)
    turns = conversation.turns()
    waiting = beside if beside and beside not in {view.status.job.id for view in views} else ""
    return render(
        request,
        visitor,
        "talk",
        title=status.job.title,
        status=status,
        beside=beside,
        other=studio.jobs.files.status(waiting) if waiting else None,
        is_ready=is_ready and (not waiting or studio.jobs.files.status(waiting).state.is_over),
        turns=[_shown(studio, conversation, index, turn) for index, turn in enumerate(turns)],
        is_busy=studio.replies.is_busy(conversation.name),
        models=models,
        chosen=_chosen(models, job_id, turns, beside),
        problems=[problem for view in views for problem in view.problems],
        reads=sorted({kind for model in models for kind in model.reads}),
        speaking={view.status.job.id for view in views if view.speaks},
        titles={view.status.job.id: view.status.job.title for view in views},
        max_media_bytes=MAX_MEDIA_BYTES,
        max_tokens=MAX_TOKENS,
        log=studio.jobs.log_lines(job_id)[-5:],
    )


def _shown(studio: Studio, talk: Talk, index: int, turn: TalkTurn) -> dict[str, Any]:
    """Return a turn for the page: its replies with the text so far of those that are being written."""
    replies = []
    for side, reply in enumerate(turn.replies):
        live = studio.replies.find(ReplyKey(talk.name, index, side)) if reply.end is ReplyEnd.PENDING else None
        if reply.end is ReplyEnd.PENDING and live is None:  # it may have ended since the turns were read
            _, reply = talk.reply(index, side)
        text = live.text if live else reply.text
        replies.append({"reply": reply, "text": text, "is_live": live is not None, "job": Side.of(reply.side).job_id})
    return {"prompt": turn.prompt, "replies": replies, "media": [(name, kind_of(name)) for name in turn.media]}


def _chosen(models: list[ServedModel], job_id: str, turns: list[TalkTurn], beside: str) -> tuple[str, str]:
    """Return the keys of the sides that the form proposes: those of the last turn, else a tuned model and its base."""
    keys = [model.side.key for model in models]
    if turns and not beside:
        last = [reply.side for reply in turns[-1].replies if reply.side in keys]
        return (last[0] if last else next(iter(keys), ""), last[1] if len(last) > 1 else "")
    first = next((key for key in keys if Side.of(key).job_id == job_id), next(iter(keys), ""))
    wanted = beside or job_id
    second = [key for key in keys if Side.of(key).job_id == wanted and key != first]
    if not beside:
        second = [key for key in second if Side.of(key).model == BASE]
    return first, next(iter(second), "")


@router.post("/talk/{job_id}")
def ask(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Ask the chosen sides. With JavaScript their replies are streamed to the page; else it comes with them."""
    assert visitor.user is not None
    studio = studio_of(request)
    conversation = Talk(studio.talks, job_id, visitor.user.name)
    running_server(studio, job_id)
    if studio.replies.is_busy(conversation.name):
        raise ConflictError("the last reply is still being written", "wait for it, or stop it")
    keys = list(dict.fromkeys(filter(None, (text_field(form, "first"), text_field(form, "second")))))
    if not keys:
        raise ConfigError("no model was chosen", "choose who answers")
    sides = [Side.of(key) for key in keys]
    addresses = [running_server(studio, side.job_id)[1] for side in sides]
    prompt, options = text_field(form, "prompt", max_chars=100_000), _options(form)
    studio.replies.check_room(len(sides))
    attached = form.get("media")
    media = []
    if isinstance(attached, UploadFile) and attached.filename:
        media.append(store_media(conversation, attached.file, attached.content_type or ""))
    turn = conversation.begin(sides, prompt, media)
    started = []
    for index, (side, address) in enumerate(zip(sides, addresses, strict=True)):
        messages = [*_history(conversation, side, turn), user_message(conversation, prompt, media)]
        started.append(_start(studio, conversation, ReplyRequest(address, side, messages, options), turn, index))
    if not request.headers.get("hx-request"):
        for live in started:
            assert live.thread is not None
            live.thread.join()
    return redirect(request, f"/talk/{job_id}")


def _start(studio: Studio, talk: Talk, request: ReplyRequest, turn: int, side: int) -> LiveReply:
    return studio.replies.start(ReplyKey(talk.name, turn, side), request, lambda reply: talk.put(turn, side, reply))


def _history(talk: Talk, side: Side, turn: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for earlier, reply in talk.history(side.key, turn):
        messages += [
            user_message(talk, earlier.prompt, earlier.media),
            {"role": "assistant", "content": reply.text},
        ]
    return messages


def _options(form: FormData) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS}
    if text := text_field(form, "temperature", max_chars=10):
        options["temperature"] = _temperature(text)
    return options


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_TEMPERATURE:
        raise ConfigError(f"{text!a} is no temperature", f"a number from 0 to {MAX_TEMPERATURE:g}")
    return value


@router.get("/talk/{job_id}/replies/{turn}/{side}/events")
async def events(
    request: Request, visitor: Reviewer, job_id: str, turn: int, side: int, after: int = 0
) -> StreamingResponse:
    """Stream a reply: events of JSON strings, each the text that came since the last, and `end`.

    after: characters that the page has already. A browser that connects again names them as Last-Event-ID.
    """
    assert visitor.user is not None
    studio = studio_of(request)
    talk = Talk(studio.talks, job_id, visitor.user.name)
    last = request.headers.get("last-event-id", "")
    position = int(last[:9]) if last.isdecimal() else max(0, after)
    live = studio.replies.find(ReplyKey(talk.name, turn, side))
    return StreamingResponse(
        _stream(request, live, position), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


async def _stream(request: Request, live: LiveReply | None, position: int) -> AsyncIterator[str]:
    while live is not None and not await request.is_disconnected():
        is_over, text = live.is_over, live.text
        if len(text) > position:
            shown = json.dumps(escape_control(text[position:]))
            position = len(text)
            yield f"id: {position}\ndata: {shown}\n\n"
        if is_over:
            break
        await asyncio.sleep(LOOK_S)
    yield "event: end\ndata: over\n\n"


@router.post("/talk/{job_id}/stop")
def stop(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """End a reply that is being written, with what has come."""
    assert visitor.user is not None
    studio = studio_of(request)
    talk = Talk(studio.talks, job_id, visitor.user.name)
    studio.replies.stop(ReplyKey(talk.name, _number(form, "turn"), _number(form, "side")))
    return redirect(request, f"/talk/{job_id}")


def _number(form: FormData, name: str) -> int:
    text = text_field(form, name, max_chars=6)
    if not text.isdecimal():
        raise ConfigError(f"the field {name} is no number", "use the form of the page")
    return int(text)


def chosen_reply(studio: Studio, visitor: Visitor, job_id: str, form: FormData) -> tuple[Talk, int, int, SideReply]:
    """Return the conversation, turn, side and reply that a form names. Raises ConfigError."""
    assert visitor.user is not None
    talk = Talk(studio.talks, job_id, visitor.user.name)
    turn, side = _number(form, "turn"), _number(form, "side")
    return talk, turn, side, talk.reply(turn, side)[1]


def request_messages(talk: Talk, turn: int, reply: SideReply) -> list[dict[str, Any]]:
    """Return the messages to which a reply was given, as the server was sent them."""
    asked, side = talk.turns()[turn], Side.of(reply.side)
    return [*_history(talk, side, turn), user_message(talk, asked.prompt, asked.media)]


@router.post("/talk/{job_id}/feedback")
def feedback(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Give a rating or a correction to the server that replied, which stores it in its inbox."""
    assert visitor.user is not None
    studio = studio_of(request)
    talk, turn, side, reply = chosen_reply(studio, visitor, job_id, form)
    job, address = running_server(studio, Side.of(reply.side).job_id)
    given: dict[str, Any] = {"receipt": reply.receipt, "consent": bool(text_field(form, "consent"))}
    rating = text_field(form, "rating", max_chars=4)
    if rating not in ("", "1", "-1"):
        raise ConfigError(f"{rating!a} is no rating", "1 or -1")
    if rating:
        given["rating"] = int(rating)
    if correction := text_field(form, "correction", max_chars=100_000):
        given["correction"] = correction
    answer = ask_server("POST", f"{address}/v1/feedback", json={**given, "user": visitor.user.name}).json()
    state = talk_servers.state_of(job)
    stored: dict[str, Any] = {
        **{name: given[name] for name in ("rating", "correction") if name in given},
        "is_learnable": bool(answer.get("learnable")),
        "inbox": str(state / "inbox"),
        "command": _learning_command(job, str(answer.get("agent", "")).partition("@")[0]),
    }
    talk.put(turn, side, SideReply(**{**vars(reply), "feedback": {**reply.feedback, **stored}}))
    return redirect(request, f"/talk/{job_id}")


def _learning_command(job: Job, agent: str) -> list[str]:
    """Return the command that learns from a server's feedback; empty for an Adapter, whose inbox `curate` reads."""
    team = talk_servers.team_file_of(job)
    return ["retrain", str(team), "--agent", agent] if team and agent != BASE else []


def ask_server(method: str, url: str, **fields: Any) -> httpx.Response:
    """Return a server's answer. Raises UnavailableError, with the server's sentence if it refuses."""
    try:
        answer = httpx.request(method, url, headers=key_headers(), timeout=REQUEST_S, trust_env=False, **fields)
        if answer.status_code == 200:
            return answer
        error = answer.json()["error"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as fault:
        raise UnavailableError(f"the server does not answer: {fault}", "open it again on the page Talk") from None
    remedy = str(error.get("remedy") or "ask again")
    problem = str(error.get("message", "")).removesuffix(f"; try: {remedy}")
    raise UnavailableError(problem[:500], remedy[:500])


@router.get("/talk/{job_id}/replies/{turn}/{side}/speech")
def speech(request: Request, visitor: Reviewer, job_id: str, turn: int, side: int) -> Response:
    """Return a reply as speech of its server's voice."""
    assert visitor.user is not None
    studio = studio_of(request)
    _, reply = Talk(studio.talks, job_id, visitor.user.name).reply(turn, side)
    _, address = running_server(studio, Side.of(reply.side).job_id)
    body = {"model": "speech", "input": reply.text[:4096], "response_format": "wav"}
    spoken = ask_server("POST", f"{address}/v1/audio/speech", json=body)
    return Response(spoken.content, media_type="audio/wav")


@router.get("/talk/{job_id}/media/{name}")
def media(request: Request, visitor: Reviewer, job_id: str, name: str) -> Response:
    """Return a picture or a recording of the user's own conversation."""
    assert visitor.user is not None
    file, kind = media_file(Talk(studio_of(request).talks, job_id, visitor.user.name), name)
    return FileResponse(file, media_type=kind)


@router.get("/talk/{job_id}/receipts/{turn}/{side}")
def receipt(
    request: Request, visitor: Reviewer, job_id: str, turn: int, side: int, download: bool = False
) -> Response:
    """Show the receipt of a reply with the command that verifies it, or send it with the words that it is for."""
    assert visitor.user is not None
    studio = studio_of(request)
    talk = Talk(studio.talks, job_id, visitor.user.name)
    _, reply = talk.reply(turn, side)
    if not reply.receipt:
        raise NotFoundError("this reply has no receipt", "ask again")
    job, document = fetch_receipt(studio, reply)
    name = f"receipt-{reply.receipt}.json"
    if download:
        content = {"receipt": document, "messages": request_messages(talk, turn, reply), "reply": reply.text}
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(json.dumps(content, indent=1), media_type="application/json", headers=headers)
    team = talk_servers.team_file_of(job)
    public_key = talk_servers.state_of(job) / "keys" / "sartor.pub"
    trust = ["--team", str(team)] if team else ["--public-key", str(public_key)]
    return render(
        request,
        visitor,
        "talk_receipt",
        title=reply.receipt,
        job=job,
        talk_id=job_id,
        turn=turn,
        side=side,
        reply=reply,
        receipt=document,
        verify=["receipt", "verify", name, *trust],
        is_keyed=team is not None,
    )


def fetch_receipt(studio: Studio, reply: SideReply) -> tuple[Job, dict[str, Any]]:
    """Return the job of the server that gave a reply, and the reply's receipt. Raises UnavailableError."""
    job, address = running_server(studio, Side.of(reply.side).job_id)
    document = ask_server("GET", f"{address}/v1/receipts/{reply.receipt}").json()
    if not isinstance(document, dict):
        raise UnavailableError("the server sends no receipt", "ask again")
    return job, document


@router.post("/talk/{job_id}/clear")
def clear(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Delete the user's conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    Talk(studio.talks, server_status(studio, job_id).job.id, visitor.user.name).clear()
    return redirect(request, f"/talk/{job_id}")
