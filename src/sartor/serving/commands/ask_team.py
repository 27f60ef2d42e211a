"""Verb ask for a team, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sartor.core.artifacts import open_artifact
from sartor.core.errors import SartorError, UnavailableError
from sartor.core.ipc import error_of
from sartor.core.records import Part
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import ReplyDone, ReplyFailed, TextDelta
from sartor.serving.commands.ask_types import AskPrompt, AskReply, as_prompt, nearest_examples
from sartor.serving.http.startup import build_services
from sartor.serving.registry.registry import Registry
from sartor.serving.team_config import Http, Team, load
from sartor.serving.types import AgentRequest


def ask_team(
    team: Team | Path | str,
    prompt: str | AskPrompt,
    *,
    agent: str = "auto",
    sampling: Mapping[str, Any] | None = None,
    top: int = 3,
    notice: Callable[[str], object] = lambda line: None,
) -> AskReply:
    """Ask a team once, with one worker that is started and stopped.

    agent: a name, `name@version`, a plan, `base` or `auto`.
    Raises UnknownAgentError for an unknown name, RequestError for media that the agent does not read,
    UnavailableError, and the worker's error if it did not start.
    """
    question = as_prompt(prompt)
    question.check(question.kinds, "")
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    single_worker_team = without_http(loaded_team)
    notice(f"opening the base {loaded_team.base!r} and the agents of the team")
    reply = asyncio.run(_ask(single_worker_team, AgentRequest(agent, (question.plain(),), sampling=sampling or {})))
    nearest, note = _nearest(single_worker_team, replace(reply, prompt=question.text), top, question.media)
    return replace(reply, prompt=question.text, media=question.media_digests(), nearest=nearest, nearest_note=note)


def without_http(team: Team) -> Team:
    """Return the team with one worker and no use of HTTP; the port is any free one."""
    return replace(team, workers=replace(team.workers, count=1, spare=0), http=Http(port=0))


async def _ask(team: Team, request: AgentRequest) -> AskReply:
    async with build_services(team) as services:
        answer = await services.replies.open(request)
        text, final_event = "", None
        async with aclosing(cast(Any, answer.events)) as events:
            async for event in cast(AsyncIterator[TextDelta | ReplyDone | ReplyFailed], events):
                if isinstance(event, TextDelta):
                    text += event.text
                else:
                    final_event = event
        if isinstance(final_event, ReplyFailed):
            raise error_of(final_event.kind, final_event.problem, final_event.remedy)
        if final_event is None:
            raise UnavailableError("the reply stopped before its end", REQUEST_AGAIN)
        receipt = await services.receipts.find(answer.receipt)
        return AskReply(
            prompt="",
            reply=text,
            finish=final_event.finish,
            agent=answer.agent,
            reason=answer.reason,
            nearest=[],
            receipt=answer.receipt if receipt else None,
        )


def _nearest(team: Team, reply: AskReply, top: int, media: Sequence[Part]) -> tuple[list[dict[str, Any]], str]:
    """Return training examples of the version that answered, and a note.

    Examples need the version's Dataset on this machine.
    """
    agent = reply.agent
    with closing(Registry.of(team)) as registry:
        version = registry.read().versions.get(agent)
    if any(agent.partition("@")[0] == plan.name for plan in team.plans):
        return [], "a plan answered; ask an agent by name for what it learnt from"
    if version is None:
        return [], "the base answered, which has no examples of yours"
    try:
        release = open_artifact(version.release, "release")
        return nearest_examples(release, reply.prompt, reply.reply, top, media)
    except SartorError as error:  # the reply is valid without its nearest examples
        return [], error.problem
