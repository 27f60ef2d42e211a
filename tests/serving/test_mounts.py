"""Applications below a path of the server: they get their requests with their root, and the server the others."""

from __future__ import annotations

from typing import Any

import pytest

from sartor.serving.http.server import _with_mounts


async def ask(path: str) -> list[tuple[str, str, str]]:
    seen: list[tuple[str, str, str]] = []

    def named(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append((name, scope["path"], scope["root_path"]))

        return app

    app = _with_mounts(named("own"), {"/studio": named("studio")})
    await app({"type": "http", "path": path, "root_path": ""}, None, None)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize(
    ("path", "name", "root"),
    [
        ("/studio", "studio", "/studio"),
        ("/studio/data/x", "studio", "/studio"),
        ("/studios", "own", ""),
        ("/v1/models", "own", ""),
        ("/", "own", ""),
        ("/v1/studio", "own", ""),
    ],
)
async def test_request_reaches_the_application_of_its_path(path: str, name: str, root: str) -> None:
    assert await ask(path) == [(name, path, root)]
