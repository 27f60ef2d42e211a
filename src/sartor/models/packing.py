"""Packs of rows without padding; attention inside a pack.

In: `TokenizedExample` rows (token ids, and which of them are supervised). Out: a `Pack`, one flat row of T tokens.
`losses/fused_decoder.py` and `losses/transformers_backend.py` compute losses of it. Examples interact only in
attention, where `attend` keeps them apart.

A pack is a forest of segments (`Segment`). Without shared prefixes every segment is a whole example and a root. With
shared prefixes (`share=True`) a common beginning of several examples is in the pack once, and a child segment
continues at the position where its parent ends. A prefix's activations do not depend on what follows it. So losses and
gradients are those of the plain pack up to the order of sums, and the work is that of the distinct tokens.

Two implementations compute attention over that forest. The C++ kernel iterates over the segments themselves
(`kernels/train_kernels.cpp`). `attend` below gathers segments of about equal length into rectangles (`SegmentGroup`)
and uses batched matrix products, on any device and under autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

# Above this row length torch's blocked kernel beats batched matrix products and keeps memory linear in the length.
BLOCKED_ATTENTION_TOKENS = 512


@dataclass(frozen=True)
class Segment:
    """Contiguous tokens of a pack.

    start: index of the first token in the pack.
    length: number of tokens.
    first: position of the first token in its example.
    ancestors: indices of the segments before it in its example, root first.
    """

    start: int
    length: int
    first: int
    ancestors: tuple[int, ...] = ()


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that attend together, padded to a rectangle of N rows, Q queries and K keys.

    queries: (N, Q) and keys: (N, K) indices into the pack. Key j of a row is at position j.
    first: (N,) position of each row's first query.
    scatter: (S,) indices of the real tokens in the flattened (N * Q) result.
    into: (S,) indices of the same tokens in the pack.
    is_plain: true if no segment has ancestors, so that keys are the queries.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    first: torch.Tensor
    scatter: torch.Tensor
    into: torch.Tensor
    is_plain: bool


@dataclass(frozen=True)
class AttentionShape:
    """Attention parameters of a layer.

    heads, groups: numbers of query heads and of key heads.
    scale: factor of the scores.
    softcap: c of c tanh(scores / c); None for none.
    window: number of positions that a query sees, itself included; None for all before it.
    """

    heads: int
    groups: int
    scale: float
    softcap: float | None = None
    window: int | None = None


def group_segments(segments: Sequence[Segment], device: torch.device | str) -> Iterator[SegmentGroup]:
    """Yield groups of segments whose lengths are within a factor of two.

    Padding inside attention then stays under half.
    """
    ungrouped = sorted(range(len(segments)), key=lambda index: (-segments[index].length, -segments[index].first))
    while ungrouped:
        longest = segments[ungrouped[0]]
        reach = longest.first + longest.length
        group = [
            index
            for index in ungrouped
            if segments[index].length * 2 > longest.length
            and reach < 2 * (segments[index].first + segments[index].length) <= 4 * reach
        ]
        grouped = set(group)
        ungrouped = [index for index in ungrouped if index not in grouped]
        yield _rectangle([segments[index] for index in group], segments, device)


def _rectangle(group: Sequence[Segment], segments: Sequence[Segment], device: torch.device | str) -> SegmentGroup:
    """Return the group of some segments, padded to the longest.

    Padding repeats a row's last token. It comes after every real query, so the causal mask hides it.
    """
    offsets = torch.arange(max(segment.length for segment in group))
    starts = torch.tensor([segment.start for segment in group])[:, None]
    lengths = torch.tensor([segment.length for segment in group])[:, None]
    first = torch.tensor([segment.first for segment in group])
    real = (offsets < lengths).flatten()
    queries = starts + torch.minimum(offsets, lengths - 1)
    is_plain = not bool(first.any())
    keys = queries if is_plain else _paths(group, segments)
    return SegmentGroup(
        queries=queries.to(device),
        keys=keys.to(device),
        first=first.to(device),
        scatter=real.nonzero().flatten().to(device),
        into=queries.flatten()[real].to(device),
        is_plain=is_plain,
    )


def _paths(group: Sequence[Segment], segments: Sequence[Segment]) -> torch.Tensor:
    """Return the pack indices (N, K) of all tokens that each segment can see, in the order of positions."""
    paths = []
    for segment in group:
        spans = [*(segments[index] for index in segment.ancestors), segment]
        paths.append(torch.cat([torch.arange(span.start, span.start + span.length) for span in spans]))
    longest = max(len(path) for path in paths)
    return torch.stack([torch.cat([path, path[-1:].expand(longest - len(path))]) for path in paths])


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Sequence[SegmentGroup],
    shape: AttentionShape,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return the attention output (T, H, V) of a pack.

    query: (H, T, K). key: (G, T, K). value: (G, T, V). Queries and keys are already rotated.
    """
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    for group in rows:
        out = out.index_copy(0, group.into, _attend(query, key, value, rows=group, shape=shape, dropout=dropout))
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: SegmentGroup,
    shape: AttentionShape,
    dropout: float,
) -> torch.Tensor:
    """Return the attention output (S, H, V) of one group of segments."""
    count, length = rows.queries.shape
    reach, width = rows.keys.shape[1], value.shape[2]
    heads, groups = query.shape[0], key.shape[0]
    # q (H, N, Q, K);  k (G, N, reach, K) and v (G, N, reach, V), gathered along each segment's path
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
        # scores (G N, H/G Q, reach) = scale q k^T, capped;  weights = softmax over visible keys;  output = weights v
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


