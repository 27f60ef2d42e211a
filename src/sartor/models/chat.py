"""Conversion of chat messages to token ids and loss mask; the only tokenisation.

The assistant's characters are determined by rendering, not guessed from the template's markers. Each assistant turn is
rendered once more with a sentinel in place of its content. The text before the sentinel is the prompt, the text after
it is the rest. The text between, up to and including the first end-of-turn token after it, is supervised. So the mask
is right for templates with or without `{% generation %}`, that strip content, or that add a thinking block: everything
that the template writes between the generation prompt and the end of the turn is what the model must produce.

An image or a recording is rendered as a mark that no text may hold, and the mark becomes the media's own token ids.
They are all there or none, and as many as the media has (`media_tokens.py`).

Content is shielded before it is rendered: text that spells the base's own markup is tokenised as text
(`content_shielding.py`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import model_refs, reply_markup
from sartor.core.errors import MediaError, ModelError, SourceError
from sartor.core.records import Example, Message, Part
from sartor.models.content_shielding import (
    Piece,
    in_text,
    pieces_of,
    shield_json,
    shield_messages,
    with_content,
    with_typed_calls,
)
from sartor.models.media_tokens import Media
from sartor.models.packing import TokenizedExample
from sartor.models.plain_tools import plain_conversations, uses_tools
from sartor.models.template_markup import Opened, Probed, TemplateMarkup, has_marks, probe

# For bases without a chat template. Plain words, so that any tokenizer can encode it; the turn ends with eos.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}### assistant:\n{{ m.content }}{{ eos_token }}\n"
    "{% else %}### {{ m.role }}:\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# Mixed case, so that it does not survive a template that changes the case of replies
_SENTINEL = "SartorSentinel0{}0sentinelSartoR"
# Private-use characters that mark the n-th media part of a conversation
MARK, _MARKED = "\ue000{}\ue001", re.compile("\ue000([0-9]+)\ue001")
_PRIVATE = re.compile("[\ue000\ue001]")
# what a template writes before a reply without reasoning
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
Seen = Sequence[list[int]]


@dataclass(frozen=True)
class RenderedConversation:
    """Rendering of a conversation by a chat template.

    messages, tools: as they were given to the template, shielded. text: with the marks of `content_shielding.py`.
    """

    messages: list[Message]
    tools: str
    text: str


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendering that are supervised."""

    start: int
    end: int


# Last tokens of a prompt, in which a template may open the reasoning
_OPENING_TOKENS = 8


