"""Examples -> packs: exact block-diagonal packing without padding and without a (T, T) mask.

In: `Encoded` rows (token ids and which of them are learnt). Out: a `Pack`, one flat row of T tokens; `forward.py` and
`general.py` make losses of it. Examples meet nowhere but in attention, which `attention.py` keeps apart.

With shared prefixes (`share=True`) what several examples begin with stands in the pack once: the pack is then a forest of
segments in which a child goes on at the position where its parent ends. A prefix's activations do not depend on what
follows them, so losses and gradients are those of the plain pack up to the order of sums; the work is that of the
distinct tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sartor.models.attention import Rows, Segment, rows_of

# A shorter common beginning saves less than the extra segment costs.
SHARED_TOKENS = 8


@dataclass(frozen=True)
class Encoded:
    """One example as tokens. `ids`: (T,) token ids; `learnt`: (T,) true where the token is supervised."""

    ids: list[int]
    learnt: list[bool]
    example_id: str = ""
    weight: float = 1.0

    @property
    def supervised_tokens(self) -> int:
        """Tokens that get a loss. The first token of a row has no predecessor and so never counts."""
        return sum(self.learnt[1:])

    @property
    def tokens(self) -> int:
        """T; of a row that is learnt beside another, the tokens of both."""
        return len(self.ids)


@dataclass(frozen=True)
class Pack:
    """T tokens of one or more examples.

    ids, positions: (1, T). predict: (S,) places whose next token is supervised, example by example. targets: (S,) those
    next tokens. weights: (S,) loss weights. segments, rows: who sees whom. places: per example, (length,) where in the
    pack its tokens stand. example_ids: whose tokens these are.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: tuple[Segment, ...]
    rows: tuple[Rows, ...]
    places: tuple[torch.Tensor, ...]
    example_ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[1]

    @property
    def supervised_tokens(self) -> int:
        """S."""
        return self.targets.shape[0]


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group examples, in order, so that no group holds more than `capacity` tokens.

    `lengths` are tokens per example, each in [1, capacity]; returns indices, each exactly once. Order is kept because a
    pack pads nothing: a fuller pack saves no work, and a reordered one would bias which examples share an update.

    >>> fill([3, 5, 2, 4], capacity=8)
    [[0, 1], [2, 3]]
    """
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = capacity
        groups[-1].append(index)
        room -= length
    return groups


def micro_batches(examples: Sequence[Encoded], capacity: int, *, share: bool) -> list[list[Encoded]]:
    """Cut the rows of an update into packs of at most `capacity` tokens (a longer row has one to itself).

    With `share`, rows are ordered so that those with a common beginning meet, and it counts once. The sum over an update
    does not depend on the cut.
    """
    if not share:
        groups = fill([len(example.ids) for example in examples], max(capacity, *(len(example.ids) for example in examples)))
        return [[examples[index] for index in group] for group in groups]
    cut: list[list[Encoded]] = []
    room = 0
    for example in sorted(examples, key=lambda one: one.ids):
        common = _common(cut[-1][-1].ids, example.ids) if cut else 0
        new = len(example.ids) - (common if common >= SHARED_TOKENS else 0)
        if not cut or new > room:
            cut.append([])
            new, room = len(example.ids), max(capacity, len(example.ids))
        cut[-1].append(example)
        room -= new
    return cut


def pack(examples: Sequence[Encoded], device: torch.device | str = "cpu", *, share: bool = False) -> Pack:
    """Lay examples end to end, common beginnings once if `share`. A token's target is its successor in its example."""
    rows = [example.ids for example in examples]
    segments, places = forest(rows) if share else _side_by_side(rows)
    ids, positions = [0] * _tokens(segments), [0] * _tokens(segments)
    predict, targets, weights = [], [], []
    for example, own in zip(examples, places, strict=True):
        for offset, (place, token) in enumerate(zip(own, example.ids, strict=True)):
            ids[place], positions[place] = token, offset
        for offset in range(len(example.ids) - 1):
            if example.learnt[offset + 1]:
                predict.append(own[offset])
                targets.append(example.ids[offset + 1])
                weights.append(example.weight)
    return Pack(
        ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        predict=torch.tensor(predict, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        segments=tuple(segments),
        rows=tuple(rows_of(segments, device)),
        places=tuple(torch.tensor(own, device=device) for own in places),
        example_ids=tuple(example.example_id for example in examples),
    )


def _tokens(segments: Sequence[Segment]) -> int:
    return sum(segment.length for segment in segments)


def _side_by_side(rows: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    segments, places, start = [], [], 0
    for row in rows:
        segments.append(Segment(start, len(row), 0))
        places.append(list(range(start, start + len(row))))
        start += len(row)
    return segments, places


def forest(rows: Sequence[Sequence[int]]) -> tuple[list[Segment], list[list[int]]]:
    """Segments in which a beginning of at least SHARED_TOKENS tokens that several rows share stands once, and each row's
    places in the pack.

    >>> [(segment.start, segment.length, segment.first) for segment in forest([[*range(9), 1], [*range(9), 2, 3]])[0]]
    [(0, 9, 0), (9, 1, 9), (10, 2, 9)]
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [_common(rows[one], rows[other]) for one, other in zip(order, order[1:], strict=False)]
    segments: list[Segment] = []
    places: list[list[int]] = [[] for _ in rows]
    size = 0
    # (rows order[low:high] that agree up to `depth`; where their next segment begins; its ancestors)
    todo: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, len(order), 0, 0, ())]
    while todo:
        low, high, begin, depth, ancestors = todo.pop()
        if high - low == 1:
            end = len(rows[order[low]])
        else:
            end = min(common[low : high - 1])
            if end == depth:  # they part here; rows of one next token stay together, and the first is laid first
                cuts = [low, *(at + 1 for at in range(low, high - 1) if common[at] == depth), high]
                groups = list(zip(cuts, cuts[1:], strict=False))
                todo.extend((a, b, begin, depth, ancestors) for a, b in reversed(groups))
                continue
            if end - begin < SHARED_TOKENS:
                todo.append((low, high, begin, end, ancestors))
                continue
        if end > begin:
            for index in order[low:high]:
                places[index].extend(range(size, size + end - begin))
            segments.append(Segment(size, end - begin, begin, ancestors))
            ancestors, size = (*ancestors, len(segments) - 1), size + end - begin
        if high - low > 1:
            todo.append((low, high, end, end, ancestors))
    return segments, places


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common from the beginning."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