def _hidden(rows: SegmentGroup, window: int | None) -> torch.Tensor:
    """Return the mask (Q, K) or (N, 1, Q, K), true where a query must not see a key.

    Hidden keys are those after the query, and those before its sliding window.
    """
    device = rows.queries.device
    # distance[q, k] = (first + q) - k: position of the query minus position of the key; visible in [0, window)
    distance = torch.arange(rows.queries.shape[1], device=device)[:, None] - torch.arange(
        rows.keys.shape[1], device=device
    )
    if not rows.is_plain:
        distance = distance + rows.first[:, None, None, None]
    return (distance < 0) | (distance >= window) if window else distance < 0


# A shorter common beginning saves less than the extra segment costs.
SHARED_TOKENS = 8


@dataclass(frozen=True)
class SoftTargets:
    """Distributions over the next token that S supervised tokens are trained towards.

    ids: (S, K) likeliest tokens. log_probabilities: (S, K) fp32 of them.
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor


@dataclass(frozen=True)
class TokenizedExample:
    """One example as tokens.

    ids: (T,) token ids. learnt: (T,) true where the token is supervised.
    weight: factor of every token's loss. factors: (T,) further factors above 0, those of the token's turn; None if all
        are 1. A turn of weight 0 is not learnt.
    soft: soft targets of the supervised tokens; with them their losses are divergences, and None trains towards the
        row's own tokens.
    """

    ids: list[int]
    learnt: list[bool]
    example_id: str = ""
    weight: float = 1.0
    factors: list[float] | None = field(default=None, kw_only=True)
    soft: SoftTargets | None = field(default=None, kw_only=True, compare=False, repr=False)

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens with a loss. The first token of a row has no predecessor and never counts."""
        return sum(self.learnt[1:])

    @property
    def token_weights(self) -> list[float]:
        """Loss weights (S,) of the supervised tokens, in order."""
        if self.factors is None:
            return [self.weight] * self.supervised_tokens
        pairs = zip(self.factors[1:], self.learnt[1:], strict=True)
        return [self.weight * factor for factor, is_learnt in pairs if is_learnt]

    @property
    def loss_weight(self) -> float:
        """Sum of `token_weights`: the row's part of the divisor of an update's loss."""
        return self.weight * self.supervised_tokens if self.factors is None else sum(self.token_weights)

    @property
    def last_reply(self) -> tuple[int, int]:
        """Range [start, end) of the last run of supervised tokens, or (0, 0) without one.

        It is the last reply, with the token that ends it.
        """
        end = max((place for place, is_learnt in enumerate(self.learnt) if is_learnt), default=-1) + 1
        start = end
        while start and self.learnt[start - 1]:
            start -= 1
        return start, end

    @property
    def tokens(self) -> int:
        """Number of tokens, T; for a preference pair the tokens of both rows."""
        return len(self.ids)


