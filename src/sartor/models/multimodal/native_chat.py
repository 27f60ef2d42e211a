"""Chat template of a multimodal model's own processor.

The template writes a placeholder for each media part. It is replaced by a mark (`models/chat.py`), so that the
supervised text is found as in any base. When the text is tokenised, the mark stands for everything that the processor
writes there, and the whole row is tokenised at once. So the tokens are those of the processor itself.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import Message
from sartor.models.chat import MARK, ChatTokenizer, Seen
from sartor.models.content_shielding import Piece, pieces_of, with_content
from sartor.models.multimodal.native_media import NativeMedia
from sartor.models.template_markup import probe

_PROBE = "SartorProbe0SartoR"
_AS_LIST, _AS_TEXT = True, False
# Type names of media parts in templates; Mistral's use OpenAI's
_NAMES = {"image": ("image",), "audio": ("audio", "input_audio")}


class NativeChat(ChatTokenizer):
    """`ChatTokenizer` of a multimodal model. media: its reader of images and audio."""

    def __init__(self, tokenizer: Any, media: NativeMedia, extra_stops: Sequence[int] = ()) -> None:
        self._native = media
        self._placeholder_pattern = re.compile("|".join(re.escape(token) for token in media.tokens.values()))
        self._has_parts = False
        self._names: dict[str, str] = {}
        self._lists: dict[str, bool] = {}
        self._template_of(tokenizer)
        super().__init__(tokenizer, extra_stops)
        self.media = media
        self.probed = probe(self)

    def write(self, messages: Sequence[Message], *, tools: str = "", reply_next: bool = False) -> str:
        """Return the template's text as `ChatTokenizer.write` does, with a mark for each media part.

        Raises SourceError also if the template writes other media than the turns hold.
        """
        text = super().write(messages, tools=tools, reply_next=reply_next)
        kinds = [part.kind for message in messages for part in message.content if part.kind != "text"]
        placeholders = self._placeholder_pattern.findall(text)
        if not self._has_parts:  # the text has marks already
            if placeholders:
                raise SourceError(
                    f"a text holds the base's own placeholder {placeholders[0]!r}", "take it out: repair_text"
                )
            return text
        if placeholders != [self._native.tokens.get(kind) for kind in kinds]:
            problem = (
                f"the turns hold {len(kinds)} media and the chat template writes "
                f"{' '.join(placeholders[:4]) or 'none'}"
            )
            raise SourceError(problem, "take placeholders out of the texts, or use another base")
        indices = itertools.count()
        return self._placeholder_pattern.sub(lambda match: MARK.format(next(indices)), text)

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages in the forms that the template accepts. Raises SourceError for unsupported media."""
        if not self._has_parts:
            return super()._turns(messages)
        self.check_private(messages)
        kinds = {part.kind for message in messages for part in message.content} - {"text", *self._native.kinds}
        if kinds:
            raise SourceError(f"this base reads no {min(kinds)}", "use a base that does, or leave these rows out")
        return [with_content(message, self._content(message)) for message in messages]

    def _content(self, message: Message) -> Any:
        """Return a message's content as a text or as a list of parts.

        It is a text if the message has no media and the template takes text for its role.
        """
        if all(part.kind == "text" for part in message.content) and not self._lists.get(message.role, False):
            return message.text
        names = self._names
        return [
            {"type": "text", "text": part.text} if part.kind == "text" else {"type": names.get(part.kind, part.kind)}
            for part in message.content
        ]

    def _coded(self, text: str, media_ids: Seen, cuts: Sequence[int] = ()) -> list[Piece]:
        """Return (token, start, end) of a text, as `ChatTokenizer._coded` does.

        The whole text is tokenised at once, each mark expanded to what the processor writes for its media.
        """
        expanded = _ExpandedText(text, self.marks(text, media_ids), media_ids)
        coded = pieces_of(
            self.tokenizer, expanded.text, [expanded.cut(cut) for cut in cuts if cut < len(text)], is_first=True
        )
        placeholders = set(self._native.placeholders.values())
        virtual = iter([token for part in media_ids for token in part if token < 0])
        pieces, previous_stop = [], 0
        for token, start, end in coded:
            begin, stop = expanded.source_position(start, is_start=True), expanded.source_position(end, is_start=False)
            if token in placeholders:
                if not expanded.is_media(start):
                    raise SourceError("a text holds the base's own placeholder of media", "take it out: repair_text")
                token = next(virtual)
            pieces.append((token, min(begin, previous_stop), stop))
            previous_stop = stop
        return pieces

    def _template_of(self, tokenizer: Any) -> None:
        """Determine the form in which the template accepts the content of turns."""
        if not tokenizer.chat_template:
            return

        def says(*turns: tuple[str, bool]) -> bool:
            """Return whether the template writes each turn's text once, and not the list around it."""
            messages = []
            for role, as_list in turns:
                content = [{"type": "text", "text": _PROBE}] if as_list else _PROBE
                messages.append({"role": role, "content": content})
            text = _rendered(tokenizer, messages)
            return text.count(_PROBE) == len(turns) and "'type'" not in text

        # the types of media parts with which the template writes both the text and the placeholder
        self._names = {}
        for kind, token in self._native.tokens.items():
            for name in _NAMES[kind]:
                media = {"role": "user", "content": [{"type": name}, {"type": "text", "text": _PROBE}]}
                text = _rendered(tokenizer, [media])
                if text.count(_PROBE) == 1 and text.count(token) == 1:
                    self._names[kind] = name
        self._has_parts = next(iter(self._native.tokens)) in self._names
        forms = (_AS_TEXT, _AS_LIST)
        user = next((form for form in forms if says(("user", form))), _AS_LIST)
        self._lists["user"] = user
        self._lists["assistant"] = next(
            (form for form in forms if says(("user", user), ("assistant", form))), _AS_LIST
        )
        self._lists["system"] = next((form for form in forms if says(("system", form), ("user", user))), _AS_LIST)


