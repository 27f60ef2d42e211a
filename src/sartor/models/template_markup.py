"""Tokens and texts that a chat template writes as markup.

A tokenizer reads `<|im_end|>` in a user's text as the token that ends a turn. So `shield` puts a private mark (BREAK)
into each piece of markup that content spells, before the chat template is rendered. The template's own markup has
none. `opened` removes the marks from the rendering and returns the positions at which the text must be cut before it
is tokenised. Text without markup is unchanged.

Every text of the probes is a sentinel, so all other text is the template's own. Of the tokens in it, and of all that
the tokenizer adds to its vocabulary, those are markup that `is_markup` accepts as control tokens.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import Message, Part

# Private-use characters: a break inside markup, and the escape of the first of these characters in content
_PRIVATE = "\ue002"
BREAK, _LITERAL = f"{_PRIVATE}\ue004", f"{_PRIVATE}\ue003"
# ASCII-only JSON and Python's repr write private characters as escapes
_ESCAPED = "\\ue002"
_CODE = re.compile("\ue002[\ue003\ue004]|\\\\+ue002\\\\+ue00[34]")
_BREAK_ENDS = ("\ue004", "4")
# The form of control tokens. A word in brackets counts if it is in capitals: [INST]
_FORM = re.compile(r"<\|[^\s<>]+\|?>|</?[^\s<>/][^\s<>]*>|\[/?[A-Z][A-Z_]+\]|\[\|[^\s\[\]]+\|\]|<｜[^<>]+｜>")
# SentencePiece's tokens for single bytes
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ELEMENTS = (
    "a abbr address article aside audio b base bdi bdo big blockquote body br button canvas caption center cite code "
    "col "
    "colgroup data dd del details dfn div dl dt em embed fieldset figcaption figure font footer form h1 h2 h3 h4 h5 "
    "h6 head "
    "header hr html i iframe img input ins kbd label legend li link main mark meta nav object ol option p pre q s "
    "samp script "
    "section select small source span strike strong style sub summary sup table tbody td textarea tfoot th thead time "
    "title "
    "tr track tt u ul var video"
)
_HTML = frozenset(_ELEMENTS.split())
# Keys of OpenAI's tools and calls, which templates look up
_KEYS = "type function name description parameters properties required items enum strict id arguments role content"
_FIELDS = frozenset(_KEYS.split())


@dataclass(frozen=True)
class VocabularyToken:
    """Token of a base's markup.

    written_by: parts in which the template writes it (turns, tools, reasoning, media), or tokenizer.
    """

    token: str
    id: int
    special: bool
    written_by: tuple[str, ...] = ("tokenizer",)

    def as_json(self) -> dict[str, Any]:
        """Return an entry of `sartor inspect BASE`."""
        return {"token": self.token, "id": self.id, "special": self.special, "written_by": list(self.written_by)}


@dataclass(frozen=True)
class Opened:
    """Rendering without private marks.

    cuts: positions in `text` inside markup that content spells.
    moves: (position in the rendering, position in `text`) behind each mark.
    """

    text: str
    cuts: tuple[int, ...] = ()
    # (position in the rendering, position in `text`) behind each mark
    moves: tuple[tuple[int, int], ...] = ((0, 0),)

    def position(self, shielded: int) -> int:
        """Return the position in `text` of a position in the rendering with marks."""
        shielded_start, text_start = self.moves[bisect.bisect_right(self.moves, (shielded, len(self.text))) - 1]
        return min(text_start + shielded - shielded_start, len(self.text))


class TemplateMarkup:
    """Markup tokens of a base, and the search for them in a text.

    keeps_case: whether the template keeps the case of content.
    openings: beginnings of markup that the template writes right before content.
    fold: the tokenizer's normalisation of one character before it looks for tokens; None for none.
    """

    def __init__(
        self,
        tokens: Iterable[VocabularyToken],
        *,
        keeps_case: bool = True,
        openings: Iterable[str] = (),
        fold: Callable[[str], str] | None = None,
    ) -> None:
        self.tokens = tuple(sorted(tokens, key=lambda token: token.id))
        self.ids = frozenset(token.id for token in self.tokens)
        self._fold = fold and functools.lru_cache(4096)(fold)
        token_texts = {token.token.strip() for token in self.tokens}
        # a tokenizer that looks for a token in normalised text has normalised the token too
        folded = {"".join(map(self._fold, text)) for text in token_texts} if self._fold else set()
        spelt = sorted(token_texts | {text for text in folded if len(text) > 1})
        self._longest = max(map(len, spelt), default=0)
        self._keeps_case = keeps_case
        self._prefixes = frozenset(self._as_read(text[:end]) for text in spelt for end in range(1, len(text)))
        flags = 0 if keeps_case else re.IGNORECASE
        rests = sorted(
            {text[len(opening) :] for opening in openings for text in spelt if text.startswith(opening)} - {""}
        )
        self._has_openings = bool(rests)
        self._rest = re.compile(_alternation(rests), flags)
        self._rest_prefixes = frozenset(self._as_read(rest[:end]) for rest in rests for end in range(1, len(rest)))
        self._any = re.compile(_alternation(spelt), flags)
        # a lookahead, so that overlapping pieces are all found
        self._overlapping = re.compile(f"(?=({_alternation(spelt)}))", flags)
        initials = re.escape("".join({text[0] for text in spelt}))
        # most texts hold none of the characters with which a mark or a piece of markup begins
        self._needs_look = re.compile("" if fold or rests else f"[{_PRIVATE}\\\\{initials}]", flags)
        self._initial = re.compile(f"[{initials}]" if spelt else r"(?!)", flags)

    def spelt(self, text: str) -> list[str]:
        """Return the pieces of markup that a text spells, in order."""
        return [text[start:end] for start, end in self._spans(text)]

    def shield(self, text: str) -> str:
        """Return content with a BREAK in each piece of markup. Other text is returned as the same object."""
        if not self._needs_look.search(text):
            return text
        if _PRIVATE in text:
            text = text.replace(_PRIVATE, _LITERAL)
        breaks = {start + 1 for start, _ in self._spans(text)} | self._unfinished(text)
        if _ESCAPED in text:
            breaks |= {match.start() + 1 for match in re.finditer(re.escape(_ESCAPED), text)}
        if self._has_openings:
            breaks |= self._begun(text)
        if not breaks:
            return text
        ends = sorted(breaks)
        return BREAK.join(text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True))

    def shield_values(self, value: Any) -> Any:
        """Return a JSON value with every string in it shielded, keys too."""
        if isinstance(value, str):
            return self.shield(value)
        if isinstance(value, list):
            return [self.shield_values(item) for item in value]
        if isinstance(value, dict):
            return {self.shield_key(key): self.shield_values(item) for key, item in value.items()}
        return value

    def shield_key(self, key: str) -> str:
        """Return a key of a JSON object shielded; keys that templates look up stay as they are."""
        return key if key in _FIELDS else self.shield(key)

    def opened(self, rendering: str) -> Opened:
        """Return a rendering without marks, and the positions at which content must be cut."""
        if not has_marks(rendering):
            return Opened(rendering)
        parts, length, previous_end, breaks, moves = [], 0, 0, [], [(0, 0)]
        for code in _CODE.finditer(rendering):
            parts.append(rendering[previous_end : code.start()])
            if code.group()[-1] in _BREAK_ENDS:
                breaks.append(length + len(parts[-1]))
            else:
                parts[-1] += code.group()[: len(code.group()) // 2]
            length += len(parts[-1])
            previous_end = code.end()
            moves.append((previous_end, length))
        text = "".join([*parts, rendering[previous_end:]])
        return Opened(text, tuple(_inside(breaks, self._spans(text) if breaks else [])), tuple(moves))

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return (start, end) of every piece of markup, also of those that overlap."""
        if not self.tokens:
            return []
        result = []
        if self._any.search(text):
            result = [match.span(1) for match in self._overlapping.finditer(text)]
        if self._fold:
            result = sorted({*result, *self._folded_spans(text)})
        return result

    def _folded_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the spans that become markup when the tokenizer normalises the text: full-width letters, say."""
        assert self._fold
        folded, origins = "", []
        for position, character in enumerate(text):
            folded_character = self._fold(character)
            folded += folded_character
            origins += [position] * len(folded_character)
        if folded == text:
            return []
        spans = [match.span(1) for match in self._overlapping.finditer(folded)]
        return [(origins[start], origins[end - 1] + 1) for start, end in spans if origins[start] < origins[end - 1]]

    def _begun(self, text: str) -> set[int]:
        """Return the position at which a text continues markup that the template began before it; else nothing."""
        start = len(text) - len(text.lstrip())
        head = self._as_read(text[start : start + self._longest].rstrip())
        return {start} if self._rest.match(head) or head in self._rest_prefixes else set()

    def _unfinished(self, text: str) -> set[int]:
        """Return the position at which a text ends inside markup that following text may complete; else nothing."""
        end = len(text.rstrip())
        first = max(0, end - self._longest)
        if self._fold or not self._keeps_case:
            tails = (self._as_read(text[start:end]) for start in range(first, end))
            return {end} if any(tail in self._prefixes for tail in tails) else set()
        while match := self._initial.search(text, first, end):
            if text[match.start() : end] in self._prefixes:
                return {end}
            first = match.end()
        return set()

    def _as_read(self, text: str) -> str:
        """Return a text as it is compared with markup: normalised, and lower-case if a template changes case."""
        folded = "".join(map(self._fold, text)) if self._fold else text
        return folded if self._keeps_case else folded.lower()


def has_marks(rendering: str) -> bool:
    """Return whether a rendering may hold private marks, as characters or spelt out."""
    return _PRIVATE in rendering or _ESCAPED in rendering


def is_markup(token: str, *, special: bool, is_written: bool = False) -> bool:
    """Return whether an added token counts as markup: a special one, or one in the form of control tokens.

    White space, single characters, bytes, and HTML elements are text, though some tokenizers store them whole.
    is_written: the base's own template writes it; then a word between marks counts, whatever its form.
    """
    token = token.strip().strip("▁")
    if len(token) < 2 or _BYTE.fullmatch(token):
        return False
    if special:
        return True
    # a word between marks: letters or digits inside, and neither at its ends
    has_marks_at_ends = not (token[0].isalnum() or token[-1].isalnum())
    if is_written and has_marks_at_ends and any(character.isalnum() for character in token):
        return True
    return bool(_FORM.fullmatch(token)) and token.strip("</>").lower() not in _HTML


def plain_markup(text: str) -> list[str]:
    """Return the pieces of a text in the form of markup, each once, in order."""
    return list(dict.fromkeys(_FORM.findall(text)))


def _inside(positions: Iterable[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the positions, in order, that lie inside a span. Both are sorted."""
    selected, index, max_end = [], 0, 0
    for position in positions:
        while index < len(spans) and spans[index][0] < position:
            max_end = max(max_end, spans[index][1])
            index += 1
        if position < max_end:
            selected.append(position)
    return selected


