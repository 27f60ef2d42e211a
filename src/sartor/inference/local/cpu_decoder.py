"""Decoder layers on a CPU by compiled kernels.

Every token is computed by itself, in one order of operations, independent of its neighbours (see decode_kernels.cpp).
Prompts may therefore be read in chunks of any size, and a reply leaves the same bits in the cache as if it were a
prompt.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sartor.core.errors import ModelError
from sartor.inference.local.lora_stacks import ModuleLora, Site, read_pairs
from sartor.inference.local.torch_decoder import Angles, Scores, TokenRun, TorchDecoder, sites_of
from sartor.models import kernels
from sartor.models.kernels import cpu, cpu_forward
from sartor.models.kernels.cpu_forward import PAGE, RANKS, CpuForward, Factor, Layer, Model, Tokens
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses.fused_decoder import DecoderBlock, FusedDecoder
from sartor.models.losses.lora_linear import Projection, Unsupported


@dataclass(frozen=True)
class AdapterTable:
    """Table of one adapter for the kernels: a `Factor` for each linear module of each layer.

    address: of the array of Factors.
    rank: largest padded rank.
    buffers: objects that keep the memory alive.
    bytes: size of the factors.
    """

    address: int = 0
    rank: int = 0
    buffers: Any = None
    bytes: int = 0


class LoraTables:
    """Tables of all adapters by name and slot; slot -1 is the base's, which is empty.

    Ranks and outputs are padded to multiples of RANKS.
    """

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, walker: CpuForward) -> None:
        self._dtype, self._walker = dtype, walker
        self.sites = tuple(sites)
        self._shapes = {module: shape for site in sites for module, shape in _shapes(site).items()}
        self._slots: dict[str, int] = {}
        self._tables: dict[int, AdapterTable] = {-1: AdapterTable()}

    def slot(self, adapter: str) -> int:
        """Return the slot of an adapter; -1 for the base."""
        return self._slots[adapter] if adapter else -1

    def at(self, slot: int) -> AdapterTable:
        """Return the table in a slot."""
        return self._tables[slot]

    def bytes_of(self, adapter: str) -> int:
        """Return the bytes of an adapter."""
        return self._tables[self.slot(adapter)].bytes

    def put(self, adapter: str, path: Path) -> int:
        """Load the PEFT directory `path` under a name; return its bytes. Raises ModelError if it does not fit."""
        return self.add(adapter, read_pairs(path, self._shapes))

    def add(self, adapter: str, pairs: Mapping[str, ModuleLora]) -> int:
        """Add an adapter given as factors by module; return its bytes."""
        slot = next(number for number in range(len(self._tables)) if number not in self._tables)
        self._tables[slot] = self._table_of(pairs)
        self._slots[adapter] = slot
        return self.bytes_of(adapter)

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self._tables[self._slots.pop(adapter)]

    def _table_of(self, pairs: Mapping[str, ModuleLora]) -> AdapterTable:
        ranks = {module: -(-len(pair.a) // RANKS) * RANKS for module, pair in pairs.items()}
        shapes = [(rank, *self._shapes[module]) for module, rank in ranks.items()]
        numbers = cpu_forward.on_wide_pages(
            sum(rank * (_filled(outs) + ins) for rank, outs, ins in shapes), self._dtype
        )
        entries = {module: Factor() for module in self._shapes}
        rest = numbers
        for site in self.sites:
            # in the order in which the kernel reads them: all A of a product, then all B
            tuned = {module: shape for module, shape in _shapes(site).items() if module in pairs}
            for module, (_, ins) in tuned.items():
                a, rest = rest[: ranks[module] * ins].view(-1, ins), rest[ranks[module] * ins :]
                a[: len(pairs[module].a)] = pairs[module].a
                entries[module].a, entries[module].rank = cpu_forward.address(a), ranks[module]
            for module, (outs, _) in tuned.items():
                pair = pairs[module]
                # scale * B, padded with zeros
                b = torch.zeros(_filled(outs), ranks[module])
                b[: len(pair.b), : len(pair.a)] = pair.b.float() * pair.scale
                rest[: b.numel()] = self._walker.laid_out(b).flatten()
                entries[module].b, rest = cpu_forward.address(rest), rest[b.numel() :]
        table = (Factor * len(entries))(*entries.values())
        return AdapterTable(ctypes.addressof(table), max(ranks.values()), (table, numbers), numbers.nbytes)


def _filled(outs: int) -> int:
    return -(-outs // RANKS) * RANKS


def _shapes(site: Site) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of each module of a site."""
    return {
        module: (high - low, site.width) for module, low, high in zip(site.modules, site.low, site.high, strict=True)
    }


