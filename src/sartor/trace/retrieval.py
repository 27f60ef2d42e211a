"""Retrieval of the training rows that share words with a prompt and its reply.

A row's score is the mean of up to four likenesses in 0..1, each 1 for an equal text:

    prompt   BM25 of the user's turns (Robertson and Zaragoza 2009, equation 3.15), over that of the query with itself
    reply    BM25 of the assistant's turns; of a preference pair the rejected reply counts too
    spans    rarity of the runs of SPAN_WORDS words that both replies hold, over that of all runs in the query's reply
    media    fraction of the query's images and recordings that the row holds, by the digest of their bytes

A likeness that the query does not have (no words, no media) is left out of the mean. The score is a look-up of words:
it says which rows resemble the reply, not which of them caused it. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.records import Example, Message, Part
from sartor.media import content_parts
from sartor.text import example_text
from sartor.trace.traced_adapter import TraceQuery
from sartor.trace.word_index import SPAN_WORDS, PackedTexts, WordIndex

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

UNKNOWN_SOURCE = "unknown"
# first words of two texts in which shared runs are looked for; the scores read the whole texts
COMPARED_WORDS = 2_000


@dataclass(frozen=True)
class SharedSpan:
    """Longest run of words that two texts share.

    text: as the row has it.
    words: its length.
    rows: number of rows whose replies hold its rarest run of SPAN_WORDS words; 0 for a shorter span.
    """

    text: str = ""
    words: int = 0
    rows: int = 0


@dataclass(frozen=True)
class RowMatch:
    """Likenesses of one row to a query, each in 0..1, and what both share.

    is_rejected: whether the rejected reply of a preference pair is what resembles the query's reply.
    """

    score: float
    prompt: float
    reply: float
    spans: float
    media: float
    shared_prompt: SharedSpan
    shared_reply: SharedSpan
    is_rejected: bool = False


@dataclass(frozen=True, eq=False)
class MediaIndex:
    """Rows by the images and recordings that they hold.

    digest_bytes, digest_starts: M digests in order, laid end to end (`PackedTexts`).
    rows: (E,) the rows that hold each medium, one medium after another; row_starts: (M + 1,) where each begins.
    """

    digest_bytes: U8
    digest_starts: I64
    rows: I32
    row_starts: I64

    @classmethod
    def of(cls, examples: Sequence[Example]) -> MediaIndex:
        """Index the media of rows."""
        found: dict[bytes, list[int]] = {}
        for index, example in enumerate(examples):
            for digest in dict.fromkeys(media_digest(part) for part in media_of(example.messages)):
                found.setdefault(digest.encode(), []).append(index)
        ordered = sorted(found)
        digests = PackedTexts.of(ordered)
        rows = [row for digest in ordered for row in found[digest]]
        starts = np.cumsum([0, *(len(found[digest]) for digest in ordered)], dtype=np.int64)
        return cls(digests.content, digests.starts, np.array(rows, dtype=np.int32), starts)

    def holders(self, digest: str) -> I32:
        """Return the rows that hold the medium with this digest."""
        digests = PackedTexts(self.digest_bytes, self.digest_starts)
        place = bisect_left(digests, digest.encode())
        if place == len(digests) or digests[place] != digest.encode():
            return self.rows[:0]
        return self.rows[self.row_starts[place] : self.row_starts[place + 1]]


@dataclass(frozen=True, eq=False)
class RowSources:
    """Sources of N rows.

    names: source and licence of each of S sources, the latter by the first row.
    owners: (E,) the row of each entry, in order; ids: (E,) index in `names`. A row has an entry for each source.
    """

    names: tuple[tuple[str, str], ...]
    owners: I32
    ids: I32

    @classmethod
    def of(cls, examples: Sequence[Example]) -> RowSources:
        """Return the sources of these rows."""
        numbers: dict[str, int] = {}
        licences: list[str] = []
        owners, ids = array("i"), array("i")
        for row, example in enumerate(examples):
            by_source = {origin.source: origin.licence for origin in example.origins} or {UNKNOWN_SOURCE: ""}
            for source, licence in by_source.items():
                number = numbers.setdefault(source, len(numbers))
                licences += [licence] if number == len(licences) else []
                owners.append(row)
                ids.append(number)
        names = tuple(zip(numbers, licences, strict=True))
        return cls(names, np.array(owners, dtype=np.int32), np.array(ids, dtype=np.int32))


@dataclass(frozen=True, eq=False)
class RetrievalIndex:
    """Index of N rows by the words of their prompts and replies, the runs of their replies, and their media.

    examples: (N,) the rows.
    replies: texts of the rows' replies in their order, then the rejected ones.
    rejected_rows: the row of each rejected reply.
    equal_rows: (N,) the first row with the same words in prompt and replies, and the same media, as each row.
    """

    examples: Sequence[Example]
    prompts: WordIndex
    replies: WordIndex
    media: MediaIndex
    sources: RowSources
    rejected_rows: I64
    equal_rows: I64

    @classmethod
    def of(cls, examples: Sequence[Example]) -> RetrievalIndex:
        """Index these rows."""
        prompts = WordIndex.of((prompt_text(example.messages) for example in examples), with_runs=False)
        rejected = [(index, example) for index, example in enumerate(examples) if example.rejected]
        texts = [reply_text(example.messages) for example in examples]
        replies = WordIndex.of([*texts, *(reply_text(example.rejected) for _, example in rejected)])
        rejected_rows = np.array([index for index, _ in rejected], dtype=np.int64)
        return cls(
            examples,
            prompts=prompts,
            replies=replies,
            media=MediaIndex.of(examples),
            sources=RowSources.of(examples),
            rejected_rows=rejected_rows,
            equal_rows=_equal_rows(examples, prompts, replies, rejected_rows),
        )

    def scores(self, queries: Sequence[TraceQuery]) -> F64:
        """Return the scores (Q, N) of all rows, in 0..1."""
        result = np.zeros((len(queries), len(self.examples)))
        for index, query in enumerate(queries):
            parts = self._likenesses(query)
            if parts:
                result[index] = np.mean(list(parts.values()), axis=0)
        return result

    def match(self, query: TraceQuery, row: int) -> RowMatch:
        """Return the likenesses of one row, and what it shares with the query."""
        return next(self.matches(query, [row]))

    def matches(self, query: TraceQuery, rows: Sequence[int]) -> Iterator[RowMatch]:
        """Yield the likenesses of these rows, and what each shares with the query."""
        parts = self._likenesses(query)
        own = self.replies.similarities(query.reply)
        for row in rows:
            example = self.examples[row]
            values = {name: float(part[row]) for name, part in parts.items()}
            is_rejected = bool(example.rejected) and own is not None and values["reply"] > float(own[row])
            reply = reply_text(example.rejected if is_rejected else example.messages)
            yield RowMatch(
                score=float(np.mean(list(values.values()))) if values else 0.0,
                prompt=values.get("prompt", 0.0),
                reply=values.get("reply", 0.0),
                spans=values.get("spans", 0.0),
                media=values.get("media", 0.0),
                shared_prompt=shared_span(prompt_text(query.prompt), prompt_text(example.messages)),
                shared_reply=shared_span(query.reply, reply, self._rows_with),
                is_rejected=is_rejected,
            )

    def _likenesses(self, query: TraceQuery) -> dict[str, F64]:
        """Return the likenesses (N,) by name that this query has."""
        values = {
            "prompt": self.prompts.similarities(prompt_text(query.prompt)),
            "reply": self._by_row(self.replies.similarities(query.reply)),
            "spans": self._by_row(self.replies.span_fractions(query.reply)),
            "media": self._media_fractions(query),
        }
        return {name: value for name, value in values.items() if value is not None}

    def _by_row(self, values: F64 | None) -> F64 | None:
        """Return the larger value of a row's chosen and rejected reply, (N,)."""
        if values is None:
            return None
        result = values[: len(self.examples)].copy()
        np.maximum.at(result, self.rejected_rows, values[len(self.examples) :])
        return result

    def _media_fractions(self, query: TraceQuery) -> F64 | None:
        digests = dict.fromkeys(media_digest(part) for part in media_of(query.prompt))
        if not digests:
            return None
        fractions = np.zeros(len(self.examples))
        for digest in digests:
            fractions[self.media.holders(digest)] += 1 / len(digests)
        return fractions

    def _rows_with(self, run: Sequence[str]) -> int:
        return len(np.unique(self.replies.holders(run)))