def _alternation(texts: Sequence[str]) -> str:
    """Return a pattern of any of the texts, the longest first.

    It is a tree, so that a search for thousands of texts is fast.
    """
    if not texts:
        return r"(?!)"
    branches: dict[str, list[str]] = {}
    for text in texts:
        branches.setdefault(text[:1], []).append(text)
    may_end = branches.pop("", None) is not None
    parts = []
    for _, alike in sorted(branches.items()):
        shared = os.path.commonprefix(alike)
        suffixes = [text[len(shared) :] for text in alike]
        parts.append(re.escape(shared) + (_alternation(suffixes) if len(suffixes) > 1 else ""))
    joined = parts[0] if len(parts) == 1 and not may_end else f"(?:{'|'.join(parts)})"
    return f"{joined}?" if may_end else joined


# Mixed case, so that a change of case by the template is visible
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
    """Results of probing a chat template.

    plain_text: pieces of the template that look like markup but are not single tokens.
    writes_calls, writes_reasoning: whether the template writes these fields of an assistant's turn.
    writes_tools: whether it writes declared tools.
    needs_text_arguments: whether it writes a call's arguments as JSON only if they are JSON text already.
    """

    markup: TemplateMarkup
    plain_text: tuple[str, ...]
    writes_calls: bool
    writes_reasoning: bool
    writes_tools: bool = False
    needs_text_arguments: bool = False


