"""What an adapter reads media with, before a worker loads it: projectors that fit the base and towers that are here. No torch.

projectors.safetensors   metadata {"towers.1": JSON of kind -> name, digest, licence, width, stack}
tensors KIND.mean, .spread, .gain, .project_in.*, .project_out.* (models/composed_model.py, Projector)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import assets, model_refs
from sartor.core.errors import AdmissionError, AssetError, ModelError
from sartor.core.model_refs import Modality
from sartor.core.safetensors_file import FLOATS, Tensor, read_whole
from sartor.inference.engine import PROJECTORS, About

CHECK = "projectors"
KINDS: tuple[Modality, ...] = ("image", "audio")
MOST_WIDTH, MOST_STACK = 1 << 16, 256
# A channel is divided by its spread (models/composed_model.py never writes a smaller one)
LEAST_SPREAD = 1e-6
_AGAIN = "release an adapter that `sartor tune` wrote"


@dataclass(frozen=True)
class Said:
    """A tower as the file names it."""

    kind: Modality
    name: str
    digest: str
    width: int
    stack: int


@dataclass(frozen=True)
class Projectors:
    """The file of a Release: its towers, and its tensors, of which no value was looked at."""

    towers: tuple[Said, ...]
    tensors: Mapping[str, Tensor]

    @property
    def reads(self) -> tuple[str, ...]:
        """Of `image` and `audio`, those that it reads beside text."""
        return tuple(tower.kind for tower in self.towers)


def read(path: Path, files: Mapping[str, Any], about: About) -> Projectors:
    """The projectors of the Release in `path`, of these files, with towers that are on this machine.

    Raises AdmissionError or ModelError for what is no such file, or where the engine reads no media or a tower is another;
    AssetError for one that is not installed.
    """
    if PROJECTORS not in files:
        return Projectors((), {})
    if about.kind != "local":
        raise ModelError(f"it reads media by projectors, and the engine {about.kind!r} reads text", "engine: {kind: local}")
    tensors, metadata = read_whole(path / PROJECTORS)
    if model_refs.SAID not in metadata:
        raise _refusal(f"says {sorted(metadata)!a:.80}; this reads {model_refs.SAID!r}")
    found = Projectors(_towers(metadata[model_refs.SAID]), tensors)
    for tower in found.towers:
        _check_tower(tower)
    return found


def _towers(text: str) -> tuple[Said, ...]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not said or not set(said) <= set(KINDS):
        raise _refusal(f"names no towers of {' and '.join(KINDS)}: {text[:80]!a}")
    return tuple(_tower(kind, said[kind]) for kind in KINDS if kind in said)


def _tower(kind: Modality, said: Any) -> Said:
    if not isinstance(said, dict) or not all(isinstance(said.get(key), str) and said[key] for key in ("name", "digest")):
        raise _refusal(f"names no tower by name and digest for {kind}: {str(said)[:80]!a}")
    for key, most in (("width", MOST_WIDTH), ("stack", MOST_STACK)):
        if type(said.get(key)) is not int or not 1 <= said[key] <= most:
            raise _refusal(f"says {key} {str(said.get(key))[:20]!a} of the tower for {kind}; it lies in 1..{most}")
    return Said(kind, said["name"], said["digest"], said["width"], said["stack"])


def _check_tower(said: Said) -> None:
    ref = model_refs.locate_tower(said.name, said.kind)
    if ref.digest != said.digest:
        raise ModelError(
            f"it reads {said.kind} by the tower {said.name[:80]!r} {said.digest[:12]}, and the one here is {ref.digest[:12]}",
            "use the tower that it was tuned with, or tune again with this one",
        )
    if ref.is_asset and not ref.path.is_dir() and not assets.entry(said.name).is_installed:
        problem = f"it reads {said.kind} by the tower {said.name!r}, which is not on this machine"
        raise AssetError(problem, f"sartor assets install {said.name}")


def check_values(found: Projectors, width: int) -> str:
    """What was found, in words; every value is read. width: of the base's embeddings. Raises AdmissionError."""
    if not found.towers:
        return "none: it reads text alone"
    wanted = {name: shape for tower in found.towers for name, shape in _shapes(tower, width).items()}
    if set(wanted) != set(found.tensors):
        odd = sorted(set(wanted) ^ set(found.tensors))[0]
        raise _refusal(f"{'lacks' if odd in wanted else 'has a surplus tensor,'} {odd}")
    for name, shape in wanted.items():
        _check_tensor(found.tensors[name], shape)
    count = sum(tensor.count for tensor in found.tensors.values())
    return f"{', '.join(f'{tower.kind} by {tower.name}' for tower in found.towers)}; {count:,} parameters"


def _shapes(tower: Said, width: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape, (out, in) of weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (tower.width,), "spread": (tower.width,), "gain": (),
        # places of a picture are averaged behind it, moments of a recording stand side by side before it
        "project_in.weight": (width, (1 if tower.kind == "image" else tower.stack) * tower.width), "project_in.bias": (width,),
        "project_out.weight": (width, width), "project_out.bias": (width,),
    }  # fmt: skip
    return {f"{tower.kind}.{name}": shape for name, shape in shapes.items()}


def _check_tensor(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise _refusal(f"has {tensor.name} of shape {tensor.shape}; tower and base make it {shape}")
    if tensor.dtype not in FLOATS:
        raise _refusal(f"has {tensor.name} in {tensor.dtype}; floats of 16 or 32 bits are read")
    for piece in tensor.pieces():
        if not np.isfinite(piece).all():
            raise _refusal(f"holds values that are not finite, in {tensor.name}")
        if tensor.name.endswith(".spread") and not (piece >= LEAST_SPREAD).all():
            raise _refusal(f"divides by a spread of {float(piece.min()):g}, in {tensor.name}")


def _refusal(problem: str) -> AdmissionError:
    return AdmissionError(f"{PROJECTORS} {problem}", _AGAIN, CHECK)
