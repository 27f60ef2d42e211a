"""Tool declarations, tool choice, parsing of tool calls.

A reply calls tools in one of the forms that open models write, recognised by its beginning:

    <tool_call>{"name": "find", "arguments": {...}}</tool_call>     Hermes, Qwen, and the form that `prompts.py` asks
                                                                    for; once per call
    {"name": "find", "arguments": {...}}                            bare, with `parameters` for Llama 3; several
                                                                    separated by `;` or as a list
    <|python_tag|>{"name": ...}                                     Llama 3, if its tokenizer shows the tag

A call that is incomplete, names no declared tool, or has arguments that are not an object stays text: a reply never
fails for its form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sartor.core.errors import RequestError
from sartor.inference.engine import GenerateCall
from sartor.text.json_schema import MOST_BYTES, read_schema

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OPEN, _CLOSE, _TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_MARKS = (_OPEN, _TAG)
_BARE = ("{", "[", "```")
_EXAMPLE = '{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}'
# keywords whose value is data, and keywords whose keys are names: there "$ref" is not a reference
_DATA = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Return a request's `tools` after a check of their form. Raises RequestError naming the invalid one."""
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools is of type {type(tools).__name__} and no list", f"tools: [{_EXAMPLE}]")
    if len(tools) > MOST_TOOLS:
        raise RequestError(
            f"{len(tools)} tools are declared; at most {MOST_TOOLS} are read", "declare those that fit the request"
        )
    for index, tool in enumerate(tools):
        _check(tool, index)
    names = [name_of(tool) for tool in tools]
    if duplicate := next((name for name in names if names.count(name) > 1), ""):
        raise RequestError(f"two tools have the name {duplicate!r}", f'"name": "{duplicate}_2" for one of them')
    if (size := len(json.dumps(tools))) > MOST_BYTES:
        raise RequestError(
            f"the tools have {size} bytes; at most {MOST_BYTES} are read", "declare those that fit the request"
        )
    return tuple(tools)


def _check(tool: Any, index: int) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise RequestError(f"tools[{index}] is no function", _EXAMPLE)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"tools[{index}] has the name {name!r:.80}", "1 to 64 letters, digits, _ or -")
    if not isinstance(function.get("description", ""), str | None):
        raise RequestError(f"the description of the tool {name!r} is no text", _EXAMPLE)
    try:
        read_schema(json.dumps(function.get("parameters") or {}))
    except (RequestError, RecursionError, ValueError, TypeError) as error:
        problem = error.problem if isinstance(error, RequestError) else "it is nested too deep, or no JSON"
        raise RequestError(f"the parameters of the tool {name!r}: {problem}", _EXAMPLE) from None


def name_of(tool: Mapping[str, Any]) -> str:
    """Return the name of a declared tool."""
    return str(tool["function"]["name"])


def read_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """Return (tools, must_call) of a GenerateCall from a request's `tool_choice` and its checked tools.

    `none` leaves the tools out of the prompt. Raises RequestError for an invalid choice or an undeclared tool.
    """
    if choice == "none":
        return (), ""
    if choice is None or choice == "auto":
        return tuple(tools), ""
    names = [name_of(tool) for tool in tools]
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice != "required" and not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {choice!r:.80}",
            'none, auto, required, or {"type": "function", "function": {"name": "find"}}',
        )
    if not tools or (choice != "required" and name not in names):
        raise RequestError(
            f"tool_choice asks for {name or 'a tool'!r:.80} and the declared tools are {names}",
            'declare it in "tools", or "tool_choice": "auto"',
        )
    return tuple(tools), "*" if choice == "required" else str(name)


def reply_schema(call: GenerateCall) -> str:
    """Return the JSON Schema that a reply must obey, or an empty string.

    A forced tool call takes precedence over the reply's own schema. Raises RequestError if `must_call` names no
    declared tool.
    """
    if not call.must_call:
        return call.schema
    callable_tools = [tool for tool in call.tools if call.must_call in ("*", name_of(tool))]
    if not callable_tools:
        raise RequestError(
            f"the tool {call.must_call!r} must be called and is not declared",
            'declare it in "tools", or "tool_choice": "auto"',
        )
    if len(callable_tools) == 1:
        return json.dumps(_form(callable_tools[0], "#"))
    return json.dumps({"anyOf": [_form(tool, f"#/anyOf/{index}") for index, tool in enumerate(callable_tools)]})


