"""Values for the `auto` options of a tuning recipe, each with its reason.

    choose_rehearsal: called before the rows are encoded, since rehearsal adds rows
    resolve: called with the encoded rows; it also needs the base's width

Small batches and about ten times the rate of full fine-tuning follow Schulman et al. 2025, "LoRA Without Regret",
Thinking Machines. The constants were chosen on banking77 and construction-faq, those of composed bases on 300 pictures
(docs/decisions/028-defaults.md). A resumed run takes over the values of its checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sartor.core import config, parquet_io
from sartor.core.artifacts import Artifact
from sartor.models.base import Base
from sartor.models.composed_model import ComposedMedia
from sartor.tune.checkpoint_selection import last_reply, natural_metric
from sartor.tune.recipe import Recipe, Rehearsal, ResolvedRecipe, Sft, StopCriteria
from sartor.tune.sampler import updates_per_epoch
from sartor.tune.tokenized_dataset import TokenizedDataset

GENERAL_TEXT = "asset:general-text"
LEARNING_RATE, BATCH_TOKENS, BUDGET, REHEARSAL = (
    "optimizer.learning_rate",
    "optimizer.batch_tokens",
    "budget",
    "data.rehearsal",
)
WEIGHTS, EVALUATIONS = "weights", "evaluations"
# The batch is the largest power of two in this range that leaves UPDATES_PER_EPOCH updates in an epoch; above
# SMALL_BATCHES, ONE_PASS_UPDATES. From so many updates on an epoch is enough
SMALLEST_BATCH, SMALL_BATCHES, LARGEST_BATCH, UPDATES_PER_EPOCH, ONE_PASS_UPDATES = 256, 1024, 4096, 64, 1000
# Target number of updates. Replies of more tokens in the median than SHORT_REPLY are learnt by heart in so many; a
# composed base needs more, because its projector starts untrained
UPDATES, LONG_REPLY_UPDATES, COMPOSED_UPDATES, SHORT_REPLY, MAX_EPOCHS = 300, 200, 700, 32, 10
# Rate of full fine-tuning at a width of 2,000, and the exponent by which it falls with the width; LoRA takes ten times
# that rate
FULL_RATE, REFERENCE_WIDTH, WIDTH_EXPONENT, LORA_OVER_FULL, MAX_RATE = 5e-5, 2000, 0.78, 10, 1e-3
# Evaluations of a run that keeps its best weights, and of a run that keeps its last
CHOSEN_EVALUATIONS, PLAIN_EVALUATIONS = 4, 2
# Fixed defaults for the objectives for which no rule was measured
UNMEASURED = {LEARNING_RATE: 2e-4, BATCH_TOKENS: 4096, BUDGET: StopCriteria(epochs=1.0), REHEARSAL: Rehearsal()}


@dataclass(frozen=True)
class Setting:
    """Value of an option that was `auto`, and the reason in one line."""

    value: Any
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return the value and reason as an entry of a manifest or a plan; what is None in it is left out."""
        plain = config.dump(self.value)
        if isinstance(plain, Mapping):
            plain = {name: value for name, value in plain.items() if value is not None}
        return {"value": plain, "reason": self.reason}


