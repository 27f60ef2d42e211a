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
    """Services, limits and shared state of this server process."""

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
        """Return the size limit of a request body in bytes.

        has_media: whether media are allowed. Their limit is added, a third larger because base64 needs 4/3 of the
        bytes.
        """
        return self.limits.body_bytes + (self.media.bytes * 4 // 3 if has_media else 0)

    async def check_model(self, model: str, principal: Principal) -> None:
        """Raise an error unless the model exists and the client's key opens it.

        model: `base`, `auto`, an agent or plan, or `name@version`.
        Raises UnknownAgentError for an unknown model; KeyRefusedError if the key does not open it.
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
        """Raise an error unless speech is on and the client's key opens `speech`.

        Raises UnknownAgentError if the team has no voice; KeyRefusedError if the key does not open `speech`.
        """
        self.services.speech.check_on()
        if not principal.opens(MODEL):
            raise KeyRefusedError(
                f"this key does not open {MODEL!r}", f"sartor agents key {MODEL} makes one that does"
            )

    def remember(
        self, record: RequestRecord, person: str, answer: AgentReply, request: AgentRequest, reply: str
    ) -> None:
        """Keep a complete reply with its key and user, so that later feedback on it can be learnt from.

        Also with a user for whom the key may not speak: a deletion must reach it. It teaches that user's own version
        nothing (`learn/personal_rows.py`).
        """
        key = record.principal.key
        exchange = Exchange(
            agent=answer.agent, messages=request.messages, text=request.text, reply=reply, key=key, person=person
        )
        self.memory.keep(answer.receipt, exchange, record.began)

    def person(self, user: str, header: str) -> str:
        """Return the internal id of the user that a request names; "" for none.

        user: OpenAI's field `user`. header: value of `x-sartor-user`.
        Raises FieldError if the two name different users.
        """
        if header and user and header != user:
            raise FieldError(
                f"user and the header {USER_HEADER} name two persons",
                f'"user" alone, without the header {USER_HEADER}',
                "user",
            )
        return self.services.people.person_of(header or user)

    def allowed_person(self, person: str, header: str, principal: Principal) -> str:
        """Return the user whose personal versions may answer; "" for none.

        If the key may not speak for the user, the field `user` is ignored, as on other servers.
        Raises KeyRefusedError if the header names a user for whom the key may not speak.
        """
        if not person or principal.may_speak_for(person):
            return person
        if header:
            raise KeyRefusedError("this key may not speak for that user", "sartor personal allow lets it")
        return ""

    def fingerprint(self) -> str:
        """Return OpenAI's `system_fingerprint`: 12 digits of the digest of the base that all agents share."""
        return f"fp_{self.services.workers.about.base_digest[:12]}"


def get_state(request: Request) -> AppState:
    """Return the state of the application that handles this request."""
    state: AppState = request.app.state.desk
    return state


def get_record(request: Request) -> RequestRecord:
    """Return the log record of this request."""
    record: RequestRecord = request.scope["state"]["entry"]
    return record


def reply_headers(group: ReplyGroup) -> Mapping[str, str]:
    """Return the response headers that name the agent, the reason for the choice and the receipts."""
    answer = group.first
    fields = {"x-sartor-agent": answer.agent, "x-sartor-reason": answer.reason, "x-sartor-receipt": group.receipts}
    return {name: as_header(value) for name, value in fields.items()}


def as_header(text: str) -> str:
    """Return a text as a header value: printable ASCII on one line, at most MAX_HEADER characters."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in plain)[:MAX_HEADER].strip()


def agent_of(version: str) -> str:
    """Return the agent's name in an exact version; `base` for a version of the base."""
    return version.partition("@")[0]
