"""Text base with frozen towers and trained projectors.

    media --tower (frozen, cached by digest)--> (T, W) features --projector--> (T / stack, D) tokens

An adapter is bound to the text base; its `projectors.safetensors` names the towers. So one server on one text base
serves text-only agents beside agents that read images and audio.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sartor.core.errors import ModelError, SourceError
from sartor.core.model_refs import TOWERS_KEY
from sartor.core.records import Part
from sartor.models.base import Base
from sartor.models.media_tokens import MediaEmbedding, content_of, key_of, virtual_ids
from sartor.models.tensor_files import TensorCache
from sartor.models.towers import open_tower
from sartor.models.towers.tower import Tower

FILE = "projectors.safetensors"
# Bytes of features that are cached in memory; others are read from disk or computed again
HELD_BYTES = 1 << 29
# Number of media from which a projector's input is standardised, and the largest distance of a feature from the mean,
# in spreads
CALIBRATED, MOST_SPREADS = 512, 10.0
_REMEDY = "give the directory that `sartor tune` wrote"


@dataclass(frozen=True)
class TowerEntry:
    """Tower as an adapter records it. stack: number of neighbouring features per token."""

    name: str
    digest: str
    licence: str
    width: int
    stack: int


class Projector(torch.nn.Module):
    """Projection of (T, W) features to (ceil(T / stack), D) token embeddings, with fp32 parameters.

    The embeddings have about the root mean square of the text's.
    is_pooled: the first layer's outputs of `stack` neighbours are averaged, as positions of an image can be; otherwise
    the features are concatenated, as moments of a recording must be.
    mean, spread: (W,) of the features of the training media, by which each channel is standardised. So a channel of
    small numbers is learnt as fast as the others (docs/development/log.md).
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int, out: int, stack: int, gain: float, *, is_pooled: bool) -> None:
        super().__init__()
        self.stack, self.width, self.is_pooled = stack, width, is_pooled
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.project_in = torch.nn.Linear(width if is_pooled else stack * width, out)
        self.project_out = torch.nn.Linear(out, out)
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T / stack, D) of features (T, W); `stack` must divide T."""
        x = ((features - self.mean) / self.spread).clamp(-MOST_SPREADS, MOST_SPREADS)
        if self.is_pooled:
            x = F.gelu(self.project_in(x)).unflatten(0, (-1, self.stack)).mean(1)
        else:
            x = F.gelu(self.project_in(x.view(-1, self.stack * self.width)))
        x = self.project_out(x)
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * self.gain


class TowerFeatureCache:
    """Features of media from frozen towers: computed once, cached in memory up to a bound, and on disk if given."""

    def __init__(
        self, towers: Mapping[str, Tower], shelf: TensorCache | None, *, held_bytes: int = HELD_BYTES
    ) -> None:
        self.towers, self.shelf, self._free_bytes = towers, shelf, held_bytes
        self._cached: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._origins: dict[int, tuple[Part, Path | None, str]] = {}
        self.computed = 0

    def key(self, part: Part, folder: Path | None) -> int:
        """Return the key by which `of` finds a media part. Raises SourceError if it cannot be read."""
        content = content_of(part, folder)
        digest = hashlib.sha256(content).hexdigest()
        key = key_of(self.towers[part.kind].digest, digest)
        self._origins[key] = (part, folder, digest)
        if key not in self._cached:
            # computed at once, so that no media file is read twice and none that cannot be decoded gets a key
            self._take(key, content)
        return key

    def of(self, key: int) -> torch.Tensor:
        """Return the features (T, W) of a key, fp16 on the CPU."""
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        return self._take(key, None)

    def kind(self, key: int) -> str:
        """Return the modality of a key."""
        return self._origins[key][0].kind

    def forget(self, key: int) -> None:
        """Remove a media from memory."""
        self._cached.pop(key, None)
        self._origins.pop(key, None)

    def let_go(self) -> None:
        """Release the bytes of all media, since a server receives them with each request. Cached features stay."""
        origins = self._origins
        self._origins = {key: (Part(origins[key][0].kind), None, origins[key][2]) for key in self._cached}

    def _take(self, key: int, content: bytes | None) -> torch.Tensor:
        """Return the features (T, W) of a key from disk or from its tower, and cache them."""
        part, folder, digest = self._origins[key]
        tower = self.towers[part.kind]
        name = hashlib.sha256(f"{tower.digest}:{digest}".encode()).hexdigest()
        raw_features = self.shelf.read(name) if self.shelf else None
        if raw_features is None:
            raw_features = tower.features(content_of(part, folder) if content is None else content)
            self.computed += 1
            if self.shelf:
                self.shelf.write(name, raw_features)
        features: torch.Tensor = raw_features[:]
        # cache them in memory, and evict the least recently used beyond the bound
        self._cached[key] = features
        self._free_bytes -= features.nbytes
        while self._free_bytes < 0 and len(self._cached) > 1:
            self._free_bytes += self._cached.popitem(last=False)[1].nbytes
        return features


class ComposedMedia(torch.nn.Module):
    """Implementation of `media_tokens.Media` by frozen towers and a projector for each."""

    def __init__(self, features: TowerFeatureCache, projectors: Mapping[str, Projector]) -> None:
        super().__init__()
        self.features = features
        self.projectors = torch.nn.ModuleDict(dict(projectors))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Media kinds that the base reads."""
        return tuple(self.projectors)

    def ids(self, part: Part, folder: Path | None) -> list[int]:
        """Return the virtual token ids of one media part. Raises SourceError if it cannot be read."""
        if part.kind not in self.projectors:
            raise SourceError(f"this base reads no {part.kind}", f"base: {{text: ..., {part.kind}: a tower}}")
        key = self.features.key(part, folder)
        return virtual_ids(key, -(-len(self.features.of(key)) // self._projector(part.kind).stack))

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Return the embeddings (T, D) of each key's tokens. All media of a kind are projected in one product."""
        embeddings: dict[int, torch.Tensor] = {}
        for kind in self.projectors:
            kind_keys = [key for key in keys if self.features.kind(key) == kind]
            if not kind_keys:
                continue
            projector = self._projector(kind)
            device, dtype = projector.gain.device, projector.gain.dtype
            parts = []
            for key in kind_keys:
                features = self.features.of(key).to(device, dtype)
                # zero rows up to a length that `stack` divides
                parts.append(F.pad(features, (0, 0, 0, -len(features) % projector.stack)))
            sizes = [len(part) // projector.stack for part in parts]
            embeddings |= dict(zip(kind_keys, projector(torch.cat(parts)).split(sizes), strict=True))
        return [embeddings[key] for key in keys]

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """Return the model's inputs for ids (1, T). The embedding handles virtual ids, and whether they are blank."""
        return {"input_ids": ids}

    def calibrate(self, keys: Sequence[int]) -> None:
        """Set each channel's mean and spread from these media, at most CALIBRATED of each kind."""
        for kind in self.projectors:
            kind_keys = sorted(key for key in set(keys) if self.features.kind(key) == kind)[:CALIBRATED]
            if kind_keys:
                features = torch.cat([self.features.of(key).float() for key in kind_keys])
                projector = self._projector(kind)
                projector.mean.copy_(features.mean(0))
                projector.spread.copy_(features.std(0, correction=0).clamp(min=1e-3))

    def towers(self) -> dict[str, TowerEntry]:
        """Return the towers as an adapter records them, by kind."""
        return {
            kind: TowerEntry(
                name=tower.name,
                digest=tower.digest,
                licence=tower.licence,
                width=tower.width,
                stack=self._projector(kind).stack,
            )
            for kind, tower in self.features.towers.items()
        }

    def tower_fields(self) -> dict[str, dict[str, Any]]:
        """Return the towers as fields of a manifest, by kind."""
        return {kind: asdict(tower) for kind, tower in self.towers().items()}

    def _projector(self, kind: str) -> Projector:
        """Return the projector of a kind."""
        projector = self.projectors[kind]
        assert isinstance(projector, Projector)
        return projector


def open_towers(names: Mapping[str, str], device: torch.device, notice: Callable[[str], object]) -> dict[str, Tower]:
    """Return the towers of these names, by media kind. Raises the errors of `open_tower`."""
    return {
        kind: open_tower(name, "image" if kind == "image" else "audio", device, notice=notice)
        for kind, name in names.items()
    }


def compose_base(base: Base, towers: Mapping[str, Tower], *, shelf: TensorCache | None = None, seed: int = 0) -> Base:
    """Return `base` reading media through `towers` (by kind) and fresh projectors.

    The projectors are drawn from `seed`. The base's model is changed in place: its embedding then accepts virtual ids.
    shelf: cache of features, each of shape (T, W).
    """
    media = new_projectors(base, TowerFeatureCache(dict(towers), shelf), seed)
    base.model.set_input_embeddings(MediaEmbedding(base.model.get_input_embeddings(), media))
    return replace(base, chat=base.chat.with_media(media), media=media)


def new_projectors(base: Base, features: TowerFeatureCache, seed: int) -> ComposedMedia:
    """Return projectors for the towers of `features`, drawn from `seed`.

    Their tokens have the root mean square of the base's own embeddings.
    """
    text = base.model.get_input_embeddings()
    with torch.no_grad():
        sample = text(torch.arange(min(1024, text.weight.shape[0]), device=base.device))
        gain, width = float(sample.float().pow(2).mean().sqrt()), sample.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = {
            kind: Projector(tower.width, width, tower.stack, gain, is_pooled=kind == "image")
            for kind, tower in features.towers.items()
        }
    return ComposedMedia(features, projectors).to(base.device).requires_grad_(False)


def write_projectors(media: ComposedMedia, folder: Path) -> None:
    """Write the projectors' weights, and which towers they read, beside an adapter."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in media.projectors.state_dict().items()}
    metadata = json.dumps(media.tower_fields(), sort_keys=True)
    save_file(tensors, folder / FILE, {TOWERS_KEY: metadata})


def read_towers(folder: Path) -> dict[str, TowerEntry]:
    """Return the towers of the adapter in `folder` by kind; none for a text adapter. Raises ModelError."""
    if not (folder / FILE).is_file():
        return {}
    try:
        with safetensors.safe_open(folder / FILE, "pt") as opened:  # type: ignore[no-untyped-call]
            metadata = opened.metadata() or {}
        if TOWERS_KEY not in metadata:
            raise ModelError(
                f"{folder / FILE} says {sorted(metadata)}; this reads {TOWERS_KEY!r}",
                "sartor tune RECIPE --out ADAPTER --replace",
            )
        return {kind: TowerEntry(**fields) for kind, fields in json.loads(metadata[TOWERS_KEY]).items()}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / FILE} cannot be read: {error}", _REMEDY) from None


def another_tower(folder: Path, entry: TowerEntry) -> ModelError:
    """Return the error for a tower that differs from the one that an adapter was tuned with."""
    problem = (
        f"the adapter {folder} reads with the tower {entry.name!r} {entry.digest[:12]}, and the one here is another"
    )
    return ModelError(problem, "use the tower that it was tuned with")


def load_projectors(media: ComposedMedia, folder: Path) -> None:
    """Load the projectors of the adapter in `folder`. Raises ModelError if they do not fit these towers."""
    for kind, entry in read_towers(folder).items():
        local_entry = media.towers().get(kind)
        if local_entry is None or local_entry.digest != entry.digest:
            raise another_tower(folder, entry)
    tensors = load_file(folder / FILE)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{folder / FILE} holds values that are not finite, in {name}",
                "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4",
            )
    try:
        media.projectors.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(
            f"{folder / FILE} does not fit its towers: {' '.join(str(error).split())[:300]}", _REMEDY
        ) from None
