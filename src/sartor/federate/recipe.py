"""Recipe of a federated tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import config
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.federate.aggregation import Alternate, FactorMean, FreezeA, Mode, Residual
from sartor.federate.privacy.accountant import PrivacyBudget
from sartor.federate.robust_aggregation import AnyRule
from sartor.tune.methods.lora import Lora
from sartor.tune.recipe import BaseChoice, Compute, ResolvedData, ResolvedOptimizer, ResolvedRecipe, StopCriteria

MODES: dict[str, Mode] = {mode.kind: mode for mode in (FreezeA(), Alternate(), Residual(), FactorMean())}
ModeName = Literal["freeze_a", "alternate", "residual", "factors"]
# limits of a client: more updates or epochs of one round are refused
MOST_UPDATES, MOST_EPOCHS = 100_000, 1_000


@dataclass(frozen=True)
class LocalTraining:
    """Length of a client's training in one round: optimiser updates, or passes over its rows.

    Raises ConfigError if both are given or one is out of range.
    """

    updates: int | None = option(None, "optimiser updates of a client in a round")
    epochs: int | None = option(None, "passes over the client's rows in a round; one, if nothing is said")

    def __post_init__(self) -> None:
        if self.updates is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1)
        if self.updates is not None and self.epochs is not None:
            raise ConfigError(
                f"both updates {self.updates} and epochs {self.epochs} are given",
                f"local: {{updates: {self.updates}}} or local: {{epochs: {self.epochs}}}",
            )
        for name, value, maximum in (("updates", self.updates, MOST_UPDATES), ("epochs", self.epochs, MOST_EPOCHS)):
            if value is not None and not 1 <= value <= maximum:
                raise ConfigError(f"{name} is {value}; it must be in 1..{maximum}", f"{name}: 1")


@dataclass(frozen=True)
class Ranked(Lora):
    """LoRA of one shared rank, of which clients with less memory train the first few ranks.

    `lora_tensors.split_ranks` divides the factors.
    """

    ranks: tuple[int, ...] = option((), "what each client trains of rank, in the clients' order; empty: all of it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [rank for rank in self.ranks if not 1 <= rank <= self.rank]:
            raise ConfigError(
                f"a client of rank {wrong[0]} under a shared rank of {self.rank}", f"ranks of 1 to {self.rank}"
            )

    @property
    def shared(self) -> Lora:
        """LoRA method of the shared adapter, at the full rank.

        Without `start`: the first round's shared tensors bring it, so clients need not have that Adapter.
        """
        return Lora(self.rank, self.alpha, self.dropout, self.targets)


@dataclass(frozen=True)
class PersonalRanks(LocalTraining):
    """Private ranks of each client, trained after the rounds on top of the frozen shared adapter."""

    rank: int = option(8, "ranks of the private delta")
    learning_rate: float | None = option(None, "peak learning rate; by default that of the rounds")
    compare: bool = option(
        False, "tune each client's rows alone, and all clients' rows as one, to compare with: costly"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or (self.learning_rate is not None and self.learning_rate <= 0):
            problem = f"rank is {self.rank}, learning_rate {self.learning_rate}"
            raise ConfigError(problem, "rank: 8, learning_rate: 2.0e-4")


@dataclass(frozen=True)
class Privacy:
    """Limit on what the adapter may reveal of one client, or of one row of a client, over all rounds."""

    epsilon: float = option(REQUIRED, "above 0; below 1 is strong, above 10 says little")
    delta: float = option(
        1e-5, "chance that epsilon does not hold, 0..1; below one over the number of those who are protected"
    )
    level: Literal["client", "example"] = option(
        "client", "client: noise inside the secure sum; example: DP-SGD in the client, who has a budget of its own"
    )
    max_grad_norm: float = option(1.0, "level example: the norm that one row's gradient is scaled down to")
    batch_rows: int = option(16, "level example: rows of an update on average; all, if a client has fewer")
    noise_multiplier: float | Literal["auto"] = option(
        "auto", "level example: noise of an update in max_grad_norm; auto: the least that all rounds allow"
    )

    def __post_init__(self) -> None:
        _ = self.budget
        if (
            self.max_grad_norm <= 0
            or self.batch_rows < 1
            or (self.noise_multiplier != "auto" and self.noise_multiplier <= 0)
        ):
            problem = (
                f"max_grad_norm {self.max_grad_norm}, batch_rows {self.batch_rows}, noise {self.noise_multiplier}"
            )
            raise ConfigError(
                problem, "max_grad_norm above 0, batch_rows at least 1, noise_multiplier above 0 or auto"
            )
        row_settings, defaults = (
            (item.max_grad_norm, item.batch_rows, item.noise_multiplier) for item in (self, Privacy)
        )
        if self.level == "client" and row_settings != defaults:
            problem = "max_grad_norm, batch_rows and noise_multiplier are of level example; level is client"
            raise ConfigError(problem, "level: example; or leave them out")

    @property
    def budget(self) -> PrivacyBudget:
        """Budget of one client at level client, of each client's rows at level example."""
        return PrivacyBudget(self.epsilon, self.delta)


