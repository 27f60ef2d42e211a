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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.records import Example, Message, Part
from sartor.media import content_parts
from sartor.text import example_text
from sartor.trace.attribution import Attribution, Method
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

# Okapi BM25's usual constants: saturation of a word's count, and weight of a text's length
K1, B = 1.2, 0.75
# words of a run; shorter ones are shared by chance
SPAN_WORDS = 3
# first words of two texts in which shared runs are looked for; the scores read the whole texts
COMPARED_WORDS = 2_000
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the product with it is a bijection of 64-bit integers


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


class WordIndex:
    """Index of D texts by word and by run of SPAN_WORDS words.

    tokens: (W,) word ids of all texts, laid end to end; starts: (D + 1,) where each text begins.
    """

    def __init__(self, texts: Iterable[str], *, with_runs: bool = True) -> None:
        """Index the texts; without runs of words if only `similarities` is wanted."""
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__  # a new word gets the next id
        tokens, starts = array("i"), array("q", [0])
        for text in texts:
            tokens.extend(map(vocabulary.__getitem__, example_text.words(text)))
            starts.append(len(tokens))
        self._vocabulary = dict(vocabulary)
        self.tokens: I32 = np.array(tokens, dtype=np.int32)
        self.starts: I64 = np.array(starts, dtype=np.int64)
        self.count = len(self.starts) - 1
        lengths = np.diff(self.starts)
        self._mean_length = max(float(lengths.mean()) if self.count else 0.0, 1.0)
        self._weights, self._rarity = self._word_weights(lengths)
        self._run_codes, self._run_texts = self._runs(lengths if with_runs else lengths[:0])

    def _word_weights(self, lengths: I64) -> tuple[Any, F64]:
        """Return the BM25 weights (D, V) as a sparse matrix by columns, and the rarity (V,) of each word."""
        shape = (self.count, max(len(self._vocabulary), 1))
        ones = np.ones(len(self.tokens), dtype=np.float32)
        # a copy: sum_duplicates sorts the words of each text in place
        counts = sparse.csr_matrix((ones, self.tokens.copy(), self.starts.copy()), shape=shape)
        counts.sum_duplicates()
        # rarity log(1 + (D - n + 1/2) / (n + 1/2)) of a word in n texts: Robertson and Sparck Jones's weight, kept
        # above 0 for words in most texts
        n = np.bincount(counts.indices, minlength=shape[1])
        rarity = np.log1p((self.count - n + 0.5) / (n + 0.5))
        length_of_entry = np.repeat(lengths, np.diff(counts.indptr))
        counts.data = (rarity[counts.indices] * self._saturated(counts.data, length_of_entry)).astype(np.float32)
        return counts.tocsc(), rarity

    def _saturated(self, counts: Any, lengths: Any) -> Any:
        """Return tf (K1 + 1) / (tf + K1 (1 - B + B length / mean length)) of counts tf in texts of these lengths."""
        return counts * (K1 + 1) / (counts + K1 * (1 - B + B * lengths / self._mean_length))

    def _runs(self, lengths: I64) -> tuple[U64, I32]:
        """Return the codes of all runs, sorted, and the text of each."""
        owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        codes = _run_codes(self.tokens[: len(owners)])
        # a run that begins in one text and ends in the next is none
        is_inside = owners[: len(codes)] == owners[len(owners) - len(codes) :]
        codes, owners = codes[is_inside], owners[: len(codes)][is_inside]
        order = np.argsort(codes, kind="stable")
        return codes[order], owners[order]

    def similarities(self, text: str) -> F64 | None:
        """Return the likeness (D,) of each text to `text` by BM25; None if it has no word.

        Words that no text holds count in full, so that few shared words among many are a small likeness.
        """
        counts = Counter(example_text.words(text))
        if not counts:
            return None
        repeats = np.array(list(counts.values()), dtype=np.float64)
        ids = np.array([self._vocabulary.get(word, -1) for word in counts], dtype=np.int64)
        unseen_rarity = np.log1p((self.count + 0.5) / 0.5)
        rarity = np.where(ids >= 0, self._rarity[ids], unseen_rarity)
        own_score = float((repeats * rarity * self._saturated(repeats, counts.total())).sum())
        is_known = ids >= 0
        scores = self._weights[:, ids[is_known]] @ repeats[is_known]
        return np.clip(np.asarray(scores, dtype=np.float64) / own_score, 0, 1)

    def span_fractions(self, text: str) -> F64 | None:
        """Return the fraction (D,) of the text's runs that each indexed text holds, weighted by their rarity.

        None if it has fewer than SPAN_WORDS words.
        """
        words = example_text.words(text)
        if len(words) < SPAN_WORDS:
            return None
        fractions, total = np.zeros(self.count), 0.0
        for run in {tuple(words[start : start + SPAN_WORDS]) for start in range(len(words) - SPAN_WORDS + 1)}:
            holders = np.unique(self.holders(run))
            rarity = float(np.log1p((self.count - len(holders) + 0.5) / (len(holders) + 0.5)))
            fractions[holders] += rarity
            total += rarity
        return fractions / total

    def holders(self, run: Sequence[str]) -> I32:
        """Return the texts that hold a run of SPAN_WORDS words, one entry for each time."""
        ids = [self._vocabulary.get(word, -1) for word in run]
        if min(ids) < 0:
            return self._run_texts[:0]
        code = _run_codes(np.array(ids, dtype=np.int32))[0]
        low, high = np.searchsorted(self._run_codes, code, "left"), np.searchsorted(self._run_codes, code, "right")
        return self._run_texts[low:high]

    def key(self, text: int) -> bytes:
        """Return the words of an indexed text as bytes: equal for equal words."""
        return self.tokens[self.starts[text] : self.starts[text + 1]].tobytes()