@dataclass(frozen=True)
class PackedSoftTargets:
    """Soft targets of some of a pack's S supervised tokens.

    places: (N,) which of them. hard: (S - N,) the others. targets: of N tokens.
    """

    places: torch.Tensor
    hard: torch.Tensor
    targets: SoftTargets

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], device: torch.device | str) -> PackedSoftTargets | None:
        """Return the soft targets of a pack of examples; None if none has some."""
        places: list[int] = []
        hard: list[int] = []
        targets, start = [], 0
        for example in examples:
            end = start + example.supervised_tokens
            if example.soft is None:
                hard += range(start, end)
            else:
                places += range(start, end)
                targets.append(example.soft)
            start = end
        if not targets:
            return None
        ids = torch.cat([part.ids for part in targets]).to(device)
        log_probabilities = torch.cat([part.log_probabilities for part in targets]).to(device)
        soft, others = (torch.tensor(part, dtype=torch.long, device=device) for part in (places, hard))
        return cls(soft, others, SoftTargets(ids, log_probabilities))


@dataclass(frozen=True)
class Pack:
    """T tokens of one or more examples.

    ids, positions: (1, T).
    predict: (S,) indices of tokens whose next token is supervised, example by example.
    targets: (S,) those next tokens.
    weights: (S,) loss weights.
    segments, rows: the forest of segments, and the same grouped for `attend`.
    places: per example, (length,) pack indices of its tokens.
    example_ids: id of each example.
    supervised: number of supervised tokens of each example.
    soft: soft targets of some of them; None if all are trained towards `targets`.
    multiple: T is a multiple of this number; tokens that belong to no example fill it up.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: tuple[Segment, ...]
    rows: tuple[SegmentGroup, ...]
    places: tuple[torch.Tensor, ...]
    example_ids: tuple[str, ...]
    supervised: tuple[int, ...]
    soft: PackedSoftTargets | None = None
    multiple: int = 1

    @functools.cached_property
    def output_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (W,) of the tokens whose last output is computed, and the place (S,) of each of `predict` in them.

        They are those that predict something, and others where `multiple` asks for more; both in the pack's order.
        """
        rows, places = torch.unique(self.predict, return_inverse=True)
        missing = -len(rows) % self.multiple
        if not missing:
            return rows, places
        is_other = torch.ones(self.tokens, dtype=torch.bool, device=rows.device)
        is_other[rows] = False
        rows = torch.cat([rows, is_other.nonzero().flatten()[:missing]]).sort().values
        return rows, torch.searchsorted(rows, self.predict)

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.ids.shape[1]

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens, S."""
        return self.targets.shape[0]


def group_by_capacity(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group examples, in order, so that no group holds more than `capacity` tokens.

    `lengths` are tokens per example, each in [1, capacity]. Returns indices, each exactly once. Order is kept because
    a pack pads nothing: a fuller pack saves no work, and a reordered one would bias which examples share an update.

    >>> group_by_capacity([3, 5, 2, 4], capacity=8)
    [[0, 1], [2, 3]]
    """
    groups: list[list[int]] = []
    free_tokens = 0
    for index, length in enumerate(lengths):
        if not groups or length > free_tokens:
            groups.append([])
            free_tokens = capacity
        groups[-1].append(index)
        free_tokens -= length
    return groups


def micro_batches(examples: Sequence[TokenizedExample], capacity: int, *, share: bool) -> list[list[TokenizedExample]]:
    """Return the rows of an update as packs of at most `capacity` tokens.

    A longer row gets a pack of its own. With `share`, rows are sorted so that those with a common beginning are
    neighbours, and the beginning counts once. The sum over an update does not depend on the grouping.
    """
    if not share:
        lengths = [len(example.ids) for example in examples]
        groups = group_by_capacity(lengths, max(capacity, *lengths))
        return [[examples[index] for index in group] for group in groups]
    packs: list[list[TokenizedExample]] = []
    free_tokens = 0
    for example in sorted(examples, key=lambda row: row.ids):
        common = _common(packs[-1][-1].ids, example.ids) if packs else 0
        new_tokens = len(example.ids) - (common if common >= SHARED_TOKENS else 0)
        if not packs or new_tokens > free_tokens:
            packs.append([])
            new_tokens, free_tokens = len(example.ids), max(capacity, len(example.ids))
        packs[-1].append(example)
        free_tokens -= new_tokens
    return packs


