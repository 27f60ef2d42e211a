"""Errors as OpenAI-style HTTP responses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sartor.core import errors
from sartor.core.errors import SartorError
from sartor.serving.http.request_body import MediaTypeError, SlowBodyError, TooLargeError
from sartor.serving.http.response_models import ErrorResponse

ASK_AGAIN_S = 5


class UnknownKeyError(errors.KeyRefusedError):
    """Request without an API key, or with an unknown one."""


class FieldError(errors.RequestError):
    """Invalid field of a request.

    param: path of the field, in the form of OpenAI's `param`.
    """

    def __init__(self, problem: str, remedy: str, param: str = "") -> None:
        super().__init__(problem, remedy)
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the constructor arguments for pickling."""
        return type(self), (self.problem, self.remedy, self.param)


class MediaFaultError(FieldError):
    """Image or recording in a request that cannot be read, or that the agent does not support.

    code: machine-readable reason.
    """

    def __init__(self, problem: str, remedy: str, param: str = "", code: str = "unreadable_media") -> None:
        super().__init__(problem, remedy, param)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the constructor arguments for pickling."""
        return type(self), (self.problem, self.remedy, self.param, self.code)


class ForeignError(errors.RefusedError):
    """Request of a page of another origin, or for another host name."""


class NotFoundError(errors.MissingError):
    """Path or receipt that does not exist."""


class CutError(errors.UnavailableError):
    """Reply that was still running when the server had to end it."""


# (class, status, OpenAI's type, code). The first match counts, so a subclass precedes its parent.
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
class HttpError:
    """Error as an HTTP response.

    type: OpenAI's error type.
    code: OpenAI's error code.
    kind: class name in docs/errors.md.
    param: path of the invalid field; None if no field is to blame.
    """

    status: int
    type: str
    code: str
    problem: str
    remedy: str
    kind: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> ErrorResponse:
        """Return OpenAI's error object, with the additional fields `kind` and `remedy`.

        Many clients show only `message`, so it contains the remedy too.
        """
        return {
            "error": {
                "message": f"{self.problem}; try: {self.remedy}",
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "kind": self.kind,
                "remedy": self.remedy,
            }
        }


BUG = HttpError(
    500,
    type="server_error",
    code="internal_error",
    problem="the server made a mistake; it is logged under this request's id",
    remedy="report the x-request-id of this answer",
    kind="Bug",
)


def to_http_error(error: SartorError) -> HttpError:
    """Return the HTTP form of an error; `BUG` for a class without a status."""
    row = next(((status, kind, code) for cls, status, kind, code in _STATUSES if isinstance(error, cls)), None)
    if row is None:
        return BUG
    status, kind, code = row
    code = error.code if isinstance(error, MediaFaultError) else code
    param = error.param if isinstance(error, FieldError) else None
    param = "model" if isinstance(error, errors.UnknownAgentError) else param
    # the nearest class defined in core/errors; classes of this package differ only in status
    public_name = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    headers = {}
    if isinstance(error, errors.BusyError):
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    elif status == 401:
        headers = {"www-authenticate": "Bearer"}
    elif status == 503:
        headers = {"retry-after": str(ASK_AGAIN_S)}
    return HttpError(
        status,
        type=kind,
        code=code,
        problem=error.problem,
        remedy=error.remedy,
        kind=public_name,
        param=param,
        headers=headers,
    )


MOST_SHOWN = 80
# Types of message parts that are not text: supported in user turns, and unsupported ones of OpenAI's API
_READ = ("image_url", "input_audio")
_OTHERS = ("input_image", "audio_url", "video_url", "file", "input_file")
_INSTEAD = (
    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}, or input_audio, in a user\'s turn'
)
Path = tuple[str | int, ...]


def field_error(complaints: Sequence[Mapping[str, Any]], body: Any, known_fields: Iterable[str]) -> FieldError:
    """Return the most specific of pydantic's validation errors as a FieldError.

    complaints: pydantic's error dicts. known_fields: names of the fields that the body may have.
    """
    if media_error := next(_media(body), None):
        return media_error
    if token_error := next(_token_ids(body), None):
        return token_error
    # In a union, members that fit less well fail at a shallower path, so the deepest error comes from the best match
    complaint = max(complaints, key=lambda item: (len(_path(item["loc"], body)), _SURE.get(item["type"], 0)))
    path, kind = _path(complaint["loc"], body), complaint["type"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if kind == "missing":
        return FieldError(
            f"{param or 'the body'} is missing", f'"{path[-1]}": ...' if path else "send a JSON object", param
        )
    if kind == "extra_forbidden":
        close_matches = difflib.get_close_matches(str(path[-1]), list(known_fields), 1, _NEAR)
        hint = f"; {close_matches[0]!r} was probably meant" if close_matches else ""
        return FieldError(
            f"there is no field {_shown(param)}{hint}",
            f'"{close_matches[0]}": ...' if close_matches else "leave it out",
            param,
        )
    if kind in _TAGS:
        return _wrong_tag(complaint, param)
    if kind == "none_required" or complaint.get("ctx", {}).get("max_length") == 0:
        return FieldError(
            f"{param} is {_shown(complaint.get('input'))}; this server does not do that", f"leave {param} out", param
        )
    if kind in ("too_short", "too_long") and isinstance(complaint.get("input"), list):
        return _wrong_length(complaint, param)
    requirement = str(complaint["msg"]).replace("Input should", "it must").replace("Value should", "it must")
    return FieldError(
        f"{param or 'the body'} is {_shown(complaint.get('input'))}; {requirement}", _remedy(complaint, param), param
    )


# Priority among errors at one depth. A list of a wrong length was meant as a list, whatever other members allow.
_SURE = {"extra_forbidden": 3, "missing": 2, "too_short": 1, "too_long": 1}
_TAGS = ("union_tag_invalid", "union_tag_not_found")
# Minimum difflib ratio of a suggestion; high enough that top_p is not taken for a misspelt top_k
_NEAR = 0.85


def _wrong_length(complaint: Mapping[str, Any], param: str) -> FieldError:
    """Return the error for a list with too few or too many items."""
    count, limits = len(complaint["input"]), complaint["ctx"]
    if complaint["type"] == "too_long":
        max_length = limits["max_length"]
        return FieldError(f"{param} holds {count}; the limit is {max_length}", f"send at most {max_length}", param)
    min_length = limits["min_length"]
    return FieldError(
        f"{param} holds {count or 'nothing'}; it must hold at least {min_length}", f"send {min_length} or more", param
    )


def _token_ids(body: Any) -> Iterator[FieldError]:
    """Yield an error if `input` or `prompt` holds token ids. OpenAI's API accepts them; this server does not."""
    for param in ("input", "prompt"):
        value = body.get(param) if isinstance(body, dict) else None
        if isinstance(value, list) and value and isinstance(value[0], (int, list)):
            problem = f"{param} holds token ids, and they mean something else to every model"
            yield FieldError(
                problem,
                "send the text; clients have an option for it (LangChain: check_embedding_ctx_length=False)",
                param,
            )


