"""Decoder layers in torch over a paged cache.

`models/losses/fused_decoder.py` reads the architecture (a family is one entry of its table). Here the cache is paged,
and every row may have its own LoRA factors. A row's results are independent of its neighbours for these reasons:

- A chunk of a prompt is computed by itself, and its boundaries depend only on that prompt.
- Newest tokens are computed in blocks of exactly BLOCK_ROWS rows, padded if necessary. A matrix product then has one
  shape for any number of rows, and sums over the inputs in the same order for each output of each row.
- Attention and LoRA are computed row by row.

This holds in fp32 and in bf16: it depends on the order of operations, not on precision.

In 16 bits, the low-rank term of each row is computed first and the frozen product is accumulated onto it
(models/losses/lora_linear.py gives the reason). Rows without an adapter accumulate onto zeros, so that their product
is the same. The residual stream is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sartor.inference.local.kv_cache import PAGE_TOKENS
from sartor.inference.local.lora_stacks import LoraStacks, Site
from sartor.models.kernels.reference import Cache, PagedKernels, PageTable, ReferenceKernels, RotaryTable
from sartor.models.losses.fused_decoder import DecoderBlock, FusedDecoder, Norm
from sartor.models.losses.lora_linear import Projection, Unsupported, rounds

BLOCK_ROWS = 16
# rotary embeddings whose angles depend on the length of the text, so that they cannot be tabulated
_MOVING_ROPE = {"dynamic", "longrope"}
_FIRST_ANGLES = 1024

Linear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Adapt = Callable[[int, torch.Tensor, torch.Tensor], None]
Mix = Callable[[int, DecoderBlock, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """Logits for the next token of N rows.

    logits: (N, V).
    likeliest: N indices of the largest logit; -1 if a row's largest logit is not finite.
    """

    logits: torch.Tensor
    likeliest: list[int]

    def row(self, index: int) -> Scores:
        """Return the scores of one row."""
        return Scores(self.logits[index : index + 1], self.likeliest[index : index + 1])


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one row.

    first: position of `ids[0]`.
    pages: cache pages of the row.
    slot: its adapter's slot; -1 for the base.
    newest: whether it is the single newest token of a reply.
    media: (indices (M,) among `ids`, embeddings (M, D)) of media; None without any.
    """

    ids: Sequence[int]
    first: int
    pages: Sequence[int]
    slot: int
    newest: bool = False
    media: tuple[torch.Tensor, torch.Tensor] | None = None


class Angles:
    """Tables of rotary embeddings by position, extended on demand.

    Raises Unsupported if the angles depend on the length of the text.
    """

    def __init__(self, fast: FusedDecoder, config: Any, max_positions: int) -> None:
        rope_parameters = config.rope_parameters or {}
        if {
            rope_parameters.get("rope_type"),
            *(part.get("rope_type") for part in rope_parameters.values() if isinstance(part, dict)),
        } & _MOVING_ROPE:
            raise Unsupported("rotary embeddings that change with the length of the text")
        self._fast, self._max_positions = fast, max_positions
        self._tables: dict[str, RotaryTable] = {}

    def turns(self, kind: str, end: int) -> RotaryTable:
        """Return the table for a kind of layer, at least up to position `end` - 1."""
        result = self._tables.get(kind)
        if result is None or len(result.cos) < end:
            table_length = min(max(2 * end, _FIRST_ANGLES), max(self._max_positions, end))
            head = self._fast.head
            like, positions = (
                head.new_empty(0, dtype=torch.float32),
                torch.arange(table_length, device=head.device)[None],
            )
            cos, sin = self._fast.rope(like, positions, *((kind,) if kind else ()))
            result = self._tables[kind] = RotaryTable(cos[0].float().contiguous(), sin[0].float().contiguous())
        return result


