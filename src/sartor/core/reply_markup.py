"""Parser of tool calls and reasoning from markup in the text of a reply.

It needs no tokenizer.

    <think>...</think> at the beginning                              -> reasoning_content
    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, only at the end,
    [TOOL_CALLS][{...}], <|python_tag|>{...}                          -> tool_calls

The remaining text must contain no markup, or the reply cannot be read. KNOWN matches the markup of the known families
of chat templates, for rows that are read before their base is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sartor.core.errors import TemplateMarkupError
from sartor.core.records import Example, MalformedRow, Message, Part

_KNOWN = (
    r"<\|(?:im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|"
    r"system|user|assistant|observation|end|start|message|channel|return|call|constrain|"
    r"image|image_pad|video_pad|audio|AUDIO|audio_bos|audio_eos|vision_start|vision_end|startoftranscript|startofprev)\|>",
    r"</?(?:tool_call|tool_calls|tool_response|think|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|"
    r"image|bos|eos|end_of_utterance)>",
    r"\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|IMG|AUDIO|THINK)\]|<</?SYS>>",
    r"<｜[^<>｜]{1,40}｜>",
)
KNOWN = re.compile("|".join(_KNOWN))
_REASONING_BEGINNING, _REASONING_END = "<think>", "</think>"
_REASONING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BEGINNINGS = ("[TOOL_CALLS]", "<|python_tag|>")
# nine letters and digits, as Mistral's templates require
_ID, _FROM_TEXT = "text{:05d}", re.compile(r"text\d{5}")
MarkupFinder = Callable[[str], list[str]]


def known(text: str) -> list[str]:
    """Return the markup of the known template families in a text, in order.

    >>> known("hi<|im_end|>"), known("a < b"), known("<s>old</s> new")
    (['<|im_end|>'], [], [])
    """
    if "<" not in text and "[" not in text:
        return []
    result = [match.group() for match in KNOWN.finditer(text)]
    # <s>struck out</s> is HTML; an unpaired tag is the beginning or end of a sequence
    if not result and text.count("<s>") != text.count("</s>"):
        if text.lstrip().startswith("<s>"):
            result.append("<s>")
        if text.rstrip().endswith("</s>"):
            result.append("</s>")
    return result


def read_example(example: Example, find_markup: MarkupFinder = known, *, keep_id: bool = False) -> Example:
    """Return the Example with the markup in its replies parsed into fields; itself if there is none.

    find_markup: returns the markup in a text.
    keep_id: keep the id that the row has in its Dataset.
    Raises TemplateMarkupError for a reply that cannot be read, and for a document with markup: a document is learnt as
    it is and has no fields.
    """
    if example.is_document and (markup := find_markup(example.messages[0].text)):
        raise _unreadable(markup[0], "it is a document, which has no fields")
    messages, rejected = (_read_turns(turns, find_markup) for turns in (example.messages, example.rejected))
    if messages is example.messages and rejected is example.rejected:
        return example
    result = replace(example, messages=messages, rejected=rejected)
    if keep_id:
        vars(result)["id"] = example.id  # the attribute of the cached property
    return result


def with_fields(example: Example) -> Example:
    """Return the row with calls and reasoning of the known template families parsed into fields.

    Raises MalformedRow if a reply cannot be read.
    """
    try:
        return read_example(example)
    except TemplateMarkupError as error:
        raise MalformedRow(error.reason, error.problem) from None


def _read_turns(messages: tuple[Message, ...], find_markup: MarkupFinder) -> tuple[Message, ...]:
    turns = tuple(
        _read_reply(message, find_markup) if message.role == "assistant" else message for message in messages
    )
    return messages if all(after is before for after, before in zip(turns, messages, strict=True)) else turns


def _read_reply(message: Message, find_markup: MarkupFinder) -> Message:
    text = message.text
    markup = find_markup(text)
    if not markup:
        return message
    if any(part.kind != "text" for part in message.content):
        raise _unreadable(markup[0], "it holds media too")
    reasoning, rest = _reasoning(text)
    content, calls = _calls(rest)
    if reasoning and not content.strip() and not calls:
        raise _unreadable(markup[0], "nothing follows the reasoning")
    if leftover := find_markup(content):
        raise _unreadable(leftover[0], "it is no whole reasoning, text and calls")
    if leftover := find_markup(reasoning):
        raise _unreadable(leftover[0], "its reasoning holds more of it")
    if (calls and message.tool_calls) or (reasoning and message.reasoning_content):
        raise _unreadable(markup[0], "the turn has the field already")
    return replace(
        message,
        content=(Part("text", content),),
        tool_calls=json.dumps(calls, ensure_ascii=False) if calls else message.tool_calls,
        reasoning_content=reasoning or message.reasoning_content,
    )


def _unreadable(markup: str, reason: str) -> TemplateMarkupError:
    problem = f"a reply spells {markup!r}, which a chat template writes, and cannot be read into fields: {reason}"
    return TemplateMarkupError(
        problem, "put calls into `tool_calls`, reasoning into `reasoning_content`, and take the rest out"
    )


def with_reasoning(message: Message, find_markup: MarkupFinder) -> Message:
    """Return the message with reasoning at the beginning of its text moved into its field.

    It returns the same object if there is nothing to read.
    """
    text = message.text
    if message.reasoning_content or any(part.kind != "text" for part in message.content) or not find_markup(text):
        return message
    reasoning, rest = _reasoning(text)
    if not reasoning or not rest.strip() or find_markup(reasoning):
        return message
    return replace(message, content=(Part("text", rest),), reasoning_content=reasoning)


def without_reasoning(text: str, *, is_opened: bool = False) -> str:
    r"""Return the text of a reply after its reasoning; unchanged if it has none or the reasoning does not end.

    is_opened: the chat template opened the reasoning, so the reply contains only its end tag.

    >>> without_reasoning("<think>\nIt is on.\n</think>\n\nyes"), without_reasoning("On.</think>yes", is_opened=True)
    ('yes', 'yes')
    """
    _, end, rest = text.partition(_REASONING_END)
    return rest.lstrip() if end and (is_opened or text.lstrip().startswith(_REASONING_BEGINNING)) else text


def opens_reasoning(prompt: str) -> bool:
    """Return whether a prompt ends with the tag that opens a reply's reasoning."""
    return prompt.rstrip().endswith(_REASONING_BEGINNING)


