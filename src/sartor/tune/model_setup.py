"""Set-up of a recipe's model: opening of the base and injection of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ConfigError
from sartor.core.home import folder
from sartor.models import adapters, hardware
from sartor.models.base import Base, open_base
from sartor.models.composed_model import ComposedMedia, compose_base, open_towers
from sartor.models.media_tokens import keys_in
from sartor.models.multimodal import trainable_parts
from sartor.models.multimodal.native_media import NativeMedia
from sartor.models.multimodal.whisper_base import WhisperMedia
from sartor.models.tensor_files import TensorCache
from sartor.tune import auto_settings
from sartor.tune.recipe import Recipe, Rehearsal, Targets
from sartor.tune.tokenized_dataset import TokenizedDataset

Notice = Callable[[str], object]


def open_recipe_base(recipe: Recipe, notice: Notice, device: torch.device | None = None) -> Base:
    """Return the recipe's base, with its media towers if it names any.

    Raises what `open_base` and `open_towers` raise.
    """
    choice = recipe.base
    hardware.bound_primitive_caches()
    base = open_base(
        choice.name, revision=choice.revision, licence=choice.licence, bits=choice.bits, device=device, notice=notice
    )
    if not choice.towers:
        return base
    towers = open_towers(choice.towers, base.device, notice)
    cache = (
        TensorCache(folder("features"), int(recipe.compute.cache_gb * 1e9), notice)
        if recipe.compute.reuse_frozen
        else None
    )
    return compose_base(base, towers, shelf=cache, seed=recipe.seed)


def calibrate(base: Base, data: TokenizedDataset) -> None:
    """Scale the projectors of a composed base by the media of the training rows."""
    if isinstance(base.media, ComposedMedia):
        base.media.calibrate([key for row in data.train for key in keys_in(row.ids)])


def inject_recipe_adapter(recipe: Recipe, base: Base) -> Any:
    """Return the base's model with LoRA factors and the other parts that the recipe trains.

    The factors are new or those of `method.start`.
    Raises ConfigError for targets that the base does not support, and what `start_of` raises.
    """
    method, targets = recipe.method, recipe.method.targets
    is_native = isinstance(base.media, NativeMedia)
    if not is_native:
        _check_parts(targets, is_composed=base.media is not None)
    model = adapters.inject_lora(
        base.model,
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        targets=_parts(base, targets) if is_native else targets.modules,
        top_layers=None if is_native else targets.top,
        seed=recipe.seed,
    )
    if targets.projector == "full" and not is_native:
        adapters.train_projectors(model)
    if (start := start_of(recipe, base)) is not None:
        adapters.load_start(model, start.path)
    return model


def start_of(recipe: Recipe, base: Base) -> Artifact | None:
    """Return the Adapter or Release whose weights the recipe starts from; None if it names none.

    Raises ArtifactError, and ConfigError if it was made for another base.
    """
    if not recipe.method.start:
        return None
    start = open_artifact(recipe.method.start, ("adapter", "release"))
    start_base = start.manifest["base"]
    if start_base["digest"] != base.ref.digest:
        problem = f"method.start {start.path} was made for the base {start_base['name']} ({start_base['digest'][:16]})"
        raise ConfigError(
            f"{problem}, not {base.ref.name} ({base.ref.digest[:16]})",
            f"base: {start_base['name']}, or a method.start that was tuned on {base.ref.name}",
        )
    return start


def rehearsal_of(recipe: Recipe) -> Artifact | None:
    """Return the Dataset of general rows that a recipe names, a directory or an asset; None without one.

    Raises ArtifactError and AssetError.
    """
    rehearsal = recipe.data.rehearsal
    if not isinstance(rehearsal, Rehearsal) or not rehearsal.path:
        return None
    if rehearsal.path.startswith(auto_settings.ASSET):
        return auto_settings.asset_dataset(rehearsal.path)
    return open_artifact(rehearsal.path, "dataset")


def _parts(base: Base, targets: Targets) -> trainable_parts.Targeted:
    # `full` is the default, and a Whisper has no projector: there it means none
    projector = targets.projector
    if isinstance(base.media, WhisperMedia) and projector == "full":
        projector = "none"
    return trainable_parts.choose_targets(
        base.model, language=targets.modules, top=targets.top, projector=projector, tower=targets.tower
    )


def _check_parts(targets: Targets, *, is_composed: bool) -> None:
    """Raise ConfigError for targets that only a native multi-modal base supports."""
    for name, value in (("projector", targets.projector), ("tower", targets.tower)):
        if value == "none" and name == "projector" and is_composed:
            problem = (
                "method.targets.projector is none: a composed base's projector begins untrained, and would stay so"
            )
            raise ConfigError(problem, "targets: {projector: full}")
        if value == "all-linear":
            problem = f"method.targets.{name} is all-linear, which native multi-modal bases alone can train"
            raise ConfigError(problem, "targets: {language: all-linear, projector: full, tower: none}")