def _rendered(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    """Return the template's text of some turns; empty if the template fails."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates raise various exceptions for forms that they do not support
        return ""


class _ExpandedText:
    """Text with its marks expanded to what the processor writes, and the map between both positions."""

    def __init__(self, text: str, marks: Sequence[re.Match[str]], media_ids: Seen) -> None:
        self._starts: list[int] = []  # start of each media in the expanded text
        self._spans: list[tuple[int, int, int]] = []  # its end there, and start and end of its mark in the text
        expanded, position = "", 0
        for index, mark in enumerate(marks):
            expanded += text[position : mark.start()]
            self._starts.append(len(expanded))
            expanded += media_ids[index].text  # type: ignore[attr-defined]  # the media of a native base write texts
            self._spans.append((len(expanded), mark.start(), mark.end()))
            position = mark.end()
        self.text = expanded + text[position:]

    def is_media(self, position: int) -> bool:
        """Return whether a character of the expanded text is written by the processor."""
        index = bisect.bisect_right(self._starts, position) - 1
        return index >= 0 and position < self._spans[index][0]

    def cut(self, cut: int) -> int:
        """Return the position in the expanded text of a cut of the text, which is never inside a mark."""
        last_span = max(((end, mark_end) for end, _, mark_end in self._spans if mark_end <= cut), default=(0, 0))
        return cut - last_span[1] + last_span[0]

    def source_position(self, position: int, *, is_start: bool) -> int:
        """Return the position in the text of one in the expanded text.

        Inside media it is the start or the end of the mark.
        """
        index = bisect.bisect_right(self._starts, position if is_start else position - 1) - 1
        if index < 0:
            return position
        end, mark_start, mark_end = self._spans[index]
        if position >= end:
            return position - end + mark_end
        return mark_start if is_start else mark_end
