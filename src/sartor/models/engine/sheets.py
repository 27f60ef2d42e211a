"""LoRA factors as `kernels/serving.cpp` reads them: every adapter for itself, in one piece of memory, with a table into it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sartor.models.engine.factors import Pair, Site, read_pairs
from sartor.models.kernels import cpu_forward
from sartor.models.kernels.cpu_forward import RANKS, Factor, Walker


@dataclass(frozen=True)
class Sheet:
    """One adapter: an array of `Factor`, for each linear module of each layer, and the numbers that it points to."""

    address: int = 0
    rank: int = 0
    held: Any = None
    bytes: int = 0


class Sheets:
    """Every adapter by its name and its slot; -1 is the base's, which has none. Ranks are filled up to multiples of RANKS."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, walker: Walker) -> None:
        self._dtype, self._walker = dtype, walker
        self._sites = tuple(sites)
        self._shapes = {module: shape for site in sites for module, shape in _shapes(site).items()}
        self._slots: dict[str, int] = {}
        self._sheets: dict[int, Sheet] = {-1: Sheet()}

    def slot(self, adapter: str) -> int:
        """Where an adapter stands; -1 for the base."""
        return self._slots[adapter] if adapter else -1

    def at(self, slot: int) -> Sheet:
        """What stands in a slot."""
        return self._sheets[slot]

    def bytes_of(self, adapter: str) -> int:
        """What an adapter takes."""
        return self._sheets[self.slot(adapter)].bytes

    def put(self, adapter: str, path: Path) -> int:
        """Load the PEFT directory `path` under a name; returns its bytes. Raises ModelError when it does not fit."""
        return self.add(adapter, read_pairs(path, self._shapes))

    def add(self, adapter: str, pairs: Mapping[str, Pair]) -> int:
        """The same for factors by module."""
        slot = next(number for number in range(len(self._sheets)) if number not in self._sheets)
        self._sheets[slot] = self._sheet(pairs)
        self._slots[adapter] = slot
        return self.bytes_of(adapter)

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self._sheets[self._slots.pop(adapter)]

    def _sheet(self, pairs: Mapping[str, Pair]) -> Sheet:
        ranks = {module: -(-len(pair.a) // RANKS) * RANKS for module, pair in pairs.items()}
        shapes = [(rank, *self._shapes[module]) for module, rank in ranks.items()]
        numbers = cpu_forward.on_wide_pages(sum(rank * (_filled(outs) + ins) for rank, outs, ins in shapes), self._dtype)
        entries = {module: Factor() for module in self._shapes}
        rest = numbers
        for site in self._sites:
            # in the order in which they are read: all A of a product, then all B
            tuned = {module: shape for module, shape in _shapes(site).items() if module in pairs}
            for module, (_, ins) in tuned.items():
                a, rest = rest[: ranks[module] * ins].view(-1, ins), rest[ranks[module] * ins :]
                a[: len(pairs[module].a)] = pairs[module].a
                entries[module].a, entries[module].rank = cpu_forward.address(a), ranks[module]
            for module, (outs, _) in tuned.items():
                size = ranks[module] * _filled(outs)
                rest[:size] = self._walker.laid_out(_padded(pairs[module], _filled(outs), ranks[module])).flatten()
                entries[module].b, rest = cpu_forward.address(rest), rest[size:]
        table = (Factor * len(entries))(*entries.values())
        return Sheet(ctypes.addressof(table), max(ranks.values()), (table, numbers), numbers.nbytes)


def _filled(outs: int) -> int:
    return -(-outs // RANKS) * RANKS


def _padded(pair: Pair, outs: int, rank: int) -> torch.Tensor:
    """(outs, rank) scaled B, filled up with zeros."""
    b = torch.zeros(outs, rank)
    b[: len(pair.b), : len(pair.a)] = pair.b.float() * pair.scale
    return b


def _shapes(site: Site) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of its modules."""
    return {module: (high - low, site.width) for module, low, high in zip(site.modules, site.low, site.high, strict=True)}
