"""A small MCP server over stdio: the program that tests give an agent. Its tools answer, wait, fail or die."""

from __future__ import annotations

import asyncio
import os
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
    schemas = {"double": NUMBER, "slow": ANY, "fails": ANY, "dies": ANY, "long": ANY, "broken": BROKEN, "environment": ANY}
    return ListToolsResult(tools=[Tool(name=name, description=name, input_schema=one) for name, one in schemas.items()])


async def called(context: Any, params: Any) -> CallToolResult:
    arguments = params.arguments or {}
    if params.name == "slow":
        await asyncio.sleep(60)
    if params.name == "dies":
        os._exit(3)
    texts = {"double": str(2 * arguments.get("number", 0)), "long": "x" * 50_000, "environment": " ".join(sorted(os.environ))}
    text = texts.get(params.name, "no such room")
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=params.name == "fails")


async def main() -> None:
    server: Any = Server("small", on_list_tools=listed, on_call_tool=called)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


if __name__ == "__main__":
    asyncio.run(main())