def is_reasoning(text: str) -> bool:
    """Return whether a partial reply is, or may become, reasoning that has not ended."""
    beginning = text.lstrip()[: len(_REASONING_BEGINNING)]
    return _REASONING_BEGINNING.startswith(beginning) and _REASONING_END not in text


def _reasoning(text: str) -> tuple[str, str]:
    """Return (reasoning, remaining text) of a reply."""
    match = _REASONING.match(text)
    return (match[1].strip("\n"), text[match.end() :]) if match else ("", text)


def _calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (text before the calls, calls) of a reply; no calls if one is incomplete."""
    position = next((text.find(mark) for mark in (_OPEN, *_BEGINNINGS) if mark in text), -1)
    if position < 0:
        return text, []
    preceding, call_text = text[:position], text[position:].strip()
    if call_text.startswith(_OPEN):
        bodies = [body.strip() for body in call_text.split(_CLOSE)]
        if bodies.pop() or not all(body.startswith(_OPEN) for body in bodies):
            return text, []  # other text stands between the tags
        bodies = [body.removeprefix(_OPEN) for body in bodies]
    else:
        bodies = [call_text.removeprefix(_BEGINNINGS[0]).removeprefix(_BEGINNINGS[1])]
    values = []
    try:
        for body in bodies:
            value = json.loads(body, parse_constant=_no_constant)
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return text, []
    if not values or not all(_is_call(value) for value in values):
        return text, []
    calls = []
    for index, call in enumerate(values):
        function = {"name": call["name"], "arguments": call.get("arguments", call.get("parameters"))}
        calls.append({"id": _ID.format(index), "type": "function", "function": function})
    return preceding.rstrip("\n"), calls


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return False
    return isinstance(call.get("arguments", call.get("parameters")), dict) and set(call) <= {
        "name",
        "arguments",
        "parameters",
        "id",
    }


def is_from_text(calls: Any) -> bool:
    """Return whether tool calls (OpenAI's list) were parsed from the text of a reply."""
    if not isinstance(calls, list) or not calls:
        return False
    return all(isinstance(call, dict) and _FROM_TEXT.fullmatch(str(call.get("id"))) for call in calls)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")