def probe(chat: Any) -> Probed:
    """Return what probe conversations reveal of a `ChatTokenizer`'s template: its markup and abilities."""
    renderings = {
        "turns": list(_turns(chat)),
        "tools": list(_tools(chat)),
        "reasoning": list(_reasoning(chat)),
        "media": [token for token in getattr(chat.media, "tokens", {}).values()],
    }
    tokens = _tokens(chat.tokenizer, renderings)
    texts = [text for rendered in renderings.values() for text in rendered]
    pieces = [piece for text in texts for piece in _SENTINEL.split(text)]
    turns = "\n".join(renderings["turns"])
    markup = markup_in(texts, tokens, _fold(chat.tokenizer, {token.id for token in tokens}))
    # control words and headers of turns that are plain text to the tokenizer: content that spells them cannot be
    # distinguished from them
    words = [word for piece in pieces for word in plain_markup(piece) if not markup.spelt(word)]
    headers = [piece for piece in _SENTINEL.split(turns) if piece.strip() and not markup.spelt(piece)]
    return Probed(
        markup,
        tuple(dict.fromkeys([*words, *headers])),
        writes_calls=any(_CALLED in text for text in renderings["tools"]),
        writes_reasoning=any(_REASON in text for text in renderings["reasoning"]),
        writes_tools=_writes_tools(chat),
        needs_text_arguments=_needs_text_arguments(chat),
    )


