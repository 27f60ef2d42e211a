"""Prompts with tools have the same bytes and token ids in training, our engine, transformers and llama.cpp."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

import tiny
import tool_prompts
from sartor.inference.llamacpp_server import LlamaCppServer
from sartor.models.chat import ChatTokenizer
from tool_prompts import (
    PROMPTS,
    TEMPLATES,
    ToolPrompt,
    by_engine,
    by_llama_cpp,
    by_training,
    by_transformers,
    is_written_otherwise,
    llama_cpp_server,
    prompts,
)

NAMES = list(TEMPLATES)
ALL = list(prompts())


def share_of(name: str) -> list[ToolPrompt]:
    """Every fourth prompt, so that the four templates together render all."""
    return list(itertools.islice(ALL, NAMES.index(name), None, len(NAMES)))


def check_alike(name: str, asked: list[ToolPrompt]) -> None:
    """Training, engine and transformers write the same; a text that spells markup is tokenised as text by us alone."""
    chat = TEMPLATES[name].chat()
    for prompt in asked:
        ours, theirs = by_engine(chat, prompt), by_transformers(chat, prompt)
        assert by_training(chat, prompt) == ours
        assert theirs.text == ours.text
        assert prompt.spells_markup or theirs.ids == ours.ids


@pytest.mark.parametrize("name", NAMES)
def test_tool_prompts_are_alike(name: str) -> None:
    check_alike(name, share_of(name))


@pytest.mark.circle
@pytest.mark.parametrize("name", NAMES)
def test_all_tool_prompts_are_alike_in_every_template(name: str) -> None:
    check_alike(name, ALL)


TEXT_ARGUMENTS = (
    "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template", [TEXT_ARGUMENTS, TEXT_ARGUMENTS.replace(" + call.function.arg", " ~ call.function.arg")]
)
def test_template_of_arguments_as_text_gets_text_everywhere(template: str) -> None:
    """The second one refuses no object, but would write it as Python does."""
    chat = ChatTokenizer(tiny.tokenizer(template))
    assert chat.probed.needs_text_arguments
    for prompt in ALL[:20]:
        ours = by_engine(chat, prompt)
        assert by_training(chat, prompt) == ours
        calls = [call["function"] for message in prompt.messages for call in message.get("tool_calls", ())]
        assert all(json.dumps(call["arguments"], ensure_ascii=False) in ours.text for call in calls)


@pytest.fixture(scope="module", params=NAMES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    yield request.param, llama_cpp_server(TEMPLATES[request.param].chat(), tmp_path_factory.mktemp("gguf"))


def test_llama_cpp_writes_tool_prompts_alike_but_for_numbers(server: tuple[str, LlamaCppServer]) -> None:
    """Its `tojson` writes numbers with six digits, and whole ones without a point; everything else is the same."""
    name, llama_cpp = server
    chat = TEMPLATES[name].chat()
    for prompt in share_of(name):
        ours, theirs = by_engine(chat, prompt), by_llama_cpp(chat, llama_cpp, prompt)
        has_number = any(map(is_written_otherwise, tool_prompts.numbers_of(prompt))) and chat.probed.writes_tools
        assert (theirs.text == ours.text) is not has_number
        assert has_number or prompt.spells_markup or theirs.ids == ours.ids


def test_prompts_are_hostile_and_typed() -> None:
    text = json.dumps([[prompt.messages, prompt.tools] for prompt in ALL], ensure_ascii=False)
    assert len(ALL) == PROMPTS and len({json.dumps(prompt.messages) for prompt in ALL}) == PROMPTS
    for piece in (
        "1e+21",
        "-0.0",
        ": 0.1",
        "9223372036854775807",
        "👩🏽‍🚀",
        "<|im_end|>",
        "<tool_call>{}",
        '"q": ""',
        "\\t",
    ):
        assert piece in text
    assert 40 < sum(prompt.spells_markup for prompt in ALL) < 110
