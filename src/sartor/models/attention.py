"""Attention inside a pack: a segment sees itself and the segments that it continues, and nothing else.

A pack is a forest of segments (`Segments`): without shared prefixes every segment is a whole example and a root; with them a
segment goes on where its parent ends. Two readers of that forest compute the same thing: the C++ kernel walks the
segments themselves (`kernels/native.cpp`); `attend` below gathers segments of about equal length into rectangles
(`Rows`) and uses batched matrix products, on any device and under autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Above this row length torch's blocked kernel beats batched matrix products and keeps memory linear in the length.
BLOCKED_ATTENTION_TOKENS = 512


@dataclass(frozen=True)
class Segment:
    """`length` tokens of a pack from `start` on, the first at position `first` of its example; `ancestors` root first."""

    start: int
    length: int
    first: int
    ancestors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Segments that attend together.

    queries: (N, Q) and keys: (N, K) indices into the pack; first: (N,) position of each row's first query. Key j of a row
    is at position j. scatter: (S,) indexes the flattened (N * Q) result; into: (S,) the same tokens' places in the pack.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    first: torch.Tensor
    scatter: torch.Tensor
    into: torch.Tensor
    is_plain: bool


@dataclass(frozen=True)
class Shape:
    """How a layer attends. window: a query sees that many positions, itself included; None sees all before it."""

    heads: int
    groups: int
    scale: float
    softcap: float | None = None
    window: int | None = None


def rows_of(segments: Sequence[Segment], device: torch.device | str) -> Iterator[Rows]:
    """Group segments whose lengths are within a factor of two: padding inside attention stays under half."""
    left = sorted(range(len(segments)), key=lambda index: (-segments[index].length, -segments[index].first))
    while left:
        longest = segments[left[0]]
        reach = longest.first + longest.length
        group = [
            index
            for index in left
            if segments[index].length * 2 > longest.length
            and reach < 2 * (segments[index].first + segments[index].length) <= 4 * reach
        ]
        taken = set(group)
        left = [index for index in left if index not in taken]
        yield _rectangle([segments[index] for index in group], segments, device)


def _rectangle(group: Sequence[Segment], segments: Sequence[Segment], device: torch.device | str) -> Rows:
    """Padding repeats a row's last token: it sits after every real query, so the causal mask hides it."""
    offsets = torch.arange(max(segment.length for segment in group))
    starts = torch.tensor([segment.start for segment in group])[:, None]
    lengths = torch.tensor([segment.length for segment in group])[:, None]
    first = torch.tensor([segment.first for segment in group])
    real = (offsets < lengths).flatten()
    queries = starts + torch.minimum(offsets, lengths - 1)
    is_plain = not bool(first.any())
    keys = queries if is_plain else _paths(group, segments)
    return Rows(
        queries=queries.to(device),
        keys=keys.to(device),
        first=first.to(device),
        scatter=real.nonzero().flatten().to(device),
        into=queries.flatten()[real].to(device),
        is_plain=is_plain,
    )


def _paths(group: Sequence[Segment], segments: Sequence[Segment]) -> torch.Tensor:
    """(N, K) places in the pack of all that each segment can see, in the order of positions."""
    paths = []
    for segment in group:
        spans = [*(segments[index] for index in segment.ancestors), segment]
        paths.append(torch.cat([torch.arange(span.start, span.start + span.length) for span in spans]))
    longest = max(len(path) for path in paths)
    return torch.stack([torch.cat([path, path[-1:].expand(longest - len(path))]) for path in paths])


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Sequence[Rows], shape: Shape, dropout: float = 0.0
) -> torch.Tensor:
    """query: (H, T, K), key: (G, T, K), value: (G, T, V), positions already rotated in -> (T, H, V)."""
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    for group in rows:
        out = out.index_copy(0, group.into, _attend(query, key, value, group, shape, dropout))
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, shape: Shape, dropout: float
) -> torch.Tensor:
    """Attention of one group of rows -> (S, H, V)."""
    count, length = rows.queries.shape
    reach, width = rows.keys.shape[1], value.shape[2]
    heads, groups = query.shape[0], key.shape[0]
    q = query.index_select(1, rows.queries.flatten()).view(heads, count, length, -1)
    k, v = (x.index_select(1, rows.keys.flatten()).view(groups, count, reach, -1) for x in (key, value))
    if length > BLOCKED_ATTENTION_TOKENS and rows.is_plain and not shape.softcap and not shape.window:
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1).repeat_interleave(heads // groups, 1),
            v.transpose(0, 1).repeat_interleave(heads // groups, 1),
            dropout_p=dropout,
            is_causal=True,
            scale=shape.scale,
        ).transpose(0, 1)
    else:
        # (G N, H/G Q, K) x (G N, K, reach): one product per key head, no copy of the keys per query head
        q = q.view(groups, heads // groups, count, length, -1).transpose(1, 2)
        q = q.reshape(groups * count, heads // groups * length, -1)
        scores = (q * shape.scale) @ k.reshape(groups * count, reach, -1).transpose(1, 2)
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        scores = scores.view(groups, count, heads // groups, length, reach)
        scores = scores.masked_fill(_hidden(rows, shape.window), torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        weights = F.dropout(weights, dropout).view(groups * count, -1, reach)
        mixed = weights @ v.reshape(groups * count, reach, width)
        mixed = mixed.view(groups, count, heads // groups, length, width).transpose(1, 2)
    return mixed.reshape(heads, count * length, width).index_select(1, rows.scatter).transpose(0, 1)


def _hidden(rows: Rows, window: int | None) -> torch.Tensor:
    """(Q, K) or (N, 1, Q, K), true where a query must not see a key: the future, or beyond the sliding window."""
    device = rows.queries.device
    distance = torch.arange(rows.queries.shape[1], device=device)[:, None] - torch.arange(rows.keys.shape[1], device=device)
    if not rows.is_plain:
        distance = distance + rows.first[:, None, None, None]
    return (distance < 0) | (distance >= window) if window else distance < 0