def _equal_rows(examples: Sequence[Example], prompts: WordIndex, replies: WordIndex, rejected_rows: I64) -> I64:
    """Return the first row (N,) with the same words and media as each row."""
    first: dict[tuple[Any, ...], int] = {}
    owners = np.empty(len(examples), dtype=np.int64)
    rejected = {int(row): len(examples) + index for index, row in enumerate(rejected_rows)}
    for row, example in enumerate(examples):
        media = tuple(part.media for part in media_of(example.messages))
        other = replies.key(rejected[row]) if row in rejected else b""
        owners[row] = first.setdefault((prompts.key(row), replies.key(row), other, media), row)
    return owners


def prompt_text(messages: Sequence[Message]) -> str:
    """Return the user's turns as one text."""
    return "\n".join(message.text for message in messages if message.role == "user")


def reply_text(messages: Sequence[Message]) -> str:
    """Return the assistant's turns, tool calls among them, as one text."""
    turns = [message for message in messages if message.role == "assistant"]
    return "\n".join(part for turn in turns for part in (turn.text, turn.tool_calls) if part)


def media_of(messages: Sequence[Message]) -> list[Part]:
    """Return the images and recordings in messages, in order."""
    return [part for message in messages for part in message.content if part.kind != "text"]


def media_digest(part: Part) -> str:
    """Return the sha256 of a medium's bytes: of a data URL, or from the name of a Dataset's file."""
    if part.media.startswith(content_parts.SCHEME):
        return hashlib.sha256(content_parts.bytes_of(part.media, part.kind)).hexdigest()
    return PurePosixPath(part.media).stem