class ChatTokenizer:
    """Tokenizer with its chat template, and what both imply: pad token, stop tokens, loss mask."""

    def __init__(self, tokenizer: Any, extra_stops: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.template = tokenizer.chat_template if self.has_template else PLAIN_TEMPLATE
        if isinstance(self.template, dict):
            self.template = self.template["default"]
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so no reply could end",
                '"eos_token": "</s>" (the base\'s own) in its tokenizer_config.json',
            )
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = added | {token_id for token_id in tokenizer.all_special_ids if token_id is not None}
        stops = {tokenizer.eos_token_id, *extra_stops}
        turn_end = self._end_of_turn()
        self.stops = sorted(stops | ({turn_end} if turn_end is not None else set()))
        # padding is masked, so any token that is not a stop token will do
        special_ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(self.special)]
        candidates = itertools.chain(special_ids, range(len(tokenizer)))
        self.pad: int = next(token for token in candidates if token is not None and token not in self.stops)
        self.media: Media | None = None
        self.keeps_empty_think = True
        self.probed: Probed = probe(self)

    def with_media(self, media: Media) -> ChatTokenizer:
        """Return a copy for a base that also reads `media`."""
        copied = copy.copy(self)
        copied.media = media
        return copied

    def without_empty_think(self) -> ChatTokenizer:
        """Return a copy that leaves the template's empty thinking block out of replies without reasoning."""
        copied = copy.copy(self)
        copied.keeps_empty_think = False
        return copied

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest token, as the vocabulary spells it."""
        return max(map(len, self.tokenizer.get_vocab()))

    @property
    def template_digest(self) -> str:
        """Digest (sha256) of the template in use; a Release is bound to it."""
        return model_refs.template_digest(self.template)

    @property
    def markup(self) -> TemplateMarkup:
        """Control tokens that content must not contain."""
        return self.probed.markup

    def render(self, messages: Sequence[Message], *, tools: str = "", reply_next: bool = False) -> str:
        """Return the text that the template writes. `reply_next` adds the prompt for the assistant's turn.

        Raises SourceError when the template refuses the messages (Gemma's refuses a system message, for one).
        """
        text = self.write(self.shielded(messages), tools=self.shielded_json(tools), reply_next=reply_next)
        return self.markup.opened(text).text

    def shielded(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with breaks in their markup, for `write`. Messages without markup are the same objects."""
        return shield_messages(self.markup, messages)

    def shielded_json(self, text: str) -> str:
        """Return JSON text with every string in it shielded. Invalid JSON is returned unchanged, for `write` to
        refuse.
        """
        return shield_json(self.markup, text)

    def typed(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose calls have their arguments as the template takes them: as objects, or as JSON text."""
        as_text = self.probed.needs_text_arguments
        return [with_typed_calls(message, as_text=as_text) for message in messages]

    def conversation(
        self, messages: Sequence[Message], tools: str = "", *, reply_next: bool = False
    ) -> RenderedConversation:
        """Return the rendering of a conversation: the one of training, of evaluation and of every engine.

        Fields that the template does not write are put into texts: reasoning and calls in the form in which Sartor
        reads them back, tools into the system turn (`plain_tools.py`). messages, tools: as they came, not shielded.
        Raises SourceError if the template refuses the turns.
        """
        probed = self.probed
        turns = in_text(self.shielded(self.typed(messages)), calls=False, reasoning=not probed.writes_reasoning)
        tools = self.shielded_json(tools)
        candidates: Iterable[tuple[list[Message], str]] = [(turns, tools)]
        if uses_tools(turns, tools):
            as_text = [with_typed_calls(message, as_text=True) for message in turns]
            candidates = [(turns, tools), (as_text, tools)]
            # a template may write calls, but no declarations
            if not (probed.writes_tools if tools else probed.writes_calls):
                candidates = ((plain, "") for plain in plain_conversations(turns, tools))
        first_error: SourceError | None = None
        for candidate, written_tools in candidates:
            try:
                text = self.write(candidate, tools=written_tools, reply_next=reply_next)
            except SourceError as error:
                first_error = first_error or error
                continue
            return RenderedConversation(candidate, written_tools, text)
        assert first_error is not None
        raise first_error

    def write(self, messages: Sequence[Message], *, tools: str = "", reply_next: bool = False) -> str:
        """Return the template's text of shielded messages and tools, with shielding marks in it.

        The marks are those of `content_shielding.py`. Raises SourceError as `render` does.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    self._turns(messages),
                    chat_template=self.template,
                    tools=json.loads(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=reply_next,
                )
            )
        except Exception as error:  # templates raise various exceptions for fields that they do not support
            roles = ", ".join(message.role for message in messages)
            raise SourceError(
                f"the chat template refuses the turns ({roles}): {error}",
                "change the row's roles to what the base expects",
            ) from None

    def prompt_ids(self, messages: Sequence[Message], tools: str = "", folder: Path | None = None) -> list[int]:
        """Return the token ids of a conversation, ready for the reply. folder: root of its media paths."""
        rendered = self.conversation(messages, tools, reply_next=True)
        return self.tokens(rendered.text, self.media_ids(messages, folder))

    def media_ids(self, messages: Sequence[Message], folder: Path | None = None) -> Seen:
        """Return the token ids of each media part of a conversation, in order. Raises SourceError for unreadable
        media.
        """
        parts = [part for message in messages for part in message.content if part.kind != "text"]
        if not parts:
            return ()
        if self.media is None:
            kind = parts[0].kind
            command = {
                "image": "sartor tune RECIPE --out DIR --base.image efficientnet-lite0",
                "audio": "sartor tune RECIPE --out DIR --base.audio whisper-tiny-en",
            }[kind]
            problem = f"a text-only base cannot read {kind} parts"
            raise MediaError("no_tower", problem, f"{command} gives it a tower that does")
        if any(
            message.role == "assistant" and part.kind != "text" for message in messages for part in message.content
        ):
            raise SourceError(
                "a reply holds media, and this base writes text alone", "put media into the user's turns"
            )
        return [self.media.ids(part, folder) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a reply."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Return whether the chat template has opened the reply's reasoning at a prompt's end."""
        # ids of media are below 0
        return reply_markup.opens_reasoning(self.decode([token for token in prompt[-_OPENING_TOKENS:] if token >= 0]))

    def encode(self, example: Example, folder: Path | None = None) -> TokenizedExample:
        """Return token ids and loss mask of one Example. folder: root of its media paths.

        A token's loss is weighted by the row's weight times that of its turn; a turn of weight 0 is not learnt, and
        changes no token id. The supervised tokens are decoded as a check. Raises SourceError for unreadable media, and
        when the template refuses the row or changes a reply so that it cannot be located.
        """
        if example.is_document:
            ids = self.content_tokens(example.messages[0].text)
            # if the tokenizer adds a bos token, it opens a document as in pretraining
            bos = self.tokenizer.bos_token_id
            first = [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []
            ids = [*first, *ids, self.tokenizer.eos_token_id]
            return TokenizedExample(ids, [True] * len(ids), example.id, example.weight * example.messages[0].weight)
        rendered = self.conversation(example.messages, example.tools)
        template_example = replace(example, messages=tuple(rendered.messages), tools=rendered.tools)
        text = rendered.text
        spans = [
            self._span(template_example, index, text)
            for index, message in enumerate(template_example.messages)
            if message.role == "assistant"
        ]
        replies = [message for message in template_example.messages if message.role == "assistant"]
        if not self.keeps_empty_think:
            text, spans = _without_empty_think(text, spans, [bool(reply.reasoning_content) for reply in replies])
        stop_tokens = tuple(self.tokenizer.convert_ids_to_tokens(stop) for stop in self.stops)
        if spans and not text[: spans[-1].end].endswith(stop_tokens):
            # the template writes no end-of-turn: without one the model would never learn to stop
            text = text[: spans[-1].end] + self.tokenizer.eos_token
            spans[-1] = replace(spans[-1], end=len(text))
        media_ids = self.media_ids(example.messages, folder)
        opened = self.markup.opened(text)
        if opened.text is not text:
            spans = [Span(opened.position(span.start), opened.position(span.end)) for span in spans]
        ids, owners = self._align(opened, spans, media_ids)
        _check_media(ids, media_ids)
        self._check(opened.text, spans, ids, [owner is not None for owner in owners])
        weights = [1.0 if owner is None else replies[owner].weight for owner in owners]
        learnt = [owner is not None and weight > 0 for owner, weight in zip(owners, weights, strict=True)]
        factors = [weight or 1.0 for weight in weights]
        has_factors = any(factor != 1 for factor in factors)
        return TokenizedExample(ids, learnt, example.id, example.weight, factors=factors if has_factors else None)

    def _span(self, example: Example, index: int, text: str) -> Span:
        """Return the characters of `text` that the assistant turn at `index` has to learn."""
        messages = list(example.messages)
        message = messages[index]
        if message.tool_calls:
            return self._span_of_calls(example, index, text)
        sentinel = _SENTINEL.format(index)
        messages[index] = replace(message, content=(Part("text", sentinel),))
        before, separator, after = self.write(messages, tools=example.tools).partition(sentinel)
        prompt = self.write(messages[:index], tools=example.tools, reply_next=True) if index else before
        # The span starts at the end of the generation prompt, if the rendering has it: the model must also produce
        # what the template writes after it (a thinking block, say). Otherwise it starts at the content, since
        # templates may render a past turn differently from a new one.
        start = next((len(opening) for opening in (prompt, before) if text.startswith(opening)), -1)
        end = len(text) - len(after)
        if not separator or start < 0 or not text.endswith(after) or start > end:
            raise SourceError(
                f"the chat template changes the assistant's turn {index + 1}, so what is to be learnt cannot be told "
                "apart",
                "use a base whose template leaves replies as they are",
            )
        return Span(start, end + self._turn_tail(after))

    def _span_of_calls(self, example: Example, index: int, text: str) -> Span:
        """Return the span of an assistant turn with tool calls. Raises SourceError if the template rewrites it.

        A template may write past turns otherwise than the newest one, as Qwen 3's leaves out their thinking. There the
        turn is what stands in the place of a text in it.
        """
        prompt = self.write(example.messages[:index], tools=example.tools, reply_next=True)
        through_turn = self.write(example.messages[: index + 1], tools=example.tools)
        if text.startswith(through_turn) and through_turn.startswith(prompt):
            return Span(len(prompt), len(through_turn.rstrip("\n")))
        messages = list(example.messages)
        messages[index] = replace(messages[index], tool_calls="")
        try:
            return self._span(replace(example, messages=tuple(messages)), index, text)
        except SourceError:
            raise SourceError(
                "the chat template rewrites a turn of tool calls", "use a base whose template supports tools"
            ) from None

    def _turn_tail(self, after: str) -> int:
        """Return the number of characters of `after` through its first special token.

        0 if anything but white space precedes that token.
        """
        ends = [0]
        stripped = after.lstrip()
        for token_id in self.special:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token and stripped.startswith(token):
                ends.append(len(token) + after.find(token))
        return max(ends)

    def _align(self, opened: Opened, spans: Sequence[Span], media_ids: Seen) -> tuple[list[int], list[int | None]]:
        """Return the tokens of a text, cut at the start of every span, and the number of the span of each, or None.

        Generation will begin at the cut. So the text before it is tokenised as the prompt alone would be: a token that
        ran across the cut in training, or that the end of the prompt spells otherwise, could never occur again.
        """
        if not self.tokenizer.is_fast:
            raise ModelError("the tokenizer gives no character offsets", "use a base with a tokenizer.json")
        text, cuts = opened.text, opened.cuts
        coded, previous_end = self._coded(text, media_ids, cuts), 0
        for span in spans:
            prefix = [piece for piece in self._coded(text[: span.start], media_ids, cuts) if piece[1] >= previous_end]
            # no token starts at `previous_end`: keep the tokens between the replies as they are
            if not prefix or prefix[0][1] > previous_end:
                prefix = [piece for piece in coded if previous_end <= piece[1] and piece[2] <= span.start]
            end = max((piece[2] for piece in coded if piece[1] < span.start < piece[2]), default=span.start)
            cut = [(token, span.start, end) for token in self._continued(text[span.start : end])]
            before = [piece for piece in coded if piece[1] < previous_end]
            after = [piece for piece in coded if piece[1] >= span.start]
            coded = [*before, *prefix, *cut, *after]
            previous_end = span.end
        owners = [_owner(spans, start, end) for _, start, end in coded]
        return [token for token, _, _ in coded], owners

    def _coded(self, text: str, media_ids: Seen, cuts: Sequence[int] = ()) -> list[Piece]:
        """Return (token, start, end) of a text, without gaps.

        Some tokenizers leave white space out of a token's characters; here it belongs to the token. Each mark becomes
        the ids of its media. Raises SourceError unless the marks in the text are in order and of known media: a
        template that leaves a part out, or repeats it, would make the model see other media than the row has.
        """
        pieces: list[Piece] = []
        previous_stop, marks = 0, self.marks(text, media_ids)
        ends = [*(mark.start() for mark in marks), len(text)]
        for index, end in enumerate(ends):
            begin = marks[index - 1].end() if index else 0
            if index:
                pieces += [(token, previous_stop, begin) for token in media_ids[index - 1]]
                previous_stop = begin
            local_cuts = [cut - begin for cut in cuts if begin < cut < end]
            for token, start, stop in pieces_of(self.tokenizer, text[begin:end], local_cuts, is_first=not index):
                pieces.append((token, min(begin + start, previous_stop), begin + stop))
                previous_stop = begin + stop
        return pieces

    @staticmethod
    def marks(text: str, media_ids: Seen) -> list[re.Match[str]]:
        """Return the marks in a text. Raises SourceError unless they are in order and no more than the media."""
        marks = list(_MARKED.finditer(text))
        if [int(mark[1]) for mark in marks] != list(range(len(marks))) or len(marks) > len(media_ids):
            problem = (
                f"the chat template writes {len(marks)} media where the turns hold {len(media_ids)}, or in another "
                "order"
            )
            raise SourceError(problem, "use a base whose template writes every part once")
        return marks

    def _continued(self, piece: str) -> list[int]:
        """Return the tokens of a text in the middle of a line, without the tokenizer's leading space.

        Behind a special token no tokenizer adds that space. Raises SourceError if the tokens do not decode to the
        text.
        """
        if not piece:
            return []
        ids = [token for token, _, _ in self._coded(self.tokenizer.eos_token + piece, ())][1:]
        if self.tokenizer.decode(ids).strip() != piece.strip():
            raise SourceError(
                f"the tokenizer cannot begin a reply with {piece!r}",
                "use a base whose tokenizer round-trips this text",
            )
        return ids

    def _check(self, text: str, spans: Sequence[Span], ids: Sequence[int], learnt: Sequence[bool]) -> None:
        """Raise SourceError unless the supervised tokens decode to the text of the spans."""
        decoded = self.tokenizer.decode([token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt])
        expected = "".join(text[span.start : span.end] for span in spans)
        if _squeezed(decoded) != _squeezed(expected):
            raise SourceError(
                f"the label mask decodes to {decoded[:80]!r} where the reply is {expected[:80]!r}",
                "use a base whose tokenizer round-trips this text",
            )

    def tokens(self, text: str, media_ids: Seen = ()) -> list[int]:
        """Return the token ids of a rendering by `write`, its marks replaced by the ids of their media.

        Raises SourceError for content that spells markup if the tokenizer cannot be made to read it as text.
        """
        if not media_ids and not has_marks(text):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        opened = self.markup.opened(text)
        if not media_ids and not opened.cuts:
            return list(self.tokenizer(opened.text, add_special_tokens=False)["input_ids"])
        if not self.tokenizer.is_fast:
            raise SourceError("the tokenizer gives no character offsets", "take control tokens out of the text")
        ids = [token for token, _, _ in self._coded(opened.text, media_ids, opened.cuts)]
        _check_media(ids, media_ids)
        return ids

    def content_tokens(self, text: str) -> list[int]:
        """Return the token ids of a text that is no rendering, without those of markup."""
        return self.tokens(self.markup.shield(text))

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages as chat templates of text models expect them, with a mark for each media part."""
        self.check_private(messages)
        indices = itertools.count()
        turns = []
        for message in messages:
            texts = [part.text if part.kind == "text" else MARK.format(next(indices)) for part in message.content]
            turns.append(with_content(message, "".join(texts)))
        return turns

    @staticmethod
    def check_private(messages: Sequence[Message]) -> None:
        """Raise SourceError if a text beside media holds a character that marks are made of."""
        parts = [part for message in messages for part in message.content]
        if any(part.kind != "text" for part in parts) and any(_PRIVATE.search(part.text) for part in parts):
            raise SourceError(
                "a text beside media holds characters for private use (U+E000, U+E001)", "take them out: repair_text"
            )

    def _end_of_turn(self) -> int | None:
        """Return the special token that the template writes right after a reply; None without one."""
        sentinel = _SENTINEL.format("end")
        try:
            text = self.write([Message.of("user", "a"), Message.of("assistant", sentinel)])
        except SourceError:
            return None
        after = text.partition(sentinel)[2].lstrip()
        for token_id in sorted(self.special, reverse=True):
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token and after.startswith(token):
                return int(token_id)
        return None


def _owner(spans: Sequence[Span], start: int, end: int) -> int | None:
    """Return the number of the first span that the characters [start, end) touch; None for none."""
    return next((index for index, span in enumerate(spans) if span.start < end and start < span.end), None)


def _without_empty_think(text: str, spans: Sequence[Span], has_reasoning: Sequence[bool]) -> tuple[str, list[Span]]:
    """Return a rendering, and its spans, without the empty thinking blocks at the start of replies.

    has_reasoning: of each span's reply; its block is kept.
    """
    result: list[Span] = []
    removed = 0
    for span, is_reasoned in zip(spans, has_reasoning, strict=True):
        start, end = span.start - removed, span.end - removed
        match = None if is_reasoned else _EMPTY_THINK.match(text, start, end)
        if match:
            text = text[:start] + text[match.end() :]
            removed += match.end() - start
            end -= match.end() - start
        result.append(Span(start, end))
    return text, result


def _check_media(ids: Sequence[int], media_ids: Seen) -> None:
    """Raise SourceError unless every media token is there."""
    if sum(token < 0 for token in ids) != sum(token < 0 for part in media_ids for token in part):
        problem = f"the chat template writes fewer than the {len(media_ids)} media that the turns hold"
        raise SourceError(problem, "use a base whose template writes every part once")


def _squeezed(text: str) -> str:
    """Return `text` without white space: decoders differ in the spaces that they put back around special tokens."""
    return "".join(text.split())