# largest size of linear layers that are copied into this process's own memory
MOST_MOVED_BYTES = 1 << 30


class CpuDecoder:
    """Decoder by compiled kernels, with the interface of `torch_decoder.TorchDecoder`.

    Raises NoKernels, with the reason, if the kernels do not support the base or the machine.
    """

    chunk_tokens = 4 * PAGE
    keeps_replies = True

    def __init__(
        self,
        fast: FusedDecoder,
        cache_pages: int,
        angles: Angles,
        names: Mapping[int, str],
        *,
        moves_weights: bool = True,
    ) -> None:
        """Prepare the kernels' tables and an empty cache.

        moves_weights: whether the weights of a small base are copied to huge pages, where they are read faster. False
        while the base is in training, whose own copies would stay beside them.
        """
        self._fast, self._angles = fast, angles
        self.dtype, self.vocabulary = fast.head.dtype, len(fast.head)
        projections = [part for block in fast.blocks for part in _projections(block)]
        _check(fast, projections)
        self._walker = CpuForward(self.dtype, tiles=all(part.modules[0].in_features % 32 == 0 for part in projections))
        if moves_weights:
            _move(fast, projections)
        self._parts = projections
        self.factors = LoraTables(sites_of(projections, names), self.dtype, self._walker)
        self._kinds = sorted({block.rope_kind for block in fast.blocks})
        self.cache_pages, block = cache_pages, fast.blocks[0]
        size = (cache_pages, block.shape.groups, 2 * PAGE * (-(-block.width // 32) * 32))  # room for any layout
        self._caches = [torch.empty(size, dtype=self.dtype) for _ in fast.blocks]
        # values in a page over all groups: at most the room for them
        self._page_numbers = block.shape.groups * self._walker.page_numbers(block.width)
        self._model = self._described()

    def advance(self, runs: Sequence[TokenRun], scored_runs: Sequence[int]) -> Scores:
        """Run the tokens through all layers; return the scores after the last token of each run in `scored_runs`."""
        return self.score(runs, [(index, len(runs[index].ids) - 1) for index in scored_runs])

    @torch.inference_mode()
    def score(self, runs: Sequence[TokenRun], places: Sequence[tuple[int, int]]) -> Scores:
        """Run the tokens through all layers; return the scores after the tokens at `places`.

        places: pairs (index of a run, index in its ids).
        """
        starts = [0] * len(runs)
        # adjacent rows with the same adapter are computed together
        order = sorted(range(len(runs)), key=lambda index: runs[index].slot)
        x, end = self._walked([runs[index] for index in order]), 0
        for index in order:
            starts[index] = end
            end += len(runs[index].ids)
        if not places:
            return Scores(x.new_empty(0, self.vocabulary), [])
        return Scores(
            *self._walker.head(self._model, x[torch.tensor([starts[index] + place for index, place in places])])
        )

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one cache page over another's, in every layer."""
        for cache in self._caches:
            pages = cache.view(-1)[: self.cache_pages * self._page_numbers].view(self.cache_pages, -1)
            pages[target].copy_(pages[source])

    def attach_own(self, adapter: str) -> int:
        """Attach the LoRA factors on the model's own modules, as peft places them; return the number of adapted
        modules.
        """
        pairs: dict[str, ModuleLora] = {}
        for part, site in zip(self._parts, self.factors.sites, strict=True):
            for factors in part.factors:
                module, a, b = site.modules[site.low.index(factors.low)], factors.a.detach(), factors.b.detach()
                if earlier := pairs.get(module):  # PiSSA has two pairs of one scale
                    a, b = torch.cat([earlier.a, a]), torch.cat([earlier.b, b], 1)
                pairs[module] = ModuleLora(a, b, factors.scale)
        self.factors.add(adapter, pairs)
        return len(pairs)

    @torch.inference_mode()
    def hidden(self, run: TokenRun) -> torch.Tensor:
        """Return the hidden states (T, D) of all T tokens of a run, as the LM head reads them."""
        norm = self._fast.norm
        return ReferenceKernels().rms_norm(self._walked([run]), norm.weight, norm.eps, norm.offset)[0]

    def _walked(self, runs: Sequence[TokenRun]) -> torch.Tensor:
        """Return the hidden states (T, D) of the tokens of all runs, one run after the other."""
        ids = torch.tensor([token for run in runs for token in run.ids])
        ends = [run.first + len(run.ids) for run in runs]
        max_pages = -(-max(ends) // PAGE)
        positions = torch.tensor(
            [position for run, end in zip(runs, ends, strict=True) for position in range(run.first, end)]
        )
        tables = [[*run.pages[:max_pages], *[0] * (max_pages - len(run.pages))] for run in runs]
        rows = [index for index, run in enumerate(runs) for _ in run.ids]
        adapter_tables = [self.factors.at(run.slot) for run in runs]
        turns = [self._angles.turns(kind, max(ends)) for kind in self._kinds]
        x, start = self._fast.embed(ids.clamp(min=0)).float(), 0
        for run in runs:
            if run.media is not None:
                # rounded like text embeddings, so that the cache holds what the model itself would compute
                x[start + run.media[0]] = run.media[1].to(self.dtype).float()
            start += len(run.ids)
        tokens = Tokens(
            x=x,
            positions=positions,
            pages=torch.tensor(tables),
            rows=torch.tensor(rows),
            factors=torch.tensor([adapter_tables[row].address for row in rows]),
            rank=max(adapter_table.rank for adapter_table in adapter_tables),
            turns=[(turn.cos, turn.sin) for turn in turns],
        )
        self._walker.walk(self._model, tokens)
        return tokens.x

    def _described(self) -> Model:
        fast, block = self._fast, self._fast.blocks[0]
        layers = (Layer * len(fast.blocks))(
            *(self._layer(block, cache) for block, cache in zip(fast.blocks, self._caches, strict=True))
        )
        self._layers = layers
        rotary = self._angles.turns(self._kinds[0], 1).cos.shape[1]
        return Model(
            layers=len(layers),
            width=fast.head.shape[1],
            heads=block.shape.heads,
            groups=block.shape.groups,
            head=block.width,
            rotary=rotary,
            gelu=block.activation != "silu",
            vocabulary=self.vocabulary,
            scale=block.shape.scale,
            cap=block.shape.softcap or 0.0,
            eps=fast.norm.eps,
            offset=fast.norm.offset,
            head_cap=fast.softcap or 0.0,
            layer=layers,
            norm=cpu_forward.address(fast.norm.weight),
            lm_head=cpu_forward.address(fast.head),
        )

    def _layer(self, block: DecoderBlock, cache: torch.Tensor) -> Layer:
        products = []
        for part in _projections(block):
            weights, biases = [m.weight.detach() for m in part.modules], [m.bias for m in part.modules]
            products.append(cpu_forward.product(weights, biases))
        heads = [] if block.head_norms is None else block.head_norms.norms
        return Layer(
            norm=cpu_forward.address(block.norm.weight),
            mlp_norm=cpu_forward.address(block.mlp_norm.weight),
            after=cpu_forward.pair([n.weight for n in block.post_norms]),
            head_norms=cpu_forward.pair([n.weight for n in heads]),
            products=(cpu_forward.Product * 4)(*products),
            cache=cpu_forward.address(cache),
            turns=self._kinds.index(block.rope_kind),
            window=block.shape.window or 0,
        )


def _projections(block: DecoderBlock) -> tuple[Projection, ...]:
    return block.attention_in, block.attention_out, block.mlp_in, block.mlp_out


def _move(fast: FusedDecoder, projections: Sequence[Projection]) -> None:
    """Copy the weights of a small base to huge pages.

    A large base stays memory-mapped, so that the processes that serve it share the memory.
    """
    modules = [module for part in projections for module in part.modules]
    if sum(module.weight.nbytes for module in modules) > MOST_MOVED_BYTES:
        return
    numbers = cpu_forward.on_wide_pages(sum(module.weight.numel() for module in modules), fast.head.dtype)
    start = 0
    for module in modules:
        size = module.weight.numel()
        module.weight.data = numbers[start : start + size].view_as(module.weight).copy_(module.weight)
        start += size
    head = cpu_forward.on_wide_pages(fast.head.numel(), fast.head.dtype).view_as(fast.head)
    fast.head = head.copy_(fast.head)


def _check(fast: FusedDecoder, projections: Sequence[Projection]) -> None:
    """Raise NoKernels for a base that decode_kernels.cpp does not support."""
    norms = [fast.norm]
    sizes = set()
    for block in fast.blocks:
        norms += [block.norm, block.mlp_norm, *block.post_norms]
        if block.head_norms is not None:
            norms += block.head_norms.norms
        shape = block.shape
        outs = tuple(len(module.weight) for part in _projections(block) for module in part.modules)
        sizes.add((block.width, shape.heads, shape.groups, shape.scale, shape.softcap, block.activation, outs))
    tensors = [fast.head, *(norm.weight for norm in norms), *(m.weight for part in projections for m in part.modules)]
    reasons = {
        "quantised weights": any(part.is_narrow for part in projections),
        "weights of unlike dtypes": any(tensor.dtype != fast.head.dtype for tensor in tensors),
        "weights that are no plain rows": not all(tensor.is_contiguous() for tensor in tensors),
        "norms of unlike epsilons": len({(norm.eps, norm.offset) for norm in norms}) > 1,
        "layers of unlike sizes": len(sizes) > 1,
    }
    if problems := [reason for reason, is_so in reasons.items() if is_so]:
        raise cpu.NoKernels(f"the base has {problems[0]}")


def open_blocks(model: Any, cache_pages: int, context_tokens: int) -> TorchDecoder | CpuDecoder:
    """Return the fastest decoder that supports a base.

    Raises ModelError for an architecture that `fused_decoder.py` does not support.
    """
    try:
        fast = FusedDecoder(model, kernels.choose_kernels(model.device)[0])
        angles = Angles(fast, model.config, context_tokens)
    except Unsupported as error:
        raise ModelError(
            f"the engine cannot serve this base: {error}", "engine: {kind: llamacpp} or {kind: openai}"
        ) from None
    try:
        return _compiled(model, fast, cache_pages, angles)
    except cpu.NoKernels:
        return TorchDecoder(fast, cache_pages, angles, _names(model))


def open_compiled(
    model: Any, cache_pages: int, context_tokens: int, *, moves_weights: bool = True
) -> CpuDecoder | None:
    """Return the compiled decoder of a model without PEFT's wrapper, or None.

    None means that the kernels do not support the base, the adapter or the machine.
    """
    try:
        fast = FusedDecoder(model, kernels.choose_kernels(model.device)[0])
        angles = Angles(fast, model.config, context_tokens)
        return _compiled(model, fast, cache_pages, angles, moves_weights=moves_weights)
    except (cpu.NoKernels, Unsupported):
        return None


def _compiled(
    model: Any, fast: FusedDecoder, cache_pages: int, angles: Angles, *, moves_weights: bool = True
) -> CpuDecoder:
    """Return the compiled decoder. Raises NoKernels, with the reason, if base or machine are not supported."""
    if model.device.type != "cpu":
        raise cpu.NoKernels("they are for CPUs")
    if problem := difference(fast.head.dtype):
        raise cpu.NoKernels(f"they are wrong on this machine: {problem}")
    return CpuDecoder(fast, cache_pages, angles, _names(model), moves_weights=moves_weights)


def _names(model: Any) -> dict[int, str]:
    """Return the names of the base's modules by id, whether or not peft has wrapped them."""
    return {id(module): name.removesuffix(".base_layer") for name, module in model.named_modules()}


@functools.cache
def difference(dtype: torch.dtype) -> str:
    """Return how the compiled kernels differ from torch on a tiny base with an adapter; empty if they agree.

    The relative error of the logits, |actual - expected| / |expected|, must stay below 1e-4 in fp32 and 0.05
    otherwise.
    """
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()
        names = {id(module): name for name, module in model.named_modules()}
        fast = FusedDecoder(model, ReferenceKernels())
        angles = Angles(fast, config, 128)
        pairs = {
            "model.layers.0.self_attn.q_proj": ModuleLora(torch.randn(3, 64), torch.randn(64, 3), 0.1),
            "model.layers.1.mlp.down_proj": ModuleLora(torch.randn(18, 96), torch.randn(64, 18), 0.1),
        }
        # TorchDecoder last: it may reorder the weights
        actual, expected = (_few(kind(fast, 4, angles, names), pairs) for kind in (CpuDecoder, TorchDecoder))
    finally:
        torch.set_rng_state(state)
    deviation = float((actual - expected).norm() / expected.norm())
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    return "" if deviation < allowed else f"logits are {deviation:.2g} apart"


def _few(blocks: TorchDecoder | CpuDecoder, pairs: Mapping[str, ModuleLora]) -> torch.Tensor:
    """Return the logits (4, V) after two prompts and after one more token of each.

    The first prompt is read in two parts and has an adapter.
    """
    blocks.factors.add("a", pairs)
    slot = blocks.factors.slot("a")
    ids = [index * 7 % 50 for index in range(90)]
    blocks.advance([TokenRun(ids[:64], 0, (0, 1), slot)], [])
    prompt_scores = blocks.advance([TokenRun(ids[64:], 64, (0, 1), slot), TokenRun(ids[:9], 0, (2,), -1)], [0, 1])
    reply_scores = blocks.advance(
        [TokenRun([3], 90, (0, 1), slot, newest=True), TokenRun([4], 9, (2,), -1, newest=True)], [0, 1]
    )
    return torch.cat([prompt_scores.logits, reply_scores.logits]).float()
