"""Frozen encoders of images and audio, opened by name. `tower.py` defines their protocol."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sartor.core import model_refs
from sartor.core.model_refs import Modality
from sartor.models.hardware import best_device
from sartor.models.towers import audio_towers, vision_towers
from sartor.models.towers.tower import Tower


def open_tower(
    name: str,
    kind: Modality,
    device: torch.device | None = None,
    *,
    notice: Callable[[str], object] = lambda line: None,
) -> Tower:
    """Return the tower of that kind that `name` denotes, in memory, frozen.

    An asset's tower is fetched and converted first, once. Raises ModelError if `name` holds no supported tower of that
    kind, HubError when a hub name cannot be fetched, AssetError when an asset cannot be. `notice` is called with a
    line of text before a long step.
    """
    ref = model_refs.locate_tower(name, kind)
    device = device or best_device()
    if ref.model == vision_towers.NAME:
        return vision_towers.open_efficientnet(ref, device, notice)
    if ref.modality == "audio":
        return audio_towers.open_whisper(ref, device, notice)
    return vision_towers.VisionTower(ref, device)
