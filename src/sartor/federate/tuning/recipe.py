"""The recipe of a federated tuning: what rounds of many clients make one adapter of. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import config, records
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.federate.aggregate.modes import Alternate, Factors, FreezeA, Mode, Residual
from sartor.federate.privacy.accountant import Budget as PrivacyBudget
from sartor.federate.robust.rules import AnyRule
from sartor.tune.recipe import BaseChoice, Budget, Compute, Data, Lora, Optimizer, Recipe

MODES: dict[str, Mode] = {mode.kind: mode for mode in (FreezeA(), Alternate(), Residual(), Factors())}
ModeName = Literal["freeze_a", "alternate", "residual", "factors"]
# what a client lets a round ask of it
MOST_UPDATES, MOST_EPOCHS = 100_000, 1_000


@dataclass(frozen=True)
class Local:
    """How long a client trains in one round: so many updates, or passes over its rows."""

    updates: int | None = option(None, "optimiser updates of a client in a round")
    epochs: int | None = option(None, "passes over the client's rows in a round; one, if nothing is said")

    def __post_init__(self) -> None:
        if self.updates is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1)
        if self.updates is not None and self.epochs is not None:
            raise ConfigError(f"both updates {self.updates} and epochs {self.epochs} are given", "one of the two")
        for name, value, most in (("updates", self.updates, MOST_UPDATES), ("epochs", self.epochs, MOST_EPOCHS)):
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} is {value}; it must be in 1..{most}", f"{name}: 1")


@dataclass(frozen=True)
class LocalData:
    """What every client makes of its Dataset."""

    path: str = option("", "one Dataset, to be dealt out by --shards; clients have their own")
    eval_fraction: float = option(0.1, "fraction held out by group, if a Dataset itself holds out nothing")
    eval_rows: int = option(64, "most held-out rows of a Dataset whose loss is measured at the end")
    max_length_tokens: int = option(1024, "a longer row is left out and counted")
    attack_rows: int = option(
        128, "rows that the attack report looks at, of trained and of held-out ones; 0: no attack, and it says so"
    )

    def __post_init__(self) -> None:
        if self.attack_rows < 0:
            raise ConfigError(f"attack_rows is {self.attack_rows}", "attack_rows: 128, or 0 for no attack")


@dataclass(frozen=True)
class RoundRules:
    """What becomes of an update before it is summed."""

    clip: float = option(10.0, "an update is scaled down to this norm; it bounds the ring's units too")
    noise: float | Literal["auto"] = option("auto", "of the sum, in clips; auto: the least that the privacy allows, else none")
    most_examples: int | Literal["auto"] = option(
        "auto", "more examples count as these; auto: the largest client's, and 1 under noise"
    )

    def __post_init__(self) -> None:
        if self.clip <= 0 or (self.noise != "auto" and self.noise < 0):
            raise ConfigError(f"clip is {self.clip}, noise {self.noise}", "clip above 0, noise from 0 or auto")
        if self.most_examples != "auto" and self.most_examples < 1:
            raise ConfigError(f"most_examples is {self.most_examples}; it must be at least 1", "most_examples: auto")


@dataclass(frozen=True)
class FederateRecipe:
    """Datasets of many clients -> one Adapter."""

    base: BaseChoice = option(REQUIRED, "which pretrained weights: every client has the same")
    data: LocalData = option(LocalData(), "what a client makes of its Dataset")
    method: Lora = option(Lora(), "what is trained")
    mode: ModeName = option("freeze_a", "what clients train and send: freeze_a, alternate, or factors to compare with")
    rounds: int = option(10, "how many rounds")
    local: Local = option(Local(), "how long a client trains in a round")
    optimizer: Optimizer = option(Optimizer(), "how it gets there; warm-up and schedule go over all rounds")
    rules: RoundRules = option(RoundRules(), "what becomes of an update before it is summed")
    privacy: PrivacyBudget | None = option(None, "what the adapter may tell of one client: {epsilon, delta}")
    robust: AnyRule | None = option(None, "declared instead of a secure sum: how updates, each seen, become one")
    micro_batch_tokens: int = option(2048, "tokens that a client computes at once")
    seed: int = option(0, "seed of the adapter's start, the order of rows and the ring's rounding")

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("micro_batch_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}", f"{name}: {least}")
        if self.base.towers:
            raise ConfigError("the base is composed; rounds tune text bases", "base: starter")
        if self.method.dropout:
            raise ConfigError(f"method.dropout is {self.method.dropout}; a client's work is repeatable", "dropout: 0.0")
        if self.robust and (self.privacy or self.noise_asked):
            problem = f"robust {self.robust.kind} sees every update, which the privacy of a secure sum forbids"
            raise ConfigError(problem, "robust or privacy: a run claims one of the two")
        if self.mode == "residual":
            problem = "mode residual changes the frozen weights, and an Adapter is bound to the base as it was"
            raise ConfigError(problem, "mode: freeze_a or alternate, exact as well")

    @property
    def noise_asked(self) -> float:
        """The noise that the recipe itself names, in clips; 0 for auto."""
        return 0.0 if self.rules.noise == "auto" else self.rules.noise


def load(recipe: FederateRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> FederateRecipe:
    """A FederateRecipe from any of its forms, with flags (`--method.rank 8`) on top. Raises ConfigError."""
    return config.load_any(FederateRecipe, recipe, flags)


def tuning(recipe: FederateRecipe, path: str) -> Recipe:
    """The tuning of one client, whose Dataset is at `path`: what of it a round decides is not in here."""
    data = recipe.data
    return Recipe(
        base=recipe.base,
        data=Data(path, data.eval_fraction, data.eval_rows, data.max_length_tokens),
        method=recipe.method,
        budget=Budget(epochs=1.0),
        optimizer=recipe.optimizer,
        compute=Compute(micro_batch_tokens=recipe.micro_batch_tokens, reuse_frozen=False),
        evaluations=0,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class Settings:
    """What a round of the task `lora` says, as JSON in its manifest: nothing that a recipe digest covers."""

    mode: ModeName
    rounds: int
    learning_rate: float
    local: Local = Local()

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.learning_rate < 1:
            problem = f"rounds is {self.rounds}, learning_rate {self.learning_rate}"
            raise ConfigError(problem, "rounds from 1, learning_rate above 0 and below 1")

    @classmethod
    def of(cls, recipe: FederateRecipe) -> Settings:
        """What a coordinator says of this recipe."""
        return cls(recipe.mode, recipe.rounds, recipe.optimizer.learning_rate, recipe.local)


def recipe_digest(recipe: Recipe, template_digest: str) -> str:
    """sha256 of what client and coordinator must have in common beside the base: method, optimiser, rows' form, seed.

    The learning rate and the length of the work are each round's own.
    """
    optimizer = {name: value for name, value in config.dump(recipe.optimizer).items() if name != "learning_rate"}
    said = {"method": config.dump(recipe.method), "optimizer": optimizer, "template": template_digest, "seed": recipe.seed}
    return records.digest({**said, "max_length_tokens": recipe.data.max_length_tokens})
