"""A device's tokens and masks are those of transformers' tokenizer, for templates of every make."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sartor.core.errors import ModelError, SourceError
from sartor.core.records import Example, Message
from sartor.models.base import open_chat
from sartor.models.chat import ChatTokenizer
from sartor.models.fast_tokenizer import FastTokenizer

TURNS = (
    Message.of("system", "Be brief."),
    Message.of("user", "what  colour is\nthe sky? Ünïcode 🙂"),
    Message.of("assistant", "the sky is blue"),
    Message.of("user", "and the kitchen"),
    Message.of("assistant", '{"place": "kitchen"}'),
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def both(tiny_base: Path, folder: Path, template: str | None) -> tuple[ChatTokenizer, ChatTokenizer]:
    shutil.copytree(tiny_base, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer(FastTokenizer(folder)), open_chat(folder, None)


@pytest.mark.parametrize("template", [None, CHATML, WITH_TOOLS])
def test_tokens_and_masks_are_transformers(tiny_base: Path, tmp_path: Path, template: str | None) -> None:
    ours, theirs = both(tiny_base, tmp_path / "base", template)
    tools = json.dumps([{"type": "function", "function": {"name": "licht_für", "parameters": {}}}])
    for example in (Example(TURNS, (), "a"), Example(TURNS[1:3], (), "b"), Example(TURNS[:3], (), "c", tools=tools)):
        assert ours.encode(example) == theirs.encode(example)
        assert ours.prompt_ids(example.prompt, example.tools) == theirs.prompt_ids(example.prompt, example.tools)
    assert (ours.stops, ours.pad, ours.special) == (theirs.stops, theirs.pad, theirs.special)
    assert ours.template_digest == theirs.template_digest and ours.longest == theirs.longest
    ids = theirs.tokens("the sky <|im_end|> is")
    assert ours.decode(ids) == theirs.decode(ids)


def test_a_template_that_refuses_is_told(tiny_base: Path, tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    chat, _ = both(tiny_base, tmp_path / "base", refuses)
    with pytest.raises(SourceError, match="no system"):
        chat.prompt_ids(TURNS[:2])


def test_a_template_cannot_reach_the_machine(tiny_base: Path, tmp_path: Path) -> None:
    reaches = "{{ messages.__class__.__mro__ }}" + CHATML
    chat, _ = both(tiny_base, tmp_path / "base", reaches)
    with pytest.raises(SourceError, match="unsafe"):
        chat.prompt_ids(TURNS[:2])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_not_whole_are_refused(tiny_base: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match="not whole"):
        FastTokenizer(tmp_path / "base")
    file.unlink()
    with pytest.raises(ModelError, match="not whole"):
        FastTokenizer(tmp_path / "base")


def test_transformers_is_not_loaded() -> None:
    code = "import sys, sartor.models.fast_tokenizer, sartor.models.chat\nsys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
