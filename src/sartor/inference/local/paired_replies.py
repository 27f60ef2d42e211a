"""Greedy replies and token losses of many rows under a base and its adapter, in one batch.

    queue -> reading (its tokens, with the reference's) -> writing (a token per step) -> done

A row's tokens are read once. The positions after its prompt give the losses of the reference. The last position of the
prompt gives the first token of the reply, which then overwrites the reference in the cache. A step computes
STEP_TOKENS tokens, those of replies first. A finished row releases its pages to the next, so no row waits for the
longest. Rows with a common beginning (a system prompt) read it once per side. The results are exact: each token is
computed by itself, independent of its neighbours, and its keys and values have the same bits wherever they were
computed (`cpu_decoder.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper

from sartor.inference.generate import DECIDED, Generation, broken_logits, context_tokens
from sartor.inference.local.cpu_decoder import CpuDecoder, open_compiled
from sartor.inference.local.kv_cache import PAGE_TOKENS
from sartor.inference.local.torch_decoder import TokenRun
from sartor.models.losses.transformers_backend import without_peft
from sartor.models.packing import TokenizedExample

# tokens per step, of prompts and replies together
STEP_TOKENS = 256
# size of the cache, unless a row needs more
CACHE_TOKENS = 8192
_ADAPTER = "tuned"


@dataclass(frozen=True)
class PairedRow:
    """A row to read, and to reply to.

    ids: token ids.
    predictions: pairs (place, token) of each token whose loss is needed; place is the position before the token.
    prompt_tokens: number of `ids` before the reply; 0 for no reply.
    """

    ids: Sequence[int]
    predictions: Sequence[tuple[int, int]] = ()
    prompt_tokens: int = 0

    @property
    def own_place(self) -> int:
        """First position with a needed result; the tokens before it may be shared with other rows."""
        ends = [self.prompt_tokens - 1] if self.prompt_tokens else []
        return min([len(self.ids) - 1, *ends, *(place for place, _ in self.predictions)])


def paired_row(example: TokenizedExample, prompt_tokens: int) -> PairedRow:
    """Return the row of an example.

    prompt_tokens: number of tokens before its reply; 0 for losses only.
    """
    predictions = [(place - 1, example.ids[place]) for place in range(1, len(example.ids)) if example.learnt[place]]
    last = max([place for place, _ in predictions], default=0)
    return PairedRow(example.ids[: max(last + 1, prompt_tokens)], predictions, prompt_tokens)


@dataclass(frozen=True)
class ReplyLimits:
    """End conditions of a reply.

    max_tokens: largest number of tokens.
    stops: ids that end a reply.
    is_decided: called with (row, its tokens so far); a true result ends the reply.
    has_logprobs: whether the logprobs of the tokens are needed.
    """

    max_tokens: int
    stops: frozenset[int]
    is_decided: Callable[[int, Sequence[int]], bool] | None = None
    has_logprobs: bool = False


@dataclass
class RowResult:
    """Losses and reply of a row on one side.

    nats: loss of each predicted token.
    generation: the reply; its finish is DECIDED if it was ended early. None if no reply was requested.
    """

    nats: list[float] = field(default_factory=list)
    generation: Generation | None = None


@dataclass(kw_only=True)
class _Reading:
    """Tokens being read into cache pages.

    read: number of tokens already read.
    followers: rows that begin with these tokens and have not yet started.
    """

    ids: Sequence[int]
    slot: int
    pages: list[int] = field(default_factory=list)
    read: int = 0
    followers: int = 0

    @property
    def is_read(self) -> bool:
        return self.read == len(self.ids)


@dataclass(kw_only=True)
class _RowReading(_Reading):
    """A row on one side.

    start: reading of its shared beginning, if any.
    first: first token of its reply, and its logprob.
    """

    index: int
    row: PairedRow
    result: RowResult
    start: _Reading | None
    first: tuple[int, float] = (-1, 0.0)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def open_pair(
    model: Any,
    rows: Sequence[PairedRow],
    max_tokens: int,
    *,
    cache_tokens: int = CACHE_TOKENS,
    moves_weights: bool = True,
) -> CpuDecoder | None:
    """Return the decoder of a model with its adapter, and a cache for `rows`.

    cache_tokens: largest size of the cache, unless a row needs more.
    moves_weights: as of `CpuDecoder`.
    None means that the compiled kernels do not support them. They support text on a CPU, a base in
    `fused_decoder.FAMILIES` that is not quantised, and a plain LoRA without dropout.
    """
    if any(token < 0 for row in rows for token in row.ids) or not rows:
        return None
    longest = max(max(len(row.ids), row.prompt_tokens + max_tokens) for row in rows)
    context = context_tokens(model) or longest
    # room for all rows of both sides if they are few, and at least for a row in work and the shared beginning of each
    # side
    all_pages = sum(_pages(max(len(row.ids), row.prompt_tokens + max_tokens)) for row in rows)
    pages = max(min(cache_tokens // PAGE_TOKENS, 2 * all_pages + 2 * _pages(longest)), 3 * _pages(longest))
    decoder = open_compiled(without_peft(model), pages, context, moves_weights=moves_weights)
    if decoder is None:
        return None
    parts = list(model.modules())
    lora_count = sum(isinstance(part, LoraLayer) and "default" in part.lora_A for part in parts)
    if lora_count != decoder.attach_own(_ADAPTER) or any(isinstance(part, ModulesToSaveWrapper) for part in parts):
        return None
    return decoder


@torch.inference_mode()
def reply_to_rows(
    decoder: CpuDecoder,
    rows: Sequence[PairedRow],
    limits: ReplyLimits,
    *,
    sides: Sequence[bool] = (False, True),
    progress: Callable[[int], object] = lambda rows: None,
) -> list[list[RowResult]]:
    """Return the results of each side, in the order of `rows`.

    sides: whether each side uses the adapter; both sides of a row are in one batch.
    progress: called with the number of newly finished rows, once per row and side.
    Raises ModelError if logits are not finite.
    """
    batch = _PairedBatch(decoder, rows, limits=limits, sides=sides, progress=progress)
    while batch.is_busy:
        batch.step()
    return batch.results


def shared_beginnings(rows: Sequence[PairedRow]) -> list[tuple[int, list[int]]]:
    """Group the rows by common beginnings; return (shared tokens, row indices) of each group.

    The groups are in the order of their tokens. A row joins the group before it if the saving, shared tokens times
    (rows - 1), does not fall. It does not join a single row with which it shares less than half of what it shares with
    the next row.
    """
    groups: list[tuple[int, list[int]]] = []
    order = sorted(range(len(rows)), key=lambda index: list(rows[index].ids))
    for index, following in zip(order, [*order[1:], None], strict=True):
        length = rows[index].own_place
        if groups:
            group_length, group = groups[-1]
            shared = min(group_length, _shared_tokens(rows[group[-1]], rows[index]))
            ahead = _shared_tokens(rows[index], rows[following]) if len(group) == 1 and following is not None else 0
            if shared and 2 * shared >= ahead and len(group) * shared >= (len(group) - 1) * group_length:
                groups[-1] = (shared, [*group, index])
                continue
        groups.append((length, [index]))
    return [(length if len(group) > 1 else 0, group) for length, group in groups]


def read_tokens(rows: Sequence[PairedRow]) -> int:
    """Return the number of tokens that one side reads, each shared beginning counted once."""
    tokens = 0
    for length, indices in shared_beginnings(rows):
        tokens += length
        for index in indices:
            tokens += len(rows[index].ids) - length
    return tokens


def _shared_tokens(first: PairedRow, second: PairedRow) -> int:
    """Return the number of common first tokens of two rows, up to the first needed result of either."""
    limit = min(first.own_place, second.own_place)
    return next((place for place in range(limit) if first.ids[place] != second.ids[place]), limit)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


class _PairedBatch:
    """Batch of the rows of all sides.

    results: for each side, in the order of the rows.
    """

    def __init__(
        self,
        decoder: CpuDecoder,
        rows: Sequence[PairedRow],
        limits: ReplyLimits,
        sides: Sequence[bool],
        progress: Callable[[int], object],
    ) -> None:
        self._decoder, self._limits, self._progress = decoder, limits, progress
        self._free = list(range(decoder.cache_pages))
        self._users = [0] * decoder.cache_pages
        self.results = [[RowResult() for _ in rows] for _ in sides]
        self._queue = self._ordered(rows, [decoder.factors.slot(_ADAPTER if tuned else "") for tuned in sides])
        self._reading: list[_Reading] = []
        self._writing: list[_RowReading] = []

    @property
    def is_busy(self) -> bool:
        """Whether a step has work."""
        return bool(self._queue or self._reading or self._writing)

    def _ordered(self, rows: Sequence[PairedRow], slots: Sequence[int]) -> deque[_Reading]:
        """Return the readings in order: each shared beginning before its rows, and the sides of a row side by side."""
        queue: deque[_Reading] = deque()
        for length, indices in shared_beginnings(rows):
            ids = rows[indices[0]].ids[:length]
            starts = [_Reading(ids=ids, slot=slot, followers=len(indices)) if length else None for slot in slots]
            queue.extend(start for start in starts if start)
            for index in indices:
                queue.extend(
                    _RowReading(
                        ids=rows[index].ids,
                        slot=slot,
                        index=index,
                        row=rows[index],
                        result=results[index],
                        start=start,
                    )
                    for results, start, slot in zip(self.results, starts, slots, strict=True)
                )
        return queue

    def step(self) -> None:
        """Let rows join, read tokens within the budget, and give every writing row its next token.

        The budget is STEP_TOKENS less the writing rows, at least PAGE_TOKENS.
        """
        budget = max(STEP_TOKENS - len(self._writing), PAGE_TOKENS)
        self._join(budget)
        chunks: list[tuple[_Reading, list[int]]] = []
        runs: list[TokenRun] = []
        places: list[tuple[int, int]] = []
        for reading in self._reading:
            ids = reading.ids[reading.read : reading.read + budget]
            if not ids:
                break
            budget -= len(ids)
            chunks.append((reading, _wanted(reading, reading.read + len(ids))))
            places += [(len(runs), place - reading.read) for place in chunks[-1][1]]
            runs.append(TokenRun(ids, reading.read, reading.pages, reading.slot))
        for state in self._writing:
            places.append((len(runs), 0))
            position = state.row.prompt_tokens + len(state.tokens) - 1
            runs.append(TokenRun(state.tokens[-1:], position, state.pages, state.slot, newest=True))
        scores, writing, number = self._decoder.score(runs, places), list(self._writing), 0
        if min(scores.likeliest, default=0) < 0:
            raise broken_logits()
        for index, (reading, wanted) in enumerate(chunks):
            reading.read += len(runs[index].ids)
            if isinstance(reading, _RowReading):
                self._hear(reading, wanted, scores.logits[number : number + len(wanted)], scores.likeliest[number:])
            number += len(wanted)
        self._reading = [reading for reading in self._reading if not reading.is_read]
        for state, token, logits in zip(writing, scores.likeliest[number:], scores.logits[number:], strict=True):
            self._take(state, token, self._logprob(logits, token))

    def _join(self, budget: int) -> None:
        """Start queued readings within the budget, while there are pages for their whole length."""
        budget -= sum(len(reading.ids) - reading.read for reading in self._reading)
        while self._queue and budget > 0:
            reading = self._queue[0]
            start = reading.start if isinstance(reading, _RowReading) else None
            if (start and not start.is_read) or not self._take_pages(reading, start):
                return
            self._reading.append(self._queue.popleft())
            budget -= len(reading.ids) - reading.read

    def _take_pages(self, reading: _Reading, start: _Reading | None) -> bool:
        """Assign pages to a reading; return False if there is no room now.

        It shares the complete pages of its beginning and copies the page in which that ends.
        """
        tokens = len(reading.ids)
        if isinstance(reading, _RowReading) and reading.row.prompt_tokens:
            tokens = max(tokens, reading.row.prompt_tokens + self._limits.max_tokens)
        shared = start.pages[: len(start.ids) // PAGE_TOKENS] if start else []
        count = _pages(tokens) - len(shared)
        if count > len(self._free):
            return False
        reading.pages = [*shared, *(self._free.pop() for _ in range(count))]
        for page in reading.pages:
            self._users[page] += 1
        if start:
            reading.read = len(start.ids)
            if len(shared) < len(start.pages):
                self._decoder.copy_page(start.pages[len(shared)], reading.pages[len(shared)])
            start.followers -= 1
            if not start.followers:
                self._leave(start)
        return True

    def _leave(self, reading: _Reading) -> None:
        for page in reading.pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def _hear(self, state: _RowReading, places: Sequence[int], logits: torch.Tensor, likeliest: Sequence[int]) -> None:
        """Process a row's logits at `places`; a row that is completely read starts to write.

        logits: (P, V) of P places.
        likeliest: their most likely tokens first.
        """
        targets = dict(state.row.predictions)
        predicted = [(number, targets[place]) for number, place in enumerate(places) if place in targets]
        if predicted:
            # loss of target t in nats: -log softmax(z)_t = logsumexp(z) - z_t
            numbers, tokens = (torch.tensor(values) for values in zip(*predicted, strict=True))
            chosen = logits[numbers].float()
            state.result.nats += (chosen.logsumexp(-1) - chosen.gather(1, tokens[:, None])[:, 0]).tolist()
        last = state.row.prompt_tokens - 1
        if last in places:
            number = places.index(last)
            state.first = likeliest[number], self._logprob(logits[number], likeliest[number])
        if not state.is_read:
            return
        if not state.row.prompt_tokens:
            self._end(state)
            return
        self._writing.append(state)
        self._take(state, *state.first)

    def _logprob(self, logits: torch.Tensor, token: int) -> float:
        return float(logits.float().log_softmax(-1)[token]) if self._limits.has_logprobs else 0.0

    def _take(self, state: _RowReading, token: int, logprob: float) -> None:
        """Add a token to a reply, and end the reply at a stop condition."""
        if token in self._limits.stops:
            self._finish(state, "stop")
            return
        state.tokens.append(token)
        state.logprobs.append(logprob)
        if len(state.tokens) >= self._limits.max_tokens:
            self._finish(state, "length")
        elif self._limits.is_decided and self._limits.is_decided(state.index, state.tokens):
            self._finish(state, DECIDED)

    def _finish(self, state: _RowReading, finish: str) -> None:
        state.result.generation = Generation(state.tokens, finish, state.logprobs if self._limits.has_logprobs else [])
        self._writing = [other for other in self._writing if other is not state]
        self._end(state)

    def _end(self, state: _RowReading) -> None:
        self._leave(state)
        self._progress(1)


def _wanted(reading: _Reading, end: int) -> list[int]:
    """Return the unread positions before `end` with needed results, in order."""
    if not isinstance(reading, _RowReading):
        return []
    last = [reading.row.prompt_tokens - 1] if reading.row.prompt_tokens else []
    places = {*last, *(place for place, _ in reading.row.predictions)}
    return sorted(place for place in places if reading.read <= place < end)