@dataclass(frozen=True)
class LocalData:
    """Settings with which every client reads its Dataset."""

    path: str = option("", "one Dataset, to be dealt out by --shards; clients have their own")
    eval_fraction: float = option(0.1, "fraction held out by group, if a Dataset itself holds out nothing")
    eval_rows: int = option(64, "most held-out rows of a Dataset whose loss is measured at the end")
    max_length_tokens: int = option(1024, "a longer row is left out and counted")
    micro_batch_tokens: int = option(2048, "tokens that a client computes at once")
    reuse_frozen: bool = option(
        False, "keep the activations below the lowest trained layer on disk for later rounds: for layers: top-N"
    )
    attack_rows: int = option(
        128, "rows that the attack report looks at, of trained and of held-out ones; 0: no attack, and it says so"
    )

    def __post_init__(self) -> None:
        if self.attack_rows < 0:
            raise ConfigError(f"attack_rows is {self.attack_rows}", "attack_rows: 128, or 0 for no attack")


@dataclass(frozen=True)
class RoundRules:
    """Treatment of an update before it is summed."""

    clip: float = option(10.0, "an update is scaled down to this norm; it bounds the ring's units too")
    noise: float | Literal["auto"] = option(
        "auto", "of the sum, in clips; auto: the least that the privacy allows, else none"
    )
    most_examples: int | Literal["auto"] = option(
        "auto", "more examples count as these; auto: the largest client's, and 1 under noise"
    )
    assumed_colluders: int | Literal["auto"] = option(
        "auto",
        "clients whose noise does not count, since they might collude; auto: fewer than a third of them, at least 1",
    )

    def __post_init__(self) -> None:
        if self.assumed_colluders != "auto" and self.assumed_colluders < 0:
            raise ConfigError(
                f"assumed_colluders is {self.assumed_colluders}; it must be at least 0", "assumed_colluders: auto"
            )
        if self.clip <= 0 or (self.noise != "auto" and self.noise < 0):
            raise ConfigError(f"clip is {self.clip}, noise {self.noise}", "clip above 0, noise from 0 or auto")
        if self.most_examples != "auto" and self.most_examples < 1:
            raise ConfigError(f"most_examples is {self.most_examples}; it must be at least 1", "most_examples: auto")


