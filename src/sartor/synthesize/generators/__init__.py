"""Every way that a recipe may name. A new one is a file here and its class in one of these unions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

from sartor.core.records import Drop, Example
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.curate.synthesize.contract import AskingWay, Made, Skipped
from sartor.curate.synthesize.ways.counterfactual import Counterfactual
from sartor.curate.synthesize.ways.media import Speech, copied
from sartor.curate.synthesize.ways.preference import Preference
from sartor.curate.synthesize.ways.questions import Questions
from sartor.curate.synthesize.ways.rewrites import Extend, Harder, Persona, Vary
from sartor.curate.synthesize.ways.scenarios import Scenarios
from sartor.curate.synthesize.ways.slot_substitution import SlotSubstitution
from sartor.curate.synthesize.ways.structured import Structured
from sartor.curate.synthesize.ways.templates import Templates

AnyAskingWay = Vary | Extend | Harder | Persona | Questions | Scenarios | Preference | Structured
AnyMakingWay = Counterfactual | SlotSubstitution | Templates | Speech
AnyCopyingWay = AugmentImages | AugmentAudio
Way = AnyAskingWay | AnyMakingWay | AnyCopyingWay
# what makes rows of nothing: the others need sources
FROM_NOTHING = (Scenarios, Structured, Templates)


def asks_teacher(way: Any) -> TypeGuard[AskingWay]:
    """Whether a way is an AskingWay."""
    return isinstance(way, get_args(AnyAskingWay))


def make(way: Any, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[Made | Drop | Skipped]:
    """What a way without a teacher makes."""
    if isinstance(way, get_args(AnyCopyingWay)):
        return copied(way, seeds, folder)
    made: Iterator[Made | Drop | Skipped] = way.make(seeds, seed, folder)
    return made
