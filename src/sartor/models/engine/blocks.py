"""A base's blocks as serving computes them: prompts in chunks, newest tokens in blocks of rows, both with many adapters.

The architecture is read by `models/forward.py` (a family is a line in its table); what differs here is the cache and that every
row may have factors of its own. What makes a row's numbers independent of its neighbours:

- a chunk of a prompt is computed by itself, and where chunks begin depends on that prompt alone;
- newest tokens are computed in blocks of exactly BLOCK_ROWS rows, filled up with padding, so a matrix product has one shape
  whatever the number of rows; it takes the sum over the inputs of each output of each row in the same order;
- attention and LoRA are computed row by row.

It holds in fp32 and in bf16, since it is a matter of order and not of precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from sartor.core.errors import ModelError
from sartor.models import kernels
from sartor.models.engine.factors import Factors, Site
from sartor.models.engine.pages import PAGE_TOKENS
from sartor.models.forward import Block, Fast
from sartor.models.kernels import serving
from sartor.models.kernels.serving import Cache, Looks, Turns
from sartor.models.linear import Projection, Unsupported

BLOCK_ROWS = 16
# Rotary embeddings whose angles depend on the length of the text cannot be tabled
_MOVING_ROPE = ("dynamic", "longrope")

Linear = Callable[[torch.Tensor], torch.Tensor]
Adapt = Callable[[int, torch.Tensor, torch.Tensor], None]
Mix = Callable[[int, Block, torch.Tensor], torch.Tensor]


class Blocks:
    """The base in memory, its adapters and the cache. `cache_pages` pages of PAGE_TOKENS tokens.

    Raises ModelError for an architecture that `forward.py` does not know.
    """

    def __init__(self, model: Any, cache_pages: int, context_tokens: int) -> None:
        chosen, _ = kernels.choose(model.device)
        try:
            self._fast = Fast(model, chosen)
            turns = {block.rope_kind: self._turns(block.rope_kind, model, context_tokens) for block in self._fast.blocks}
        except Unsupported as why:
            raise ModelError(
                f"the engine cannot serve this base: {why}", "engine: {kind: llamacpp} or {kind: openai}"
            ) from None
        self.device, self.dtype = model.device, self._fast.head.dtype
        self._turns_by_kind = turns
        self._serving = serving.choose(self.device, self.dtype)
        names = {id(module): name for name, module in model.named_modules()}
        projections = [
            part
            for block in self._fast.blocks
            for part in (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out)
        ]
        self.factors = Factors([_site(part, names) for part in projections], self.dtype, self.device)
        self._linears = [linear(part) for part in projections]
        self._head = packed(self._fast.head, None)
        self.vocabulary = len(self._fast.head)
        self._caches = [self._cache(block, cache_pages) for block in self._fast.blocks]

    def _turns(self, kind: str, model: Any, positions: int) -> Turns:
        if (model.config.rope_parameters or {}).get("rope_type") in _MOVING_ROPE:
            raise Unsupported("rotary embeddings that change with the length of the text")
        like = torch.empty(0, dtype=torch.float32, device=model.device)
        places = torch.arange(positions, device=model.device)[None]
        cos, sin = self._fast.rope(like, places, *((kind,) if kind else ()))
        return Turns(cos[0].float().contiguous(), sin[0].float().contiguous())

    def _cache(self, block: Block, pages: int) -> Cache:
        shape = (pages, block.shape.groups, PAGE_TOKENS, block.width)
        return Cache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    @torch.inference_mode()
    def read(self, ids: Sequence[int], first: int, pages: Sequence[int], slot: int, *, all_rows: bool = False) -> torch.Tensor:
        """A chunk of one prompt: T ids from position `first` on -> normed hidden states, (1, D) or (T, D) of all."""
        x = self._fast.embed(torch.tensor(ids, device=self.device))
        table = torch.tensor(pages[: (first + len(ids) - 1) // PAGE_TOKENS + 1], device=self.device)

        def mix(place: int, block: Block, qkv: torch.Tensor) -> torch.Tensor:
            turns = self._turns_by_kind[block.rope_kind]
            return self._serving.attend_row(qkv, self._caches[place], table, first, block.shape, turns)

        def adapt(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
            self._adapt_chunk(site, y, x, slot)

        for place in range(len(self._fast.blocks)):
            last = place == len(self._fast.blocks) - 1 and not all_rows
            x = self._block(place, x, mix, adapt if slot >= 0 else _leave, only_last=last)
        return self._fast.norm.forward(x)[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, D) hidden state of a prompt's last token -> (1, V)."""
        return self._capped(self._head(_filled(hidden))[: len(hidden)])

    @torch.inference_mode()
    def decode(
        self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]], slots: Sequence[int]
    ) -> torch.Tensor:
        """The newest token of each of N rows -> logits (N, V) of what comes next."""
        cuts = [slice(start, start + BLOCK_ROWS) for start in range(0, len(ids), BLOCK_ROWS)]
        parts = [self._decode_block(ids[cut], positions[cut], pages[cut], slots[cut]) for cut in cuts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode_block(
        self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]], slots: Sequence[int]
    ) -> torch.Tensor:
        spare = BLOCK_ROWS - len(ids)
        most = max(len(row) for row in pages)
        table = torch.tensor([[*row, *[0] * (most - len(row))] for row in pages] + [[0] * most] * spare, device=self.device)
        looks = Looks(table, torch.tensor([*positions, *[-1] * spare], device=self.device))
        own = torch.tensor([*slots, *[-1] * spare], device=self.device)
        x = self._fast.embed(torch.tensor([*ids, *[0] * spare], device=self.device))

        def mix(place: int, block: Block, qkv: torch.Tensor) -> torch.Tensor:
            turns = self._turns_by_kind[block.rope_kind]
            return self._serving.attend(qkv, self._caches[place], looks, block.shape, turns)

        def adapt(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
            self._serving.adapt(y, x, self.factors.stacks[site], own)

        for place in range(len(self._fast.blocks)):
            x = self._block(place, x, mix, adapt if max(slots) >= 0 else _leave)
        return self._capped(self._head(self._fast.norm.forward(x)[0]))[: len(ids)]

    def _block(self, place: int, x: torch.Tensor, mix: Mix, adapt: Adapt, *, only_last: bool = False) -> torch.Tensor:
        """One layer. only_last: nothing reads the other rows of its result."""
        block, site = self._fast.blocks[place], 4 * place
        qkv = self._product(site, block.norm.forward(x)[0], adapt)
        if block.head_norms is not None:
            qkv = block.head_norms.forward(qkv)
        mixed = mix(place, block, qkv)
        if only_last:
            mixed, x = mixed[-1:], x[-1:]
        x = x + self._after(block, 0, self._product(site + 1, mixed, adapt))
        gate_up = self._product(site + 2, block.mlp_norm.forward(x)[0], adapt)
        return x + self._after(block, 1, self._product(site + 3, block.kernels.glu(gate_up, block.activation), adapt))

    def _product(self, site: int, x: torch.Tensor, adapt: Adapt) -> torch.Tensor:
        y = self._linears[site](x)
        adapt(site, y, x)
        return y

    @staticmethod
    def _after(block: Block, place: int, y: torch.Tensor) -> torch.Tensor:
        return block.after[place].forward(y)[0] if block.after else y

    def _adapt_chunk(self, site: int, y: torch.Tensor, x: torch.Tensor, slot: int) -> None:
        """y (T, O) += scale x A^T B^T of one adapter."""
        stack = self.factors.stacks[site]
        low = x @ stack.a[slot].T
        for place, rank in enumerate(stack.ranks):
            scale = float(stack.scales[slot, place])
            if rank and scale:
                b = stack.b[slot, stack.module_b(place)].view(rank, -1)
                y[:, stack.low[place] : stack.high[place]].addmm_(low[:, stack.module_a(place)], b, alpha=scale)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self._fast.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _leave(site: int, y: torch.Tensor, x: torch.Tensor) -> None:
    """No row has an adapter."""


def _filled(x: torch.Tensor) -> torch.Tensor:
    """x (N, D) with rows of zeros up to BLOCK_ROWS."""
    return torch.cat([x, x.new_zeros(BLOCK_ROWS - len(x), x.shape[1])])


def _site(part: Projection, names: dict[int, str]) -> Site:
    lows, low = [], 0
    for module in part.modules:
        lows.append(low)
        low += module.out_features
    highs = (*lows[1:], low)
    return Site(part.modules[0].in_features, tuple(names[id(m)] for m in part.modules), tuple(lows), highs)


def linear(part: Projection) -> Linear:
    """x (N, D) -> x W^T + bias. A dense W on a CPU is laid out anew for its products, and the module's own is let go."""
    if part.is_quantised:
        return lambda x: F.linear(x, part.weight(), part.bias)
    weight = part.weight()
    if weight.device.type == "cpu":
        part.release()
    return packed(weight, part.bias)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """x (N, D) -> x W^T + bias, W in oneDNN's own order where it has one: plain weights would be reordered at every call."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or weight.dtype == torch.float64:
        return lambda x: F.linear(x, weight, bias)
    try:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK_ROWS)
    except RuntimeError:  # bf16 on a processor without AVX-512
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")