@dataclass(frozen=True)
class EarlierRun:
    """Recipe and automatic settings of the run that is resumed.

    recipe: resolved, as in the run's manifest.
    settings: option -> {value, reason} of the options that were `auto`; None for a run of an older Sartor, whose
    defaults were numbers.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] | None = None

    def setting(self, name: str) -> Setting | None:
        """Return the earlier run's value of an option that was `auto`.

        None if its recipe set the option, or has no such option.
        """
        if name in (WEIGHTS, EVALUATIONS) and WEIGHTS not in self.recipe:
            older: Any = "last" if name == WEIGHTS else self.recipe.get("evaluations", PLAIN_EVALUATIONS)
            return Setting(older, "as the run that is resumed has it, of a Sartor that kept the last weights")
        if self.settings is not None and name not in self.settings:
            return None
        value: Any = self.recipe
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            return None
        if name == BUDGET:
            value = config.load(StopCriteria, value)
        elif name == REHEARSAL:
            value = config.load(Rehearsal, value)
        return Setting(
            value, str((self.settings or {}).get(name, {}).get("reason", "as the run that is resumed has it"))
        )


def auto_options(recipe: Recipe) -> list[str]:
    """Return the options of a recipe that are `auto`, except rehearsal, which depends on them."""
    values = {
        BATCH_TOKENS: recipe.optimizer.batch_tokens,
        LEARNING_RATE: recipe.optimizer.learning_rate,
        BUDGET: recipe.budget,
    }
    return [name for name, value in values.items() if value == "auto"]


def choose_rehearsal(
    recipe: Recipe, dataset: Artifact, base: Base, earlier: EarlierRun | None = None
) -> tuple[Recipe, Setting | None]:
    """Return the recipe with its rehearsal chosen, and the Setting if it was `auto`."""
    if recipe.data.rehearsal != "auto":
        return recipe, None
    setting = (earlier and earlier.setting(REHEARSAL)) or _rehearsal(recipe, dataset, base)
    plain = config.dump(recipe)
    plain["data"]["rehearsal"] = config.dump(setting.value)
    return config.load(Recipe, plain), setting


def _rehearsal(recipe: Recipe, dataset: Artifact, base: Base) -> Setting:
    absent = Rehearsal()
    if not isinstance(recipe.objective, Sft):
        return Setting(absent, f"none: of the objective {recipe.objective.kind} no default is measured")
    if not auto_options(recipe):
        return Setting(absent, "none: the recipe itself names rate, batch and budget")
    if base.media is not None:
        return Setting(absent, "none: rows of text beside pictures or recordings are not measured")
    if parquet_io.rehearsal_sources(dataset):
        return Setting(absent, "none: the Dataset has a source of rehearsal of its own")
    rehearsal = Rehearsal(GENERAL_TEXT, loss="kl", weight=1.0)
    return Setting(rehearsal, f"{rehearsal.fraction:.0%} of the tokens hold the model at the base on general text")


def resolve(
    recipe: Recipe, data: TokenizedDataset, base: Base, rehearsal: Setting | None, earlier: EarlierRun | None = None
) -> tuple[ResolvedRecipe, dict[str, Setting]]:
    """Return the recipe without `auto`, and the Setting of each option that was `auto`.

    recipe: as `choose_rehearsal` returns it.
    rehearsal: the Setting that `choose_rehearsal` returns.
    data: the encoded rows of the recipe.
    """
    settings: dict[str, Setting] = {}
    for name in auto_options(recipe):
        taken_over = earlier.setting(name) if earlier else None
        settings[name] = taken_over or _choose(name, recipe, data, base=base, settings=settings)
    if recipe.weights == "auto":
        settings[WEIGHTS] = (earlier and earlier.setting(WEIGHTS)) or _weights(recipe, data)
    if recipe.evaluations == "auto":
        weights = settings[WEIGHTS].value if WEIGHTS in settings else recipe.weights
        if weights == "best":
            default = Setting(CHOSEN_EVALUATIONS, "to choose the best weights among")
        else:
            default = Setting(PLAIN_EVALUATIONS, "in the middle and at the end")
        settings[EVALUATIONS] = (earlier and earlier.setting(EVALUATIONS)) or default
    plain = config.dump(recipe)
    for name, setting in settings.items():
        *path, last = name.split(".")
        target = plain
        for part in path:
            target = target[part]
        target[last] = config.dump(setting.value)
    if plain["data"]["rehearsal"] == "none":
        plain["data"]["rehearsal"] = config.dump(Rehearsal())
    if rehearsal:
        settings[REHEARSAL] = rehearsal
    return config.load(ResolvedRecipe, plain), settings


def _choose(name: str, recipe: Recipe, data: TokenizedDataset, base: Base, settings: Mapping[str, Setting]) -> Setting:
    if not isinstance(recipe.objective, Sft):
        return Setting(UNMEASURED[name], f"of the objective {recipe.objective.kind} no default is measured")
    if name == BATCH_TOKENS:
        limit = None if recipe.budget == "auto" else recipe.budget.tokens
        return batch_tokens(data.tokens, limit)
    if name == LEARNING_RATE:
        return learning_rate(int(base.model.get_input_embeddings().weight.shape[1]))
    chosen = settings[BATCH_TOKENS].value if BATCH_TOKENS in settings else recipe.optimizer.batch_tokens
    # the media tower of a native base is already trained
    if isinstance(base.media, ComposedMedia):
        wanted = COMPOSED_UPDATES
    else:
        is_short = statistics.median(row.supervised_tokens for row in data.train) <= SHORT_REPLY
        wanted = UPDATES if is_short else LONG_REPLY_UPDATES
    return budget([row.tokens for row in data.train], int(chosen), wanted)


def _weights(recipe: Recipe, data: TokenizedDataset) -> Setting:
    if not isinstance(recipe.objective, Sft):
        return Setting("last", f"of the objective {recipe.objective.kind} no default is measured")
    if not auto_options(recipe):
        return Setting("last", "the recipe itself names rate, batch and budget")
    if not data.held_out:
        return Setting("last", "no row is held out")
    if recipe.evaluations != "auto" and recipe.evaluations < 2:
        return Setting("last", f"{recipe.evaluations} evaluations leave no choice")
    earlier = "an earlier evaluation's if better beyond chance"
    if natural_metric(data.held_out) == "exact_match":
        return Setting("best", f"{earlier}, by replies to {len(data.held_out)} held-out rows")
    documents = sum(not last_reply(row)[0] for row in data.held_out)
    if documents == len(data.held_out):
        # of a text without a question the loss is all that is learnt; that of replies may rise while they get better
        return Setting("best", f"{earlier}, by the loss of {len(data.held_out)} held-out documents")
    if documents:
        return Setting("last", f"{documents} of {len(data.held_out)} held-out rows are documents, the others replies")
    return Setting("last", "the replies are too long to generate some at each evaluation")


def batch_tokens(epoch_tokens: int, budget_tokens: int | None = None) -> Setting:
    """Return the tokens of an update: the largest power of two that leaves UPDATES_PER_EPOCH updates.

    The result is at least SMALLEST_BATCH and at most LARGEST_BATCH; above SMALL_BATCHES it has to leave
    ONE_PASS_UPDATES. The updates are those of an epoch, or those of `budget_tokens` if the budget reads less than an
    epoch.
    """
    tokens, of = epoch_tokens, "an epoch"
    if budget_tokens is not None and budget_tokens < epoch_tokens:
        tokens, of = budget_tokens, "a budget"
    size, least = LARGEST_BATCH, ONE_PASS_UPDATES
    while size > SMALLEST_BATCH and tokens < least * size:
        size //= 2
        if size == SMALL_BATCHES:
            least = UPDATES_PER_EPOCH
    updates = tokens / size
    if updates < least:
        return Setting(size, f"the smallest: it makes about {updates:.0f} updates {of} of {tokens:,} tokens")
    more = f"; a larger one would have to leave {ONE_PASS_UPDATES:,}" if size == SMALL_BATCHES else ""
    return Setting(size, f"the largest that leaves {least:,} updates {of} of {tokens:,} tokens{more}")


def learning_rate(width: int) -> Setting:
    """Return the peak learning rate for a base whose hidden states have `width` dimensions.

    rate = 5e-5 * 10 * (2000 / width)^0.78, at most 1e-3.
    """
    rate = FULL_RATE * LORA_OVER_FULL * (REFERENCE_WIDTH / width) ** WIDTH_EXPONENT
    if rate >= MAX_RATE:
        return Setting(MAX_RATE, f"the highest: ten times the full fine-tuning rate of width {width} is {rate:.1e}")
    return Setting(float(f"{rate:.2g}"), f"ten times the full fine-tuning rate of a base of width {width}")


def budget(row_tokens: Sequence[int], batch: int, wanted: int = UPDATES) -> Setting:
    """Return the number of whole epochs that give `wanted` updates, at most MAX_EPOCHS.

    It is 1 only if an epoch has ONE_PASS_UPDATES.
    """
    per_epoch = updates_per_epoch(row_tokens, batch)
    least = 1 if per_epoch >= ONE_PASS_UPDATES else 2
    epochs = min(max(math.ceil(wanted / per_epoch), least), MAX_EPOCHS)
    made = math.ceil(per_epoch)  # the last update of an epoch is smaller
    reason = f"about {epochs * made:,} updates, {made:,} an epoch; {wanted} are wanted"
    return Setting(StopCriteria(epochs=float(epochs)), f"{reason}, in at most {MAX_EPOCHS} epochs")


def lines(settings: Mapping[str, Setting]) -> list[str]:
    """Return a line for each Setting: `optimizer.batch_tokens auto: 256 (reason)`."""
    return [f"{name} auto: {value_text(setting.value)} ({setting.reason})" for name, setting in settings.items()]


def value_text(value: Any) -> str:
    """Return a Setting's value as a short text."""
    if isinstance(value, StopCriteria):
        limits = {item.name: getattr(value, item.name) for item in fields(value)}
        return ", ".join(f"{limit:g} {name}" for name, limit in limits.items() if limit is not None)
    if isinstance(value, Rehearsal):
        return value.path or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
