"""A recipe's base, opened, and the model that learns: for `tune` and for `plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sartor.core.home import folder
from sartor.models import adapters
from sartor.models.base import Base, open_base
from sartor.models.composed import ComposedMedia, compose, open_towers
from sartor.models.media import keys_in
from sartor.models.shelf import Shelf
from sartor.tune.recipe import Recipe
from sartor.tune.rows import Rows

Notice = Callable[[str], object]


def open_chosen(recipe: Recipe, notice: Notice, device: torch.device | None = None) -> Base:
    """The base that a recipe names, with the towers that it names. Raises what `open_base` and `open_tower` raise."""
    chosen = recipe.base
    base = open_base(
        chosen.name, revision=chosen.revision, licence=chosen.licence, bits=chosen.bits, device=device, notice=notice
    )
    if not chosen.towers:
        return base
    towers = open_towers(chosen.towers, base.device, notice)
    shelf = Shelf(folder("features"), int(recipe.compute.cache_gb * 1e9), notice) if recipe.compute.reuse_frozen else None
    return compose(base, towers, shelf=shelf, seed=recipe.seed)


def calibrate(base: Base, data: Rows) -> None:
    """Scale the projectors of a composed base by the media of the training rows."""
    if isinstance(base.media, ComposedMedia):
        base.media.calibrate([key for row in data.train for key in keys_in(row.ids)])


def adapted(recipe: Recipe, base: Base) -> Any:
    """The base's model with fresh factors, and what else of it the recipe trains."""
    method = recipe.method
    model = adapters.inject_lora(
        base.model,
        rank=method.rank,
        alpha=method.alpha,
        dropout=method.dropout,
        targets=method.targets.modules,
        top_layers=method.targets.top,
        seed=recipe.seed,
    )
    if method.targets.projector == "full":
        adapters.train_projectors(model)
    return model
