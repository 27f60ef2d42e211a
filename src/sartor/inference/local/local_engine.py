"""Continuous batching over one base and many adapters.

    submit -> waiting -> reading (prefill, a chunk at a time) -> writing (a token per step) -> ReplyDone

A step lets rows join, prefills at most about READ_TOKENS of prompts, and gives every writing row its next token.
Greedy replies are token for token those of each adapter alone (`torch_decoder.py` gives the reason). Sampled replies
use a generator of their own. A row whose logits are not finite fails alone: its pages are not kept, and no other row
has read them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import torch

from sartor.core.errors import BusyError, ConfigError, ModelError, RequestError, SartorError
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import BASE, LOCAL, EngineInfo, Event, GenerateCall, ReplyDone, ReplyFailed, TextEmbedding
from sartor.inference.local.cpu_decoder import open_blocks
from sartor.inference.local.kv_cache import PAGE_TOKENS, CacheScope, PagedKvCache
from sartor.inference.local.media_inputs import MediaAdapters, MediaPrompt
from sartor.inference.local.sequence import SequenceState
from sartor.inference.local.torch_decoder import Scores, TokenRun
from sartor.inference.prompts import PromptReader
from sartor.media.content_parts import kinds_in
from sartor.models.base import Base, open_base

# limit on prompt tokens per step, so that a step takes at most a few times as long as one that only decodes
READ_TOKENS = 4 * PAGE_TOKENS
# wait of a step for a tower, s, if there is nothing else to do
MOMENT_S = 0.02


class LocalEngine:
    """Sartor's own engine on one base.

    rows: replies in work at a time.
    waiting: calls that may wait.
    cache_tokens: size of the KV cache.
    Raises ConfigError if one of them is too small.
    """

    def __init__(self, base: Base, *, rows: int = 16, waiting: int = 256, cache_tokens: int = 32_768) -> None:
        if min(rows, waiting, cache_tokens // PAGE_TOKENS) < 1:
            problem = (
                f"rows is {rows}, waiting {waiting}, cache_tokens {cache_tokens}; at least 1, 1 and {PAGE_TOKENS}"
            )
            raise ConfigError(problem, "engine: {rows: 16, waiting: 256, cache_tokens: 32768}")
        self._base, self._rows, self._max_waiting = base, rows, waiting
        trained = int(base.model.config.get_text_config().max_position_embeddings)
        context = min(trained, cache_tokens // PAGE_TOKENS * PAGE_TOKENS)
        vocabulary = {"vocab_size": base.model.get_output_embeddings().weight.shape[0]}
        self._reader = PromptReader(base.ref, base.chat, vocabulary, context)
        self._pages = PagedKvCache(cache_tokens // PAGE_TOKENS)
        self._blocks = open_blocks(base.model, self._pages.total, context)
        bits = base.as_manifest()
        self._about = EngineInfo(
            kind=LOCAL,
            base=base.ref.name,
            base_digest=base.ref.digest,
            template_digest=base.chat.template_digest,
            context_tokens=context,
            rows=rows,
            dtype=bits["dtype"],
            device=str(base.device),
        )
        self._numbers = itertools.count(1)
        self._adapters = {BASE: 0}
        self._waiting: deque[SequenceState] = deque()
        self._reading: deque[SequenceState] = deque()
        self._writing: list[SequenceState] = []
        self._pending_events: list[Event] = []
        self._media_adapters = MediaAdapters(base, self._reader)
        self._media_calls: dict[str, tuple[GenerateCall, Future[MediaPrompt]]] = {}

    @property
    def about(self) -> EngineInfo:
        """Facts about the engine."""
        return self._about

    @property
    def busy(self) -> bool:
        """Whether `step` has work."""
        return bool(self._waiting or self._reading or self._writing or self._pending_events or self._media_calls)

    def attach(self, adapter: str, path: Path) -> int:
        """Load an adapter and return its bytes: those of a slot, with room for the largest rank attached, and its
        projectors.

        Raises ModelError if it does not fit the base.
        """
        if adapter in self._adapters:
            return self._blocks.factors.bytes_of(adapter)
        adapter_bytes = self._media_adapters.attach(adapter, path)
        try:
            adapter_bytes += self._blocks.factors.put(adapter, path)
        except ModelError:
            self._media_adapters.detach(adapter)
            raise
        self._adapters[adapter] = next(self._numbers)
        return adapter_bytes

    def detach(self, adapter: str) -> None:
        """Forget an adapter and its cached pages; its live calls fail with ModelError."""
        if adapter not in self._adapters or adapter == BASE:
            return
        for sequence in self._all():
            if sequence.call.adapter == adapter:
                self._fail(sequence, ModelError("the adapter was detached while it answered", REQUEST_AGAIN))
        self._media_adapters.detach(adapter)
        self._pages.forget(self._adapters.pop(adapter))
        self._blocks.factors.drop(adapter)

    def submit(self, call: GenerateCall) -> None:
        """Queue a call.

        Raises BusyError if the queue is full, ModelError for an adapter that is not attached, and RequestError for a
        duplicate id or an invalid prompt.
        """
        if (waiting := len(self._waiting) + len(self._media_calls)) >= self._max_waiting:
            raise BusyError(f"{waiting} calls wait already", "ask again later, or raise engine.waiting")
        if call.adapter not in self._adapters:
            raise ModelError(
                f"no adapter {call.adapter[:16]!r} is attached",
                "engine.attach(adapter, PATH) before engine.submit(call)",
            )
        if call.id in self._media_calls or any(sequence.call.id == call.id for sequence in self._all()):
            raise RequestError(f"a call with the id {call.id!r} is being answered", "give each call its own id")
        if kinds_in(call.messages):
            self._media_calls[call.id] = call, self._media_adapters.read(call)
            return
        self._queue(call, self._reader.prompt(call), None)

    def _queue(self, call: GenerateCall, prompt: list[int], media: MediaPrompt | None) -> None:
        max_tokens = min(call.sampling.max_tokens, self._about.context_tokens - len(prompt))
        constraint = self._reader.constraint(call)
        sequence = SequenceState(call, prompt, self._base.chat, max_tokens=max_tokens, constraint=constraint)
        sequence.media = media
        n_public = self._reader.public_tokens(call, prompt) if call.cache_salt and call.public_system else 0
        sequence.scope = CacheScope(self._adapters[call.adapter], call.cache_salt, n_public)
        self._waiting.append(sequence)

    def _collect_media(self) -> None:
        """Queue the calls whose media have been read; wait MOMENT_S for them if nothing else is to be done."""
        if not (self._waiting or self._reading or self._writing):
            wait([future for _, future in self._media_calls.values()], MOMENT_S, FIRST_COMPLETED)
        for call, future in [pair for pair in self._media_calls.values() if pair[1].done()]:
            del self._media_calls[call.id]
            try:
                if call.adapter not in self._adapters:
                    raise ModelError("the adapter was detached while it looked", REQUEST_AGAIN)
                media = future.result()
                self._queue(call, media.ids, media)
            except SartorError as error:
                self._pending_events.append(ReplyFailed(call.id, error.kind, error.problem, error.remedy))

    def cancel(self, call: str) -> None:
        """End a call, wherever it is; an unknown one is ignored."""
        if call in self._media_calls:
            self._media_calls.pop(call)[1].cancel()
            self._pending_events.append(ReplyDone(call, "cancelled", 0, 0))
        for sequence in self._all():
            if sequence.call.id == call:
                self._leave(sequence)
                self._pending_events += sequence.end("cancelled")

    def step(self) -> Sequence[Event]:
        """Run one round: queue finished media calls, let rows join, prefill chunks and decode one token per row."""
        if self._media_calls:
            self._collect_media()
        self._join()
        chunks = self._chunks()
        if chunks or self._writing:
            self._advance(chunks, list(self._writing))
        events, self._pending_events = self._pending_events, []
        return events

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        """Yield one embedding per text, and None after each page of it.

        Raises RequestError for an empty or too long text, BusyError if the cache is full.
        """
        for text in texts:
            yield from self._embed(text)

    def close(self) -> None:
        """End the thread of the towers; there is nothing else outside this process's memory."""
        self._media_adapters.close()

    def _all(self) -> list[SequenceState]:
        return [*self._waiting, *self._reading, *self._writing]

    def _join(self) -> None:
        """Move rows from the queue to prefill, in order, while the cache has room for whole replies.

        A row therefore never runs out of pages while it writes.
        """
        while self._waiting and len(self._reading) + len(self._writing) < self._rows:
            sequence = self._waiting[0]
            scope = sequence.scope
            allocation = self._pages.take(scope, sequence.prompt, len(sequence.prompt) + sequence.max_tokens)
            if allocation is None:
                return
            sequence.slot = self._blocks.factors.slot(sequence.call.adapter)
            sequence.pages, sequence.read = allocation
            n_public = scope.public_tokens // PAGE_TOKENS * PAGE_TOKENS if scope.salt else 0
            sequence.cached = max(0, sequence.read - n_public)
            self._reading.append(self._waiting.popleft())

    def _chunks(self) -> list[tuple[SequenceState, list[int]]]:
        """Return the prompt chunks of this step: one per row, in turn.

        A long prompt then does not delay short ones.
        """
        chunks: list[tuple[SequenceState, list[int]]] = []
        budget = READ_TOKENS
        for sequence in list(self._reading):
            if budget <= 0:
                break
            chunk = sequence.prompt[sequence.read : sequence.read + self._blocks.chunk_tokens]
            chunks.append((sequence, chunk))
            budget -= len(chunk)
            self._reading.rotate(-1)
        return chunks

    def _advance(self, chunks: Sequence[tuple[SequenceState, list[int]]], writing: Sequence[SequenceState]) -> None:
        """Read the chunks, and give every row with a complete prompt its next token."""
        runs = [
            TokenRun(
                chunk,
                sequence.read,
                sequence.pages,
                sequence.slot,
                media=sequence.media.of(sequence.read, chunk) if sequence.media else None,
            )
            for sequence, chunk in chunks
        ]
        runs += [
            TokenRun(
                sequence.tokens[-1:],
                len(sequence.prompt) + len(sequence.tokens) - 1,
                sequence.pages,
                sequence.slot,
                newest=True,
            )
            for sequence in writing
        ]
        for sequence, chunk in chunks:
            sequence.read += len(chunk)
        finished = [index for index, (sequence, _) in enumerate(chunks) if sequence.read == len(sequence.prompt)]
        sequences = [*(chunks[index][0] for index in finished), *writing]
        scores = self._blocks.advance(runs, [*finished, *range(len(chunks), len(runs))])
        for sequence in sequences[: len(finished)]:
            self._reading.remove(sequence)
            self._writing.append(sequence)
        self._choose(sequences, scores)

    def _choose(self, sequences: Sequence[SequenceState], scores: Scores) -> None:
        """Choose the next token of each row and queue its events."""
        for index, sequence in enumerate(sequences):
            if scores.likeliest[index] < 0:
                self._fail(
                    sequence,
                    ModelError(
                        "the logits are not finite: the adapter or the base is broken",
                        "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4",
                    ),
                )
                continue
            # Keep the row's complete pages for later calls with the same prefix: only after finite logits, since pages
            # that produced others are useless
            if not sequence.tokens:
                self._pages.keep(sequence.scope, sequence.prompt, sequence.pages)
            elif self._blocks.keeps_replies and (len(sequence.prompt) + len(sequence.tokens)) % PAGE_TOKENS == 0:
                self._pages.keep(sequence.scope, [*sequence.prompt, *sequence.tokens], sequence.pages)
            try:
                token = scores.likeliest[index] if sequence.is_plain else sequence.choose(scores.logits[index])
                events = sequence.take(token)
            except SartorError as error:
                self._fail(sequence, error)
                continue
            self._pending_events += events
            if events and isinstance(events[-1], ReplyDone):
                self._leave(sequence)

    def _fail(self, sequence: SequenceState, error: SartorError) -> None:
        self._leave(sequence)
        self._pending_events.append(ReplyFailed(sequence.call.id, error.kind, error.problem, error.remedy))

    def _leave(self, sequence: SequenceState) -> None:
        for sequences in (self._waiting, self._reading, self._writing):
            if sequence in sequences:
                sequences.remove(sequence)
        self._pages.give_back(sequence.pages)
        sequence.pages = []

    def _embed(self, text: str) -> Iterator[TextEmbedding | None]:
        ids = self._reader.text(text)
        allocation = self._pages.take(CacheScope(0), [], len(ids))
        if allocation is None:
            raise BusyError("the cache is full of replies in work", "ask again later, or raise engine.cache_tokens")
        pages, _ = allocation
        try:
            parts = []
            for start in range(0, len(ids), PAGE_TOKENS):
                parts.append(
                    self._blocks.hidden(TokenRun(ids[start : start + PAGE_TOKENS], start, pages, -1)).float().sum(0)
                )
                yield None
        finally:
            self._pages.give_back(pages)
        total = torch.stack(parts).sum(0)
        yield TextEmbedding((total / total.norm().clamp(min=1e-12)).tolist(), len(ids))


def open_engine(
    base: str,
    *,
    rows: int = 16,
    waiting: int = 256,
    cache_tokens: int = 32_768,
    threads: int = 0,
    bits: int | str = "auto",
) -> LocalEngine:
    """Return the engine for a base by name; the options are those of `team_config.LocalEngineOptions`.

    Raises what `open_base` raises, and ModelError.
    """
    if threads:
        torch.set_num_threads(threads)
    return LocalEngine(open_base(base, bits=bits), rows=rows, waiting=waiting, cache_tokens=cache_tokens)
