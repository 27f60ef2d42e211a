"""The curation recipe: sources, steps, split, seed. One declaration per option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.curate.sources.types import SourceOptions
from sartor.curate.steps import Step, makes_copies
from sartor.curate.steps.text_duplicates import ExactDuplicates


@dataclass(frozen=True)
class Split:
    """Options for the held-out rows. All rows of a group get the same split."""

    eval_fraction: float = option(0.1, "fraction of the rows held out, 0..1")
    test_fraction: float = option(
        0.0, "fraction held out for release alone (split test): tuning never reads it; 0 for none"
    )
    by: Literal["group", "prompt"] = option(
        "group", "the row's `group` field (its prompt where it has none), or the prompt"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1", "eval_fraction: 0.1"
            )
        if not 0 <= self.test_fraction < 1 - self.eval_fraction:
            problem = (
                f"test_fraction is {self.test_fraction} beside eval_fraction {self.eval_fraction}; no row is left to "
                "train on"
            )
            raise ConfigError(problem, "test_fraction: 0.1, at least 0, and below 1 together with eval_fraction")


@dataclass(frozen=True)
class CurateRecipe:
    """Recipe of a curation: sources, steps and split of one Dataset."""

    sources: tuple[SourceOptions, ...] = option(REQUIRED, "where rows come from")
    steps: tuple[Step, ...] = option((ExactDuplicates(),), "what is done to each row, in order")
    split: Split = option(Split(), "how rows are held out")
    seed: int = option(0, "seed of the split")
    max_row_bytes: int = option(4 << 20, "a longer row is dropped, not read")
    workers: int = option(0, "processes at once; 0 takes one a core. Changes nothing in the Dataset")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; it must be 0 or more", "workers: 2")
        if not self.sources:
            raise ConfigError("the recipe names no source", "sources: [{path: rows.jsonl, licence: CC-BY-4.0}]")
        self._check_copies_are_last()

    def _check_copies_are_last(self) -> None:
        """Raise ConfigError unless the copying steps come last and each occurs once.

        Copies are made once the held-out rows are known, so no other step could see them. Many of those steps would
        take the copies for duplicates.
        """
        kinds: list[str] = [step.kind for step in self.steps]
        copying: list[str] = [step.kind for step in self.steps if makes_copies(step)]
        others: list[str] = [step.kind for step in self.steps if not makes_copies(step)]
        if kinds != others + copying:
            later_step = next(kind for kind in kinds[kinds.index(copying[0]) :] if kind not in copying)
            problem = f"steps: {later_step} stands behind {copying[0]}, whose copies are made after every other step"
            raise ConfigError(problem, f"put {' and '.join(dict.fromkeys(copying))} last")
        if repeated := next((kind for kind in copying if copying.count(kind) > 1), ""):
            raise ConfigError(
                f"steps: {repeated} stands twice; its copies are made of the rows, not of copies",
                f"one {repeated} with more copies, as {{kind: {repeated}, copies: 4}}",
            )
