"""What the frozen layers below the lowest adapted one make of a row, computed once and kept on disk for later epochs.

Rows are laid into packs of about PACK_TOKENS once, in an order that depends on the rows alone, and a pack is computed and
stored as a whole: a row's activations then have the same bits whoever asked first, so a killed and resumed run ends as an
uninterrupted one does. A pack's name is the digest of the base, the layer, the arithmetic and the tokens, so another run on
the same base and rows (another rate, another rank) finds them; what another version's arithmetic made is computed anew
(`shelf.py`). Files live below SARTOR_HOME/activations, the least recently used go first when the limit is reached; rows
that the limit has no room for are computed with each update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sartor.models.batches import Encoded, Pack, fill, pack
from sartor.models.forward import Fast
from sartor.models.shelf import SCHEMA, Shelf

PACK_TOKENS = 2048


@dataclass
class Part:
    """One stored pack: its rows, their places in it, its name on the shelf, and its tensor, opened when it is first needed."""

    rows: list[Encoded]
    places: dict[tuple[int, ...], slice]
    name: str
    hidden: Any = None


@dataclass
class Frozen:
    """A bounded cache of frozen activations on disk for one model and its rows."""

    fast: Fast
    device: torch.device
    shelf: Shelf
    identity: str
    parts: dict[tuple[int, ...], Part] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0

    def plan(self, rows: Sequence[Encoded]) -> None:
        """Lay `rows` into packs, as many as the limit holds."""
        unlike = {tuple(row.ids): row for row in rows}
        ordered = [unlike[ids] for ids in sorted(unlike)]  # neighbours share beginnings
        lengths = [len(row.ids) for row in ordered]
        room = self.shelf.limit_bytes
        for group in fill(lengths, max(PACK_TOKENS, *lengths)) if lengths else []:
            room -= sum(lengths[index] for index in group) * self._token_bytes
            if room < 0:
                left = len(ordered) - len(self.parts)
                self.shelf.notice(
                    f"compute.cache_gb holds {len(self.parts):,} rows' frozen activations; {left:,} are computed anew"
                )
                break
            self._add([ordered[index] for index in group])

    @property
    def _token_bytes(self) -> int:
        return int(self.fast.head.shape[1] * self.fast.head.element_size())

    def _add(self, rows: list[Encoded]) -> None:
        ends, places = 0, {}
        for row in rows:
            places[tuple(row.ids)] = slice(ends, ends + len(row.ids))
            ends += len(row.ids)
        said = (
            SCHEMA, self.identity, self.fast.lowest, str(self.fast.head.dtype), self.fast.kernels.name, torch.__version__,
            torch.get_num_threads(), list(places),
        )  # fmt: skip
        name = hashlib.sha256(repr(said).encode()).hexdigest()
        self.shelf.keep(name)
        self.parts.update(dict.fromkeys(places, Part(rows, places, name)))

    def inputs(self, rows: Sequence[Encoded], batch: Pack) -> torch.Tensor:
        """(T, D) input of the lowest adapted layer for a pack of `rows`. Call under no_grad."""
        x = torch.empty(batch.tokens, self.fast.head.shape[1], dtype=self.fast.head.dtype, device=self.device)
        unknown = [place for place, row in enumerate(rows) if tuple(row.ids) not in self.parts]
        for row, places in zip(rows, batch.places, strict=True):
            ids = tuple(row.ids)
            if ids in self.parts:
                part = self.parts[ids]
                x[places] = self._hidden(part)[part.places[ids]].to(self.device)
        if unknown:
            own = pack([rows[place] for place in unknown], self.device, share=True)
            made = self._compute(own)
            for place, places in zip(unknown, own.places, strict=True):
                x[batch.places[place]] = made[places]
        return x

    def _compute(self, batch: Pack) -> torch.Tensor:
        return self.fast.frozen(self.fast.embed(batch.ids[0]), self.fast.geometries(batch))

    def _hidden(self, part: Part) -> Any:
        """A part's activations, (tokens, D), row by row, as something that can be sliced."""
        if part.hidden is None:
            shape = (sum(len(row.ids) for row in part.rows), self.fast.head.shape[1])
            part.hidden = self.shelf.read(part.name, shape)
            self.reused += part.hidden is not None
        if part.hidden is None:
            batch = pack(part.rows, self.device, share=True)
            made = self._compute(batch)[torch.cat(batch.places)].cpu()
            self.computed += 1
            part.hidden = self.shelf.write(part.name, made)
        return part.hidden
