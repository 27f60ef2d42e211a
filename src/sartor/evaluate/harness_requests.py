"""Requests of lm-evaluation-harness, answered by a model as it stands.

The three kinds of requests, and how texts become tokens, are those of the harness's own adapter of transformers
(its class `HFLM`, 0.4.13), with two differences: text that spells control tokens is tokenised as text,
and a row may be one token shorter. The module does not import `lm_eval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.core.errors import ConfigError, ModelError
from sartor.inference.engine import Sampling
from sartor.inference.generate import context_tokens, generate
from sartor.models import packing
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.losses.token_scores import top_tokens
from sartor.models.packing import TokenizedExample

# Tokens computed at once: the logits of all of them are in memory
PACK_TOKENS = 1024
# Longest reply where a task names no limit, as in the harness
REPLY_TOKENS = 256
_KNOWN_OPTIONS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_new_tokens", "max_tokens"}


@dataclass(frozen=True)
class ReplyEnd:
    """Sampling of a reply, and the texts before which it ends."""

    until: tuple[str, ...]
    sampling: Sampling


def reply_end(options: Mapping[str, Any]) -> ReplyEnd:
    """Return the sampling and the end of a reply that a task's `generation_kwargs` ask for.

    Without `do_sample`, a temperature above 0 samples. Raises ConfigError for an option that Sartor's generation does
    not have.
    """
    # beam search with one beam is greedy
    if unknown := sorted(set(options) - _KNOWN_OPTIONS - ({"num_beams"} if options.get("num_beams") == 1 else set())):
        raise ConfigError(
            f"the task's generation_kwargs hold {unknown[0]}: {options[unknown[0]]!r}, which Sartor's generation "
            "does not have",
            f"generation_kwargs with {', '.join(sorted(_KNOWN_OPTIONS))} alone, in a task of your own",
        )
    until = options.get("until") or ()
    texts = (until,) if isinstance(until, str) else tuple(until)
    limits = [options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(name)]
    temperature = float(options.get("temperature") or 0.0)
    is_sampled = bool(options.get("do_sample", temperature > 0))
    if is_sampled and not temperature:
        temperature = 1.0
    return ReplyEnd(
        tuple(text for text in texts if text),
        Sampling(
            int(limits[0]) if limits else REPLY_TOKENS,
            temperature if is_sampled else 0.0,
            top_p=float(options.get("top_p") or 1.0) if is_sampled else 1.0,
        ),
    )


def before_stop(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of the stop texts.

    >>> before_stop('4. Next', ['Next', '.'])
    '4'
    """
    return text[: min([len(text), *(text.find(stop) for stop in until if stop in text)])]


def raw_tokens(chat: ChatTokenizer, text: str) -> list[int]:
    """Return the token ids of a text outside a chat, with the token that the tokenizer puts first, if it does."""
    ids, bos = chat.content_tokens(text), chat.tokenizer.bos_token_id
    is_added = bos is not None and chat.tokenizer("a")["input_ids"][0] == bos
    return [bos, *ids] if is_added else ids


def prefix_token(chat: ChatTokenizer) -> int:
    """Return the token before a text without a context: the BOS token, else EOS."""
    tokenizer = chat.tokenizer
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


