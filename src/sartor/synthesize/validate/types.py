"""Options and limits of a validation."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.core.config import option
from sartor.core.errors import ConfigError


@dataclass(frozen=True)
class ValidationLimits:
    """Largest effects at which synthetic rows are still accepted.

    A test fails if its effect is significant and exceeds the limit. The effect is the observed value minus what chance
    alone gives.
    """

    distinguishable: float = option(0.3, "a classifier's AUC above 0.5")
    mmd: float = option(0.15, "squared MMD as a part of reality's own spread")
    coverage: float = option(0.05, "fraction of real rows without a synthetic neighbour")
    novelty: float = option(0.2, "fraction of synthetic rows without a real neighbour")
    length: float = option(0.2, "Kolmogorov-Smirnov distance of words in prompts or replies")
    label: float = option(0.15, "total variation distance of labels")
    topic: float = option(0.15, "total variation distance of topics")
    copies: float = option(0.05, "fraction of rows that are near-copies: of seeds, of held-out rows, of one another")
    diversity: float = option(0.2, "loss of distinct pairs of words, or of the Vendi score, as a fraction")
    span: float = option(0.05, "fraction of cited spans that do not hold")
    group_outcome: float = option(0.1, "change of the gap between a group's outcome rate and the others'")
    outside: float = option(
        0.01, "fraction of real rows that are as far from the others as a row that is named as outside"
    )

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if not limit >= 0:
                default = getattr(ValidationLimits, name)
                raise ConfigError(f"{name} is {limit}; it must be at least 0", f"limits.{name}: {default}")


@dataclass(frozen=True)
class ValidateOptions:
    """Options of a validation."""

    alpha: float = option(0.05, "the false alarm of all tests together, where synthetic rows are like reality")
    limits: ValidationLimits = option(ValidationLimits(), "effects that are let pass")
    permutations: int = option(1999, "of which rows are the synthetic ones")
    encoder: str = option(
        "auto", "auto (minilm where it can be opened, else tfidf), a name, or the directory of a model"
    )
    label: str = option("auto", "what a reply's label is: auto, reply, text, json:KEY or regex:PATTERN")
    group: tuple[str, ...] = option((), "fields that name groups of people; empty takes the lexicon")
    most_rows: int = option(1000, "of each side, drawn by unit, in what is compared pair by pair")
    seed: int = option(0, "of the permutations and the draw")

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha is {self.alpha}; it must be between 0 and 1", "alpha: 0.05")
        if self.permutations < 199:
            raise ConfigError(
                f"permutations is {self.permutations}; under 199 nothing could be found", "permutations: 1999"
            )
        if self.most_rows < 50:
            raise ConfigError(f"most_rows is {self.most_rows}; it must be 50 or more", "most_rows: 1000")
