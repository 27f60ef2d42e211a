"""TEAM.yaml's `mcp`, `a2a` and `tools`: what a team is to other programs, and which of theirs its agents may call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError


@dataclass(frozen=True)
class McpTerms:
    """The team as a server of the Model Context Protocol."""

    serve: bool = option(False, "answer MCP (streamable HTTP) at /mcp, and at /mcp/AGENT for one agent; needs sartor[mcp]")


@dataclass(frozen=True)
class CardTerms:
    """The team's card for the Agent2Agent protocol's discovery."""

    card: bool = option(False, "tell at /.well-known/agent-card.json who is here, and by which protocols they are asked")
    url: str = option("", "the address by which others reach this server; by default the one that they asked")


@dataclass(frozen=True)
class ToolServer:
    """An MCP server whose tools agents may call. It is a program of this machine (`command`), or an address (`url`)."""

    name: str = option(REQUIRED, "what an agent's `tools` calls it")
    command: tuple[str, ...] = option((), "the program and its arguments, run as they stand: there is no shell")
    url: str = option("", "address of its streamable HTTP")
    token_env: str = option("", "of a url: the environment variable whose value is sent as `Authorization: Bearer`")
    env: tuple[str, ...] = option(
        (), "names of environment variables that the program gets, beside HOME, PATH, USER and the like"
    )
    allow: tuple[str, ...] = option((), "the tools of it that may be called; empty is all")
    timeout_s: float = option(20.0, "how long one call, or its opening, may take")
    result_bytes: int = option(16_384, "of one result, of which the rest is cut off and said to be")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise ConfigError(f"tools have the name {self.name!r:.80}", "1 to 64 letters, digits, _ or -")
        if bool(self.command) == bool(self.url):
            raise ConfigError(f"the tools {self.name!r} have {'both' if self.url else 'neither'} command and url", "give one")
        if self.url and self.env or self.command and self.token_env:
            raise ConfigError(
                f"the tools {self.name!r} have a setting of the other kind", "env goes with command, token_env with url"
            )
        if self.timeout_s <= 0 or self.result_bytes < 1:
            raise ConfigError(f"the tools {self.name!r} would never say anything", "timeout_s: 20, result_bytes: 16384")


def check_tools(servers: Sequence[str], members: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError where two servers have one name, or an agent lists one that is not there."""
    if twice := next((name for name in servers if servers.count(name) > 1), ""):
        raise ConfigError(f"two servers of tools have the name {twice!r}", "give each its own")
    for agent, listed in members.items():
        if foreign := next((name for name in listed if name not in servers), ""):
            raise ConfigError(
                f"{agent} lists the tools {foreign!r}, and there are {', '.join(servers) or 'none'}", "see `tools`"
            )
