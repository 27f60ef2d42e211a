"""What the frozen layers below the lowest adapted one make of a row, computed once and kept on disk for later epochs.

Rows are laid into packs of about PACK_TOKENS once, in an order that depends on the rows alone, and a pack is computed and
stored as a whole: a row's activations then have the same bits whoever asked first, so a killed and resumed run ends as an
uninterrupted one does. A pack's name is the digest of the base, the layer, the arithmetic and the tokens, so another run on
the same base and rows (another rate, another rank) finds them. Files live below SARTOR_HOME/activations, the least
recently used go first when the limit is reached; rows that the limit has no room for are computed with each update.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from sartor.models.batches import Encoded, Pack, fill, pack
from sartor.models.forward import Fast

PACK_TOKENS = 2048
SCHEMA = 1


@dataclass
class Shelf:
    """One stored pack: its rows, their places in it, and the file, opened when it is first needed."""

    rows: list[Encoded]
    places: dict[tuple[int, ...], slice]
    file: Path
    hidden: Any = None


@dataclass
class Frozen:
    """A bounded cache of frozen activations on disk for one model and its rows."""

    fast: Fast
    device: torch.device
    store: Path
    identity: str
    limit_bytes: int
    notice: Callable[[str], object] = lambda line: None
    shelves: dict[tuple[int, ...], Shelf] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0

    def plan(self, rows: Sequence[Encoded]) -> None:
        """Lay `rows` into packs, as many as the limit holds."""
        unlike = {tuple(row.ids): row for row in rows}
        ordered = [unlike[ids] for ids in sorted(unlike)]  # neighbours share beginnings
        lengths = [len(row.ids) for row in ordered]
        room = self.limit_bytes
        for group in fill(lengths, max(PACK_TOKENS, *lengths)) if lengths else []:
            room -= sum(lengths[index] for index in group) * self._token_bytes
            if room < 0:
                left = len(ordered) - len(self.shelves)
                self.notice(
                    f"compute.cache_gb holds {len(self.shelves):,} rows' frozen activations; {left:,} are computed anew"
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
        shelf = Shelf(rows, places, self.store / name[:2] / f"{name}.safetensors")
        self.shelves.update(dict.fromkeys(places, shelf))

    def inputs(self, rows: Sequence[Encoded], batch: Pack) -> torch.Tensor:
        """(T, D) input of the lowest adapted layer for a pack of `rows`. Call under no_grad."""
        x = torch.empty(batch.tokens, self.fast.head.shape[1], dtype=self.fast.head.dtype, device=self.device)
        unknown = [place for place, row in enumerate(rows) if tuple(row.ids) not in self.shelves]
        for row, places in zip(rows, batch.places, strict=True):
            ids = tuple(row.ids)
            if ids in self.shelves:
                shelf = self.shelves[ids]
                x[places] = self._hidden(shelf)[shelf.places[ids]].to(self.device)
        if unknown:
            own = pack([rows[place] for place in unknown], self.device, share=True)
            made = self._compute(own)
            for place, places in zip(unknown, own.places, strict=True):
                x[batch.places[place]] = made[places]
        return x

    def _compute(self, batch: Pack) -> torch.Tensor:
        return self.fast.frozen(self.fast.embed(batch.ids[0]), self.fast.geometries(batch))

    def _hidden(self, shelf: Shelf) -> Any:
        """A shelf's activations, (tokens, D), row by row, as something that can be sliced."""
        if shelf.hidden is None:
            shelf.hidden = self._read(shelf)
            self.reused += shelf.hidden is not None
        if shelf.hidden is None:
            batch = pack(shelf.rows, self.device, share=True)
            made = self._compute(batch)[torch.cat(batch.places)].cpu()
            self.computed += 1
            shelf.hidden = self._write(shelf, made)
        return shelf.hidden

    def _read(self, shelf: Shelf) -> Any:
        """A stored pack, mapped into memory; None if it is not there or not whole."""
        with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError, ValueError):
            opened: Any = safetensors.safe_open(str(shelf.file), "pt")
            whole = opened.get_tensor("hidden")
            expected = (sum(len(row.ids) for row in shelf.rows), self.fast.head.shape[1])
            if tuple(whole.shape) == expected and (opened.metadata() or {}).get("sha256") == _digest(whole):
                os.utime(shelf.file)
                return opened.get_slice("hidden")
        return None

    def _write(self, shelf: Shelf, made: torch.Tensor) -> Any:
        """Store a pack under its name, atomically. A full disk ends the caching, not the run."""
        content = save({"hidden": made}, {"schema": str(SCHEMA), "sha256": _digest(made)})
        part = shelf.file.with_name(f".{shelf.file.name}.part-{os.getpid()}")
        try:
            shelf.file.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            part.write_bytes(content)
            os.replace(part, shelf.file)
        except OSError as error:
            part.unlink(missing_ok=True)
            self.notice(f"frozen activations could not be stored ({error.strerror}); this pack is held in memory")
            return made
        opened: Any = safetensors.safe_open(str(shelf.file), "pt")
        return opened.get_slice("hidden")

    def _make_room(self, wanted: int) -> None:
        """Remove the least recently used packs of other runs until `wanted` bytes more are within the limit."""
        own = {shelf.file for shelf in self.shelves.values()}
        files = [(stat.st_mtime, stat.st_size, file) for file, stat in _stored(self.store)]
        total = sum(size for _, size, _ in files) + wanted
        for _, size, file in sorted(files, key=lambda entry: entry[0]):
            if total <= self.limit_bytes:
                return
            if file not in own:
                file.unlink(missing_ok=True)
                total -= size


def _stored(store: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for file in store.glob("*/*.safetensors"):
        with contextlib.suppress(OSError):
            found.append((file, file.stat()))
    return found


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
