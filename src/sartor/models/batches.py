"""Examples -> packs -> loss: exact block-diagonal packing without padding and without a (T, T) mask.

In: `Encoded` rows (token ids and which of them are learnt). Out: a `Pack`, one flat row of T tokens in which every
example starts at position 0 and sees only itself, and its loss, for which only supervised rows reach the LM head.

Attention is the one place where the examples of a pack must not meet. `packed_attention` is registered with transformers
under the name `sartor_packed`: it gathers the flat (T, ...) queries, keys and values into groups of rows of about equal
length, does plain causal attention there, and scatters back. So the cost is that of the examples, not of the pack, and
any architecture whose attention goes through transformers' AttentionInterface packs exactly. Whether one does is
measured, not assumed: see `packs_exactly`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

IGNORED = -100
# Above this row length torch's blocked kernel beats batched matrix products and keeps memory linear in the length.
BLOCKED_ATTENTION_TOKENS = 512


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
class Rows:
    """Segments of a pack that attend together: `gather` (N, L) indices into the pack, `scatter` positions to read back.

    `scatter` (S,) indexes the flattened (N * L) result; `into` (S,) are the same tokens' positions in the pack.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    into: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """T tokens of one or more examples.

    ids, positions: (1, T). predict: (S,) positions whose next token is supervised. targets: (S,) those next tokens.
    weights: (S,) loss weights. rows: how attention regroups them. example_ids: whose tokens these are.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rows: tuple[Rows, ...]
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