def _wrong_tag(complaint: Mapping[str, Any], param: str) -> FieldError:
    """Return the error for a union whose discriminator (role, type) is missing or unknown."""
    tag_field = str(complaint["ctx"]["discriminator"]).strip("'")
    param = f"{param}.{tag_field}"
    expected = complaint["ctx"].get("expected_tags", "")
    problem = f"is {_shown(complaint['ctx']['tag'])}" if "tag" in complaint["ctx"] else "is missing"
    return FieldError(f"{param} {problem}", f"send one of {expected}" if expected else f'"{tag_field}": ...', param)


def _path(location: Sequence[str | int], body: Any) -> Path:
    """Return the path of an error in the body.

    The names of union members that pydantic inserts are left out. The last part may be absent from the body.
    """
    path: list[str | int] = []
    parts = list(location[1:]) if location and location[0] in ("body", "path", "query", "header") else list(location)
    for index, part in enumerate(parts):
        is_inside = isinstance(body, (dict, list)) and (
            part in body if isinstance(body, dict) else isinstance(part, int)
        )
        if is_inside and (isinstance(body, dict) or (isinstance(part, int) and part < len(body))):
            body = body[part]
            path.append(part)
        elif index == len(parts) - 1 and isinstance(body, dict) and isinstance(part, str) and part.isidentifier():
            path.append(part)
    return tuple(path)


def _remedy(complaint: Mapping[str, Any], param: str) -> str:
    limits = complaint.get("ctx", {})
    name = param.rpartition(".")[2] or "body"
    if "expected" in limits:
        return f"send {limits['expected']}, or leave {name} out"
    bounds = [f"{word} {limits[key]}" for key, word in _BOUNDS if key in limits]
    return f"send a value {' and '.join(bounds)}" if bounds else f"send {name} of the right type"


_BOUNDS = (
    ("ge", "of at least"),
    ("gt", "above"),
    ("le", "of at most"),
    ("lt", "below"),
    ("min_length", "with a length of at least"),
    ("max_length", "with a length of at most"),
    ("pattern", "that matches"),
)


def _media(body: Any) -> Iterator[FieldError]:
    """Yield errors for media parts outside user turns, of unsupported types, or given as plain strings."""
    messages = body.get("messages") if isinstance(body, dict) else None
    for turn, message in enumerate(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for index, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, dict) else None
            param = f"messages[{turn}].content[{index}]"
            if kind in _OTHERS:
                yield FieldError(f"{param} is of type {kind!r}, which no agent reads", f"send {_INSTEAD}", param)
            elif kind in _READ and message.get("role") != "user":
                problem = f"{param} is of type {kind!r} in a turn of {_shown(message.get('role'))}"
                yield FieldError(problem, f"send {_INSTEAD}", param)
            elif kind in _READ and isinstance(part.get(kind), str):
                yield FieldError(f"{param}.{kind} is a text", f"send {_INSTEAD}", f"{param}.{kind}")


def _shown(value: Any) -> str:
    """Return a value in the form that error messages quote: ASCII, at most about MOST_SHOWN characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    size = len(value) if isinstance(value, str) else 0
    text = ascii(value[: MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({size or len(text)} characters)"
