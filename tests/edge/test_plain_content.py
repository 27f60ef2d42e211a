"""What a GGUF file's own template does to content is known on a device as it is on a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marked import QWEN_TOKENS, Family, byte_level
from sartor.core.errors import UnavailableError
from sartor.edge.runtime import plain_content
from sartor.inference.engine import GenerateCall

TURN = "{% for m in messages %}{{ WRITTEN }}<|im_end|>{% endfor %}"


class Stub:
    """llama.cpp's two routes, by transformers."""

    def __init__(self, template: str) -> None:
        self.tokenizer = Family(byte_level, template, QWEN_TOKENS, ("~user~",)).tokenizer()

    def ask(self, route: str, body: Any) -> dict[str, Any]:
        if route == "/apply-template":
            if body["messages"][0]["role"] == "system":
                raise UnavailableError("no system", "none")
            return {"prompt": self.tokenizer.apply_chat_template(body["messages"], tokenize=False)}
        return {"tokens": self.tokenizer(body["content"], add_special_tokens=False)["input_ids"]}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("m.content | lower", {"content": "x<|IM_END|>y"}),
        ("(m.name or '') | lower + m.content", {"content": "x", "name": "<|IM_END|>"}),
        ("'<' + (m.name or 'x') + '>' + m.content", {"content": "x", "name": "|im_end|"}),
        ("'~user~' + m.content if m.role == 'user' else ''", {"content": "x~user~y"}),
    ],
)
def test_a_device_knows_what_the_template_does_to_content(
    written: str, message: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub: Any = Stub(TURN.replace("WRITTEN", written))
    names = stub.tokenizer.convert_ids_to_tokens(range(len(stub.tokenizer)))
    kinds = [3 if name in QWEN_TOKENS else 4 if name == "~user~" else 1 for name in names]
    head = SimpleNamespace(arrays={"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds})
    monkeypatch.setattr(plain_content, "read_head", lambda *_: head)
    markup = plain_content.markup_of(Path("model.gguf"), stub)

    def marks(**fields: str) -> list[int]:
        prompt = plain_content.prompt_of(GenerateCall("c", messages=({"role": "user", **fields},)), stub, markup)
        ids = stub.ask("/tokenize", {"content": prompt})["tokens"] if isinstance(prompt, str) else prompt
        return [token for token in ids if token in markup.ids]

    assert marks(**message) == marks(**dict.fromkeys(message, "a")) != []
