"""Routes of a studio, which tests walk so that a new page is looked at without being named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def routes_of(app: Any, method: str) -> Iterator[Any]:
    """Yield the routes of a StudioApp that answer a method; FastAPI keeps those of included routers apart."""
    for group in app._asgi._app.routes:
        router = getattr(group, "original_router", None)
        for route in [group] if router is None else router.routes:
            if method in (getattr(route, "methods", None) or ()):
                yield route
