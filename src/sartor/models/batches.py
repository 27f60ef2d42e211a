"""Examples -> packs -> loss: exact block-diagonal packing without padding and without a (T, T) mask.

In: `Encoded` rows (token ids and which of them are learnt). Out: a `Pack`, one flat row of T tokens, and its loss, for
which only supervised rows reach the LM head. Examples meet nowhere but in attention, which `attention.py` keeps apart.

With shared prefixes (`share=True`) what several examples begin with stands in the pack once: the pack is then a forest of
segments in which a child goes on at the position where its parent ends. A prefix's activations do not depend on what
follows them, so losses and gradients are those of the plain pack up to the order of sums; the work is that of the
distinct tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from sartor.models.attention import Rows, Segment, packing, rows_of
from sartor.models.media import own_inputs
from sartor.models.native.media import native_media
from sartor.models.native.replies import is_plain

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
    """Whether `packed` (rows -> (S,) losses) gives what the model gives for single rows, and the largest difference.

    Two short rows and the longest are packed (windows and chunks show in long rows alone). Their losses must be those of
    the plain pass, up to what reordered sums cost at the model's precision; and must not move when only the tokens of the
    row before them change. The second is the sharper test: in bf16 a leak can be smaller than the rounding. A model with
    state outside attention (convolutions, recurrences), or that drops unknown keyword arguments, fails one of them. Any
    exception of the packed pass counts as "no": another path then serves.
    """
    rows = sorted((example for example in examples if example.supervised_tokens), key=lambda example: len(example.ids))
    few = [*rows[:2], *rows[-1:]]
    if not any(token < 0 for row in few for token in row.ids):  # what a model does with media shows in a row that has some
        few += [row for row in rows if any(token < 0 for token in row.ids)][:1]
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
    apart = (plain - behind[own:]).abs()
    difference, spread = float(apart.max()), float(apart.pow(2).mean().sqrt())
    leak = float((behind[own:] - behind_other[own:]).abs().max())
    low_precision = model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
    if low_precision:  # rounding alone is 0.1 nats in the root mean square, and 1 for one token in hundreds (docs/log.md)
        return leak <= 1e-3 and spread <= 0.2 and difference <= 3.0, max(difference, leak)
    return leak <= 1e-6 and difference <= 1e-3, max(difference, leak)