def _writes_tools(chat: Any) -> bool:
    """Return whether the template writes declared tools."""
    tools = json.dumps([{"type": "function", "function": {**_PLAIN_TOOL, "name": _TOOL}}])
    return any(_TOOL in text for text in _written(chat, [Message.of("user", _USER)], tools=tools, reply_next=True))


def _needs_text_arguments(chat: Any) -> bool:
    """Return whether the template refuses arguments as an object, or writes them as Python does, but not as text."""
    arguments = {"probe": _ARGUMENT}
    tools = json.dumps([{"type": "function", "function": _PLAIN_TOOL}])
    objects = list(_called(chat, arguments, tools))
    if objects and not any(str(arguments) in text for text in objects):
        return False
    return any(json.dumps(arguments) in text for text in _called(chat, json.dumps(arguments), tools))


def markup_in(
    texts: Sequence[str], tokens: Iterable[VocabularyToken], fold: Callable[[str], str] | None = None
) -> TemplateMarkup:
    """Return the markup of a base from the `texts` that its template wrote for probes.

    The template's treatment of content is derived from them.
    """
    tokens = list(tokens)
    spelt = [token.token.strip() for token in tokens]
    beginnings = {text[:end] for text in spelt for end in range(1, len(text))}
    longest = max(map(len, beginnings), default=0)
    prefixes = {piece for text in texts for piece in _SENTINEL.split(text)[:-1]}
    openings = {piece[-size:] for piece in prefixes for size in range(1, longest + 1)} & beginnings
    keeps_case = all(_AS_GIVEN.fullmatch(sentinel) for text in texts for sentinel in _SENTINEL.findall(text))
    return TemplateMarkup(tokens, keeps_case=keeps_case, openings=openings, fold=fold)


