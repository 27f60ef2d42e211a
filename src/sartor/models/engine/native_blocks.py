"""A base's blocks on a CPU by `kernels/serving.cpp`: weights where they stand, one call for all layers.

Every token is computed by itself, in one order, whatever is computed beside it (see serving.cpp). So prompts may be read in
chunks of any size, and what a reply left in the cache has the bits that it would have as a prompt.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sartor.core.errors import ModelError
from sartor.models import kernels
from sartor.models.engine.blocks import Angles, Blocks, Run, Scores, sites_of
from sartor.models.engine.factors import Pair, Site, read_pairs
from sartor.models.forward import Block, Fast, Norm
from sartor.models.kernels import native, walk
from sartor.models.kernels.walk import PAGE, RANKS, Factor, Layer, Model, Tokens, Walker
from sartor.models.linear import Projection, Unsupported

# Of the linear layers of a base that is copied into memory of the process's own
MOST_MOVED_BYTES = 1 << 30


class NativeBlocks:
    """See `blocks.Blocks`. Raises NoKernels, with the reason, where the base or the machine is not one for this."""

    chunk_tokens = 4 * PAGE
    keeps_replies = True

    def __init__(self, fast: Fast, cache_pages: int, angles: Angles, names: Mapping[int, str]) -> None:
        self._fast, self._angles = fast, angles
        self.dtype, self.vocabulary = fast.head.dtype, len(fast.head)
        projections = [part for block in fast.blocks for part in _projections(block)]
        self._walker = Walker(self.dtype, tiles=all(part.modules[0].in_features % 32 == 0 for part in projections))
        _check(fast, projections)
        _move(fast, projections)
        self.factors = OwnFactors(sites_of(projections, names), self.dtype)
        self._kinds = sorted({block.rope_kind for block in fast.blocks})
        block = fast.blocks[0]
        padded = -(-block.width // 16) * 16
        size = (cache_pages, block.shape.groups, PAGE * (block.width + padded))
        self._caches = [torch.empty(size, dtype=self.dtype) for _ in fast.blocks]
        self._model = self._described()

    @torch.inference_mode()
    def advance(self, runs: Sequence[Run], wanted: Sequence[int]) -> Scores:
        """See `blocks.Blocks`."""
        last = [0] * len(runs)
        # neighbours with one adapter are computed together
        order = sorted(range(len(runs)), key=lambda place: runs[place].slot)
        x, end = self._walked([runs[place] for place in order]), 0
        for place in order:
            end += len(runs[place].ids)
            last[place] = end - 1
        if not wanted:
            return Scores(x.new_empty(0, self.vocabulary), [])
        return Scores(*self._walker.head(self._model, x[torch.tensor([last[place] for place in wanted])]))

    @torch.inference_mode()
    def hidden(self, run: Run) -> torch.Tensor:
        """See `blocks.Blocks`."""
        return self._fast.norm.forward(self._walked([run]))[0]

    def _walked(self, runs: Sequence[Run]) -> torch.Tensor:
        """(T, D) hidden states of all runs' tokens, one run after the other."""
        ids = torch.tensor([token for run in runs for token in run.ids])
        ends = [run.first + len(run.ids) for run in runs]
        reach = -(-max(ends) // PAGE)
        positions = torch.tensor([position for run, end in zip(runs, ends, strict=True) for position in range(run.first, end)])
        tables = [[*run.pages[:reach], *[0] * (reach - len(run.pages))] for run in runs]
        rows = [place for place, run in enumerate(runs) for _ in run.ids]
        sheets = [self.factors.sheets[run.slot] if run.slot >= 0 else None for run in runs]
        addresses = [ctypes.addressof(sheet.table) if sheet is not None else 0 for sheet in sheets]
        turns = [self._angles.turns(kind, max(ends)) for kind in self._kinds]
        tokens = Tokens(
            x=self._fast.embed(ids).float(),
            positions=positions,
            pages=torch.tensor(tables),
            rows=torch.tensor(rows),
            factors=torch.tensor([addresses[row] for row in rows]),
            rank=max((sheet.rank for sheet in sheets if sheet is not None), default=0),
            turns=[(turn.cos, turn.sin) for turn in turns],
        )
        self._walker.walk(self._model, tokens)
        return tokens.x

    def _described(self) -> Model:
        fast, block = self._fast, self._fast.blocks[0]
        layers = (Layer * len(fast.blocks))(
            *(self._layer(block, cache) for block, cache in zip(fast.blocks, self._caches, strict=True))
        )
        self._held = layers
        rotary = self._angles.turns(self._kinds[0], 1).cos.shape[1]
        return Model(
            len(layers), fast.head.shape[1], block.shape.heads, block.shape.groups, block.width, rotary,
            block.activation != "silu", self.vocabulary, block.shape.scale, block.shape.softcap or 0.0, fast.norm.eps,
            fast.norm.offset, fast.softcap or 0.0, layers, walk.address(fast.norm.weight), walk.address(fast.head),
        )  # fmt: skip

    def _layer(self, block: Block, cache: torch.Tensor) -> Layer:
        products = [
            walk.product([m.weight.detach() for m in part.modules], [m.bias for m in part.modules])
            for part in _projections(block)
        ]
        heads = [] if block.head_norms is None else block.head_norms.norms
        return Layer(
            walk.address(block.norm.weight), walk.address(block.mlp_norm.weight), walk.pair([n.weight for n in block.after]),
            walk.pair([n.weight for n in heads]), (walk.Product * 4)(*products), walk.address(cache),
            self._kinds.index(block.rope_kind), block.shape.window or 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """One adapter: an entry for each linear module of each layer, and the tensor that they point into."""

    table: Any
    numbers: torch.Tensor
    rank: int


class OwnFactors:
    """Every adapter for itself, its ranks filled up to multiples of RANKS."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shapes = {
            module: (high - low, site.width)
            for site in sites
            for module, low, high in zip(site.modules, site.low, site.high, strict=True)
        }
        self._slots: dict[str, int] = {}
        self.sheets: dict[int, Sheet] = {}

    def slot(self, adapter: str) -> int:
        """Where an adapter stands; -1 for the base."""
        return self._slots[adapter] if adapter else -1

    def bytes_of(self, adapter: str) -> int:
        """What an adapter takes."""
        return self.sheets[self._slots[adapter]].numbers.nbytes if adapter else 0

    def put(self, adapter: str, path: Path) -> int:
        """Load the PEFT directory `path` under a name; returns its bytes. Raises ModelError when it does not fit."""
        pairs = read_pairs(path, self._shapes)
        slot = next(number for number in range(len(self.sheets) + 1) if number not in self.sheets)
        self.sheets[slot] = self._sheet(pairs)
        self._slots[adapter] = slot
        return self.bytes_of(adapter)

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self.sheets[self._slots.pop(adapter)]

    def _sheet(self, pairs: Mapping[str, Pair]) -> Sheet:
        ranks = {module: -(-len(pair.a) // RANKS) * RANKS for module, pair in pairs.items()}
        sizes = [ranks.get(module, 0) * (outs + ins) for module, (outs, ins) in self._shapes.items()]
        # tiles read 32 inputs of a factor of rank 16: what stands behind the last must be numbers too
        numbers = walk.on_wide_pages(sum(sizes) + 64, self._dtype)
        table = (Factor * len(self._shapes))()
        at = 0
        for entry, (module, (outs, ins)) in zip(table, self._shapes.items(), strict=True):
            if (pair := pairs.get(module)) is None:
                continue
            rank = ranks[module]
            a = numbers[at : at + rank * ins].view(rank, ins)
            b = numbers[at + rank * ins : at + rank * (ins + outs)].view(outs, rank)
            a[: len(pair.a)] = pair.a
            b[:, : len(pair.a)] = pair.b.float() * pair.scale
            entry.a, entry.b, entry.rank = walk.address(a), walk.address(b), rank
            at += rank * (ins + outs)
        return Sheet(table, numbers, max(ranks.values()))


def _projections(block: Block) -> tuple[Projection, ...]:
    return block.attention_in, block.attention_out, block.mlp_in, block.mlp_out


def _move(fast: Fast, projections: Sequence[Projection]) -> None:
    """Put the weights of a small base on wide pages. A large one stays mapped, so that the processes that serve it share it."""
    modules = [module for part in projections for module in part.modules]
    if sum(module.weight.nbytes for module in modules) > MOST_MOVED_BYTES:
        return
    numbers = walk.on_wide_pages(sum(module.weight.numel() for module in modules), fast.head.dtype)
    at = 0
    for module in modules:
        size = module.weight.numel()
        module.weight.data = numbers[at : at + size].view_as(module.weight).copy_(module.weight)
        at += size
    head = walk.on_wide_pages(fast.head.numel(), fast.head.dtype).view_as(fast.head)
    fast.head = head.copy_(fast.head)


def _check(fast: Fast, projections: Sequence[Projection]) -> None:
    """Raise NoKernels for what serving.cpp does not compute."""
    norms = [fast.norm, *(norm for block in fast.blocks for norm in _norms(block))]
    tensors = [fast.head, *(norm.weight for norm in norms), *(m.weight for part in projections for m in part.modules)]
    reasons = {
        "quantised weights": any(part.is_quantised for part in projections),
        "weights of unlike dtypes": any(tensor.dtype != fast.head.dtype for tensor in tensors),
        "weights that are no plain rows": not all(tensor.is_contiguous() for tensor in tensors),
        "norms of unlike epsilons": len({(norm.eps, norm.offset) for norm in norms}) > 1,
        "layers of unlike sizes": len({_sizes(block) for block in fast.blocks}) > 1,
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise native.NoKernels(f"the base has {found[0]}")


def _norms(block: Block) -> list[Norm]:
    return [block.norm, block.mlp_norm, *block.after, *(block.head_norms.norms if block.head_norms else ())]


def _sizes(block: Block) -> tuple[Any, ...]:
    shape = block.shape
    outs = tuple(len(module.weight) for part in _projections(block) for module in part.modules)
    return (block.width, shape.heads, shape.groups, shape.scale, shape.softcap, block.activation, outs)


def open_blocks(model: Any, cache_pages: int, context_tokens: int) -> Blocks | NativeBlocks:
    """The fastest that is right for a base. Raises ModelError for an architecture that `forward.py` does not know."""
    names = {id(module): name for name, module in model.named_modules()}
    try:
        fast = Fast(model, kernels.choose(model.device)[0])
        angles = Angles(fast, model.config, context_tokens)
    except Unsupported as why:
        raise ModelError(f"the engine cannot serve this base: {why}", "engine: {kind: llamacpp} or {kind: openai}") from None
    try:
        if model.device.type == "cpu":
            return NativeBlocks(fast, cache_pages, angles, names)
    except native.NoKernels:
        pass
    return Blocks(fast, cache_pages, angles, names)
