"""State shared by all routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request

from sartor.core.errors import KeyRefusedError, UnknownAgentError
from sartor.serving.api_keys import Principal
from sartor.serving.feedback_intake import FeedbackIntake
from sartor.serving.feedback_store import Exchange, Memory
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.media_checks import MediaChecker
from sartor.serving.http.reply_collection import ReplyGroup
from sartor.serving.http.request_body import BodyReader
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.services import Services
from sartor.serving.http.shutdown import ServerLifetime
from sartor.serving.http.speech_service import MODEL
from sartor.serving.http.telemetry import Metrics
from sartor.serving.team_config import MediaLimits, RequestLimits
from sartor.serving.types import AgentReply, AgentRequest

MOST_HEADER = 512
SPECIAL = ("base", "auto")
USER_HEADER = "x-sartor-user"


@dataclass(frozen=True)
class AppState:
    """The house, the limits, and what this process keeps."""

    house: Services
    limits: RequestLimits
    shift: ServerLifetime
    meters: Metrics
    memory: Memory
    hearing: FeedbackIntake
    reading: BodyReader
    looking: MediaChecker
    media: MediaLimits

    def most_bytes(self, has_media: bool) -> int:
        """Of a request's body. With media these come beside the rest, a third larger as base64."""
        return self.limits.body_bytes + (self.media.bytes * 4 // 3 if has_media else 0)

    async def check_model(self, model: str, visitor: Principal) -> None:
        """Raises UnknownAgentError for a name that nobody has, KeyRefusedError for one that the visitor's key does not open."""
        name, at, version = model.partition("@")
        listed = {agent.name: agent for agent in (*await self.house.roster.listed(), *self.house.plans)}
        is_special = name in SPECIAL and not at
        if not (is_special or (name in listed and (not at or version in listed[name].versions))):
            opened = [other for other in (*SPECIAL, *listed) if visitor.opens(other)]
            raise UnknownAgentError(
                f"there is no agent {model[:80]!a}; there are: {', '.join(opened) or 'none that this key opens'}",
                f'"model": "{opened[-1]}"' if opened else "send a key of that agent",
            )
        if not visitor.opens(name):
            raise KeyRefusedError(f"this key does not open {name!r}", "send a key of that agent")

    def check_speech(self, visitor: Principal) -> None:
        """Raises UnknownAgentError where the team does not speak, KeyRefusedError for a key that does not open `speech`."""
        self.house.speech.check_on()
        if not visitor.opens(MODEL):
            raise KeyRefusedError(f"this key does not open {MODEL!r}", f"sartor agents key {MODEL} makes one that does")

    def remember(self, key: str, person: str, answer: AgentReply, question: AgentRequest, reply: str) -> None:
        """Keep a reply that is whole, and who got it, so that feedback on it can be learnt from."""
        exchange = Exchange(answer.agent, question.messages, question.text, reply, key, person)
        self.memory.keep(answer.receipt, exchange)

    def person(self, user: str, header: str) -> str:
        """Whom a request names, "" for nobody. user: OpenAI's field; header: `x-sartor-user`. Raises FieldError for two."""
        if header and user and header != user:
            raise FieldError(f"user and the header {USER_HEADER} name two persons", "send one of the two", "user")
        return self.house.people.person_of(header or user)

    def spoken_for(self, person: str, header: str, visitor: Principal) -> str:
        """Whose own versions may answer. A key that may not speak for a person changes nothing by `user`, as on other servers.

        Raises KeyRefusedError where the header asks for somebody for whom it may not speak.
        """
        if not person or visitor.may_speak_for(person):
            return person
        if header:
            raise KeyRefusedError("this key may not speak for that user", "sartor personal allow lets it")
        return ""

    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: of the base that all agents stand on."""
        return f"fp_{self.house.crew.about.base_digest[:12]}"


def get_state(request: Request) -> AppState:
    """The desk of the application that this request came to."""
    desk: AppState = request.app.state.desk
    return desk


def get_record(request: Request) -> RequestRecord:
    """What is noted of this request."""
    entry: RequestRecord = request.scope["state"]["entry"]
    return entry


def reply_headers(opened: ReplyGroup) -> Mapping[str, str]:
    """Who answered, why, and under which receipts."""
    first = opened.first
    said = {"x-sartor-agent": first.agent, "x-sartor-reason": first.reason, "x-sartor-receipt": opened.receipts}
    return {name: as_header(value) for name, value in said.items()}


def as_header(text: str) -> str:
    """A text as a header may hold it: ASCII, one line, short."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in plain)[:MOST_HEADER].strip()


def agent_of(version: str) -> str:
    """The agent of an exact version, `base` of the base's."""
    return version.partition("@")[0]