def shared_span(text: str, row_text: str, rows_with: Callable[[Sequence[str]], int] | None = None) -> SharedSpan:
    """Return the longest run of words that a text shares with a row's.

    rows_with: function from a run of SPAN_WORDS words to the number of rows that hold it.
    """
    words, row_words = _first_words(text), _first_words(row_text)
    longest = _matcher(words, row_words).find_longest_match()
    if not longest.size:
        return SharedSpan()
    start, end = row_words[longest.b][1], row_words[longest.b + longest.size - 1][2]
    runs = range(longest.a, longest.a + longest.size - SPAN_WORDS + 1)
    plain = [word for word, _, _ in words]
    counts = [rows_with(plain[first : first + SPAN_WORDS]) for first in runs] if rows_with else []
    return SharedSpan(row_text[start:end], words=longest.size, rows=min(counts, default=0))


def shared_pieces(text: str, row_text: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Return both texts in pieces, each with whether its words are shared, in the same order in both texts.

    A single shared word is no shared piece, unless one of the texts has no other.
    """
    words, row_words = _first_words(text), _first_words(row_text)
    least = max(1, min(2, len(words), len(row_words)))
    blocks = [block for block in _matcher(words, row_words).get_matching_blocks() if block.size >= least]
    own = [(words[block.a][1], words[block.a + block.size - 1][2]) for block in blocks]
    other = [(row_words[block.b][1], row_words[block.b + block.size - 1][2]) for block in blocks]
    return _pieces(text, own), _pieces(row_text, other)


def _first_words(text: str) -> list[tuple[str, int, int]]:
    return example_text.word_positions(text)[:COMPARED_WORDS]


def _matcher(words: Sequence[tuple[str, int, int]], row_words: Sequence[tuple[str, int, int]]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [word for word, _, _ in words], [word for word, _, _ in row_words], autojunk=False)


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[bool, str]]:
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(False, text[position:start]), (True, text[start:end])]
        position = end
    return [piece for piece in [*pieces, (False, text[position:])] if piece[1]]
