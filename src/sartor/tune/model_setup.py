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
from sartor.models.losses.transformers_backend import without_peft
from sartor.models.media_tokens import keys_in
from sartor.models.multimodal import trainable_parts
from sartor.models.multimodal.native_media import NativeMedia
from sartor.models.multimodal.whisper_base import WhisperMedia
from sartor.models.tensor_files import TensorCache
from sartor.tune import preflight
from sartor.tune.methods.full import Full
from sartor.tune.methods.pissa import Pissa
from sartor.tune.methods.targets import ALL, Placement, Targets
from sartor.tune.recipe import Method, Recipe
from sartor.tune.tokenized_dataset import TokenizedDataset

Notice = Callable[[str], object]


def open_recipe_base(recipe: Recipe, notice: Notice, device: torch.device | None = None) -> Base:
    """Return the recipe's base, with its media towers if it names any.

    Raises what `open_base` and `open_towers` raise.
    """
    choice = recipe.base
    hardware.bound_primitive_caches()
    # the copies that `full` trains are fp32; in another dtype the base would compute otherwise than they do
    bits = 32 if isinstance(recipe.method, Full) and choice.bits == "auto" else choice.bits
    base = open_base(
        choice.name, revision=choice.revision, licence=choice.licence, bits=bits, device=device, notice=notice
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
    """Return the base's model with the recipe's method on it, and the other parts that the recipe trains.

    What is trained begins anew or as `method.start`.
    Raises ConfigError for targets and methods that the base does not support, BudgetError for an adapter larger than
    the memory, and what `start_of` raises.
    """
    method, targets = recipe.method, recipe.method.targets
    is_native = isinstance(base.media, NativeMedia)
    _check_method(method, base)
    if not is_native:
        _check_parts(targets, is_composed=base.media is not None)
    placement = Placement(
        targets=_parts(base, targets) if is_native else targets.modules,
        top_layers=None if is_native else targets.top,
        seed=recipe.seed,
    )
    linear = placement.targets.linear if is_native else placement.targets
    if linear != ALL:  # `full` of all weights is counted before the base is opened
        shapes = adapters.linear_shapes(base.model, linear, placement.top_layers)
        for refusal in preflight.of_adapter(recipe, shapes, base.device):
            raise refusal.error
    model = method.inject(base.model, placement)
    if targets.projector == "full" and not is_native:
        adapters.train_projectors(model)
    if (start := start_of(recipe, base)) is not None:
        adapters.load_start(model, start.path, method.kind)
    return model


def stored_bytes(recipe: Recipe, model: Any) -> int:
    """Return the bytes of the tensors that the Adapter of `model` will hold, without projectors and whole modules."""
    method = recipe.method
    if isinstance(method, Full):
        return method.stored_bytes(adapters.copied_shapes(model))
    bare = without_peft(model)
    return method.stored_bytes(adapters.adapted_shapes(bare))


def start_of(recipe: Recipe, base: Base) -> Artifact | None:
    """Return the Adapter or Release whose weights the recipe starts from; None if it names none.

    Raises ArtifactError, and ConfigError if it was made for another base, or as a LoRA and goes on as pissa.
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
    # on disk a pissa is a LoRA of twice the rank
    start_kind = start.manifest.get("recipe", {}).get("method", {}).get("kind", recipe.method.kind)
    if isinstance(recipe.method, Pissa) and start_kind != recipe.method.kind:
        problem = (
            f"method.start {start.path} was tuned by {start_kind}, and the recipe's method is {recipe.method.kind}"
        )
        raise ConfigError(problem, f"--method.kind {start_kind}, or --method.start '' to begin afresh")
    return start


def _parts(base: Base, targets: Targets) -> trainable_parts.Targeted:
    # `full` is the default, and a Whisper has no projector: there it means none
    projector = targets.projector
    if isinstance(base.media, WhisperMedia) and projector == "full":
        projector = "none"
    return trainable_parts.choose_targets(
        base.model, language=targets.modules, top=targets.top, projector=projector, tower=targets.tower
    )


def _check_method(method: Method, base: Base) -> None:
    """Raise ConfigError for a method that the base, or the recipe's targets, does not support."""
    if base.media is not None and not method.reads_media:
        raise ConfigError(
            f"method.kind is {method.kind}, which tunes text, and the base {base.ref.name} reads media",
            "method: {kind: lora}, or a text base",
        )
    if method.targets.modules == ALL and not isinstance(method, Full):
        raise ConfigError(
            f"method.targets is all, and {method.kind} adapts linear modules alone",
            "targets: all-linear, or method: {kind: full}",
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