def _form(tool: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    """Return the schema of a call of this tool, placed at the JSON pointer `pointer`."""
    parameters = {"type": "object", **(tool["function"].get("parameters") or {})}
    return {
        "type": "object",
        "properties": {
            "name": {"const": name_of(tool)},
            "arguments": _moved(parameters, f"{pointer}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, pointer: str) -> Any:
    """Return a schema with its local references rewritten for its new position `pointer`.

    `read_schema` has bounded its depth.
    """
    if isinstance(schema, list):
        return [_moved(item, pointer) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            result[key] = {name: _moved(part, pointer) for name, part in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[key] = pointer + value[1:]
        else:
            result[key] = value if key in _DATA else _moved(value, pointer)
    return result


class CallReader:
    """Incremental parser that splits a reply's text into visible text and tool calls.

    Text is passed on at once, except text that is or may begin a call: that is held until the end. All text that was
    fed comes out again, as text or as calls, except white space around calls.
    """

    def __init__(self, call: GenerateCall) -> None:
        self._id = call.id
        self._names = frozenset(name_of(tool) for tool in call.tools)
        self._buffer = ""
        self._has_emitted = False
        self._is_holding = not self._names

    def feed(self, text: str) -> str:
        """Add text of the reply; return the part that is certainly text."""
        if not self._names:
            return text
        self._buffer += text
        if self._is_holding:
            return ""
        cut = self._certain()
        emitted, self._buffer = self._buffer[:cut], self._buffer[cut:]
        self._has_emitted = self._has_emitted or bool(emitted)
        return emitted

    def end(self) -> tuple[str, tuple[Mapping[str, Any], ...]]:
        """Return the rest of the text, and the calls in OpenAI's form."""
        if not self._names:
            return "", ()
        calls, rest = _bare_calls(self._buffer, self._names) if not self._has_emitted else ([], self._buffer)
        if not calls:
            calls, rest = _tagged_calls(self._buffer, self._names)
        openai_calls = []
        for index, (name, arguments) in enumerate(calls):
            # the id is derived from the reply's, so a repeated reply has the same ids
            identity = hashlib.sha256(f"{self._id}/{index}".encode(errors="surrogatepass")).hexdigest()[:24]
            function = {"name": name, "arguments": arguments}
            openai_calls.append({"id": f"call_{identity}", "type": "function", "function": function})
        return rest, tuple(openai_calls)

    def _certain(self) -> int:
        """Return the number of buffered characters that are text; set `_is_holding` if a call may have begun."""
        text = self._buffer
        start = len(text) - len(text.lstrip())
        if not self._has_emitted:
            if start == len(text) or _may_begin(text[start:], _BARE):
                return 0
            self._is_holding = text.startswith(_BARE, start)
            if self._is_holding:
                return 0
        positions = [position for mark in _MARKS if (position := text.find(mark)) >= 0]
        self._is_holding = bool(positions)
        if positions:
            return min(positions)
        return next(
            (index for index in range(max(0, len(text) - 16), len(text)) if _may_begin(text[index:], _MARKS)),
            len(text),
        )


def _may_begin(text: str, marks: Sequence[str]) -> bool:
    """Return whether `text` is a proper prefix of a mark."""
    return any(mark.startswith(text) and mark != text for mark in marks)


def _tagged_calls(text: str, names: Collection[str]) -> tuple[list[tuple[str, str]], str]:
    """Return the calls between marks, and the text without them.

    A mark whose content is not a call stays in the text.
    """
    calls: list[tuple[str, str]] = []
    plain_text, position = "", 0
    while (start := text.find(_OPEN, position)) >= 0:
        close = text.find(_CLOSE, start)
        end = len(text) if close < 0 else close
        values = list(_values(_unfenced(text[start + len(_OPEN) : end])))
        call = _read_call(values[0], names) if len(values) == 1 else None
        # if it is not a call, skip only the mark: another call may begin inside
        after = min(end + len(_CLOSE), len(text)) if call else start + len(_OPEN)
        plain_text += text[position:start] if call else text[position:after]
        calls += [call] if call else []
        position = after
    plain_text += text[position:]
    if not calls and (start := plain_text.find(_TAG)) >= 0:
        calls, _ = _bare_calls(plain_text[start:], names)
        plain_text = plain_text[:start] if calls else plain_text
    return calls, plain_text if plain_text.strip() or not calls else ""


def _bare_calls(text: str, names: Collection[str]) -> tuple[list[tuple[str, str]], str]:
    """Return (calls, "") if the whole text consists of calls, else (no calls, the text)."""
    parsed = [_read_call(value, names) for value in _values(_unfenced(text.strip().removeprefix(_TAG)))]
    calls = [call for call in parsed if call]
    return (calls, "") if parsed and len(calls) == len(parsed) else ([], text)


def _unfenced(text: str) -> str:
    """Return the text without the ``` fence that models put around JSON."""
    text = text.strip()
    return re.sub(r"^```(?:json)?\s*|\s*```$", "", text) if text.startswith("```") and text.endswith("```") else text


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text, separated by white space, `;` or `,`; None at invalid text.

    The items of a list are yielded one by one.
    """
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    position = 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            yield None
            return
        yield from value if isinstance(value, list) else [value]
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n;,"))


def _read_call(value: Any, names: Collection[str]) -> tuple[str, str] | None:
    """Return (name, arguments as JSON) if the value calls a declared tool, else None."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = next(_values(arguments), None)
    return (value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")
