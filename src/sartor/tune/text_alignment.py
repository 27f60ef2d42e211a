"""Alignment of one reply as two tokenizers cut it.

A reply is cut into chunks, the shortest pieces of text at whose ends both tokenisations have a boundary. The
log-probability of a chunk is the sum over its tokens, under either model:

    log p(chunk | text before it) = sum_{t in chunk} log p(t | tokens before t)

So distributions over different vocabularies become comparable: approximate likelihood matching, Minixhofer et al.
2025, arXiv:2503.20083. Both models see the same text before a chunk, though not the same tokens. What ends a reply
(`<|im_end|>`, `</s>`) is spelt differently by each chat template and forms one chunk, with white space before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample


@dataclass(frozen=True)
class Chunk:
    """Piece of a reply: indices among the supervised tokens of the row under either tokenizer."""

    student: range
    teacher: range


def supervised_runs(row: TokenizedExample) -> list[range]:
    """Return the runs of supervised tokens, as indices among the row's supervised tokens: one run for each reply.

    The first token of a row has no predecessor and is in no run.
    """
    runs: list[range] = []
    count, previous = 0, -2
    for position in range(1, len(row.ids)):
        if not row.learnt[position]:
            continue
        if position == previous + 1 and runs:
            runs[-1] = range(runs[-1].start, count + 1)
        else:
            runs.append(range(count, count + 1))
        count, previous = count + 1, position
    return runs


def supervised_ids(row: TokenizedExample) -> list[int]:
    """Return the supervised token ids of a row, in order."""
    return [token for token, is_learnt in zip(row.ids[1:], row.learnt[1:], strict=True) if is_learnt]


def align(
    student: tuple[TokenizedExample, ChatTokenizer], teacher: tuple[TokenizedExample, ChatTokenizer]
) -> list[Chunk]:
    """Return the chunks of every reply of a row that both tokenizers spell alike, in order.

    A reply whose text differs (a template that adds or drops a part of it) has no chunk. If the templates supervise a
    different number of replies, only the last one is aligned.
    """
    runs = [supervised_runs(row) for row, _ in (student, teacher)]
    if len(runs[0]) != len(runs[1]):
        runs = [side[-1:] for side in runs]
    ids = [supervised_ids(row) for row, _ in (student, teacher)]
    chunks: list[Chunk] = []
    for own, other in zip(*runs, strict=False):
        spans = _align_reply(
            (ids[0][own.start : own.stop], student[1]), (ids[1][other.start : other.stop], teacher[1])
        )
        for first, second in spans:
            chunks.append(
                Chunk(
                    range(own.start + first.start, own.start + first.stop),
                    range(other.start + second.start, other.start + second.stop),
                )
            )
    return chunks


def _align_reply(
    student: tuple[Sequence[int], ChatTokenizer], teacher: tuple[Sequence[int], ChatTokenizer]
) -> list[tuple[range, range]]:
    """Return the chunks of one reply, as ranges of its tokens on either side; empty if the texts differ."""
    cuts, texts = [], []
    for ids, chat in (student, teacher):
        content = _content(ids, chat)
        text, ends = _ends(content, chat)
        cuts.append(ends)
        texts.append(text)
    if texts[0] != texts[1]:
        return []
    chunks: list[tuple[range, range]] = []
    first = second = 0
    # the end of the text is left to the last chunk, with what ends the reply
    for end in sorted((cuts[0].keys() & cuts[1].keys()) - {0, len(texts[0])}):
        chunks.append((range(first, cuts[0][end]), range(second, cuts[1][end])))
        first, second = cuts[0][end], cuts[1][end]
    content_ends = [cuts[side].get(len(texts[side]), 0) for side in (0, 1)]
    if content_ends[0] > first and content_ends[1] > second:
        chunks.append((range(first, content_ends[0]), range(second, content_ends[1])))
        first, second = content_ends
    if len(student[0]) > first and len(teacher[0]) > second:
        chunks.append((range(first, len(student[0])), range(second, len(teacher[0]))))
    return chunks


def _content(ids: Sequence[int], chat: ChatTokenizer) -> Sequence[int]:
    """Return the tokens of a reply without the special tokens that end it."""
    end = len(ids)
    while end and (ids[end - 1] in chat.special or ids[end - 1] in chat.stops):
        end -= 1
    return ids[:end]


def _ends(ids: Sequence[int], chat: ChatTokenizer) -> tuple[str, dict[int, int]]:
    """Return the text of a reply without white space around it, and its boundaries.

    A boundary is a number of characters, with the number of tokens that spell them. A token that ends within a
    character of several bytes makes none.
    """
    text = _decode(ids, chat)
    lead, stripped = len(text) - len(text.lstrip()), text.strip()
    ends: dict[int, int] = {}
    for count in range(1, len(ids) + 1):
        part = _decode(ids[:count], chat)
        if part.endswith("\ufffd") or not text.startswith(part):
            continue
        place = min(max(len(part) - lead, 0), len(stripped))
        # of the tokens that end at one place the first is its boundary: white space behind the text belongs to its end
        ends.setdefault(place, count)
    return stripped, ends


def _decode(ids: Sequence[int], chat: ChatTokenizer) -> str:
    return str(chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
