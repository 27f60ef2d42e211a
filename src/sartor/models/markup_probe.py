"""Find a base's markup: render turns, tools, reasoning and media with its own template, and see which tokens are not content.

Every text of the probes is a sentinel, so whatever else the template writes is its own. Of its own tokens, and of all that the
tokenizer adds to its vocabulary, those count that `markup.is_markup` takes for control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import Message, Part
from sartor.models.markup import Markup, Token, is_markup, plain_markup

# Mixed case, so that it shows where a template changes the case of content
_AS_GIVEN = re.compile("Sartor[A-Z]ProbeSartoR")
_SENTINEL = re.compile(_AS_GIVEN.pattern, re.IGNORECASE)
_USER, _REPLY, _SYSTEM, _CALLED, _ARGUMENT, _RESULT, _REASON = (f"Sartor{letter}ProbeSartoR" for letter in "URSCATZ")
_TOOL, _ABOUT, _KEY = (f"Sartor{letter}ProbeSartoR" for letter in "NDK")
_PLAIN_TOOL = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
# Clients choose the keys of schemas too, and some templates write a key between angle brackets
_PARAMETER = {"type": "string", "description": _ABOUT, _KEY: _ARGUMENT}
_PARAMETERS = {"type": "object", "properties": {_KEY: _PARAMETER}, _KEY: _ARGUMENT}
_FULL_TOOL = {"name": _TOOL, "description": _ABOUT, "parameters": _PARAMETERS, _KEY: _ARGUMENT}


@dataclass(frozen=True)
class Probed:
    """What the probes found. plain_text: pieces of the template that look like markup and are no tokens of their own.

    writes_calls, writes_reasoning: whether the template writes these fields of an assistant's turn.
    """

    markup: Markup
    plain_text: tuple[str, ...]
    writes_calls: bool
    writes_reasoning: bool


def probe(chat: Any) -> Probed:
    """Return what a `Chat` keeps for itself."""
    renderings = {
        "turns": list(_turns(chat)),
        "tools": list(_tools(chat)),
        "reasoning": list(_reasoning(chat)),
        "media": [token for token in getattr(chat.media, "tokens", {}).values()],
    }
    tokens = _tokens(chat.tokenizer, renderings)
    texts = [text for written in renderings.values() for text in written]
    pieces = [piece for text in texts for piece in _SENTINEL.split(text)]
    turns = "\n".join(renderings["turns"])
    markup = markup_in(texts, tokens, _fold(chat.tokenizer, {token.id for token in tokens}))
    return Probed(
        markup,
        tuple(_plain_text(pieces, _SENTINEL.split(turns), markup)),
        writes_calls=any(_CALLED in text for text in renderings["tools"]),
        writes_reasoning=any(_REASON in text for text in renderings["reasoning"]),
    )


def markup_in(texts: Sequence[str], tokens: Iterable[Token], fold: Callable[[str], str] | None = None) -> Markup:
    """Return the markup of a base whose template wrote `texts` of probes: what it does to content is read off them."""
    tokens = list(tokens)
    spelt = [token.token.strip() for token in tokens]
    beginnings = {text[:end] for text in spelt for end in range(1, len(text))}
    longest = max(map(len, beginnings), default=0)
    before = {piece for text in texts for piece in _SENTINEL.split(text)[:-1]}
    openings = {piece[-size:] for piece in before for size in range(1, longest + 1)} & beginnings
    keeps_case = all(_AS_GIVEN.fullmatch(sentinel) for text in texts for sentinel in _SENTINEL.findall(text))
    return Markup(tokens, keeps_case=keeps_case, openings=openings, fold=fold)


def plain_probes() -> list[list[dict[str, str]]]:
    """Return conversations of sentinels in OpenAI's form, for a template that somebody else renders."""
    user, reply = {"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}
    named = [{**turn, "name": _CALLED} for turn in (user, reply)]
    return [[{"role": "system", "content": _SYSTEM}, user, reply, user], [user], [*named, user]]


def _turns(chat: Any) -> Iterator[str]:
    user, reply = Message.of("user", _USER), Message.of("assistant", _REPLY)
    yield from _written(chat, [Message.of("system", _SYSTEM), user, reply, user], reply_next=True)
    yield from _written(chat, [user, reply, user], reply_next=True)
    yield from _written(chat, [user, reply])
    yield from _written(chat, [replace(user, name=_CALLED), replace(reply, name=_CALLED), user])


def _tools(chat: Any) -> Iterator[str]:
    for tool, key in ((_PLAIN_TOOL, "probe"), (_FULL_TOOL, _KEY)):
        tools = json.dumps([{"type": "function", "function": tool}])
        for arguments in ({key: _ARGUMENT}, json.dumps({key: _ARGUMENT})):
            yield from _called(chat, arguments, tools)


def _called(chat: Any, arguments: Any, tools: str) -> Iterator[str]:
    call = {"id": "123456789", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    called = Message("assistant", (Part("text"),), tool_calls=json.dumps([call]))
    result = Message("tool", (Part("text", _RESULT),), name=_CALLED, tool_call_id="123456789")
    turns = [Message.of("user", _USER), called, result, Message.of("assistant", _REPLY), Message.of("user", _USER)]
    whole = list(_written(chat, turns, tools=tools, reply_next=True))
    yield from whole or _written(chat, turns[:2], tools=tools)


def _reasoning(chat: Any) -> Iterator[str]:
    reply = Message("assistant", (Part("text", _REPLY),), reasoning_content=_REASON)
    yield from _written(chat, [Message.of("user", _USER), reply])


def _written(chat: Any, messages: list[Message], *, tools: str = "", reply_next: bool = False) -> Iterator[str]:
    """The rendering; nothing where the template refuses."""
    try:
        yield chat.write(messages, tools=tools, reply_next=reply_next)
    except SourceError:
        return


def _tokens(tokenizer: Any, renderings: dict[str, list[str]]) -> list[Token]:
    added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    writers: dict[int, list[str]] = {}
    for name, texts in renderings.items():
        for token_id in {token_id for text in texts for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]}:
            writers.setdefault(token_id, []).append(name)
    candidates = {token_id: token.content for token_id, token in added.items()}
    # tokens of the vocabulary that nobody declared, such as a <tool_call> that was learnt as a word
    candidates |= {token_id: tokenizer.decode([token_id]) for token_id in writers if token_id not in added}
    candidates |= {token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in special if token_id not in candidates}
    return [
        Token(text, token_id, token_id in special, tuple(writers.get(token_id, ("tokenizer",))))
        for token_id, text in candidates.items()
        if text and is_markup(text, special=token_id in special, is_written=token_id in writers and token_id in added)
    ]


def _fold(tokenizer: Any, ids: set[int]) -> Callable[[str], str] | None:
    """What the tokenizer's normalizer makes of a character, if it looks for markup in normalised text; else None.

    Words of the vocabulary, which nobody added, are always read out of normalised text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    added = tokenizer.added_tokens_decoder
    if normalizer is None or not any(token_id not in added or added[token_id].normalized for token_id in ids):
        return None
    before = normalizer.normalize_str("x")

    def fold(character: str) -> str:
        written = normalizer.normalize_str(f"x{character}")
        return written[len(before) :] if written.startswith(before) else character

    return fold


def _plain_text(pieces: list[str], turns: list[str], markup: Markup) -> list[str]:
    """Control words and headers of turns that are plain text to the tokenizer: content that spells them is not told apart."""
    words = [word for piece in pieces for word in plain_markup(piece) if not markup.spelt(word)]
    headers = [piece for piece in turns if piece.strip() and not markup.spelt(piece)]
    return list(dict.fromkeys([*words, *headers]))
