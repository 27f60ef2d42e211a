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

MAX_HEADER = 512
SPECIAL = ("base", "auto")
USER_HEADER = "x-sartor-user"


@dataclass(frozen=True)
class AppState:
    """The house, the limits, and what this process keeps."""

    services: Services
    limits: RequestLimits
    lifetime: ServerLifetime
    metrics: Metrics
    memory: Memory
    feedback_intake: FeedbackIntake
    body_reader: BodyReader
    media_checker: MediaChecker
    media: MediaLimits

    def max_body_bytes(self, has_media: bool) -> int:
        """Of a request's body. With media these come beside the rest, a third larger as base64."""
        return self.limits.body_bytes + (self.media.bytes * 4 // 3 if has_media else 0)

    async def check_model(self, model: str, principal: Principal) -> None:
        """Raises UnknownAgentError for a name that nobody has, KeyRefusedError for one that the visitor's key does not
        open.
        """
        name, separator, version = model.partition("@")
        listed = {agent.name: agent for agent in (*await self.services.agent_admin.listed(), *self.services.plans)}
        is_special = name in SPECIAL and not separator
        if not (is_special or (name in listed and (not separator or version in listed[name].versions))):
            openable = [other for other in (*SPECIAL, *listed) if principal.opens(other)]
            raise UnknownAgentError(
                f"there is no agent {model[:80]!a}; there are: {', '.join(openable) or 'none that this key opens'}",
                f'"model": "{openable[-1]}"' if openable else "send a key of that agent",
            )
        if not principal.opens(name):
            raise KeyRefusedError(f"this key does not open {name!r}", "send a key of that agent")

    def check_speech(self, principal: Principal) -> None:
        """Raises UnknownAgentError where the team does not speak, KeyRefusedError for a key that does not open
        `speech`.
        """
        self.services.speech.check_on()
        if not principal.opens(MODEL):
            raise KeyRefusedError(
                f"this key does not open {MODEL!r}", f"sartor agents key {MODEL} makes one that does"
            )

    def remember(self, key: str, person: str, answer: AgentReply, request: AgentRequest, reply: str) -> None:
        """Keep a reply that is whole, and who got it, so that feedback on it can be learnt from."""
        exchange = Exchange(answer.agent, request.messages, request.text, reply, key, person)
        self.memory.keep(answer.receipt, exchange)

    def person(self, user: str, header: str) -> str:
        """Whom a request names, "" for nobody. user: OpenAI's field; header: `x-sartor-user`. Raises FieldError for
        two.
        """
        if header and user and header != user:
            raise FieldError(
                f"user and the header {USER_HEADER} name two persons",
                f'"user" alone, without the header {USER_HEADER}',
                "user",
            )
        return self.services.people.person_of(header or user)

    def allowed_person(self, person: str, header: str, principal: Principal) -> str:
        """Whose own versions may answer. A key that may not speak for a person changes nothing by `user`, as on other
        servers.

        Raises KeyRefusedError where the header asks for somebody for whom it may not speak.
        """
        if not person or principal.may_speak_for(person):
            return person
        if header:
            raise KeyRefusedError("this key may not speak for that user", "sartor personal allow lets it")
        return ""

    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: of the base that all agents stand on."""
        return f"fp_{self.services.workers.about.base_digest[:12]}"


def get_state(request: Request) -> AppState:
    """The desk of the application that this request came to."""
    state: AppState = request.app.state.desk
    return state


def get_record(request: Request) -> RequestRecord:
    """What is noted of this request."""
    record: RequestRecord = request.scope["state"]["entry"]
    return record


def reply_headers(group: ReplyGroup) -> Mapping[str, str]:
    """Who answered, why, and under which receipts."""
    answer = group.first
    fields = {"x-sartor-agent": answer.agent, "x-sartor-reason": answer.reason, "x-sartor-receipt": group.receipts}
    return {name: as_header(value) for name, value in fields.items()}


def as_header(text: str) -> str:
    """A text as a header may hold it: ASCII, one line, short."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in plain)[:MAX_HEADER].strip()


def agent_of(version: str) -> str:
    """The agent of an exact version, `base` of the base's."""
    return version.partition("@")[0]
