"""Which tower a name means: its directory, digest, licence, and what it sees or hears. No torch.

A tower is the frozen encoder of pictures or of recordings in a composed base: one of the offline assets (converted once by
`models/towers`), or a directory or hub name in transformers' layout, as a base is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core import assets, bases
from sartor.core.errors import ModelError
from sartor.core.home import folder
from sartor.core.records import digest

Modality = Literal["image", "audio"]
# Raised when `models/towers` makes other features of the same weights: features are kept by the tower's digest.
FEATURES_VERSION = 1
ASSETS: dict[str, Modality] = {"efficientnet-lite0": "image", "whisper-tiny-en": "audio"}
# transformers' model_type -> what it reads
MODEL_TYPES: dict[str, Modality] = {
    "whisper": "audio",
    "clip": "image",
    "clip_vision_model": "image",
    "siglip": "image",
    "siglip_vision_model": "image",
    "dinov2": "image",
}
# The one key of metadata of an adapter's projectors: which towers they read, and the form in which that is said. One, since
# the order of several is the writer's whim, and equal adapters are to be equal files
SAID = "towers.1"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class TowerRef:
    """A tower by name, found. `model`: the asset's name, or transformers' model_type.

    `digest`: of the weights' files and FEATURES_VERSION: what decides the features. An asset's `path` may not be there yet.
    """

    name: str
    path: Path
    digest: str
    licence: str
    modality: Modality
    model: str

    @property
    def is_asset(self) -> bool:
        """Whether `path` is converted from an asset."""
        return self.model in ASSETS


def locate(name: str, kind: Modality | None = None, licence: str = "") -> TowerRef:
    """The tower that `name` means. `licence` overrides what its own files state.

    Raises ModelError for what holds no tower that is known here, or none of that kind; HubError when a hub name cannot be
    fetched.
    """
    ref = _located(name, licence)
    if kind and ref.modality != kind:
        fitting = " or ".join(asset for asset, modality in ASSETS.items() if modality == kind)
        raise ModelError(f"the tower {name} takes in {ref.modality}, and is asked for as one of {kind}", f"{kind}: {fitting}")
    return ref


def _located(name: str, licence: str) -> TowerRef:
    if name in ASSETS:
        entry = assets.entry(name)
        identity = digest({"asset": [file.sha256 for file in entry.files], "features": FEATURES_VERSION})
        path = folder("towers") / f"{name}-{identity[:12]}"
        return TowerRef(name, path, identity, licence or entry.licence, ASSETS[name], name)
    path = Path(name).expanduser()
    if not name or not path.is_dir() and not (_HUB_NAME.match(name) and not path.exists() and not name.startswith(".")):
        raise ModelError(
            f"there is no tower {name!r}: it is none of the assets, no directory, and no hub name (owner/model)",
            f"one of {', '.join(ASSETS)}, or a directory with config.json and *.safetensors",
        )
    base = bases.locate(name, licence=licence)
    model_type = _model_type(base.path)
    if model_type not in MODEL_TYPES:
        raise ModelError(
            f"{name} is a model of the type {model_type!r}, which is no tower that is known here",
            f"one of {', '.join(ASSETS)}, or a model of a type of {', '.join(MODEL_TYPES)}",
        )
    identity = digest({"files": base.digest, "features": FEATURES_VERSION})
    return TowerRef(base.name, base.path, identity, base.licence, MODEL_TYPES[model_type], model_type)


def _model_type(path: Path) -> str:
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path / 'config.json'} is no config of a model: {error}", "restore it from a copy") from None
