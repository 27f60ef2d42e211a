"""The OpenAPI says what the server does: which statuses it answers, which key it wants, how an error looks."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_NOT_OURS = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI) -> None:
    """Give the application an `openapi` without the framework's own 422, and with keys."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    said = get_openapi(title=app.title, version="1", summary=app.summary, routes=app.routes)
    components = said["components"]
    for name in _NOT_OURS:
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in said["paths"].items():
        for operation in operations.values():
            operation["security"] = [{"key": []}, {}]
            if not path.startswith("/v1/agents"):
                operation["responses"].pop("422", None)
    return said
