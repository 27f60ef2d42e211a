"""Sartor's own engine: one base in memory, many adapters, replies made side by side.

A `step` computes at most a few chunks of prompts that came, then one token of every reply. What a reply says depends on its
own call alone (see `body.py`): not on who is answered beside it, nor on what is cached.

in fp32 and in bf16 alike: logits are the same bits alone and among neighbours, at any slot, after a cold or a warm start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sartor.core.errors import BusyError, ModelError, RequestError, SartorError
from sartor.models.base import Base, open_base
from sartor.models.engine.body import Body, Turn, open_body, places_of
from sartor.models.engine.choose import Chooser, Constraint
from sartor.models.engine.contract import BASE, About, Call, Event, Failed
from sartor.models.engine.factors import read_factors
from sartor.models.engine.pages import Pages
from sartor.models.engine.prompts import prompt_ids
from sartor.models.engine.rows import Attached, Row, Tools
from sartor.models.engine.spelling import Spelling
from sartor.models.linear import Unsupported

Constrain = Callable[[str], Constraint]
# Chunks of prompts that a step may compute while many rows wait to join and few decode.
MOST_CHUNKS = 4
MOST_ALTERNATIVES = 20


class LocalEngine:
    """See `contract.Engine`."""

    def __init__(
        self, base: Base, rows: int, waiting: int, cache_tokens: int,
        *, constrain: Constrain | None = None, tools: Tools | None = None,
    ) -> None:  # fmt: skip
        self._base, self._rows, self._waiting = base, rows, waiting
        self._constrain, self._tools = constrain, tools
        count = max(cache_tokens // Body.page, 1)
        try:
            self._body = open_body(base.model, count, rows)
        except Unsupported as why:
            raise ModelError(
                f"Sartor's engine does not compute this base: {why}", "engine: {kind: llamacpp}, or {kind: openai} with vLLM"
            ) from None
        self._places = places_of(base.model)
        self._pages = Pages(count, self._body.page)
        self._attached: dict[str, Attached] = {BASE: Attached(self._pages.root())}
        self._queue: deque[Row] = deque()
        self._live: list[Row] = []
        self._events: list[Event] = []

    @property
    def about(self) -> About:
        """What it serves."""
        return About(
            kind="local",
            base=self._base.ref.name,
            base_digest=self._base.ref.digest,
            template_digest=self._base.chat.template_digest,
            context_tokens=self._context_tokens,
            rows=self._rows,
            dtype=str(self._base.dtype).removeprefix("torch."),
            device=self._base.device.type,
        )

    @property
    def busy(self) -> bool:
        """Whether `step` has work."""
        return bool(self._queue or self._live or self._events)

    @property
    def _context_tokens(self) -> int:
        context = self._base.model.config.max_position_embeddings
        return int(min(context, self._pages.count * self._pages.size))

    def attach(self, adapter: str, path: Path) -> int:
        """See `contract.Engine`."""
        if adapter == BASE:
            raise ModelError("an adapter without a digest cannot be attached", "attach it under adapter_digest(files)")
        if adapter not in self._attached:
            factors = read_factors(path, self._places, self._base.dtype, self._base.device)
            self._attached[adapter] = Attached(self._pages.root(), factors)
        held = self._attached[adapter].factors
        return held.bytes if held is not None else 0

    def detach(self, adapter: str) -> None:
        """See `contract.Engine`."""
        if adapter == BASE or adapter not in self._attached:
            return
        gone = self._attached.pop(adapter)
        for row in [row for row in (*self._live, *self._queue) if row.attached is gone]:
            self._fail(row, ModelError("the adapter was detached while it answered", "ask again: another version is live"))
        self._pages.forget(gone.root)

    def submit(self, call: Call) -> None:
        """See `contract.Engine`."""
        if len(self._queue) >= self._waiting:
            raise BusyError(
                f"{len(self._queue)} calls wait, which is as many as may (engine.waiting)", "ask again in a moment", 1.0
            )
        if any(row.call.id == call.id for row in (*self._queue, *self._live)):
            raise RequestError(f"a call with the id {call.id!r} is being answered", "give each call its own id")
        if call.adapter not in self._attached:
            raise ModelError(f"no adapter is attached under {call.adapter[:16]!r}", "attach it first")
        if call.top_logprobs > MOST_ALTERNATIVES:
            raise RequestError(f"top_logprobs is {call.top_logprobs}; at most {MOST_ALTERNATIVES} are told", "top_logprobs: 5")
        if call.tools and self._tools is not None:
            call = self._tools.prepare(call, self._base.chat)
        ids = prompt_ids(call, self._base.chat)
        wanted, most = len(ids) + call.sampling.max_tokens, self._context_tokens
        if wanted > most:
            raise RequestError(
                f"a prompt of {len(ids)} tokens and a reply of up to {call.sampling.max_tokens} need {wanted} positions; "
                f"there are {most}",
                f"max_tokens: {most - len(ids)}" if most > len(ids) else "shorten the prompt",
            )
        chooser = Chooser(call.sampling, self._constraint(call.schema))
        spelling = Spelling(self._base.chat.tokenizer, call.sampling.stop)
        self._queue.append(Row(call, self._attached[call.adapter], ids, len(ids), chooser, spelling))

    def _constraint(self, schema: str) -> Constraint | None:
        if not schema:
            return None
        if self._constrain is None:
            raise RequestError(
                "this server was opened without a grammar, so a schema cannot be held", "pip install 'sartor[serve]'"
            )
        return self._constrain(schema)

    def cancel(self, call: str) -> None:
        """See `contract.Engine`."""
        for row in [row for row in (*self._queue, *self._live) if row.call.id == call]:
            self._events.extend(self._end(row, "cancelled"))

    def step(self) -> Sequence[Event]:
        """See `contract.Engine`."""
        self._join()
        events, self._events = self._events, []
        for _ in range(self._chunks()):
            events.extend(self._prefill())
        events.extend(self._decode())
        return events

    def _join(self) -> None:
        """Waiting calls get their place in the cache, in the order in which they came."""
        while self._queue and len(self._live) < self._rows:
            row = self._queue[0]
            lease = self._pages.lease(row.attached.root, row.ids, row.prompt_tokens + row.call.sampling.max_tokens)
            if lease is None:
                return
            row.lease, row.computed = lease, lease.cached
            self._live.append(self._queue.popleft())

    def _chunks(self) -> int:
        """How many chunks of prompts this step computes: more when those that wait for it outnumber those that it delays."""
        joining = sum(row.slot < 0 for row in self._live)
        return min(joining, MOST_CHUNKS, max(1, joining // max(1, len(self._live) - joining)))

    def _prefill(self) -> list[Event]:
        """A chunk of the first prompt that is not yet computed; with its end, the first token of the reply."""
        row = next((row for row in self._live if row.slot < 0), None)
        if row is None:
            return []
        chunk = row.ids[row.computed : row.computed + self._body.chunk]
        x = self._body.prefill(chunk, row.computed, row.lease.pages, row.attached.factors)
        row.computed += len(chunk)
        if row.computed < row.prompt_tokens:
            return []
        row.slot = min(set(range(self._rows)) - {other.slot for other in self._live})
        self._body.join(row.slot, row.attached.factors)
        return self._advance([row], self._body.logits(x[-1:]))

    def _decode(self) -> list[Event]:
        rows = [row for row in self._live if row.slot >= 0 and row.computed < len(row.ids)]
        if not rows:
            return []
        turns = [Turn(row.slot, row.ids[-1], row.computed, row.lease.pages) for row in rows]
        logits = self._body.decode(turns)
        for row in rows:
            row.computed += 1
        return self._advance(rows, logits)

    def _advance(self, rows: Sequence[Row], logits: torch.Tensor) -> list[Event]:
        """The next token of each row, from (B, V) logits."""
        logits = logits.cpu()
        values, likeliest = logits.max(-1)  # a NaN anywhere is the maximum
        finite, greedy = torch.isfinite(values).tolist(), likeliest.tolist()
        events: list[Event] = []
        for place, row in enumerate(rows):
            try:
                if not finite[place]:
                    raise ModelError("the model's logits are not finite: the adapter or the base is broken", "tune it again")
                if not row.reply_tokens:
                    self._share(row)
                token = greedy[place] if row.chooser.is_plain else row.chooser.choose(logits[place])
                events.extend(self._write(row, token, logits[place]))
            except SartorError as error:
                self._fail(row, error)
        events.extend(self._events)
        self._events = []
        return events

    def _write(self, row: Row, token: int, logits: torch.Tensor) -> list[Event]:
        chat = self._base.chat
        if token in chat.stops:
            return self._end(row, "stop")
        events = row.write(token, logits, chat.tokenizer)
        if row.spelling.stopped or row.chooser.is_done:
            return [*events, *self._end(row, "stop")]
        if row.reply_tokens >= row.call.sampling.max_tokens:
            return [*events, *self._end(row, "length")]
        return events

    def _end(self, row: Row, finish: str) -> list[Event]:
        if row.slot >= 0:
            self._share(row)
        events = row.end(finish, self._tools)  # type: ignore[arg-type]
        self._leave(row)
        return events

    def _share(self, row: Row) -> None:
        """Let later calls begin where this one did. Only after finite logits: what made others is of no use."""
        whole = row.prompt_tokens - row.prompt_tokens % self._body.chunk
        self._pages.store(row.lease, row.ids[: row.computed if self._body.keeps_replies else whole])

    def _fail(self, row: Row, error: SartorError) -> None:
        """End a row; its keys and values are not shared."""
        self._leave(row)
        self._events.append(Failed(row.call.id, error.kind, error.problem, error.remedy))

    def _leave(self, row: Row) -> None:
        self._pages.give_back(row.lease)
        if row.slot >= 0:
            self._body.leave(row.slot)
        if row in self._live:
            self._live.remove(row)
        else:
            self._queue.remove(row)

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """See `contract.Engine`."""
        return [self._embed(text) for text in texts]

    def _embed(self, text: str) -> list[float]:
        ids = self._base.chat.text_ids(text)
        if not 0 < len(ids) <= self._context_tokens:
            raise RequestError(f"a text has {len(ids)} tokens; 1 to {self._context_tokens} can be embedded", "split the text")
        lease = self._pages.lease(self._pages.root(), ids, len(ids))
        if lease is None:
            raise BusyError("the cache is full with replies", "ask again in a moment, or raise engine.cache_tokens")
        try:
            total = 0
            for first in range(0, len(ids), self._body.chunk):
                x = self._body.prefill(ids[first : first + self._body.chunk], first, lease.pages, None)
                total = total + self._body.normed(x).double().sum(0)
        finally:
            self._pages.give_back(lease)
        vector = torch.nn.functional.normalize(total, dim=0)
        return [float(value) for value in vector]

    def close(self) -> None:
        """Nothing is held outside this process's memory."""


def open_engine(
    base: str, *, rows: int = 16, waiting: int = 256, cache_tokens: int = 65_536, threads: int = 0, bits: int | str = "auto",
    constrain: Constrain | None = None, tools: Tools | None = None,
) -> LocalEngine:  # fmt: skip
    """The engine for a base by name. Options as in agents.team.Local.

    Raises what `open_base` raises, and ModelError for a base whose architecture it does not compute.
    """
    if threads:
        torch.set_num_threads(threads)
    return LocalEngine(open_base(base, bits=bits), rows, waiting, cache_tokens, constrain=constrain, tools=tools)
