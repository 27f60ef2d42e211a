"""Request + version -> Call: the Release's system prompt, sampling and tools, where the client says nothing else."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sartor.agents.asking import Request
from sartor.agents.entries import Version
from sartor.core.errors import RequestError
from sartor.inference.engine import BASE, Call, Sampling

_OPTIONS = frozenset(option.name for option in fields(Sampling))
_SYSTEM = ("system", "developer")


def call_of(request: Request, version: Version | None, id: str, most_tokens: int) -> Call:
    """What an engine is asked, by a version or the base (None).

    A client's own system message stands in place of the Release's, and so do its sampling options and its tools. Raises
    RequestError for an option that is none or asks for more than `most_tokens`, ConfigError for a value out of range.
    """
    facts = version.facts if version else {}
    return Call(
        id=id,
        adapter=version.adapter if version else BASE,
        messages=_messages(request, str(facts.get("system_prompt", ""))),
        text=request.text,
        sampling=_sampling(request, dict(facts.get("sampling", {})), most_tokens),
        schema=request.schema,
        tools=tuple(facts.get("tools", ())) if request.tools is None else request.tools,
        must_call=request.must_call,
        top_logprobs=request.top_logprobs,
    )


def _messages(request: Request, system: str) -> tuple[Any, ...]:
    if not system or not request.messages or any(message.get("role") in _SYSTEM for message in request.messages):
        return request.messages
    return ({"role": "system", "content": system}, *request.messages)


def _sampling(request: Request, released: dict[str, Any], most_tokens: int) -> Sampling:
    if foreign := sorted(set(request.sampling) - _OPTIONS):
        raise RequestError(f"there is no sampling option {foreign[0]!r}", f"one of {', '.join(sorted(_OPTIONS))}")
    if request.sampling.get("max_tokens", 0) > most_tokens:
        asked = request.sampling["max_tokens"]
        raise RequestError(f"max_tokens is {asked}; the limit of this server is {most_tokens}", f"max_tokens: {most_tokens}")
    known = {name: value for name, value in released.items() if name in _OPTIONS}
    merged = {"max_tokens": Sampling().max_tokens, **known, **request.sampling}
    return Sampling(**{**merged, "max_tokens": min(merged["max_tokens"], most_tokens)})