def pack(examples: Sequence[Encoded], device: torch.device | str = "cpu") -> Pack:
    """Lay examples end to end. A token's target is its successor within the same example."""
    ids = [token for example in examples for token in example.ids]
    positions = [position for example in examples for position in range(len(example.ids))]
    predict, targets, weights, start = [], [], [], 0
    for example in examples:
        for offset in range(len(example.ids) - 1):
            if example.learnt[offset + 1]:
                predict.append(start + offset)
                targets.append(example.ids[offset + 1])
                weights.append(example.weight)
        start += len(example.ids)
    return Pack(
        ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        predict=torch.tensor(predict, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        rows=tuple(_rows([len(example.ids) for example in examples], device)),
        example_ids=tuple(example.example_id for example in examples),
    )


def _rows(lengths: Sequence[int], device: torch.device | str) -> Iterator[Rows]:
    """Group segments whose lengths are within a factor of two: padding inside attention stays under half."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while by_length:
        longest = lengths[by_length[0]]
        group = [index for index in by_length if lengths[index] * 2 > longest]
        by_length = by_length[len(group) :]
        offsets = torch.arange(longest)
        first = torch.tensor([starts[index] for index in group])[:, None]
        length = torch.tensor([lengths[index] for index in group])[:, None]
        real = (offsets < length).flatten()
        # Padding repeats a row's last token: it sits after every real query, so the causal mask hides it.
        gather = first + torch.minimum(offsets, length - 1)
        yield Rows(
            gather=gather.to(device),
            scatter=real.nonzero().flatten().to(device),
            into=gather.flatten()[real].to(device),
        )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which each segment of a pack sees only itself.

    query: (1, H, T, K); key, value: (1, G, T, K) with H a multiple of G. Returns ((1, T, H, K), None), as transformers'
    attention functions do. `options` are theirs: scaling, softcap, sliding_window, dropout, and our `rows`.
    """
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for rows in options["rows"]:
        mixed = _attend(query[0], key[0], value[0], rows, options)
        out = out.index_copy(0, rows.into, mixed)
    return out[None], None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, options: dict[str, Any]) -> torch.Tensor:
    """Attention of one group of rows: query (H, T, K), key and value (G, T, K) -> (S, H, K)."""
    count, length = rows.gather.shape
    heads, groups, width = query.shape[0], key.shape[0], value.shape[2]
    flat = rows.gather.flatten()
    q, k, v = (x.index_select(1, flat).view(x.shape[0], count, length, x.shape[2]) for x in (query, key, value))
    scale = options.get("scaling") or query.shape[2] ** -0.5
    softcap, window = options.get("softcap"), options.get("sliding_window")
    dropout = options.get("dropout") or 0.0
    if length > BLOCKED_ATTENTION_TOKENS and not softcap and not window:
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1).repeat_interleave(heads // groups, 1),
            v.transpose(0, 1).repeat_interleave(heads // groups, 1),
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
        ).transpose(0, 1)
    else:
        # (G, H/G * L, K) x (G, K, L): one product per key head, no copy of the keys per query head
        fold = (groups, heads // groups, count, length)
        q = q.view(*fold, -1).transpose(1, 2).reshape(groups * count, heads // groups * length, -1)
        scores = (q * scale) @ k.reshape(groups * count, length, -1).transpose(1, 2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.view(groups * count, heads // groups, length, length)
        scores = scores.masked_fill(_hidden(length, window, scores.device), torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype), dropout)
        mixed = weights.view(groups * count, -1, length) @ v.reshape(groups * count, length, width)
        mixed = mixed.view(groups, count, heads // groups, length, width).transpose(1, 2)
    return mixed.reshape(heads, count * length, width).index_select(1, rows.scatter).transpose(0, 1)


def _hidden(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(L, L) true where a query (row) must not see a key (column): the future, or beyond the sliding window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance < 0) | (distance >= window) if window else distance < 0


AttentionInterface.register("sartor_packed", packed_attention)


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """Inside, `model` attends within segments (and makes no mask of its own); after, as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sartor_packed")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    return F.cross_entropy(_at_least_fp32(logits), batch.targets, reduction="none")


def row_losses(model: Any, examples: Sequence[Encoded], device: torch.device | str) -> torch.Tensor:
    """What `pack_losses` gives, one example at a time through the model's own attention: slow, and right for any model."""
    losses = []
    for example in examples:
        batch = pack([example], device)
        if batch.supervised_tokens:
            logits = model(input_ids=batch.ids, use_cache=False).logits[0]
            losses.append(F.cross_entropy(_at_least_fp32(logits[batch.predict]), batch.targets, reduction="none"))
    return torch.cat(losses) if losses else torch.zeros(0, device=device)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def packs_exactly(model: Any, examples: Sequence[Encoded], device: torch.device | str) -> tuple[bool, float]:
    """Whether this model's packed losses equal its unpacked ones, and the largest difference in nats.

    Two short rows and the longest are packed (windows and chunks show in long rows alone). Their losses must be those of
    the plain pass, up to what reordered sums cost at the model's precision; and must not move when only the tokens of the
    row before them change. The second is the sharper test: in bf16 a leak can be smaller than the rounding. A model with
    state outside attention (convolutions, recurrences), or that drops unknown keyword arguments, fails one of them. Any
    exception of the packed pass counts as "no": the plain path then serves.
    """
    rows = sorted((example for example in examples if example.supervised_tokens), key=lambda example: len(example.ids))
    few = [*rows[:2], *rows[-1:]]
    if not few:
        return True, 0.0  # nothing is supervised, so nothing can leak
    plain = row_losses(model, few, device)
    other = replace(few[0], ids=few[0].ids[::-1])
    try:
        with packing(model):
            behind, behind_other = (pack_losses(model, pack([first, *few], device)) for first in (few[0], other))
    except Exception:  # each architecture fails in its own way, and each failure is an answer
        return False, float("inf")
    own = few[0].supervised_tokens
    difference = float((plain - behind[own:]).abs().max())
    leak = float((behind[own:] - behind_other[own:]).abs().max())
    low_precision = model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
    is_exact = leak <= (1e-3 if low_precision else 1e-6) and difference <= (0.25 if low_precision else 1e-3)
    return is_exact, max(difference, leak)
