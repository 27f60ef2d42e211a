"""Messages and tools reach the model through the base's own template, or in the stated text where it writes no tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

import tiny
from sartor.core.errors import RequestError
from sartor.inference.engine import GenerateCall
from sartor.inference.prompts import FIRST_CHARACTERS, prompt_ids, prompt_text
from sartor.models.chat import ChatTokenizer

# as Qwen's and Hermes's do: tools in the system turn, calls with their arguments as JSON
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as DeepSeek's does: the arguments' text where it stands
TEXT_TEMPLATE = TOOL_TEMPLATE.replace("{{ c.function.arguments | tojson }}", "{{ 'say ' + c.function.arguments }}")
# as Gemma's does
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + tiny.CHATML
)
FIND = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
}
ASKED = {"role": "user", "content": "what colour is the sky"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"q": "sky"}'}}],
}
RETURNED = {"role": "tool", "tool_call_id": "call_1", "content": "blue"}


def rendered(template: str, *messages: dict[str, Any], tools: tuple[Any, ...] = ()) -> str:
    return prompt_text(ChatTokenizer(tiny.tokenizer(template)), GenerateCall(id="c", messages=messages, tools=tools))


def test_messages_go_through_the_template() -> None:
    parts = {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]}
    assert rendered(tiny.CHATML, parts, ASKED) == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nwhat colour is the sky<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_writes_tools_is_given_them() -> None:
    chat = ChatTokenizer(tiny.tokenizer(TOOL_TEMPLATE))
    others = ChatTokenizer(tiny.tokenizer()), ChatTokenizer(tiny.tokenizer(None))
    assert chat.probed.writes_tools and not any(other.probed.writes_tools for other in others)
    text = rendered(TOOL_TEMPLATE, ASKED, CALLED, RETURNED, tools=(FIND,))
    assert (
        '"name": "find"' in text.partition("<|im_start|>user")[0]
        and '<tool_call>find {"q": "sky"}</tool_call>' in text
    )
    assert "<|im_start|>tool\nblue" in text and "<tools>" not in text


def test_a_template_that_wants_arguments_as_text_is_given_text() -> None:
    assert '<tool_call>find say {"q": "sky"}</tool_call>' in rendered(
        TEXT_TEMPLATE, ASKED, CALLED, RETURNED, tools=(FIND,)
    )


def test_a_template_without_tools_is_given_the_stated_text() -> None:
    text = rendered(
        tiny.CHATML, {"role": "system", "content": "be short"}, ASKED, CALLED, RETURNED, RETURNED, tools=(FIND,)
    )
    system, _, rest = text.partition("<|im_end|>")
    assert (
        system.startswith("<|im_start|>system\nbe short\n\nYou may call")
        and '"name": "find"' in system
        and "{{" not in system
    )
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "find", "arguments": {"q": "sky"}}\n</tool_call><|im_end|>'
        in rest
    )
    assert (
        rest.count("<|im_start|>user\n<tool_response>\nblue\n</tool_response>\n<tool_response>") == 1
        and "<|im_start|>tool" not in rest
    )


def test_template_without_system_turn_gets_it_in_the_user_turn() -> None:
    """The tools stand in the user turn, before the question."""
    text = rendered(NO_SYSTEM, ASKED, tools=(FIND,))
    assert text.startswith("<|im_start|>user\nYou may call") and text.index("<tools>") < text.index("what colour")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_of_earlier_replies_reaches_the_template(name: str) -> None:
    """Under the name of DeepSeek and older vLLM, and that of newer vLLM and OpenRouter."""
    template = tiny.CHATML.replace(
        "message['content']", "(message.reasoning_content or '') + '|' + message['content']"
    )
    said = {"role": "assistant", "content": "blue", name: "it is day"}
    assert "it is day|blue" in rendered(template, ASKED, said, ASKED)


def test_earlier_calls_are_told_without_tools_too() -> None:
    text = rendered(tiny.CHATML, ASKED, CALLED, RETURNED)
    assert "<tool_call>" in text and "<tools>" not in text


def test_a_raw_text_is_taken_as_it_is() -> None:
    chat = ChatTokenizer(tiny.tokenizer())
    call = GenerateCall(id="c", text="the sky")
    assert prompt_text(chat, call) == "the sky" and chat.tokenizer.decode(prompt_ids(chat, call, 512)) == "the sky"


def test_a_raw_text_opens_as_in_pretraining() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    chat = ChatTokenizer(made)
    assert prompt_ids(chat, GenerateCall(id="c", text="the sky"), 512)[0] == 0
    assert prompt_ids(chat, GenerateCall(id="c", messages=(ASKED,)), 512)[0] == chat.tokenizer.convert_tokens_to_ids(
        "<|im_start|>"
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (3, "role"),
        ({}, "role"),
        ({"role": "robot", "content": "a"}, "robot"),
        ({"role": ["user"], "content": "a"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 3}, "int"),
        ({"role": "user", "content": {"a": 1}}, "dict"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}]}, "no data URL"),
        ({"role": "user", "content": ["a"]}, "part of type None"),
        ({"role": "user", "content": [{"type": "text"}]}, "without text"),
        ({"role": "user", "content": "a", "name": 3}, "name"),
        ({"role": "assistant", "content": "a", "tool_calls": "x"}, "tool call"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": 3}}]}, "tool call"),
        ({"role": "assistant", "content": "a", "tool_calls": [3]}, "tool call"),
    ],
)
def test_a_malformed_message_is_refused(message: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        rendered(tiny.CHATML, message)


def test_what_the_template_refuses_is_the_clients_fault() -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        rendered(NO_SYSTEM, {"role": "system", "content": "a"}, ASKED)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        prompt_ids(ChatTokenizer(tiny.tokenizer()), GenerateCall(id="c"), 512)


def test_arguments_that_are_no_json_are_told_as_they_are() -> None:
    broken = json.loads(json.dumps(CALLED))
    broken["tool_calls"][0]["function"]["arguments"] = "{broken"
    assert '"arguments": "{broken"' in rendered(tiny.CHATML, ASKED, broken, RETURNED)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_huge_prompt_is_not_read_to_its_end(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = "the sky is blue. " * 120_000
    chat = ChatTokenizer(tiny.tokenizer())
    read: list[int] = []
    call = (
        GenerateCall("c", text=huge)
        if form == "text"
        else GenerateCall("c", messages=({"role": "user", "content": huge},))
    )
    kind, given = type(chat.tokenizer), type(chat.tokenizer).__call__

    def counting(self: Any, text: str, **options: Any) -> Any:
        read.append(len(text))
        return given(self, text, **options)

    monkeypatch.setattr(kind, "__call__", counting)
    with pytest.raises(RequestError, match="may have 512") as told:
        prompt_ids(chat, call, 512)
    assert read == [FIRST_CHARACTERS * 512] and told.value.remedy == "send a prompt of fewer than 512 tokens"


def test_a_long_text_of_few_tokens_is_read() -> None:
    """Characters alone refuse nothing: what a tokenizer says of it does."""
    chat = ChatTokenizer(tiny.tokenizer())
    chat.tokenizer.add_tokens(["=" * 400])
    assert len(prompt_ids(chat, GenerateCall("c", text="=" * 40_000), 110)) == 100
