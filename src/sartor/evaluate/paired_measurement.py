"""Replies and losses of base and tuned on held-out rows, in one batch where compiled kernels apply.

The kernels apply to text on a CPU (`inference/local/paired_replies.py`). Elsewhere `predictions.py` measures each
side by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from sartor.evaluate.metrics import ModelOutputs
from sartor.evaluate.predictions import (
    HeldOut,
    losses,
    measure_model,
    model_side,
    prompt_tokens,
    reply_limit,
    reply_outputs,
)
from sartor.inference.generate import Generation, check_context
from sartor.inference.local import paired_replies
from sartor.inference.local.paired_replies import PairedRow, ReplyLimits, paired_row
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample

IsDecided = Callable[[int, str], bool]


def measure_models(
    base: Base,
    model: Any,
    eval_set: HeldOut,
    field: str,
    *,
    sides: Sequence[bool] = (False, True),
    is_decided: IsDecided | None = None,
    progress: Callable[[float], object] = lambda fraction: None,
) -> list[ModelOutputs]:
    """Measure each side (whether tuned) as `measure_model` does.

    Both sides share one batch where the compiled kernels apply.

    is_decided: (index of a row, reply so far) -> whether no requested score can change any more; the reply then ends.
    progress: called with the fraction done, 0..1.
    """
    limit, chat = reply_limit(base, eval_set.examples), base.chat
    encoded = [chat.encode(example, eval_set.folder) for example in eval_set.examples]
    prompts = prompt_tokens(chat, eval_set)
    check_context(model, max(map(len, prompts)), limit)
    rows, loss_rows, reply_rows = _paired_rows(encoded, prompts)
    decoder = paired_replies.open_pair(model, rows, limit)
    if decoder is None:
        outputs = []
        for count, tuned in enumerate(sides, 1):
            outputs.append(measure_model(base, model, eval_set, field, tuned=tuned))
            progress(count / len(sides))
        return outputs
    examples = {row: index for index, row in enumerate(reply_rows)}

    def is_reply_decided(row: int, tokens: Sequence[int]) -> bool:
        """Return whether the scores of the reply of a batch row are decided."""
        text = chat.decode(tokens)
        # an incomplete UTF-8 character decodes to U+FFFD; wait for the rest of it
        return is_decided is not None and not text.endswith("\ufffd") and is_decided(examples[row], text)

    # a tokenizer that cleans up spaces changes earlier text when more follows; a template that opens the reasoning
    # makes the start of the reply no answer
    is_opened = any(chat.opens_reasoning(prompt) for prompt in prompts)
    has_clean_up = getattr(chat.tokenizer, "clean_up_tokenization_spaces", False)
    can_end = is_decided is not None and not has_clean_up and not is_opened
    limits = ReplyLimits(limit, frozenset(chat.stops), is_reply_decided if can_end else None, has_logprobs=bool(field))
    results = paired_replies.reply_to_rows(
        decoder, rows, limits, sides=sides, progress=_counted(len(rows) * len(sides), progress)
    )
    tokens = [example.supervised_tokens for example in encoded]
    outputs = []
    for side in results:
        nats = [side[row].nats for row in loss_rows]
        loss = [math.fsum(row) / len(row) if row else 0.0 for row in nats]
        # a document has an empty reply
        generations = [side[row].generation or Generation([], "stop") for row in reply_rows]
        outputs.append(reply_outputs(chat, generations, loss=loss, tokens=tokens, field=field, is_opened=is_opened))
    return outputs


def measure_losses(
    base: Base,
    model: Any,
    encoded: Sequence[TokenizedExample],
    *,
    sides: Sequence[bool] = (False, True),
    progress: Callable[[float], object] = lambda fraction: None,
) -> list[list[float]]:
    """Return nats per supervised token of each row under each side (whether tuned).

    progress: called with the fraction done, 0..1.

    The loss of a row without such tokens is 0. Both sides share one batch where the compiled kernels apply, as in
    `measure_models`; ModelError is raised there if logits are not finite.
    """
    rows = [paired_row(example, 0) for example in encoded]
    decoder = paired_replies.open_pair(model, rows, 0) if rows else None
    if decoder is None:
        side_losses = []
        for count, tuned in enumerate(sides, 1):
            with model_side(model, tuned=tuned):
                side_losses.append(losses(base, model, encoded)[0] if rows else [])
            progress(count / len(sides))
        return side_losses
    advance = _counted(len(rows) * len(sides), progress)
    results = paired_replies.reply_to_rows(decoder, rows, ReplyLimits(0, frozenset()), sides=sides, progress=advance)
    return [[math.fsum(row.nats) / max(len(row.nats), 1) for row in side_rows] for side_rows in results]


def _counted(total: int, progress: Callable[[float], object]) -> Callable[[int], None]:
    """Return a function that adds up numbers of finished rows and calls `progress` with their fraction of `total`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done / total)

    return advance


def _paired_rows(
    encoded: Sequence[TokenizedExample], prompts: Sequence[Sequence[int]]
) -> tuple[list[PairedRow], list[int], list[int]]:
    """Return the batch rows, and for each example the row with its losses and the row with its reply.

    Both are one row where the example's tokens begin with its prompt.
    """
    rows: list[PairedRow] = []
    loss_rows, reply_rows = [], []
    for example, prompt in zip(encoded, prompts, strict=True):
        is_whole = list(example.ids[: len(prompt)]) == list(prompt)
        loss_rows.append(len(rows))
        rows.append(paired_row(example, len(prompt) if is_whole else 0))
        if not is_whole:
            rows.append(PairedRow(prompt, (), len(prompt)))
        reply_rows.append(len(rows) - 1)
    return rows, loss_rows, reply_rows