def pack(
    examples: Sequence[TokenizedExample],
    device: torch.device | str = "cpu",
    *,
    share: bool = False,
    multiple: int = 1,
) -> Pack:
    """Return the examples as one pack, common beginnings once if `share`.

    A token's target is its successor in its example. multiple: as in `Pack`; the tokens that fill it up are a segment
    of their own at the end, of token 0, and nothing reads what is computed of them.
    """
    rows = [example.ids for example in examples]
    segments, row_indices = share_prefixes(rows) if share else _side_by_side(rows)
    if missing := -_tokens(segments) % multiple:
        segments.append(Segment(_tokens(segments), missing, 0))
    ids, positions = [0] * _tokens(segments), [0] * _tokens(segments)
    predict, targets = [], []
    weights: list[float] = []
    for example, indices in zip(examples, row_indices, strict=True):
        for offset, (index, token) in enumerate(zip(indices, example.ids, strict=True)):
            ids[index], positions[index] = token, offset
        for offset in range(len(example.ids) - 1):
            if example.learnt[offset + 1]:
                predict.append(indices[offset])
                targets.append(example.ids[offset + 1])
        weights += example.token_weights
    return Pack(
        ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        predict=torch.tensor(predict, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        segments=tuple(segments),
        rows=tuple(group_segments(segments, device)),
        places=tuple(torch.tensor(indices, device=device) for indices in row_indices),
        example_ids=tuple(example.example_id for example in examples),
        supervised=tuple(example.supervised_tokens for example in examples),
        soft=PackedSoftTargets.of(examples, device),
        multiple=multiple,
    )


def _tokens(segments: Sequence[Segment]) -> int:
    """Return the total length of some segments."""
    return sum(segment.length for segment in segments)


def _side_by_side(rows: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    """Return one root segment per row, and each row's pack indices."""
    segments, row_indices, start = [], [], 0
    for row in rows:
        segments.append(Segment(start, len(row), 0))
        row_indices.append(list(range(start, start + len(row))))
        start += len(row)
    return segments, row_indices


def share_prefixes(rows: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    """Return a forest of segments with shared beginnings once, and each row's pack indices.

    A beginning is shared if several rows have it and it has at least SHARED_TOKENS tokens.

    >>> segments, _ = share_prefixes([[*range(9), 1], [*range(9), 2, 3]])
    >>> [(segment.start, segment.length, segment.first) for segment in segments]
    [(0, 9, 0), (9, 1, 9), (10, 2, 9)]
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [_common(rows[index], rows[next_index]) for index, next_index in zip(order, order[1:], strict=False)]
    segments: list[Segment] = []
    row_indices: list[list[int]] = [[] for _ in rows]
    size = 0
    # (rows order[low:high] that agree up to `depth`; where their next segment begins; its ancestors)
    todo: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, len(order), 0, 0, ())]
    while todo:
        low, high, begin, depth, ancestors = todo.pop()
        if high - low == 1:
            end = len(rows[order[low]])
        else:
            end = min(common[low : high - 1])
            if end == depth:  # the rows differ here: group them by their next token, in order
                cuts = [low, *(cut + 1 for cut in range(low, high - 1) if common[cut] == depth), high]
                groups = list(zip(cuts, cuts[1:], strict=False))
                todo.extend((a, b, begin, depth, ancestors) for a, b in reversed(groups))
                continue
            if end - begin < SHARED_TOKENS:
                todo.append((low, high, begin, end, ancestors))
                continue
        if end > begin:
            for index in order[low:high]:
                row_indices[index].extend(range(size, size + end - begin))
            segments.append(Segment(size, end - begin, begin, ancestors))
            ancestors, size = (*ancestors, len(segments) - 1), size + end - begin
        if high - low > 1:
            todo.append((low, high, end, end, ancestors))
    return segments, row_indices


def _common(row: Sequence[int], other_row: Sequence[int]) -> int:
    """Return the length of the common beginning of two rows."""
    for index, (a, b) in enumerate(zip(row, other_row, strict=False)):
        if a != b:
            return index
    return min(len(row), len(other_row))
