"""FastAPI application and OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as PlainHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sartor.core.errors import SartorError
from sartor.serving.http.app_state import AppState, get_record, get_state
from sartor.serving.http.http_errors import BUG, HttpError, field_error, to_http_error
from sartor.serving.http.request_body import MediaTypeError, SlowBodyError, check_weight, parse
from sartor.serving.http.response_models import ErrorResponse
from sartor.serving.http.shutdown import ClientDisconnectedError

CLIENT_DISCONNECTED = 499
LARGE_BYTES = 64 << 10
Answering = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonResponse(Response):
    """JSON response in UTF-8.

    A lone surrogate that a model wrote is replaced by "?", since UTF-8 cannot encode it.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode `content` as compact JSON.

        Raises ValueError for NaN and infinities.
        """
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


class _Checked(Request):
    """Request whose body `body_of` read and `_value` parsed. FastAPI takes the parsed value from it.

    body_bytes: size of the body that was read; kept as `state.body_bytes`.
    value: parsed JSON.
    """

    def __init__(self, request: Request, body_bytes: int, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self.state.body_bytes = body_bytes
        self._body = b"null" if body_bytes else b""  # FastAPI only tests whether the body is empty
        self._json = value


class StrictJsonRoute(APIRoute):
    """Route that reads its JSON body within the limits and parses it strictly. Routes without a body are unchanged."""

    def get_route_handler(self) -> Answering:
        """Return the handler that reads and parses the body before FastAPI validates it.

        The handler raises FieldError instead of FastAPI's RequestValidationError, and what `body_of` and `parse`
        raise.
        """
        original = super().get_route_handler()
        body_model: Any = self.body_field.field_info.annotation if self.body_field else None
        model_fields: Mapping[str, Any] = body_model.model_fields if body_model else {}
        has_media = "messages" in model_fields

        async def answer(request: Request) -> Response:
            if not body_model:
                return await original(request)
            body = await body_of(request, has_media)
            body_bytes = len(body)
            value = await _value(body, get_state(request).limits.body_bytes)
            try:
                return await original(_Checked(request, body_bytes, value))
            except RequestValidationError as error:
                raise field_error(error.errors(), value, model_fields) from None

        return answer


async def _value(body: bytearray, limit_bytes: int) -> Any:
    """Parse a JSON body; use a thread from LARGE_BYTES up, so that the event loop can serve other replies."""

    def weighed() -> Any:
        check_weight(body, limit_bytes)
        return parse(body)

    return parse(body) if len(body) < LARGE_BYTES else await asyncio.to_thread(weighed)


async def body_of(request: Request, has_media: bool = False) -> bytearray:
    """Return the body of a request, read within the limits of size and time.

    has_media: whether the request may hold media, which raises the size limit.
    Raises MediaTypeError unless the body is announced as unpacked JSON; SlowBodyError, TooLargeError, BusyError.
    """
    state = get_state(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(
            f"the body is of type {media_type[:80]!a}", "send the header Content-Type: application/json"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise MediaTypeError(
            f"the body is packed by {encoding[:80]!a}", "send it as it is, without the header Content-Encoding"
        )
    limit_s = state.limits.slow_client_s
    try:
        async with asyncio.timeout(limit_s):
            return await state.body_reader.read_body(
                request.stream(), request.headers, state.max_body_bytes(has_media)
            )
    except TimeoutError:
        raise SlowBodyError(
            f"the body did not come within {limit_s:g} s",
            f"send the whole body within {limit_s:g} s, or raise limits.slow_client_s in the team's file",
        ) from None


def build_app(state: AppState, cors: tuple[str, ...]) -> FastAPI:
    """Build the FastAPI application that runs behind `AuthMiddleware`.

    cors: allowed origins; empty for no CORS middleware.
    """
    app = FastAPI(
        title="Sartor",
        summary="A team of agents on one base, OpenAI-compatible",
        docs_url=None,  # Swagger UI and ReDoc would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.state.desk = state
    app.router.route_class = StrictJsonRoute
    for error_class, handler in ((SartorError, _sartor_error), (PlainHTTPException, _http_error), (Exception, _bug)):
        app.add_exception_handler(error_class, handler)
    for disconnect_error in (ClientDisconnectedError, ClientDisconnect):
        app.add_exception_handler(disconnect_error, _client_disconnected)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-sartor-user"],
            expose_headers=["x-request-id", "x-sartor-agent", "x-sartor-reason", "x-sartor-receipt"],
        )
    return app


def _answer(request: Request, fault: HttpError) -> Response:
    get_record(request).error = fault.kind
    return JsonResponse(fault.as_json(), fault.status, dict(fault.headers))


async def _sartor_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SartorError)
    return _answer(request, to_http_error(error))


async def _bug(request: Request, error: Exception) -> Response:
    """Answer 500. Starlette raises the error again afterwards, and `AuthMiddleware` logs it."""
    return _answer(request, BUG)


async def _client_disconnected(request: Request, error: Exception) -> Response:
    """Return status 499. The client has gone, so the status is only for the log."""
    get_record(request).error = "Gone"
    return Response(status_code=CLIENT_DISCONNECTED)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an HTTPException of the framework: an unknown path or a wrong method."""
    assert isinstance(error, PlainHTTPException)
    endpoint = f"{request.method} {ascii(request.url.path)[1:-1][:80]}"
    problem = f"there is no {endpoint}" if error.status_code in (404, 405) else f"{endpoint} is not possible"
    fault = HttpError(
        error.status_code,
        type="invalid_request_error",
        code="unknown_url",
        problem=problem,
        remedy="see GET /openapi.json",
        kind="RequestError",
        headers=dict(error.headers or {}),
    )
    return _answer(request, fault)


_TEXTS = {
    400: "The request is malformed, or asks for what this server does not do",
    401: "No key, or one that nobody has",
    403: "The key does not open this, or a foreign page asks",
    404: "No such agent, version or receipt; never answered by another",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not announced as JSON",
    429: "A queue is full or a rate is used up: Retry-After says when to come again",
    503: "Not now: no worker, an agent in quarantine, or the server is closing",
    504: "The reply was not done in time",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _TEXTS.items()
}


_NOT_OURS = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI) -> None:
    """Replace the application's `openapi`: it declares API keys and drops FastAPI's own 422 responses."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _openapi_schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _openapi_schema(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version="1", summary=app.summary, routes=app.routes)
    components = schema["components"]
    for name in _NOT_OURS:
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["security"] = [{"key": []}, {}]
            if not path.startswith("/v1/agents"):
                operation["responses"].pop("422", None)
    return schema
