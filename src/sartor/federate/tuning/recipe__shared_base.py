"""Part of federate.tuning.recipe."""

from __future__ import annotations

from sartor.core import config, records
from sartor.tune.recipe import Recipe


def recipe_digest(recipe: Recipe, template_digest: str) -> str:
    """sha256 of what client and coordinator must have in common beside the base: method, optimiser, rows' form, seed.

    The learning rate and the length of the work are each round's own.
    """
    optimizer = {name: value for name, value in config.dump(recipe.optimizer).items() if name != "learning_rate"}
    said = {"method": config.dump(recipe.method), "optimizer": optimizer, "template": template_digest, "seed": recipe.seed}
    return records.digest({**said, "max_length_tokens": recipe.data.max_length_tokens})
