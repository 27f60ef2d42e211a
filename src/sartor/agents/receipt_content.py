"""What a receipt has digests of: a question and its parts, in the one form in which they are digested.

The same question reaches a server as a client wrote it and an engine as a Call. Both come to the same here: text parts are
joined, nulls and OpenAI's fields that are always empty are left out, `developer` is `system`, a schema is compared as JSON.
Of a picture or a recording, in whichever form, the bytes count: its digest stands where it stood among the parts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.errors import ArtifactError, SourceError
from sartor.inference.engine import Call
from sartor.inference.tool_calls import read_choice, read_tools
from sartor.media import content_parts
from sartor.media.content_parts import MEDIA, is_media, url_in
from sartor.text.json_schema import JSON_OBJECT

_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")
Digest = Callable[[str, Any], str]


@dataclass(frozen=True)
class Content:
    """A question. system: the leading system message, where there is one. schema: JSON text, "" for none."""

    system: tuple[Mapping[str, Any], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: str = ""
    schema: str = ""

    @classmethod
    def of_call(cls, call: Call) -> Content:
        """What an engine was asked."""
        return cls._of(call.messages, call.text, call.tools, call.must_call, call.schema)

    @classmethod
    def of_request(cls, said: Mapping[str, Any]) -> Content:
        """The body of a request to /v1/chat/completions or /v1/completions. Raises ArtifactError, RequestError for its form."""
        messages, text = said.get("messages") or [], said.get("text") or said.get("prompt") or ""
        if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages) or not isinstance(text, str):
            raise ArtifactError("the messages are no list of messages", '[{"role": "user", "content": "..."}]')
        tools, must_call = read_choice(said.get("tool_choice"), read_tools(_without_none(said.get("tools") or [])))
        return cls._of(messages, text, tools, must_call, _schema_of(said.get("response_format")))

    @classmethod
    def _of(
        cls, messages: Sequence[Mapping[str, Any]], text: str, tools: Sequence[Mapping[str, Any]], must_call: str, schema: str
    ) -> Content:
        plain = tuple(_plain(message) for message in messages)
        leading = 1 if plain and plain[0].get("role") == "system" else 0
        return cls(plain[:leading], plain[leading:], text, tuple(tools), must_call, schema)

    def digests(self, digest: Digest) -> dict[str, str]:
        """A digest a part; "" for a part that is not there."""
        return {
            "system": digest("system", list(self.system)),
            "messages": digest("messages", [_by_digest(message) for message in self.messages]),
            "text": digest("text", self.text),
            "tools": digest("tools", [list(self.tools), self.must_call] if self.tools else None),
            "schema": digest("schema", json.loads(self.schema) if self.schema else None),
        }


def digest_by(secret: bytes) -> Digest:
    """HMAC-SHA256 over a value and the name of what it is, so that an equal prompt and reply look unlike; "" of nothing."""

    def digest(what: str, value: Any) -> str:
        if not value:
            return ""
        # ASCII: a model can write half of a surrogate pair, which UTF-8 cannot
        said = json.dumps([what, value], sort_keys=True, separators=(",", ":"))
        return hmac.digest(secret, said.encode(), "sha256").hex()

    return digest


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    said = {key: message[key] for key in _KEPT if message.get(key) is not None}
    if said.get("role") == "developer":
        said["role"] = "system"
    if isinstance(said.get("content"), (list, tuple)):
        parts = [part for part in said["content"] if isinstance(part, Mapping)]
        has_media = any(map(is_media, parts))
        said["content"] = parts if has_media else "".join(str(part.get("text", "")) for part in parts)
    if isinstance(said.get("tool_calls"), (list, tuple)):
        calls = [_without_none(call) for call in said["tool_calls"] if isinstance(call, Mapping)]
        said["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    return said


def _by_digest(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose media are digests of their bytes."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_digested(part) for part in message["content"]]}


def _digested(part: Mapping[str, Any]) -> list[str]:
    if not is_media(part):
        return ["text", str(part.get("text", ""))]
    url = url_in(part)
    try:
        content = content_parts.bytes_of(url)
    except SourceError:  # no data URL: a file that is held against a receipt, and is not what was asked
        content = url.encode()
    return [MEDIA[part["type"]], hashlib.sha256(content).hexdigest()]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _schema_of(said: Any) -> str:
    """The schema of a request's `response_format`; "" where it asks for text."""
    if not isinstance(said, Mapping) or said.get("type") == "text":
        return ""
    if said.get("type") == "json_object":
        return JSON_OBJECT
    named = said.get("json_schema")
    if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
        raise ArtifactError("response_format holds no schema", '{"type": "json_schema", "json_schema": {"schema": {...}}}')
    return json.dumps(named["schema"])
