"""Text that spells no control token has the ids that it had before content was shielded: GOLDEN was written at f346d1e.

`PYTHONPATH=src:tests/helpers python tests/models/test_content_shielding_golden.py` prints the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest

from marked import FAMILIES, Family
from sartor.core.errors import SourceError
from sartor.core.records import Example, Message, Part
from sartor.inference.engine import GenerateCall
from sartor.inference.prompts import prompt_ids

TEXTS = [
    "the sky is blue",
    " leads",
    "trails ",
    "\n\nboth\n",
    "\t deep \n ",
    "",
    " ",
    "  two  inner  ",
    "a\n\nb\n\n\nc",
    "é\u0301 ß ﷽ ここ",
    "🐈‍⬛ 👩🏽‍🚀 naïve\u200bword",
    "a < b and c > d",
    "x <",
    "> y",
    "<",
    ">",
    "[",
    "]",
    "<|",
    "|>",
    "i <| f |> g",
    "List<String> [0] [a]",
    "<table><tr><td>1</td></tr></table><br/>",
    "<p>para</p> <b>x</b>",
    "if x<tool and think>y: return [INS",
    "im_start im_end think",
    "def f():\n\n    return {'a': 1}  # {{ x }} {% y %}\n\n\nf()",
    '{"name": "light", "arguments": {"room": "hall"}}',
    "User: hi\n### assistant:\nsystem",
    "＜|im_end|＞ ＜think＞",
    "< |im_end|> <\u200b|im_end|>",
    "\ue002",
    "a\ue002\ue004b\ue002\ue003",
    "\\ue002\\ue004",
    "\\n \\u003c",
    "mail me at <a@b.org> or <http://c.org/>",
    "1 << 2 >> 3 <= 4 <=> 5",
    "<0x0A> ▁ ▁▁ x",
]
CALL = json.dumps(
    [{"id": "123456789", "type": "function", "function": {"name": "light", "arguments": {"room": "hall < é"}}}]
)
TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "light", "description": "a < b", "parameters": {"type": "object"}}}]
)
GOLDEN = {
    "chatml, byte level": "0da504fde39c5b98",
    "chatml, a space put first": "08a2e2ff3e5a5e7e",
    "chatml, words normalised": "1513df2bf3885742",
    "chatml, words of the vocabulary": "60fe63f8ba4962e2",
    "chatml without tools": "12f66e533afb815f",
    "llama 3": "2d2846a62f561ea0",
    "gemma": "55567d48ecb96140",
    "mistral, word mark first": "fe78444e61cca187",
    "mistral, word marks put before": "d180dce20a8959f2",
    "mistral, byte level": "d323b7a8eb83c092",
    "llama 2, roles in plain text": "7cff25c3a9d56858",
    "no template": "da9654df13624ee6",
}


def conversations(family: Family) -> Iterator[Example]:
    """Rows of every text, alone and beside each other, with tools where the template writes them."""
    texts = [text for text in TEXTS if not (family.normalized and "＜" in text)]  # NFKC makes markup of these
    for place, text in enumerate(texts):
        other = texts[(7 * place + 3) % len(texts)]
        turns = [Message.of("user", text), Message.of("assistant", other)]
        yield Example(tuple(turns), ())
        yield Example((*turns, Message.of("user", other), Message.of("assistant", text)), ())
        yield Example((Message("user", (Part("text", text), Part("text", other))), turns[1]), ())
        if family.takes_system:
            yield Example((Message.of("system", text), *turns), ())
        if family.takes_tools:
            called = Message("assistant", (Part("text"),), tool_calls=CALL)
            result = Message("tool", (Part("text", text),), name="light", tool_call_id="123456789")
            yield Example((turns[0], called, result, turns[1]), (), tools=TOOLS)
        yield Example((Message.of("assistant", text),), ())


def digest(family: Family) -> str:
    """Digest of all ids and masks; of what is refused, of that."""
    chat, found = family.chat(), []
    for row in conversations(family):
        try:
            coded = chat.encode(row)
            found.append([coded.ids, coded.learnt, chat.prompt_ids(row.prompt, row.tools) if row.prompt else []])
        except SourceError:
            found.append("refused")
    for text in TEXTS:
        if family.normalized and "＜" in text:
            continue
        call = GenerateCall(id="c", messages=({"role": "user", "content": text},), tools=tuple(json.loads(TOOLS)))
        found.append(prompt_ids(chat, call, 4096))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", FAMILIES)
def test_clean_text_encodes_to_the_same_ids(name: str) -> None:
    assert digest(FAMILIES[name]) == GOLDEN[name]


if __name__ == "__main__":
    print(json.dumps({name: digest(family) for name, family in FAMILIES.items()}, indent=4))
