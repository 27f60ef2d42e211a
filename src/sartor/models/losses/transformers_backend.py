"""The general path: losses by transformers' own module, packed where that is exact.

`packed_attention` hands `attend` to transformers under the name `sartor_packed`: any architecture whose attention goes
through transformers' AttentionInterface then packs exactly, which `agrees` measures on rows of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from sartor.models.attention import Shape, attend
from sartor.models.batches import Encoded, Pack, pack
from sartor.models.linear import rounds
from sartor.models.media import own_inputs
from sartor.models.native.media import native_media
from sartor.models.native.replies import is_plain
from sartor.models.widened import in_fp32


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls attention: query (1, H, T, K), key and value (1, G, T, K) -> ((1, T, H, K), None).

    `options` are theirs: scaling, softcap, sliding_window, dropout, and our `rows`.
    """
    shape = Shape(
        heads=query.shape[1],
        groups=key.shape[1],
        scale=options.get("scaling") or query.shape[3] ** -0.5,
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
    )
    return attend(query[0], key[0], value[0], options["rows"], shape, options.get("dropout") or 0.0)[None], None


AttentionInterface.register("sartor_packed", packed_attention)


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """Inside, `model` attends within segments (and makes no mask of its own); after, as before."""
    text = decoder(model)
    before = text.config._attn_implementation
    text.set_attn_implementation("sartor_packed")
    try:
        yield
    finally:
        text.set_attn_implementation(before)


def without_peft(model: Any) -> Any:
    """Transformers' module inside: `model` itself if it has no adapter."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def decoder(model: Any) -> Any:
    """What of a model attends among tokens: the model itself, or beside towers its language model."""
    return model if model.config.get_text_config(decoder=True) is model.config else model.get_decoder()


def pack_losses(model: Any, batch: Pack) -> torch.Tensor:
    """(S,) cross-entropy in nats of each supervised token of a pack, fp32. Call inside `packing(model)`.

    Only the S predicting positions reach the LM head (`logits_to_keep`), so a prompt costs no (T, V) logits.
    """
    logits = model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        logits_to_keep=batch.predict,
        use_cache=False,
        rows=batch.rows,
    ).logits[0]
    if len(logits) == batch.tokens:  # a model that does not know `logits_to_keep`
        logits = logits[batch.predict]
    return F.cross_entropy(_at_least_fp32(logits), batch.targets, reduction="none")


def row_losses(model: Any, examples: Sequence[Encoded], device: torch.device | str) -> torch.Tensor:
    """What `pack_losses` gives, one example at a time through the model's own attention: slow, and right for any model."""
    losses = []
    for example in examples:
        batch = pack([example], device)
        if batch.supervised_tokens:
            logits = model(**own_inputs(model, batch.ids), use_cache=False).logits[0]
            losses.append(F.cross_entropy(_at_least_fp32(logits[batch.predict]), batch.targets, reduction="none"))
    return torch.cat(losses) if losses else torch.zeros(0, device=device)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def packs_exactly(model: Any, examples: Sequence[Encoded], device: torch.device | str) -> tuple[bool, float]:
    """Whether this model's packed losses equal its unpacked ones, and the largest difference in nats: see `agrees`."""

    def packed(few: Sequence[Encoded]) -> torch.Tensor:
        with packing(model):
            return pack_losses(model, pack(few, device))

    return agrees(model, examples, device, packed)


def turned(ids: Sequence[int]) -> list[int]:
    """The tokens of text in the other order; media stay where they are, since none may become what is to be said next.

    >>> turned([1, 2, -9, 3])
    [3, 2, -9, 1]
    """
    text = [token for token in ids if token >= 0]
    return [token if token < 0 else text.pop() for token in ids]