class TorchDecoder:
    """Base in memory, its adapters and a cache of `cache_pages` pages of PAGE_TOKENS tokens.

    chunk_tokens: prompt tokens read at once; chunks begin at its multiples.
    keeps_replies: whether decoding leaves the same bits in the cache as reading a prompt, so that a later prompt can
        reuse the pages of a reply.
    """

    chunk_tokens = PAGE_TOKENS
    keeps_replies = False

    def __init__(self, fast: FusedDecoder, cache_pages: int, angles: Angles, names: Mapping[int, str]) -> None:
        self._fast, self._angles = fast, angles
        self.device, self.dtype = fast.head.device, fast.head.dtype
        self._residual_dtype = torch.promote_types(self.dtype, torch.float32)
        self._serving = PagedKernels()
        projections = [
            part
            for block in self._fast.blocks
            for part in (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)
        ]
        self.factors = LoraStacks(sites_of(projections, names), self.dtype, self.device)
        self._linears = [linear(part) for part in projections]
        self._head = packed(self._fast.head, None)
        self.vocabulary = len(self._fast.head)
        self._caches = []
        for block in self._fast.blocks:
            shape = (cache_pages, block.shape.groups, PAGE_TOKENS, block.width)
            # not zeroed: unwritten memory is then not allocated by the system, and no row reads what it did not write
            keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self._caches.append(Cache(keys, values))

    @torch.inference_mode()
    def advance(self, runs: Sequence[TokenRun], scored_runs: Sequence[int]) -> Scores:
        """Run the tokens through all layers; return the scores after the last token of each scored run.

        scored_runs: indices of runs; the scores are in this order.
        """
        scores_by_run: dict[int, Scores] = {}
        for index, run in enumerate(runs):
            if not run.newest:
                x = self._read(run)
                scores_by_run |= {index: self._scores(x[-1:])} if index in scored_runs else {}
        newest = [index for index, run in enumerate(runs) if run.newest]
        for start in range(0, len(newest), BLOCK_ROWS):
            block = newest[start : start + BLOCK_ROWS]
            scores = self._scores(self._decoded([runs[index] for index in block]))
            scores_by_run |= {index: scores.row(row) for row, index in enumerate(block)}
        if not scored_runs:
            return Scores(torch.empty(0, self.vocabulary), [])
        logits = torch.cat([scores_by_run[index].logits for index in scored_runs])
        return Scores(logits, [scores_by_run[index].likeliest[0] for index in scored_runs])

    @torch.inference_mode()
    def hidden(self, run: TokenRun) -> torch.Tensor:
        """Return the hidden states (T, D) of all T tokens of a run, as the LM head reads them."""
        return self._normed(self._fast.norm, self._read(run, all_rows=True))

    def _scores(self, x: torch.Tensor) -> Scores:
        """Return the scores of hidden states x (N, D), N at most BLOCK_ROWS."""
        hidden = self._normed(self._fast.norm, x)
        padded = torch.cat([hidden, hidden.new_zeros(BLOCK_ROWS - len(x), x.shape[1])])
        logits = self._logits(padded)[: len(x)]
        # soft cap c: z = c tanh(z / c)
        logits = logits if self._fast.softcap is None else self._fast.softcap * torch.tanh(logits / self._fast.softcap)
        values, token_ids = logits.max(-1)
        return Scores(logits, torch.where(torch.isfinite(values), token_ids, -1).tolist())

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) of hidden states (N, D), in fp32 at least.

        A bf16 logit near 16 is a multiple of 1/8. In 16 bits the rounding error is recovered by a second product: z =
        r(H W^T) + r(H W^T - r(H W^T)), where r rounds to the dtype and the sum is in fp32.
        """
        logits = self._head(hidden, None)
        return logits.float() + self._head(hidden, -logits).float() if rounds(self.dtype) else logits

    def _read(self, run: TokenRun, *, all_rows: bool = False) -> torch.Tensor:
        """Read a chunk of one prompt; return the last hidden state (1, D), or those of all tokens (T, D)."""
        ids, first, pages, slot = run.ids, run.first, run.pages, run.slot
        x = self._fast.embed(torch.tensor(list(ids), device=self.device).clamp(min=0))
        if run.media is not None:
            x = x.index_copy(0, run.media[0], run.media[1].to(x.dtype))
        x = x.to(self._residual_dtype)
        table = torch.tensor(list(pages[: (first + len(ids) - 1) // PAGE_TOKENS + 1]), device=self.device)

        def mix(index: int, block: DecoderBlock, qkv: torch.Tensor) -> torch.Tensor:
            rotary = self._angles.turns(block.rope_kind, first + len(ids))
            return self._serving.attend_row(qkv, self._caches[index], table, first, block.shape, rotary)

        def adapt(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
            self._adapt_chunk(site, y, x, slot)

        for index in range(len(self._fast.blocks)):
            last = index == len(self._fast.blocks) - 1 and not all_rows
            x = self._block(index, x, mix, adapt if slot >= 0 else _no_adapter, only_last=last)
        return x

    def _decoded(self, runs: Sequence[TokenRun]) -> torch.Tensor:
        """Return the hidden states (N, D) of the newest tokens of N rows, N at most BLOCK_ROWS."""
        ids, positions = [run.ids[0] for run in runs], [run.first for run in runs]
        pages, slots = [run.pages for run in runs], [run.slot for run in runs]
        padding_rows = BLOCK_ROWS - len(ids)
        max_pages = max(len(row) for row in pages)
        table = torch.tensor(
            [[*row, *[0] * (max_pages - len(row))] for row in pages] + [[0] * max_pages] * padding_rows,
            device=self.device,
        )
        page_table = PageTable(table, torch.tensor([*positions, *[-1] * padding_rows], device=self.device))
        row_slots = torch.tensor([*slots, *[-1] * padding_rows], device=self.device)
        x = self._fast.embed(torch.tensor([*ids, *[0] * padding_rows], device=self.device)).to(self._residual_dtype)

        def mix(index: int, block: DecoderBlock, qkv: torch.Tensor) -> torch.Tensor:
            rotary = self._angles.turns(block.rope_kind, max(positions) + 1)
            return self._serving.attend(qkv, self._caches[index], page_table, block.shape, rotary)

        def adapt(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
            self._serving.adapt(y, x, self.factors.stacks[site], row_slots)

        for index in range(len(self._fast.blocks)):
            x = self._block(index, x, mix, adapt if max(slots) >= 0 else _no_adapter)
        return x[: len(ids)]

    def _block(self, index: int, x: torch.Tensor, mix: Mix, adapt: Adapt, *, only_last: bool = False) -> torch.Tensor:
        """Return the output (N, D) of one layer for the residual stream x (N, D).

        only_last: compute only the last row, (1, D), since nothing reads the others.
        """
        block, site = self._fast.blocks[index], 4 * index
        # x' = x + post(O attend(QKV norm(x)));  x'' = x' + post(Down glu(GateUp norm(x')))
        qkv = self._product(site, self._normed(block.norm, x), adapt)
        if block.head_norms is not None:
            qkv = block.head_norms.forward(qkv)
        mixed = mix(index, block, qkv)
        if only_last:
            mixed, x = mixed[-1:], x[-1:]
        x = x + self._after(block, 0, self._product(site + 1, mixed, adapt))
        gate_up = self._product(site + 2, self._normed(block.mlp_norm, x), adapt)
        return x + self._after(block, 1, self._product(site + 3, block.kernels.glu(gate_up, block.activation), adapt))

    def _product(self, site: int, x: torch.Tensor, adapt: Adapt) -> torch.Tensor:
        """Return x W^T + bias + each row's low-rank term, (N, O), for x (N, D)."""
        if not rounds(self.dtype):
            y = self._linears[site](x, None)
            adapt(site, y, x)
            return y
        low_rank = x.new_zeros(len(x), self.factors.sites[site].high[-1])
        adapt(site, low_rank, x)
        return self._linears[site](x, low_rank)

    def _normed(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of the residual stream x (N, D), in the dtype of the products that read it."""
        if x.dtype == self.dtype:
            return norm.forward(x)[0]
        return ReferenceKernels().rms_norm(x, norm.weight, norm.eps, norm.offset)[0].to(self.dtype)

    @staticmethod
    def _after(block: DecoderBlock, index: int, y: torch.Tensor) -> torch.Tensor:
        return block.post_norms[index].forward(y)[0] if block.post_norms else y

    def _adapt_chunk(self, site: int, y: torch.Tensor, x: torch.Tensor, slot: int) -> None:
        """Add the low-rank term of one adapter in place: y += scale (x A^T) B^T, for x (T, D) and y (T, O)."""
        stack = self.factors.stacks[site]
        low = x @ stack.a[slot].T
        for index, rank in enumerate(stack.ranks):
            scale = float(stack.scales[slot, index])
            if rank and scale:
                b = stack.b[slot, stack.module_b(index)].view(rank, -1)
                y[:, stack.low[index] : stack.high[index]].addmm_(low[:, stack.module_a(index)], b, alpha=scale)


def _no_adapter(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
    """Do nothing: no row has an adapter."""


def sites_of(projections: Sequence[Projection], names: Mapping[int, str]) -> list[Site]:
    """Return the sites at which adapters may have factors.

    names: of the base's modules, by id.
    """
    return [_site(part, names) for part in projections]


def _site(part: Projection, names: Mapping[int, str]) -> Site:
    lows, low = [], 0
    for module in part.modules:
        lows.append(low)
        low += module.out_features
    highs = (*lows[1:], low)
    return Site(part.modules[0].in_features, tuple(names[id(m)] for m in part.modules), tuple(lows), highs)


def linear(part: Projection) -> Linear:
    """Return the function (x (N, D), onto) -> x W^T + bias, of shape (N, O).

    The result is added to `onto` (N, O), unless that is None, and rounded once. A dense W on a CPU is reordered for
    its products, and the module's own copy is released.
    """
    if part.is_narrow:
        return lambda x, onto: _plain(x, part.weight(), part.bias, onto)
    weight = part.weight()
    if weight.device.type == "cpu":
        part.release()
    return packed(weight, part.bias)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return the function of `linear` for a weight (O, D) and bias (O,).

    W is stored in oneDNN's own order where it has one: a plain weight would be reordered at every call.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.dtype == torch.float64:
        return lambda x, onto: _plain(x, weight, bias, onto)
    try:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK_ROWS)
    except RuntimeError:  # bf16 on a processor without AVX-512
        return lambda x, onto: _plain(x, weight, bias, onto)

    def product(x: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        if onto is None:
            return torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, onto, ordered, bias, "add")

    return product


def _plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, onto: torch.Tensor | None
) -> torch.Tensor:
    if onto is None:
        return F.linear(x, weight, bias)
    y = onto.addmm_(x, weight.T)
    return y if bias is None else y.add_(bias)