def _run_codes(tokens: I32) -> U64:
    """Return the hash of each run of SPAN_WORDS word ids, (max(0, W - SPAN_WORDS + 1),)."""
    count = max(0, len(tokens) - SPAN_WORDS + 1)
    codes = np.zeros(count, dtype=np.uint64)
    for offset in range(SPAN_WORDS):
        codes = (codes + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)) * _MIX  # modulo 2^64
        codes ^= codes >> np.uint64(29)
    return codes


class RetrievalIndex:
    """Index of N rows by the words of their prompts and replies, the runs of their replies, and their media.

    examples: (N,) the rows.
    equal_rows: (N,) the first row with the same words in prompt and replies, and the same media, as each row.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self._prompts = WordIndex((prompt_text(example.messages) for example in examples), with_runs=False)
        rejected = [(index, example) for index, example in enumerate(examples) if example.rejected]
        # replies of the rows first, in their order; then the rejected ones
        self._rejected_rows = np.array([index for index, _ in rejected], dtype=np.int64)
        texts = [reply_text(example.messages) for example in examples]
        self._replies = WordIndex([*texts, *(reply_text(example.rejected) for _, example in rejected)])
        self._media: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            for digest in {media_digest(part) for part in media_of(example.messages)}:
                self._media.setdefault(digest, []).append(index)
        self.equal_rows = self._equal_rows()

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
        own = self._replies.similarities(query.reply)
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

    def _equal_rows(self) -> I64:
        first: dict[tuple[Any, ...], int] = {}
        owners = np.empty(len(self.examples), dtype=np.int64)
        rejected = {int(row): len(self.examples) + index for index, row in enumerate(self._rejected_rows)}
        for row, example in enumerate(self.examples):
            media = tuple(part.media for part in media_of(example.messages))
            other = self._replies.key(rejected[row]) if row in rejected else b""
            owners[row] = first.setdefault((self._prompts.key(row), self._replies.key(row), other, media), row)
        return owners

    def _likenesses(self, query: TraceQuery) -> dict[str, F64]:
        """Return the likenesses (N,) by name that this query has."""
        values = {
            "prompt": self._prompts.similarities(prompt_text(query.prompt)),
            "reply": self._by_row(self._replies.similarities(query.reply)),
            "spans": self._by_row(self._replies.span_fractions(query.reply)),
            "media": self._media_fractions(query),
        }
        return {name: value for name, value in values.items() if value is not None}

    def _by_row(self, values: F64 | None) -> F64 | None:
        """Return the larger value of a row's chosen and rejected reply, (N,)."""
        if values is None:
            return None
        result = values[: len(self.examples)].copy()
        np.maximum.at(result, self._rejected_rows, values[len(self.examples) :])
        return result

    def _media_fractions(self, query: TraceQuery) -> F64 | None:
        digests = {media_digest(part) for part in media_of(query.prompt)}
        if not digests:
            return None
        fractions = np.zeros(len(self.examples))
        for digest in digests:
            fractions[self._media.get(digest, [])] += 1 / len(digests)
        return fractions

    def _rows_with(self, run: Sequence[str]) -> int:
        return len(np.unique(self._replies.holders(run)))


def retrieval_scores(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Attribution:
    """Return the scores of the training rows for queries by shared words."""
    index = RetrievalIndex([row.example for row in traced.rows])
    return Attribution(Method.RETRIEVAL, index.scores(queries))


def nearest_rows(dataset: Artifact, query: TraceQuery, top: int) -> list[tuple[float, Example]]:
    """Return the `top` training Examples of a Dataset with the highest scores, each with its score, best first.

    Rows that share nothing with the query are left out.
    """
    examples = list(parquet_io.read_examples(dataset, "train"))
    scores = RetrievalIndex(examples).scores([query])[0]
    best = np.argsort(-scores, kind="stable")[:top]
    return [(float(scores[index]), examples[index]) for index in best if scores[index] > 0]


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