def plain_probes() -> list[list[dict[str, str]]]:
    """Return conversations of sentinels in OpenAI's form, for a template that another program renders."""
    user, reply = {"role": "user", "content": _USER}, {"role": "assistant", "content": _REPLY}
    named_turns = [{**turn, "name": _CALLED} for turn in (user, reply)]
    return [[{"role": "system", "content": _SYSTEM}, user, reply, user], [user], [*named_turns, user]]


def _turns(chat: Any) -> Iterator[str]:
    """Yield renderings of conversations without tools."""
    user, reply = Message.of("user", _USER), Message.of("assistant", _REPLY)
    yield from _written(chat, [Message.of("system", _SYSTEM), user, reply, user], reply_next=True)
    yield from _written(chat, [user, reply, user], reply_next=True)
    yield from _written(chat, [user, reply])
    yield from _written(chat, [replace(user, name=_CALLED), replace(reply, name=_CALLED), user])


def _tools(chat: Any) -> Iterator[str]:
    """Yield renderings of conversations with tools, with plain and full tools and both forms of arguments."""
    for tool, key in ((_PLAIN_TOOL, "probe"), (_FULL_TOOL, _KEY)):
        tools = json.dumps([{"type": "function", "function": tool}])
        for arguments in ({key: _ARGUMENT}, json.dumps({key: _ARGUMENT})):
            yield from _called(chat, arguments, tools)


def _called(chat: Any, arguments: Any, tools: str) -> Iterator[str]:
    """Yield renderings of a conversation with a tool call and its result."""
    call = {"id": "123456789", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    call_turn = Message("assistant", (Part("text"),), tool_calls=json.dumps([call]))
    result = Message("tool", (Part("text", _RESULT),), name=_CALLED, tool_call_id="123456789")
    turns = [Message.of("user", _USER), call_turn, result, Message.of("assistant", _REPLY), Message.of("user", _USER)]
    renderings = list(_written(chat, turns, tools=tools, reply_next=True))
    yield from renderings or _written(chat, turns[:2], tools=tools)


def _reasoning(chat: Any) -> Iterator[str]:
    """Yield renderings of a reply with reasoning."""
    reply = Message("assistant", (Part("text", _REPLY),), reasoning_content=_REASON)
    yield from _written(chat, [Message.of("user", _USER), reply])


def _written(chat: Any, messages: list[Message], *, tools: str = "", reply_next: bool = False) -> Iterator[str]:
    """Yield the rendering; nothing if the template refuses."""
    try:
        yield chat.write(messages, tools=tools, reply_next=reply_next)
    except SourceError:
        return


def _tokens(tokenizer: Any, renderings: dict[str, list[str]]) -> list[VocabularyToken]:
    """Return the tokens of the tokenizer and of the renderings that count as markup."""
    added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    writers: dict[int, list[str]] = {}
    for name, texts in renderings.items():
        token_ids: set[int] = set()
        for text in texts:
            token_ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        for token_id in token_ids:
            writers.setdefault(token_id, []).append(name)
    candidates = {token_id: token.content for token_id, token in added.items()}
    # undeclared tokens of the vocabulary, such as a <tool_call> that was learnt as a word
    candidates |= {token_id: tokenizer.decode([token_id]) for token_id in writers if token_id not in added}
    candidates |= {
        token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in special if token_id not in candidates
    }
    return [
        VocabularyToken(text, token_id, token_id in special, tuple(writers.get(token_id, ("tokenizer",))))
        for token_id, text in candidates.items()
        if text and is_markup(text, special=token_id in special, is_written=token_id in writers and token_id in added)
    ]


def _fold(tokenizer: Any, ids: set[int]) -> Callable[[str], str] | None:
    """Return the tokenizer's normalisation of a character, if it looks for markup in normalised text; else None.

    Words of the vocabulary that are not added tokens are always read from normalised text.
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
