"""TEAM.yaml's `mcp` and `a2a`: what a team is to other programs."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.core.config import option


@dataclass(frozen=True)
class McpTerms:
    """The team as a server of the Model Context Protocol."""

    serve: bool = option(False, "answer MCP (streamable HTTP) at /mcp, and at /mcp/AGENT for one agent; needs sartor[mcp]")


@dataclass(frozen=True)
class CardTerms:
    """The team's card for the Agent2Agent protocol's discovery."""

    card: bool = option(False, "tell at /.well-known/agent-card.json who is here, and by which protocols they are asked")
    url: str = option("", "the address by which others reach this server; by default the one that they asked")
