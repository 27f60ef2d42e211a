"""Frozen encoders of pictures and recordings: `open_tower`. Their contract: `contract.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sartor.core import model_refs
from sartor.core.model_refs import Modality
from sartor.models.device import best_device
from sartor.models.towers import efficientnet, vision, whisper
from sartor.models.towers.contract import Tower


def open_tower(
    name: str, kind: Modality, device: torch.device | None = None, *, notice: Callable[[str], object] = lambda line: None
) -> Tower:
    """The tower of that kind that `name` means, in memory, frozen. An asset's is fetched and converted first, once.

    Raises ModelError for what holds no tower of that kind that is known here, HubError when a hub name cannot be fetched,
    AssetError when an asset cannot be. `notice` is told what takes long.
    """
    ref = model_refs.locate_tower(name, kind)
    device = device or best_device()
    if ref.model == efficientnet.NAME:
        return efficientnet.open_efficientnet(ref, device, notice)
    if ref.modality == "audio":
        return whisper.open_whisper(ref, device, notice)
    return vision.VisionTower(ref, device)
