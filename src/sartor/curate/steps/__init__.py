"""Every step that a recipe may name. A new one is a file here and its class in one of these three unions."""

from __future__ import annotations

from typing import Any, TypeGuard, get_args

from sartor.curate.steps.audio import Audio
from sartor.curate.steps.augment_audio import AugmentAudio
from sartor.curate.steps.augment_images import AugmentImages
from sartor.curate.steps.bias import Bias
from sartor.curate.steps.boilerplate import Boilerplate
from sartor.curate.steps.chat_quality import ChatQuality
from sartor.curate.steps.contamination import Contamination
from sartor.curate.steps.contract import CopyStep, SetStep
from sartor.curate.steps.counterfactuals import Counterfactuals
from sartor.curate.steps.domain import Domain
from sartor.curate.steps.exact import ExactDuplicates
from sartor.curate.steps.image_duplicates import ImageDuplicates
from sartor.curate.steps.images import Images
from sartor.curate.steps.labels import SuspiciousLabels
from sartor.curate.steps.language import Language
from sartor.curate.steps.length import Length
from sartor.curate.steps.markup import Markup
from sartor.curate.steps.near import NearDuplicates
from sartor.curate.steps.personal_data import PersonalData
from sartor.curate.steps.repair import RepairText
from sartor.curate.steps.repetition import Repetition
from sartor.curate.steps.rules import Rules
from sartor.curate.steps.semantic import SemanticDuplicates

AnyRowStep = RepairText | Markup | Rules | Length | Repetition | ChatQuality | PersonalData | Images | Audio
AnySetStep = (
    Language
    | Boilerplate
    | Domain
    | Contamination
    | ExactDuplicates
    | NearDuplicates
    | SemanticDuplicates
    | ImageDuplicates
    | SuspiciousLabels
    | Bias
)
AnyCopyStep = AugmentImages | AugmentAudio | Counterfactuals
Step = AnyRowStep | AnySetStep | AnyCopyStep


def needs_all_rows(step: Any) -> TypeGuard[SetStep]:
    """Whether a step is a SetStep."""
    return isinstance(step, get_args(AnySetStep))


def makes_copies(step: Any) -> TypeGuard[CopyStep]:
    """Whether a step is a CopyStep."""
    return isinstance(step, get_args(AnyCopyStep))
