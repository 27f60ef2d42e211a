"""A real server on the tiny base that opens a real tool server, and is itself one of MCP."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from server_process import SMALL, address, serve

pytest.importorskip("mcp")


@pytest.mark.services
@pytest.mark.alone
async def test_server_opens_tools_reports_faults_and_answers_mcp(
    tiny_base: Path, tmp_path: Path, commands: dict[str, str]
) -> None:
    """Health names a broken schema and an absent program; an MCP call has a receipt."""
    from mcp.client import Client

    tools = json.dumps([{"name": "small", "command": SMALL}, {"name": "absent", "command": ["/no/such/program"]}])
    with serve(tmp_path / "state", str(tiny_base), "--tools", tools, "--mcp.serve", "true", commands=commands) as (
        process,
        _,
    ):
        url = address(process)
        troubles = httpx.get(f"{url}/health", timeout=120).json()["troubles"]
        assert "is no JSON Schema" in troubles["tools small.broken"] and "No such file" in troubles["tools absent"]

        async with Client(f"{url}/mcp/base") as client:
            said = await client.call_tool("base", {"prompt": "light in the hall"})
        assert not said.is_error and said.meta["sartor/agent"].startswith("base@")
        receipt = httpx.get(f"{url}/v1/receipts/{said.meta['sartor/receipt']}", timeout=120).json()
        assert receipt["agent"] == said.meta["sartor/agent"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
