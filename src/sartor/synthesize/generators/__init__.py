"""Unions of all generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

from sartor.core.records import Drop, Example
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.synthesize.generator import GeneratedRow, PromptedGenerator, Skipped
from sartor.synthesize.generators.local_generators import (
    Counterfactual,
    SlotSubstitution,
    SpokenQuestions,
    Templates,
    copied,
)
from sartor.synthesize.generators.prompted_generators import Questions, Scenarios, Structured
from sartor.synthesize.generators.rewrite_generators import Extend, Harder, Persona, Preference, Vary

AnyAskingWay = Vary | Extend | Harder | Persona | Questions | Scenarios | Preference | Structured
AnyMakingWay = Counterfactual | SlotSubstitution | Templates | SpokenQuestions
AnyCopyingWay = AugmentImages | AugmentAudio
Way = AnyAskingWay | AnyMakingWay | AnyCopyingWay
# generators that need no sources
FROM_NOTHING = (Scenarios, Structured, Templates)


def asks_teacher(generator: Any) -> TypeGuard[PromptedGenerator]:
    """Return True for a PromptedGenerator."""
    return isinstance(generator, get_args(AnyAskingWay))


def make(generator: Any, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
    """Yield the rows of a generator without a teacher."""
    if isinstance(generator, get_args(AnyCopyingWay)):
        return copied(generator, seeds, folder)
    result: Iterator[GeneratedRow | Drop | Skipped] = generator.make(seeds, seed, folder)
    return result