@dataclass(frozen=True)
class FederateRecipe:
    """Recipe that tunes one Adapter on the Datasets of many clients."""

    base: BaseChoice = option(REQUIRED, "which pretrained weights: every client has the same")
    data: LocalData = option(LocalData(), "what a client makes of its Dataset")
    method: Ranked = option(Ranked(), "what is trained")
    mode: ModeName = option(
        "freeze_a", f"what clients train and send. {config.choices_text(map(type, MODES.values()))}"
    )
    rounds: int = option(10, "how many rounds")
    local: LocalTraining = option(LocalTraining(), "how long a client trains in a round")
    optimizer: ResolvedOptimizer = option(
        ResolvedOptimizer(), "how it gets there; warm-up and schedule go over all rounds"
    )
    rules: RoundRules = option(RoundRules(), "what becomes of an update before it is summed")
    privacy: Privacy | None = option(None, "what the adapter may tell of one client or row: {epsilon, delta, level}")
    robust: AnyRule | None = option(None, "declared instead of a secure sum: how updates, each seen, become one")
    personal: PersonalRanks | None = option(None, "what each client adds for itself after the rounds: {rank, epochs}")
    seed: int = option(0, "seed of the adapter's start, the order of rows and the ring's rounding")

    def __post_init__(self) -> None:
        for name, minimum in (("rounds", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least {minimum}", f"{name}: {minimum}"
                )
        if self.base.towers:
            raise ConfigError("the base is composed; rounds tune text bases", "base: starter")
        if self.method.dropout:
            raise ConfigError(
                f"method.dropout is {self.method.dropout}; a client's work is repeatable", "dropout: 0.0"
            )
        if self.optimizer.b_rate_ratio != 1:
            problem = f"optimizer.b_rate_ratio is {self.optimizer.b_rate_ratio:g}; rounds have one rate for A and B"
            raise ConfigError(problem, "b_rate_ratio: 1.0")
        self._check_sum()
        if self.privacy and self.privacy.level == "example":
            self._check_rows(self.privacy)
        frozen = [name for name, value in (("method.ranks", self.method.ranks), ("personal", self.personal)) if value]
        if self.optimizer.weight_decay and (frozen or self.mode == "residual"):
            problem = f"optimizer.weight_decay moves the ranks that {', '.join(frozen) or 'mode residual'} holds still"
            raise ConfigError(problem, "weight_decay: 0.0")

    def _check_sum(self) -> None:
        """Raise ConfigError unless mode, sum and privacy fit each other."""
        if self.robust and (self.of_clients or self.noise_asked):
            problem = f"robust {self.robust.kind} sees every update, which the privacy of a secure sum forbids"
            raise ConfigError(problem, "robust or privacy: a run claims one of the two; or privacy: {level: example}")
        if self.mode == "residual" and (self.robust is None or self.robust.kind != "mean"):
            problem = (
                "mode residual adds to the frozen weights what only one who sees every client's factors can compute"
            )
            raise ConfigError(
                problem, "robust: mean, which declares a sum that is seen; or mode: freeze_a or alternate"
            )
        if self.method.ranks and not isinstance(MODES[self.mode], FreezeA | Alternate):
            problem = f"method.ranks under mode {self.mode}: a mean of whole factors takes one rank only"
            raise ConfigError(problem, "mode: freeze_a or alternate")

    def _check_rows(self, privacy: Privacy) -> None:
        """Raise ConfigError where gradients of single rows are not available, or noise is requested twice."""
        if self.noise_asked:
            problem = (
                f"rules.noise {self.noise_asked:g} is of the secure sum, and the privacy is of level {privacy.level}"
            )
            raise ConfigError(problem, "privacy.noise_multiplier, or level: client")
        if self.rules.most_examples not in ("auto", 1):
            problem = (
                f"rules.most_examples is {self.rules.most_examples}: a weight by the count of rows would tell of each "
                "row"
            )
            raise ConfigError(problem, "most_examples: 1, or auto")
        if self.base.bits in (4, 8):
            problem = (
                f"base.bits is {self.base.bits}: the gradients of single rows are taken on a base that is not "
                "quantised"
            )
            raise ConfigError(problem, "base.bits: 16")
        if self.method.ranks or self.mode == "residual":
            feature = "method.ranks" if self.method.ranks else "mode residual"
            problem = (
                f"{feature} holds ranks still, and the gradient that a row has in them would be clipped with the rest"
            )
            raise ConfigError(problem, "privacy of level example: mode freeze_a or alternate, and ranks: []")

    @property
    def of_clients(self) -> PrivacyBudget | None:
        """Budget of one client, whose noise goes into the secure sum; None without one."""
        return self.privacy.budget if self.privacy and self.privacy.level == "client" else None

    @property
    def colluders_asked(self) -> int | None:
        """Colluders that the recipe itself states; None for auto."""
        return None if self.rules.assumed_colluders == "auto" else self.rules.assumed_colluders

    @property
    def noise_asked(self) -> float:
        """Noise that the recipe itself states, in clips; 0 for auto."""
        return 0.0 if self.rules.noise == "auto" else self.rules.noise


def load(recipe: FederateRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> FederateRecipe:
    """Return a FederateRecipe from any of its forms, with flags (`--method.rank 8`) applied on top.

    Raises ConfigError.
    """
    return config.load_any(FederateRecipe, recipe, flags)


def tuning(recipe: FederateRecipe, path: str) -> ResolvedRecipe:
    """Return the tuning recipe of one client, whose Dataset is at `path`.

    Settings that a round decides are not part of it.
    """
    data = recipe.data
    return ResolvedRecipe(
        base=recipe.base,
        data=ResolvedData(path, data.eval_fraction, data.eval_rows, data.max_length_tokens),
        method=recipe.method.shared,
        budget=StopCriteria(epochs=1.0),
        optimizer=recipe.optimizer,
        compute=Compute(micro_batch_tokens=recipe.data.micro_batch_tokens, reuse_frozen=False),
        evaluations=0,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class RoundSettings:
    """Settings of a round of the task `lora`, stored as JSON in its manifest.

    They hold nothing that a recipe digest covers.
    """

    mode: ModeName
    rounds: int
    learning_rate: float
    local: LocalTraining = LocalTraining()

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.learning_rate < 1:
            problem = f"rounds is {self.rounds}, learning_rate {self.learning_rate}"
            raise ConfigError(problem, "rounds from 1, learning_rate above 0 and below 1")

    @classmethod
    def of(cls, recipe: FederateRecipe) -> RoundSettings:
        """Return the settings that a coordinator sends for this recipe."""
        return cls(recipe.mode, recipe.rounds, recipe.optimizer.learning_rate, recipe.local)
