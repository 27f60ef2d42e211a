"""Foreign web pages and a server without keys: Host and Origin headers that are no addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

import serving
from serving import chat


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://[x", 403),
        ("http://[::1", 403),
        ("http://127.0.0.1]:80", 403),
        ("null", 403),
        ("http://evil.example", 403),
        ("http://127.0.0.1", 200),
    ],
)
async def test_origin_that_is_no_address_is_forbidden(tmp_path: Path, origin: str, status: int) -> None:
    headers = {"origin": origin, "host": "127.0.0.1"}
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        answer = await client.request("POST", "/v1/chat/completions", json=chat(), headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["remedy"]


@pytest.mark.parametrize("host", ["[x", "[::1", "127.0.0.1]", "evil.example"])
async def test_host_that_is_no_address_is_forbidden(tmp_path: Path, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        answer = await client.request("POST", "/v1/chat/completions", json=chat(), headers=headers)
    assert answer.status_code == 403
