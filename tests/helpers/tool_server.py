"""A small MCP server: the program that tests give an agent. Its tools answer, wait, fail or die.

python tool_server.py               over stdio
python tool_server.py PORT TOKEN    over streamable HTTP, for who has the token; it prints its port (0: any that is free)
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

NUMBER = {
    "type": "object",
    "properties": {"number": {"type": "integer"}},
    "required": ["number"],
    "additionalProperties": False,
}
ANY = {"type": "object", "properties": {}}
BROKEN = {"type": "object", "properties": {"number": {"type": "no type"}}}


async def listed(context: Any, params: Any) -> ListToolsResult:
    schemas = {
        "double": NUMBER,
        "slow": ANY,
        "fails": ANY,
        "dies": ANY,
        "long": ANY,
        "broken": BROKEN,
        "environment": ANY,
    }
    return ListToolsResult(
        tools=[Tool(name=name, description=name, input_schema=one) for name, one in schemas.items()]
    )


async def called(context: Any, params: Any) -> CallToolResult:
    arguments = params.arguments or {}
    if params.name == "slow":
        await asyncio.sleep(60)
    if params.name == "dies":
        os._exit(3)
    texts = {
        "double": str(2 * arguments.get("number", 0)),
        "long": "x" * 50_000,
        "environment": " ".join(sorted(os.environ)),
    }
    text = texts.get(params.name, "no such room")
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=params.name == "fails")


async def main(server: Any) -> None:
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def by_http(server: Any, port: int, token: str) -> None:
    import uvicorn
    from starlette.responses import PlainTextResponse

    app = server.streamable_http_app()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != f"Bearer {token}".encode():
            await PlainTextResponse("who are you?", 401)(scope, receive, send)
        else:
            await app(scope, receive, send)

    with socket.create_server(("127.0.0.1", port)) as listening:
        print(listening.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(guarded, log_level="warning")).run([listening])


if __name__ == "__main__":
    small: Any = Server("small", on_list_tools=listed, on_call_tool=called)
    if len(sys.argv) > 1:
        by_http(small, int(sys.argv[1]), sys.argv[2])
    else:
        asyncio.run(main(small))
