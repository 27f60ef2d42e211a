"""Log-probabilities of chosen tokens at every predicting position, of a student and of a teacher.

A loss backend (`loss_backend.py`) returns the log-probability of the row's own token alone. Distillation compares the
distributions over K tokens of each position. Both are computed by the backend's own forward pass. The fused backend
does not keep the logits (S, V) for its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sartor.core.errors import ModelError
from sartor.models import packing
from sartor.models.losses.loss_backend import FusedBackend, LossBackend
from sartor.models.losses.transformers_backend import (
    PackedTransformersBackend,
    RowTransformersBackend,
    pack_logits,
    row_logits,
)
from sartor.models.losses.transformers_backend import packing as packed_model
from sartor.models.packing import Pack, TokenizedExample


@dataclass(frozen=True)
class TopTokens:
    """Likeliest tokens at S predicting positions.

    ids: (S, K) token ids, likeliest first.
    log_probabilities: (S, K) fp32.
    targets: (S,) fp32 log-probabilities of the row's own tokens.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor
    targets: torch.Tensor


def token_log_probabilities(backend: LossBackend, rows: Sequence[TokenizedExample], ids: torch.Tensor) -> torch.Tensor:
    """Return differentiable log-probabilities (S, K) of the tokens `ids` (S, K) at the supervised tokens of `rows`."""
    if isinstance(backend, FusedBackend):
        batch = backend.pack(rows)
        return backend.fast.token_scores(_hidden(backend, rows, batch), ids)
    return torch.cat(
        [
            logits.log_softmax(-1).gather(1, part)
            for logits, part in _logits_with_ids(_transformers(backend), rows, ids)
        ]
    )


@torch.no_grad()
def top_tokens(backend: LossBackend, rows: Sequence[TokenizedExample], count: int, vocabulary: int) -> TopTokens:
    """Return the `count` likeliest tokens at the supervised tokens of `rows`.

    vocabulary: number of tokens that count as candidates; a head may be padded beyond the tokenizer's.
    """
    parts: list[TopTokens] = []
    for logits, targets in _predictions(backend, rows):
        scores = _at_least_fp32(logits).log_softmax(-1)
        width = min(vocabulary, scores.shape[1])
        values, ids = scores[:, :width].topk(min(count, width))
        parts.append(TopTokens(ids, values, scores.gather(1, targets[:, None])[:, 0]))
    return TopTokens(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_probabilities for part in parts]),
        torch.cat([part.targets for part in parts]),
    )


def _predictions(
    backend: LossBackend, rows: Sequence[TokenizedExample]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits (n, V), targets (n,)) of all supervised tokens, in order, a part at a time."""
    if not isinstance(backend, FusedBackend):
        targets = packing.pack(rows, _transformers(backend).device).targets[:, None]
        yield from ((logits, part[:, 0]) for logits, part in _logits_with_ids(_transformers(backend), rows, targets))
        return
    batch = backend.pack(rows)
    normed, _ = backend.fast.norm.forward(_hidden(backend, rows, batch))
    size = backend.fast.rows_at_once(normed)
    for part, targets in zip(normed.split(size), batch.targets.split(size), strict=True):
        yield backend.fast.capped_logits(part), targets


def _transformers(backend: LossBackend) -> PackedTransformersBackend | RowTransformersBackend:
    if not isinstance(backend, (PackedTransformersBackend, RowTransformersBackend)):
        raise ModelError(f"the path {backend.name} gives no distributions", "compute: {path: general}")
    return backend


def _logits_with_ids(
    backend: PackedTransformersBackend | RowTransformersBackend, rows: Sequence[TokenizedExample], ids: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits (n, V), ids (n, K)) of rows that are computed together."""
    if isinstance(backend, PackedTransformersBackend):
        batch = packing.pack(rows, backend.device, share=backend.share)
        with packed_model(backend.model):
            yield pack_logits(backend.model, batch), ids
        return
    start = 0
    for row in rows:
        if count := row.supervised_tokens:
            yield row_logits(backend.model, packing.pack([row], backend.device)), ids[start : start + count]
            start += count


def _hidden(backend: FusedBackend, rows: Sequence[TokenizedExample], batch: Pack) -> torch.Tensor:
    """Return the hidden states (S, D) before the final norm, as `FusedBackend.losses` computes them."""
    fast = backend.fast
    fast.check_distributions()
    geometries = fast.geometries(batch)
    with torch.no_grad():
        if backend.frozen is not None:
            x = backend.frozen.inputs(rows, batch)
        else:
            x = fast.embed(batch.ids[0])
            x = fast.frozen(x, geometries) if fast.lowest else x
    return fast.predicting(x, batch, geometries)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