@torch.no_grad()
def agrees(
    model: Any, examples: Sequence[Encoded], device: torch.device | str, packed: Callable[[Sequence[Encoded]], torch.Tensor]
) -> tuple[bool, float]:
    """Return whether `packed` (rows -> (S,) losses) gives what the model gives for single rows, and the largest difference.

    Two short rows and the longest are packed (windows and chunks show in long rows alone). Their losses must be those of
    the plain pass, up to what reordered sums cost at the model's precision; and must not move when only the tokens of the
    row before them change. The second is the sharper test: in bf16 a leak can be smaller than the rounding. A model with
    state outside attention (convolutions, recurrences), or that drops unknown keyword arguments, fails one of them. Any
    exception of the packed pass counts as "no": another path then serves.

    In 16 bits both ways round, by up to 0.5 nats a token where losses are near 10, so neither can judge the other. Both are
    judged by the same computation in fp32 (`widened.py`), over more rows: `packed` may be off by half as much again as the
    model's own way. The difference is then the largest one to fp32.
    """
    few = _few_rows(examples, model.get_output_embeddings().weight.dtype)
    if not few:
        return True, 0.0  # nothing is supervised, so nothing can leak
    media = native_media(model)
    for row in few:
        if media is not None and not is_plain(model, media, row.ids):
            return False, max(media.apart.values())
    plain = row_losses(model, few, device)
    other = replace(few[0], ids=turned(few[0].ids))
    try:
        behind, behind_other = (packed([first, *few]) for first in (few[0], other))
    except Exception:  # each architecture fails in its own way, and each failure is an answer
        return False, float("inf")
    own = few[0].supervised_tokens
    leak = float((behind[own:] - behind_other[own:]).abs().max())
    if not rounds(model.get_output_embeddings().weight.dtype):
        difference = float((plain - behind[own:]).abs().max())
        return leak <= 1e-6 and difference <= 1e-3, max(difference, leak)
    right = _fp32_losses(model, few, device)
    if right is None:  # rounding alone is 0.1 nats in the root mean square, and 1 for one token in hundreds (docs/log.md)
        apart = (plain - behind[own:]).abs()
        is_near = _root_mean_square(apart) <= 0.2 and float(apart.max()) <= 3.0
    else:
        apart = (behind[own:] - right).abs()
        is_near = _root_mean_square(apart) <= ROUNDING_SLACK * _root_mean_square(plain - right) + ROUNDING_FLOOR_NATS
    return leak <= 1e-3 and is_near, max(float(apart.max()), leak)


# How much more a packed pass in 16 bits may be off from fp32 than the model's own single rows, in the root mean square
ROUNDING_SLACK, ROUNDING_FLOOR_NATS = 1.5, 0.02
# Rows and supervised tokens over which rounding is measured in 16 bits
_ROUNDED_ROWS, _ROUNDED_TOKENS = 16, 256


def _few_rows(examples: Sequence[Encoded], dtype: torch.dtype) -> list[Encoded]:
    """Return the rows that `agrees` looks at: the two shortest, the longest, one with media; in 16 bits further short ones."""
    rows = sorted((example for example in examples if example.supervised_tokens), key=lambda example: len(example.ids))
    few = [*rows[:2], *rows[-1:]]
    if not any(token < 0 for row in few for token in row.ids):  # what a model does with media shows in a row that has some
        few += [row for row in rows if any(token < 0 for token in row.ids)][:1]
    if rounds(dtype):
        for row in rows[2:-1]:
            if len(few) >= _ROUNDED_ROWS or sum(chosen.supervised_tokens for chosen in few) >= _ROUNDED_TOKENS:
                break
            if row is not few[-1]:
                few.append(row)
    return few


def _fp32_losses(model: Any, examples: Sequence[Encoded], device: torch.device | str) -> torch.Tensor | None:
    """Return what `row_losses` gives in fp32; None for a model that does not compute with widened weights."""
    try:
        with in_fp32(model):
            losses = row_losses(model, examples, device)
    except Exception:  # a model that casts to its weights' dtype fails in its own way
        return None
    return losses if bool(losses.isfinite().all()) else None


def _root_mean_square(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())
