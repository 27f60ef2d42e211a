"""Client of one MCP tool server.

A server program is started by its arguments and never by a shell. It gets the few environment variables that the `mcp`
package passes on, and those that TEAM.yaml names. Its stderr goes to STATE/tools/NAME.log.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from sartor.core.errors import DeadlineError, RequestError, SartorError, UnavailableError, missing_package
from sartor.inference.tool_calls import read_tools
from sartor.serving.team_config import ToolServer

if TYPE_CHECKING:
    from mcp.client import ClientSession

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
MOST_TOOLS_READ = 128
# longest silence of an open HTTP stream; a call has its own, shorter limit
OPEN_STREAM_S = 300.0


@dataclass(frozen=True)
class OfferedTool:
    """Tool that agents may call.

    declared: as in OpenAI's `tools`.
    schema: JSON Schema of its arguments.
    """

    name: str
    server: McpConnection
    declared: Mapping[str, Any]
    schema: Mapping[str, Any]


class McpConnection:
    """Connection to a tool server.

    troubles: reasons why something is not offered, by `tools NAME` or `tools NAME.TOOL`.
    """

    def __init__(self, terms: ToolServer, folder: Path) -> None:
        self.terms, self._folder = terms, folder
        self.tools: dict[str, OfferedTool] = {}
        self.troubles: dict[str, str] = {}
        self._session: ClientSession | None = None
        self._tried, self._broken, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server can be called now."""
        return self._session is not None

    async def start(self) -> None:
        """Open the server, and return after the first attempt. Raises ExtraError if `mcp` is not installed."""
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise missing_package("mcp", "mcp") from None
        self._task = asyncio.ensure_future(self._keep())
        await self._tried.wait()

    async def close(self) -> None:
        """Close the connection and stop the program."""
        self._ended.set()  # the package swallows a cancellation while it closes a broken session
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def call(self, name: str, arguments: Mapping[str, Any], max_s: float) -> str:
        """Return a tool's result for arguments that satisfy its schema.

        max_s: limit in seconds, besides the server's own timeout_s; the shorter one applies.
        Raises DeadlineError, UnavailableError if the server is down or fails, RequestError for an error that the tool
        reports.
        """
        from mcp.shared.exceptions import MCPError

        session, limit_s = self._session, min(max_s, self.terms.timeout_s)
        if session is None:
            raise UnavailableError(
                f"the tools {self.terms.name} are not there", "ask again in a while; /health says why"
            )
        try:
            async with asyncio.timeout(limit_s):
                result = await session.call_tool(name, dict(arguments))
        except TimeoutError:
            raise DeadlineError(
                f"the tool {name} took longer than {limit_s:g} s",
                f"timeout_s: {2 * limit_s:g} of {self.terms.name} in the team's file, within limits.deadline_s",
            ) from None
        except MCPError as error:
            self._broken.set()  # reconnect to a server that answers with a protocol error
            raise UnavailableError(
                f"the tool {name} failed: {error.message[:200]}",
                f"send the request again; STATE/tools/{self.terms.name}.log says more",
            ) from None
        except (RuntimeError, ValueError, OSError) as error:  # raised by the package for messages it cannot read
            self._broken.set()
            raise UnavailableError(
                f"the tool {name} failed: {type(error).__name__}",
                f"send the request again; STATE/tools/{self.terms.name}.log says more",
            ) from None
        texts = []
        for part in result.content:
            texts.append(part.text if part.type == "text" else json.dumps({"left out": part.type}))
        text = _cut("\n".join(texts), self.terms.result_bytes)
        if result.is_error:
            raise RequestError(
                f"the tool {name} says: {text}", "call it again with arguments that its inputSchema allows"
            )
        return text

    async def _keep(self) -> None:
        """Keep the session open in one task, as the package requires; reopen it with growing delays
        after a failure.
        """
        wait_s = FIRST_WAIT_S
        while not self._ended.is_set():
            self._broken.clear()
            try:
                async with self._opened() as session:
                    self._session, wait_s = session, FIRST_WAIT_S
                    self._tried.set()
                    await self._broken.wait()
                reason = "it broke off, and is opened again"
            except Exception as error:  # any failure of a foreign program is a trouble of this server alone
                if isinstance(error, SartorError):
                    reason = error.problem
                else:
                    cause: Exception = error
                    while isinstance(cause, ExceptionGroup):
                        cause = cause.exceptions[0]
                    reason = f"{type(cause).__name__}: {str(cause)[:200]}"
            self._session, self.troubles = None, {f"tools {self.terms.name}": reason}
            self._tried.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[ClientSession]:
        from mcp.client import ClientSession

        async with self._transport() as (read, write), ClientSession(read, write) as session:
            try:
                async with asyncio.timeout(self.terms.timeout_s):
                    await session.initialize()
                    listed = (await session.list_tools()).tools
            except TimeoutError:
                problem = f"it said nothing for {self.terms.timeout_s:g} s"
                raise UnavailableError(problem, "see its log in STATE/tools") from None
            self._offer(listed)
            yield session

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        if self.terms.url:
            async with self._by_http() as streams:
                yield streams
            return
        environment = {name: os.environ[name] for name in self.terms.env if name in os.environ}
        program, *arguments = self.terms.command
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / f"{self.terms.name}.log").open("w", encoding="utf-8") as log:
            async with stdio_client(
                StdioServerParameters(command=program, args=arguments, env=environment), log
            ) as streams:
                yield streams

    @asynccontextmanager
    async def _by_http(self) -> AsyncIterator[Any]:
        import httpx2  # the package's own client
        from mcp.client.streamable_http import streamable_http_client

        headers = {}
        if name := self.terms.token_env:
            if not os.environ.get(name):
                raise UnavailableError(
                    f"the environment variable {name} is not set", f"export {name} and start the server anew"
                )
            headers["authorization"] = f"Bearer {os.environ[name]}"
        limits = httpx2.Timeout(self.terms.timeout_s, read=OPEN_STREAM_S)
        async with (
            httpx2.AsyncClient(headers=headers, timeout=limits) as client,
            streamable_http_client(self.terms.url, http_client=client) as streams,
        ):
            yield streams

    def _offer(self, listed: list[Any]) -> None:
        """Offer the allowed tools with a valid schema, and record the troubles of the others."""
        offered, troubles = {}, {}
        names = {tool.name for tool in listed}
        for name in set(self.terms.allow) - names:
            troubles[f"tools {self.terms.name}.{name}"] = "it is allowed, and the server has no such tool"
        for tool in listed[:MOST_TOOLS_READ]:
            if self.terms.allow and tool.name not in self.terms.allow:
                continue
            try:
                offered[tool.name] = _offered(self, tool)
            except RequestError as error:
                troubles[f"tools {self.terms.name}.{tool.name}"] = error.problem
        self.tools, self.troubles = offered, troubles


def _offered(server: McpConnection, tool: Any) -> OfferedTool:
    schema = dict(tool.input_schema)
    function = {"name": tool.name, "description": tool.description or "", "parameters": schema}
    (declared,) = read_tools([{"type": "function", "function": function}])
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise RequestError(
            f"its inputSchema is no JSON Schema: {error.message[:200]}",
            "leave the tool out of `allow` of its server in the team's file, or correct its inputSchema",
        ) from None
    return OfferedTool(tool.name, server, declared, schema)


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= max_bytes:
        return text
    return data[:max_bytes].decode("utf-8", "ignore") + f"\n[cut: {len(data) - max_bytes} more bytes]"
