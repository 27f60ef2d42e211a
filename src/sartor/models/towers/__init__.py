"""Frozen encoders of pictures and recordings: `open_tower`. Their contract: `contract.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sartor.core import towers
from sartor.models.base import best_device
from sartor.models.towers import efficientnet, vision, whisper
from sartor.models.towers.contract import Tower


def open_tower(
    name: str, device: torch.device | None = None, *, licence: str = "", notice: Callable[[str], object] = lambda line: None
) -> Tower:
    """The tower that `name` means, in memory, frozen. An asset's is fetched and converted first, once.

    Raises ModelError for what holds no tower that is known here, HubError when a hub name cannot be fetched, AssetError when
    an asset cannot be. `notice` is told what takes long.
    """
    ref = towers.locate(name, licence)
    device = device or best_device()
    if ref.kind == efficientnet.NAME:
        return efficientnet.open_efficientnet(ref, device, notice)
    if ref.modality == "audio":
        return whisper.open_whisper(ref, device, notice)
    return vision.VisionTower(ref, device)
