"""Which error is which status, in OpenAI's form with the remedy beside it. A bug says that it is one, and nothing of why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sartor.agents.serve.bodies import MediaTypeError, SlowBodyError, TooLargeError
from sartor.core import errors
from sartor.core.errors import SartorError
from sartor.inference.engine import Failed

ASK_AGAIN_S = 5


class UnknownKeyError(errors.KeyRefusedError):
    """No key was sent, or one that nobody has."""


class FieldError(errors.RequestError):
    """A field of a request that is not as it must be. `param`: which one, as OpenAI names it."""

    def __init__(self, problem: str, remedy: str, param: str = "") -> None:
        super().__init__(problem, remedy)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.param)


class MediaFaultError(FieldError):
    """A picture or a recording of a request that cannot be read, or that nobody who is asked reads. `code`: a word for why."""

    def __init__(self, problem: str, remedy: str, param: str = "", code: str = "unreadable_media") -> None:
        super().__init__(problem, remedy, param)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.param, self.code)


class ForeignError(errors.RefusedError):
    """A request that a page of another origin, or another host's name, led here."""


class NotFoundError(errors.MissingError):
    """A path or a receipt that is not there."""


class CutError(errors.UnavailableError):
    """A reply that was still running when the server had to end."""


# The first line that fits, so a class stands before its parent: status, OpenAI's type, code
_STATUSES: tuple[tuple[type[SartorError], int, str, str], ...] = (
    (TooLargeError, 413, "invalid_request_error", "request_too_large"),
    (MediaTypeError, 415, "invalid_request_error", "unsupported_media_type"),
    (SlowBodyError, 408, "invalid_request_error", "request_timeout"),
    (errors.RequestError, 400, "invalid_request_error", "invalid_request"),
    (errors.SourceError, 400, "invalid_request_error", "invalid_request"),
    (errors.ConfigError, 400, "invalid_request_error", "invalid_request"),
    (UnknownKeyError, 401, "authentication_error", "invalid_api_key"),
    (errors.KeyRefusedError, 403, "permission_error", "key_refused"),
    (ForeignError, 403, "permission_error", "foreign_origin"),
    (errors.UnknownAgentError, 404, "invalid_request_error", "model_not_found"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (errors.ConflictError, 409, "conflict_error", "conflict"),
    (errors.AdmissionError, 422, "invalid_request_error", "not_admitted"),
    (errors.ArtifactError, 422, "invalid_request_error", "not_admitted"),
    (errors.RefusedError, 422, "invalid_request_error", "refused"),
    (errors.BusyError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.ExtraError, 501, "server_error", "not_installed"),
    (errors.DeadlineError, 504, "server_error", "deadline"),
    (errors.UnavailableError, 503, "server_error", "unavailable"),
    (errors.ModelError, 503, "server_error", "unavailable"),
    (errors.BudgetError, 503, "server_error", "unavailable"),
    (errors.MissingError, 503, "server_error", "unavailable"),
)


@dataclass(frozen=True)
class Fault:
    """An error as HTTP says it."""

    status: int
    type: str
    code: str
    problem: str
    remedy: str
    kind: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's error object, with the kind of docs/errors.md and the next thing to type.

        Clients show the message alone, so the remedy stands in it too.
        """
        said = {"message": f"{self.problem}; try: {self.remedy}", "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**said, "kind": self.kind, "remedy": self.remedy}}


BUG = Fault(
    500, "server_error", "internal_error", "the server made a mistake; it is logged under this request's id",
    "report the x-request-id of this answer", "Bug",
)  # fmt: skip


def fault_of(error: SartorError) -> Fault:
    """The status and words of an error."""
    found = next(((status, kind, code) for cls, status, kind, code in _STATUSES if isinstance(error, cls)), None)
    if found is None:
        return BUG
    status, kind, code = found
    code = error.code if isinstance(error, MediaFaultError) else code
    param = error.param if isinstance(error, FieldError) else None
    param = "model" if isinstance(error, errors.UnknownAgentError) else param
    return Fault(status, kind, code, error.problem, error.remedy, _public(error), param, _headers(error, status))


def _public(error: SartorError) -> str:
    """The nearest class of core/errors: the kinds of this package are statuses."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)


def _headers(error: SartorError, status: int) -> dict[str, str]:
    if isinstance(error, errors.BusyError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    return {"retry-after": str(ASK_AGAIN_S)} if status == 503 else {}


def error_of(failed: Failed) -> SartorError:
    """The error that a Failed tells of."""
    cls = vars(errors).get(failed.kind)
    if isinstance(cls, type) and issubclass(cls, SartorError):
        return cls(failed.problem, failed.remedy)
    return SartorError(failed.problem, failed.remedy)