def continuation_row(chat: ChatTokenizer, context: str, continuation: str) -> TokenizedExample:
    """Return a context with its continuation, whose tokens alone are supervised.

    Both are tokenised together. White space at the end of the context belongs to the continuation.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    head = raw_tokens(chat, stripped) if stripped else []
    ids = raw_tokens(chat, stripped + continuation) if stripped else chat.content_tokens(continuation)
    # the last token of the context may have grown into the continuation
    start = min(len(head), len(ids) - 1)
    if start <= 0:
        ids, start = [prefix_token(chat), *ids], 1
    return TokenizedExample(ids, [False] * start + [True] * (len(ids) - start))


def rolling_rows(chat: ChatTokenizer, text: str, max_tokens: int) -> list[TokenizedExample]:
    """Return rows of at most `max_tokens` tokens in which each token of a text is supervised once.

    The first begins with the prefix token. Each later one has as many tokens of context as fit.
    """
    ids = [prefix_token(chat), *chat.content_tokens(text)]
    rows = []
    scored = 1
    while scored < len(ids):
        end = min(scored + max_tokens - 1, len(ids))
        start = max(end - max_tokens, 0)
        rows.append(TokenizedExample(ids[start:end], [place >= scored for place in range(start, end)]))
        scored = end
    return rows


@torch.no_grad()
def log_likelihoods(
    base: Base,
    model: Any,
    rows: Sequence[TokenizedExample],
    progress: Callable[[int], object] = lambda rows: None,
) -> list[tuple[float, bool]]:
    """Return of each row log P(supervised tokens | tokens before), in nats, and whether greedy decoding writes them.

    progress: called with the number of newly computed rows. Raises ModelError where a sum is not finite.
    """
    if not rows:
        return []
    # no fast path: it would always apply the adapter, which may be disabled
    backend = base.path(model, rows, LossOptions(fast=False, share=False))
    vocabulary = len(base.chat.tokenizer)
    results: list[tuple[float, bool]] = []
    lengths = [len(row.ids) for row in rows]
    for group in packing.group_by_capacity(lengths, max(PACK_TOKENS, *lengths)):
        batch = [rows[index] for index in group]
        top = top_tokens(backend, batch, 1, vocabulary)
        counts = [row.supervised_tokens for row in batch]
        scores = zip(batch, top.ids[:, 0].split(counts), top.targets.double().split(counts), strict=True)
        for row, likeliest, targets in scores:
            wanted = [token for token, is_learnt in zip(row.ids[1:], row.learnt[1:], strict=True) if is_learnt]
            results.append((float(targets.sum()), likeliest.tolist() == wanted))
        progress(len(batch))
    if not all(math.isfinite(total) for total, _ in results):
        raise ModelError(
            "the log-likelihood of some texts is not finite: the weights of the model or the adapter are broken",
            "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4, or another base",
        )
    return results


class RequestRunner:
    """Answers of a base, with its adapter or without, to the requests of a task.

    progress: called with the number of newly answered requests.
    clipped: number of requests whose context was cut at its beginning, since the model has fewer positions.
    """

    def __init__(self, base: Base, model: Any, progress: Callable[[float], object] = lambda requests: None) -> None:
        self.base, self.model, self.progress, self.clipped = base, model, progress, 0
        self.max_tokens = context_tokens(model) or 2**31

    def continuations(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each (context, continuation).

        Raises ModelError for a continuation that does not fit into the model's context.
        """
        rows = []
        for context, continuation in requests:
            row = continuation_row(self.base.chat, context, continuation)
            excess = len(row.ids) - self.max_tokens
            if excess > 0:
                if excess >= row.learnt.index(True):
                    raise ModelError(
                        f"a continuation has {row.supervised_tokens} tokens; the model has {self.max_tokens} "
                        "positions",
                        "a task with shorter continuations, or a base with a longer context",
                    )
                row = TokenizedExample(row.ids[excess:], row.learnt[excess:])
                self.clipped += 1
            rows.append(row)
        return log_likelihoods(self.base, self.model, rows, self.progress)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each whole text, in windows as long as the model's context."""
        windows = [rolling_rows(self.base.chat, text, self.max_tokens) for text in texts]
        totals = iter(log_likelihoods(self.base, self.model, [row for rows in windows for row in rows]))
        results = []
        for rows in windows:
            results.append(sum(next(totals)[0] for _ in rows))
            self.progress(1)
        return results

    def replies(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return the reply to each (context, generation_kwargs), without its stop text.

        Raises ConfigError for options that Sartor's generation does not have, and for a reply that may be as long as
        the model's context.
        """
        ends = [reply_end(options) for _, options in requests]
        by_end: dict[ReplyEnd, list[int]] = {}
        for index, end in enumerate(ends):
            by_end.setdefault(end, []).append(index)
        results = [""] * len(requests)
        for end, indices in by_end.items():
            texts = self._reply_all([requests[index][0] for index in indices], end)
            for index, text in zip(indices, texts, strict=True):
                results[index] = text
        return results

    def _reply_all(self, contexts: Sequence[str], end: ReplyEnd) -> list[str]:
        """Return the replies to contexts under the same sampling."""
        chat, room = self.base.chat, self.max_tokens - end.sampling.max_tokens
        if room < 1:
            raise ConfigError(
                f"the task asks for replies of {end.sampling.max_tokens} tokens; the model has {self.max_tokens} "
                "positions",
                "max_gen_toks in generation_kwargs, in a task of your own",
            )
        prompts = []
        for context in contexts:
            ids = raw_tokens(chat, context) or [prefix_token(chat)]
            self.clipped += len(ids) > room
            prompts.append(ids[-room:])
        # a token is a byte at least, so that a stop text lies in as many of the last tokens, and one more
        reach = max((len(text.encode()) for text in end.until), default=0) + 1

        def has_stop(ids: Sequence[int]) -> bool:
            """Return whether the last tokens of a reply hold a stop text."""
            tail = chat.decode(ids[-reach:])
            return any(text in tail for text in end.until)

        generations = generate(
            self.model,
            prompts,
            stop=chat.stops,
            pad=chat.pad,
            sampling=end.sampling,
            progress=self.progress,
            is_decided=has_stop if end.until else None,
        )
        return [before_stop(chat.decode(generation.ids), end.until) for generation in generations]
